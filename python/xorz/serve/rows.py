"""Which tenant each row of a batch belongs to: carried from `Tenants.use` to every attached module, never guessed.

The map lives in a context variable, so that each thread and each asyncio task has its own. It says one slot per batch row;
a module asks for the slots of the rows that it was given, by their leading shape. Shapes that the map cannot explain raise.
"""

import contextvars
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .runs import note

BASE = -1
"""The slot of the base."""

HOST = torch.device("cpu")

Layout = tuple[str, int]
"""Where the batch's rows are in a tensor: ("dim", d), a dimension; ("flat", 0), dimension 0, so many positions for each row;
("inner", 0), dimension 0, all rows so many times over; or `TABLE`.
"""

MOST_EXPANDED = 2048
"""Shapes of which a map remembers the rows."""

TABLE: Layout = ("table", 0)
"""It belongs to no row: what is made of it is as each tenant has it, whole."""


class Table(Exception):
    """What a layer was given belongs to no row."""


class Unknown(RuntimeError):
    """Who has which row would have to be known, and rows of a graph do not tell: that changes with each replay."""

    def __init__(self, who: str | None = None) -> None:
        """`who`: the module or tensor, if it is known here; else whoever knows it says it by `of`."""
        super().__init__(who)
        self.who = who

    def of(self, who: str) -> "Unknown":
        """The same error, which names `who` if it names nobody yet."""
        self.who = self.who or who
        return self

    def __str__(self) -> str:
        """The sentence that users read."""
        return (
            f"xorz: {self.who or 'a module'} is not served with rows of a graph: it would be computed tenant by tenant, and "
            "who has which row is not known before each replay; leave it out of the graph, or use tenants by their names"
        )


def capturing(device: torch.device) -> bool:
    """Whether what this thread asks of the device goes into a CUDA graph, where nothing may wait."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def sent(numbers: Tensor, device: torch.device) -> Tensor:
    """Numbers of the host where a device reads them. To a GPU they go by pinned memory, which torch lends again when the device
    has read it: nobody waits, and they are there for whatever follows on this stream.
    """
    if device.type != "cuda":
        return numbers.to(device)
    refuse_in_capture(device, "who has which row would be copied")
    return staged(numbers, device).to(device, non_blocking=True)


def refuse_in_capture(device: torch.device, what: str) -> None:
    """RuntimeError where a graph is being captured; `what` must be done before."""
    if capturing(device):
        raise RuntimeError(
            f"xorz: {what} inside of the capture of a CUDA graph; run a batch of that shape under the same rows before it "
            "(graph_rows(...).warm_up)"
        )


def staged(words: Tensor, device: torch.device) -> Tensor:
    """Words of the host as a copy to the device wants them: for a GPU in pinned memory, which no copy waits for.

    torch lends that memory to nobody else before the device has read it.
    """
    return words if device.type == "cpu" or words.is_pinned() else words.pin_memory()


def copy_to(target: Tensor, words: Tensor) -> None:
    """Copy words of the host to where a device's forwards read them, after what this stream was asked before; no wait."""
    target.copy_(staged(words, target.device), non_blocking=True)


def pattern(shape: Sequence[int], batch: int) -> tuple[int, ...]:
    """Which sizes are 1 (0), the batch's (2), and others (1)."""
    return tuple(0 if n == 1 else 2 if n == batch else 1 for n in shape)


def lead_of(x: Tensor) -> Sequence[int]:
    """The dimensions in which a tensor's rows are looked for: all but the last of what is computed with, all of numbers."""
    return x.shape[:-1] if x.dim() > 1 and x.is_floating_point() else x.shape


