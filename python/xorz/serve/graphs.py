"""Rows of a batch whose tenants change between two replays of a captured CUDA graph.

A graph reads the same addresses at each replay, so that who has which row lies in buffers that stay, beside the tables of
`fixed`. What a forward is given under such rows is computed on what these say when the device runs it: whatever would have to
know that earlier, on the host, is refused (`rows.Unknown`).
"""

import threading
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from .rows import BASE, Layout, RowMap, Unknown, copy_to, lasting, refuse_in_capture


class _Slots(Sequence):
    """As many slots as there are rows; which ones nobody on the host may ask."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> NoReturn:
        raise Unknown

    def __iter__(self) -> NoReturn:
        raise Unknown


class GraphRows:
    """Made by `Tenants.graph_rows`, and given to `Tenants.use`. Methods may be called from any thread; `set` and replays
    belong on one stream, where each replay has the rows that were set before it.

    Attributes:
        batch: how many rows there are.
        names: whose they are, None for the base's.
        tensor: int32 [batch] on the device, each row's slot; for graphs to read, not to be written to.
    """

    def __init__(self, owner: Any, batch: int) -> None:
        """Rows of the base; `Tenants.graph_rows` is the door."""
        self.batch, self.names = batch, (None,) * batch
        with lasting():
            self.tensor = torch.full((batch,), BASE, dtype=torch.int32, device=owner.devices[0])
        self._owner: Any = owner
        self._lock = threading.RLock()
        # Shapes that layers are given -> the number of the row at each position, and that row's slot.
        self._spread: dict[Any, tuple[Tensor, Tensor]] = {}
        self._give_back: Any = None
        # One entry for each open `use`: taking one out is one step for all threads.
        self._uses: list[None] = []

    def set(self, names: str | Sequence[str | None] | None) -> None:
        """From the next replay on the rows are these tenants'. Nothing is waited for and nothing read back, but that a tenant
        which was evicted is loaded first. Tenants that rows name stay in memory, unloaded ones too, until others are set:
        those of before and those to come have room together.

        Args:
            names: one name for all rows, or one for each; None is the base.

        Raises:
            KeyError: no tenant of that name; ValueError: as many names as there are not rows, or a tenant with tokens of its
                own; MemoryError: an evicted one finds no room. The rows are then as they were. RuntimeError: these rows are
                closed, or a graph is being captured.
        """
        refuse_in_capture(self.tensor.device, "rows of a graph would be set")
        self._check()
        names, slots, give_back = self._owner.hold(names)
        try:
            if len(names) == 1:
                names, slots = names * self.batch, slots * self.batch
            if len(names) != self.batch:
                raise ValueError(f"{len(names)} names were given for {self.batch} rows of a graph")
            with self._lock:
                self._check()
                self._write(slots)
                give_back, self._give_back, self.names = self._give_back, give_back, names
        finally:
            # Those who were named before, or, where this has failed, those who were to be.
            if give_back is not None:
                give_back()

    def warm_up(self, *inputs: Any, **named: Any) -> None:
        """Run the model on these inputs under these rows, twice, as a graph is to be captured: where its rows are is found out,
        and whatever is made once is made. What is not served with such rows is refused here, by name.

        Raises:
            RuntimeError: see `rows.Unknown` and `Tenants.use`.
        """
        for _ in range(2):
            with torch.no_grad(), self._owner.use(self):
                self._owner.model(*inputs, **named)

    def close(self) -> None:
        """The tenants are nobody's rows any more. Graphs that were captured with these rows must not be replayed after it.

        Raises:
            RuntimeError: a `use` of these rows is open.
        """
        refuse_in_capture(self.tensor.device, "rows of a graph would be closed")
        with self._lock:
            if self._uses:
                raise RuntimeError(
                    "xorz: rows of a graph are in use; leave their `with tenants.use(...)` first"
                )
            before, self._give_back = self._give_back, None
            with self._owner.lock:
                if self not in self._owner.graphs:
                    return
                self._owner.graphs.remove(self)
            self._write([BASE] * self.batch)
            self.names = (None,) * self.batch
        if before is not None:
            before()

    def map(self, owner: Any) -> RowMap:
        """The map of one `use` of them."""
        with self._lock:
            if owner is not self._owner:
                raise ValueError("rows of a graph belong to the tenants of another model")
            self._check()
            self._uses.append(None)
        out = _GraphMap(self, None, self._uses.pop)
        out.together = owner.proofs.together
        return out

    def spread(self, layout: Layout, lead: tuple[int, ...], rows: RowMap) -> Tensor:
        """The slot of each position of a shape, in a buffer of its own, which `set` fills anew."""
        kind, dim = layout
        at = lead[dim if kind == "dim" else 0] if lead else 1
        count = 1
        for size in lead:
            count *= size
        if at == count == self.batch:
            return self.tensor
        with self._lock:
            found = self._spread.get((layout, lead))
            if found is None:
                refuse_in_capture(
                    self.tensor.device, f"rows of shape {list(lead)} are met for the first time"
                )
                with lasting():
                    numbers = rows.index(layout, lead).reshape(-1).contiguous()
                    found = self._spread[layout, lead] = (numbers, self.tensor.index_select(0, numbers))
        return found[1]

    def _check(self) -> None:
        if self not in self._owner.graphs:
            raise RuntimeError("xorz: these rows of a graph are closed; make others by tenants.graph_rows")

    def _write(self, slots: Sequence[int]) -> None:
        with torch.no_grad():
            copy_to(self.tensor, torch.tensor(slots, dtype=torch.int32))
            for numbers, slots_there in self._spread.values():
                torch.index_select(self.tensor, 0, numbers, out=slots_there)

    def __repr__(self) -> str:
        """Whose rows they are."""
        return f"GraphRows({self.batch} rows: {', '.join('the base' if n is None else repr(n) for n in self.names)})"


class _GraphMap(RowMap):
    """The map of one `use` of such rows, or the same one inside of a model of which more is known."""

    advice = "leave it out of the graph, or use one tenant at a time by its name"

    def __init__(self, fixed: GraphRows, parent: RowMap | None, release: Any = None) -> None:
        slots = (BASE,) * fixed.batch
        super().__init__(slots, fixed.names, release=release, parent=parent, device=fixed.tensor.device)
        self.slots, self.only, self.fixed = _Slots(fixed.batch), None, fixed
        self._tensor = fixed.tensor
        # Whoever asks for it meets `__getattr__`.
        del self.used

    def __getattr__(self, name: str) -> Any:
        if name == "used":
            raise Unknown
        raise AttributeError(f"'{type(self).__name__}' object has no attribute {name!r}")

    def describe(self) -> str:
        return f"{self.fixed.batch} rows of a graph"

    def groups(self, one_by_one: bool) -> NoReturn:
        raise Unknown

    def known(self, proof: Any) -> RowMap:
        known = self._known
        if known is None or known[0] is not proof:
            found = _GraphMap(self.fixed, self)
            found.proof = proof
            known = self._known = (proof, found)
        return known[1]

    def along(self, dim: int) -> RowMap:
        if dim != self.dim:
            raise Unknown
        return self

    def regroup(self, slots: Sequence[int]) -> NoReturn:
        raise Unknown

    def expanded(self, each: int) -> NoReturn:
        raise Unknown

    def _spread(self, layout: Layout, lead: tuple[int, ...]) -> Tensor:
        return self.fixed.spread(layout, lead, self)

    def _layout_of(self, lead: tuple[int, ...], flattens: bool, who: str, place: Any) -> Layout:
        # Of a batch of one row everything is that row's.
        return ("flat", 0) if len(self.slots) == 1 else super()._layout_of(lead, flattens, who, place)