def lasting() -> AbstractContextManager[Any]:
    """For tensors that outlive a forward: made in inference mode, they would be of no use to a later one that trains."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


class RowMap:
    """One slot per batch row, alive while its `use` is open, or while a forward that began in it still runs.

    Attributes:
        slots: slot of each batch row; one entry alone stands for any number of rows.
        names: tenants' names, for messages.
        dim: dimension of the batch in what modules are given (0, or 1 for sequence-first models).
        used: the distinct slots.
        only: the slot, where all rows have the same one.
        touching: module -> whether a row's tenant changes anything there.
        closed: whether the `use` has ended; running: as many entries as there are calls of modules that run.
        frame: of the generator that opened the `use`, if one did.
        proof: where the rows are in what each layer is given, inside of the model; None where a module is called on its own,
            whose inputs have the batch in `dim`, as `use` says. together: what is known of the model by now, for those and for
            compiled code. probe: what notes that, in a run that finds it out.
        fixed: the rows of a graph, whose slots nobody knows; see `graphs`. advice: what to do where rows are not known.
    """

    fixed: Any = None
    advice = "use one tenant at a time"

    def __init__(
        self,
        slots: Sequence[int],
        names: Sequence[str | None],
        *,
        dim: int = 0,
        tokens: bool = False,
        release: Callable[[], None] | None = None,
        parent: "RowMap | None" = None,
        device: torch.device | None = None,
    ) -> None:
        """`tokens`: the rows are single tokens in an order of the module's own; shapes must then match exactly. `device`: where
        what is computed with it lies; of a map made from another one, None is where that is, else the host.
        """
        self.slots = tuple(slots)
        self.names = tuple(names)
        self.dim = dim
        self.tokens = tokens
        self.used = tuple(dict.fromkeys(self.slots))
        self.only = self.used[0] if len(self.used) == 1 else None
        # A map made from another one lives and ends with it.
        self.root: RowMap = self if parent is None else parent.root
        self.carried = parent.carried if parent is not None else False
        # Taken out by whoever gives the tenants back: taking is one step for all threads, and for a collector in this one.
        self._releases = [] if release is None else [release]
        self.device = device or (HOST if parent is None else parent.device)
        # A map of the same rows has the same tensors: to each GPU they are copied once, when the `use` begins.
        same = parent is not None and parent.slots == self.slots
        self._tensors: dict[torch.device, Tensor] = parent._tensors if same else {}
        self._tensor: Tensor | None = self._tensors.get(self.device)
        self._groups: dict[Any, list[tuple[int, Tensor]]] = parent._groups if same else {}
        self._expanded: dict[Any, Tensor] = {}
        # What modules have found out about these slots; it cannot change while their tenants are held in memory.
        self.touching: dict[Any, bool] = {}
        # What linear layers compute with for these slots, of a mixed batch for each shape.
        self.plans: dict[Any, tuple[Any, ...]] = {}
        self._elsewhere: dict[torch.device, RowMap] = {}
        self._arrivals: list[tuple[torch.device, Any]] = []
        self.proof: Any = None if parent is None or tokens else parent.proof
        self.together: Any = None if parent is None or tokens else parent.together
        self.probe: Any = None
        self._known: tuple[Any, RowMap] | None = None
        self._uniform: dict[int, RowMap] = {}
        self.closed = False
        # One entry for each call of a module that runs: appending is one step for all threads.
        self.running: list[None] = []
        self.frame: Any = None
        self.outer: RowMap | None = None

    @property
    def tensor(self) -> Tensor:
        """`slots` as int32, on the map's device."""
        if self._tensor is None:
            found = self._tensors.get(self.device)
            if found is None:
                with lasting():
                    found = sent(torch.tensor(self.slots, dtype=torch.int32), self.device)
                self._tensors[self.device] = found
            self._tensor = found
        return self._tensor

    def groups(self, one_by_one: bool) -> list[tuple[int, Tensor]]:
        """(slot, the numbers of its batch rows, int64 on the map's device) of each tenant, or of each row."""
        key = (self.device, one_by_one)
        if key not in self._groups:
            if one_by_one:
                found = [(slot, [row]) for row, slot in enumerate(self.slots)]
            else:
                found = [(slot, [r for r, s in enumerate(self.slots) if s == slot]) for slot in self.used]
            # One copy for all of them.
            with lasting():
                numbers = sent(torch.tensor([row for _, mine in found for row in mine]), self.device)
                parts = numbers.split([len(mine) for _, mine in found])
            self._groups[key] = [(slot, part) for (slot, _), part in zip(found, parts, strict=True)]
        return self._groups[key]

    def ready(self, devices: Sequence[torch.device]) -> None:
        """Copy to each of the model's devices what forwards read, so that none of them does: a graph may be capturing it."""
        for device in devices:
            if self.only is None and device.type == "cuda":
                here = self.on(device)
                here.groups(False)
                _ = here.tensor
                self._arrivals.append((device, torch.cuda.current_stream(device).record_event()))

    def arrived(self) -> None:
        """Let the current streams wait for what `ready` has copied, which may be on its way on others. The host waits for
        nothing.
        """
        for device, event in self.root._arrivals:
            # A capture begins when the device has done all.
            if not capturing(device):
                torch.cuda.current_stream(device).wait_event(event)

    def on(self, device: torch.device) -> "RowMap":
        """The same rows, for what lies on this device."""
        if device == self.device:
            return self
        found = self._elsewhere.get(device)
        if found is None:
            found = RowMap(
                self.slots, self.names, dim=self.dim, tokens=self.tokens, parent=self, device=device
            )
            found.proof, found.together, found.probe = self.proof, self.together, self.probe
            found.touching, found.plans = self.touching, self.plans
            found._elsewhere[self.device] = self
            self._elsewhere[device] = found
        return found

    def begin(self) -> None:
        """A call of a module starts; RuntimeError if the `use` has ended."""
        root = self.root
        root.running.append(None)
        if root.closed:
            self.end()
            raise root.ended()

    def end(self) -> None:
        """The call of a module has ended; the last one gives the tenants back if the `use` is closed."""
        root = self.root
        root.running.pop()
        if root.closed:
            root.give_back()

    def ended(self) -> RuntimeError:
        """The error of whoever still computes with it."""
        return RuntimeError(
            f"xorz: the use of {_list(self.names)} has ended; a task or thread that outlives its `with tenants.use(...)` "
            "must open its own"
        )

    def describe(self) -> str:
        """The tenants' names, for messages."""
        return _list(self.names)

    def close(self) -> None:
        """The `use` ends; the tenants are given back when the last running forward has."""
        self.closed = True
        self.give_back()

    def give_back(self) -> None:
        """The tenants are nobody's any more, if the `use` has ended and no forward runs."""
        if not self.closed or self.running:
            return
        try:
            release = self._releases.pop()
        except IndexError:
            return
        release()

    def rows(self, lead: Sequence[int], flattens: bool, who: str, place: Any = None) -> Tensor:
        """Slot of each row of an input whose shape but for its last dimension is `lead`, int32, flattened.

        `flattens`: whether two-dimensional inputs of this module are the batch's tokens, flattened batch first. `place`: of
        whose input that is proven (`Proof`); None where an op says itself where its batch is.

        Raises:
            Table: it belongs to no row; RuntimeError: where the rows are is not known.
        """
        key = (place, flattens, *lead)
        found = self._expanded.get(key)
        if found is None:
            with lasting():
                found = self._expand(tuple(lead), flattens, who, place)
            if len(self._expanded) > MOST_EXPANDED:
                self._expanded.clear()
            self._expanded[key] = found
        return found

    def _expand(self, lead: tuple[int, ...], flattens: bool, who: str, place: Any) -> Tensor:
        count = 1
        for size in lead:
            count *= size
        if self.only is not None:
            return torch.full((count,), self.only, dtype=torch.int32, device=self.device)
        layout = self._layout_of(lead, flattens, who, place)
        if layout == ("dim", 0) and lead == (len(self.slots),):
            self._note(self.tensor)
            return self.tensor
        # Layers that are given the same share one tensor.
        key = (layout, *lead)
        # Another thread may begin anew with what is remembered between two looks at it.
        found = self._expanded.get(key)
        if found is None:
            found = self._expanded[key] = self._spread(layout, lead)
        return found

    def _spread(self, layout: Layout, lead: tuple[int, ...]) -> Tensor:
        found = self.tensor[self.index(layout, lead).reshape(-1)]
        if layout in (("dim", 0), ("flat", 0)):
            self._note(found)
        return found

    def _note(self, spread: Tensor) -> None:
        """Say whose these rows are, each of the batch's so many times one after another; of rows of a graph nobody knows."""
        if self.fixed is None and self.slots:
            note(spread, self.slots, spread.numel() // len(self.slots))

    def _layout_of(self, lead: tuple[int, ...], flattens: bool, who: str, place: Any) -> Layout:
        """Where the rows are in a shape; errors as `rows`."""
        batch = len(self.slots)
        known = self._layouts()
        at = (place, pattern(lead, batch))
        if place is not None and known is not None and (self.proof is not None or at in known):
            layout = known.get(at)
            if layout == TABLE:
                raise Table
            if layout is not None and (layout[0] == "dim" or lead[0] % batch == 0):
                return layout
            raise self.unproven(lead, who)
        if self.tokens:
            if lead == (batch,):
                return "dim", 0
        elif len(lead) > self.dim and lead[self.dim] == batch and not (len(lead) == 1 and self.dim):
            return "dim", self.dim
        elif len(lead) == 1 and flattens and lead[0] % batch == 0 and self.dim == 0:
            return "flat", 0
        raise self.unproven(lead, who)

    def unproven(self, lead: Sequence[int], who: str) -> RuntimeError:
        """The error of whoever cannot know whose the rows of this shape are."""
        batch = len(self.slots)
        if self.proof is not None and not self.tokens and len(lead) > self.dim and lead[self.dim] == batch:
            if self.proof.why:
                # Nothing is known of any layer, of which this one is only the first that asks.
                return RuntimeError(
                    "xorz: the model could not be tried on the base, which tells where the rows of the batch are in what its "
                    f"layers are given ({self.proof.why}), so that {who} and what follows are not served; {self.advice}"
                )
            return RuntimeError(
                f"xorz: {who} was given rows of shape {list(lead)}, and it could not be proven that those are the rows of the "
                f"batch; {self.advice}"
            )
        what = "tokens" if self.tokens else "batch rows"
        return RuntimeError(
            f"xorz: {who} was given rows of shape {list(lead)}, but the active tenants map {batch} {what} "
            f"(dimension {self.dim}); give one name for each row of the batch, or regroup the map with them (tenants.regroup)"
        )

    def index(self, layout: Layout, lead: Sequence[int]) -> Tensor:
        """The number of the batch row at each position of this shape, int64."""
        (kind, dim), batch = layout, len(self.slots)
        numbers, shape = torch.arange(batch, device=self.device), [1] * len(lead)
        shape[dim] = lead[dim]
        if kind == "flat":
            numbers = numbers.repeat_interleave(lead[0] // batch)
        elif kind == "inner":
            numbers = numbers.repeat(lead[0] // batch)
        return numbers.reshape(shape).expand(tuple(lead))

    def picked(self, layout: Layout, lead: Sequence[int], values: Sequence[Tensor]) -> Tensor:
        """Each row of its own tenant's value: there is one for each of `used`, all of one shape that begins with `lead`."""
        out = values[0]
        here = self.on(out.device)
        whose = here.tensor[here.index(layout, lead)]
        whose = whose.reshape(*whose.shape, *[1] * (out.dim() - whose.dim()))
        for slot, mine in zip(self.used, values, strict=True):
            out = torch.where(whose == slot, mine, out)
        return out

    def _layouts(self) -> Any:
        """What is known of the model."""
        known = self.together if self.proof is None else self.proof
        return None if known is None or self.tokens else known.layouts

    def where(self, place: Any, x: Tensor) -> Layout | None:
        """Where the rows of a tensor are; None if that is not known."""
        known, at = self._layouts(), (place, pattern(lead_of(x), len(self.slots)))
        if known is None or (self.proof is None and at not in known):
            return ("dim", self.dim) if x.dim() > self.dim and x.size(self.dim) == len(self.slots) else None
        return known.get(at)

    def aligned(self, given: Sequence[tuple[Any, Tensor, int]], who: str) -> None:
        """Of tensors that an op takes for the batch's in these dimensions, (place, tensor, dimension): one must be proven to be
        it, the others at least not to be anything else. Raises `Table` if none belongs to any row.
        """
        known, batch = self._layouts(), len(self.slots)
        places = [(place, pattern(lead_of(x), batch)) for place, x, _ in given]
        if known is None or (self.proof is None and not any(place in known for place in places)):
            return
        found = [(self.where(place, x), dim, x) for place, x, dim in given]
        if all(layout == TABLE for layout, _, _ in found):
            raise Table
        for layout, dim, x in found:
            if layout != TABLE and layout != ("dim", dim):
                raise self.unproven(lead_of(x), who)

    def known(self, proof: Any) -> "RowMap":
        """The same rows, inside of a model of which this is proven."""
        # Threads that share a `use` may each be in a model of another kind of batch: one look, and what is made is given.
        known = self._known
        if known is None or known[0] is not proof:
            found = RowMap(self.slots, self.names, dim=self.dim, tokens=self.tokens, parent=self)
            found.proof = proof
            known = self._known = (proof, found)
        return known[1]

    def trial(self, probe: Any) -> "RowMap":
        """The base alone, where `probe` notes what layers are given."""
        out = RowMap((BASE,), self.names, dim=self.dim, parent=self)
        out.probe = probe
        return out

    def along(self, dim: int) -> "RowMap":
        """The same rows where the batch is dimension `dim`."""
        return (
            self
            if dim == self.dim or self.only is not None
            else RowMap(self.slots, self.names, dim=dim, parent=self)
        )

    def regroup(self, slots: Sequence[int]) -> "RowMap":
        """A map of single tokens, of these slots."""
        return RowMap(slots, self.names, tokens=True, parent=self)

    def expanded(self, each: int) -> "RowMap":
        """A map with so many rows in place of every one."""
        slots = [slot for slot in self.slots for _ in range(each)]
        return RowMap(slots, [n for n in self.names for _ in range(each)], dim=self.dim, parent=self)

    def uniform(self, slot: int) -> "RowMap":
        """A map whose rows are all of one slot; the same one each time, which keeps what modules found out about it."""
        found = self._uniform.get(slot)
        if found is None or found.proof is not self.proof:
            found = self._uniform[slot] = RowMap((slot,), self.names, parent=self)
        return found


def _list(names: Sequence[str | None]) -> str:
    shown = ["the base" if n is None else repr(n) for n in dict.fromkeys(names)]
    return ", ".join(shown[:4]) + (", ..." if len(shown) > 4 else "")


class Active:
    """The map that is active in this thread or task, for one attached model."""

    def __init__(self) -> None:
        """Begin with no active map."""
        self._var: contextvars.ContextVar[RowMap | None] = contextvars.ContextVar("xorz_rows", default=None)
        self.get = self._var.get

    @contextmanager
    def set(self, rows: RowMap | None) -> Iterator[None]:
        """Make `rows` the active map inside the `with`, and the one before active again after it."""
        token = self._var.set(rows)
        try:
            yield
        finally:
            self._var.reset(token)

    def put(self, rows: RowMap) -> None:
        """`rows` is active from now on; whoever `set` another one before ends it."""
        self._var.set(rows)

    def enter(self, rows: RowMap) -> None:
        """`rows` is active from now on."""
        rows.outer = self._var.get()
        self._var.set(rows)

    def leave(self, rows: RowMap) -> None:
        """What was active before is so again, if it has not ended; nothing where another context is current by now."""
        if self._var.get() is rows:
            outer = rows.outer
            while outer is not None and outer.root.closed:
                outer = outer.outer
            self._var.set(outer)


class Use(AbstractContextManager[None]):
    """The context that `Tenants.use` gives: its tenants are active between entering and leaving it."""

    def __init__(self, owner: Any, names: tuple[str | None, ...], dim: int) -> None:
        """`owner` makes the map when it is entered."""
        self._owner, self._names, self._dim = owner, names, dim
        self._rows: RowMap | None = None

    def __enter__(self) -> None:
        """Hold the tenants in memory and make them the active ones."""
        if self._rows is not None:
            raise RuntimeError("xorz: this use is open already; call tenants.use(...) again for each `with`")
        rows = self._owner.map(self._names, self._dim)
        rows.frame = _generator(sys._getframe(1))
        if rows.frame is not None:
            self._owner.generators[id(rows)] = rows
        self._rows = rows
        self._owner.active.enter(rows)

    def __exit__(self, *error: Any) -> None:
        """The tenants are no longer active, and may be evicted once no module of theirs runs."""
        rows, self._rows = self._rows, None
        self._owner.active.leave(rows)
        self._owner.generators.pop(id(rows), None)
        rows.frame = None
        rows.close()


def _generator(frame: Any) -> Any:
    """The frame that a `with` stands in, if a generator's; of one that contextlib made a context of, who entered that."""
    while frame is not None:
        entered_by = frame.f_back
        if frame.f_code.co_flags & (inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR):
            if entered_by is None or not _enters(entered_by):
                return frame
        elif not _enters(frame):
            return None
        frame = entered_by
    return None


def _enters(frame: Any) -> bool:
    """Whether this is contextlib at work."""
    return frame.f_globals.get("__name__") == "contextlib"


def stepping(rows: RowMap | None, generators: dict[int, RowMap]) -> RuntimeError | None:
    """The error of a step in which a generator's `use` is not the active one, or is active where that generator is not."""
    frame, running = sys._getframe(1), set()
    while frame is not None:
        running.add(id(frame))
        frame = frame.f_back
    for other in list(generators.values()):
        here = id(other.frame) in running
        # A later `use` may be active for a while inside of this one.
        if (rows is not None and rows.root is other and not here) or (here and not _within(rows, other)):
            return RuntimeError(
                f"xorz: {other.describe()} was made active in a generator, and another step of it or of its caller would be "
                "computed with it; leave `with tenants.use(...)` before each yield, or step the generator by "
                "tenants.stream(name, iterator)"
            )
    return None


def _within(rows: RowMap | None, other: RowMap) -> bool:
    while rows is not None:
        if rows.root is other:
            return True
        rows = rows.root.outer
    return False
