"""Where the rows of a batch are in a tensor: found by trying, never by a size that fits.

Before the first batch of several tenants of a kind (the ranks of its inputs, and which of their sizes are the batch's), the
model is run some times on the base, on copies of what it is given. In each run the words of some batch rows are changed, so
that every row has its own pattern of runs in which it changes. What reaches a layer, or meets a weight, must then change by
the same pattern, which tells where its rows lie. What never changes belongs to no row (positions, learned queries, masks).
Anything else is not served row by row.
"""

import copy
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from . import enclosing
from .moves import Listing, Moves, verdicts
from .rows import TABLE, Layout, RowMap, lead_of, pattern, refuse_in_capture
from .split import opened
from .state import KeptState
from .weight import Weight, trials

_MOST_INPUTS = 6
_ROUNDS = 4


class Proof:
    """For one kind of batch: where the rows are in what each layer is given.

    Attributes:
        layouts: (place, pattern of sizes) -> where; None if that is not known, or not always the same.
        seen: all that was seen of each.
        why: what kept the model from being tried.
        whole: names of the modules that are run once per tenant; see `enclosing`.
    """

    def __init__(self) -> None:
        """Begin with no layout at all."""
        self.layouts: dict[Any, Layout | None] = {}
        self.seen: dict[Any, set[Layout | None]] = {}
        self.why: str | None = None
        self.whole: frozenset[str] = frozenset()

    def add(self, key: Any, layout: Layout | None) -> None:
        """Take one observation: where the rows were; two that differ leave `key` unknown."""
        self.seen.setdefault(key, set()).add(layout)
        self.layouts[key] = layout if self.layouts.get(key, layout) == layout else None


class Recorder:
    """What one run gave to each layer: a number for each position, in the order of the calls.

    Attributes:
        batch: rows of the batch; layouts: what is known of them by now.
        moves: follows this run, if that is asked for; moved: what was given that is not to be believed, see `moves`.
    """

    def __init__(self, batch: int, layouts: Mapping[Any, Layout | None]) -> None:
        """A recorder that has seen nothing yet, for a batch of `batch` rows."""
        self.batch, self.layouts = batch, layouts
        self.seen: dict[Any, Tensor] = {}
        self.moves: Moves | None = None
        self.moved: set[Any] = set()
        self._times: dict[Any, int] = {}

    def note(self, place: Any, x: Any) -> Layout | None:
        """`x` is given to a layer or meets a weight; gives what is known of it."""
        if not isinstance(x, Tensor) or x.is_nested or isinstance(x, Weight):
            return None
        key = (place, pattern(lead_of(x), self.batch))
        if self.moves is not None and self.moves.moved(x):
            self.moved.add(key)
        times = self._times[key] = self._times.get(key, 0) + 1
        # Compared on the host, wherever the model is.
        self.seen[key, times] = told = _told(x).cpu()
        if x.dim() == 1 and x.is_floating_point():
            # One row alone is given to layers like this, too.
            self.seen[(place, ()), times] = told.norm()
        return self.layouts.get(key)

    def table(self, place: Any, x: Tensor) -> None:
        """`x`, which is made of weights alone, is given to a layer."""
        key = (place, pattern(lead_of(x), self.batch))
        times = self._times[key] = self._times.get(key, 0) + 1
        self.seen[key, times] = torch.zeros(())


def _told(x: Tensor) -> Tensor:
    """A number for each position in `lead_of(x)`, which is another one where the words there are."""
    x = x.detach()
    if x.is_complex():
        return x.real.double() + 0.7 * x.imag.double()
    if x.dim() < 2 or not x.is_floating_point():
        return x.double()
    g = torch.Generator().manual_seed(x.size(-1))
    return x.double() @ torch.randn(x.size(-1), generator=g, dtype=torch.float64).to(x.device)


class Proofs:
    """What is known of an attached model, by the kind of batch."""

    def __init__(self) -> None:
        """Begin without a proof for any kind of batch."""
        self._found: dict[Any, Proof] = {}
        self._lock = threading.RLock()
        self.together = Proof()
        """Of all kinds, where they agree: for compiled code, which does not say what it was given."""

    def of(
        self,
        owner: Any,
        module: nn.Module,
        run: Callable[..., Any],
        rows: RowMap,
        args: Any,
        kwargs: Any,
        main: str,
    ) -> Proof:
        """Of batches like this one; `run` calls `module`, the model or its encoder, `main` is the name of its first input."""
        kind = (module, *_kind(rows, args, kwargs, owner.model.training))
        found = self._found.get(kind)
        if found is None:
            with self._lock:
                found = self._found.get(kind)
                if found is None:
                    refuse_in_capture(rows.device, "the first batch of a kind would be tried")
                    found = self._found[kind] = _Trial(owner, run, rows, args, kwargs, main).proof()
                    for key, layout in found.layouts.items():
                        self.together.add(key, layout)
        return found


def _kind(rows: RowMap, args: Any, kwargs: Any, training: bool) -> Any:
    batch = len(rows.slots)

    def of(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return (
                pattern(leaf.shape, batch),
                leaf.is_floating_point(),
                leaf.size(0) % batch == 0 if leaf.dim() else None,
            )
        if leaf is None or isinstance(leaf, (bool, int, str)):
            return leaf
        return type(leaf), _holds_something(leaf)

    kinds = tuple(type(value) for value in (*args, *kwargs.values()))
    leaves = tuple(of(leaf) for leaf in tree_leaves((args, kwargs)))
    is_autocast = torch.is_autocast_enabled(rows.device.type)
    return rows.dim, tuple(kwargs), kinds, leaves, is_autocast, training


def _holds_something(leaf: Any) -> bool:
    """Whether a cache of transformers has positions in it: what a model makes of the same inputs then has other sizes."""
    length = getattr(leaf, "get_seq_length", None)
    try:
        found = 0 if length is None else length()
        # On a device it is not to be read; such a cache has the same sizes whatever it holds.
        return bool(isinstance(found, Tensor) and found.device.type != "cpu") or bool(found > 0)
    except (AttributeError, IndexError, TypeError, ValueError):
        return False


class _Trial:
    """The runs of one kind of batch."""

    def __init__(
        self, owner: Any, run: Callable[..., Any], rows: RowMap, args: Any, kwargs: Any, main: str
    ) -> None:
        self._owner, self._run, self._rows, self._devices = owner, run, rows, owner.devices
        self._leaves, self._spec = tree_flatten((args, kwargs))
        self._batch = len(rows.slots)
        self._inputs = self._rows_of(args, kwargs, main)
        # Every row has a number other than 0, whose digits say in which runs its words are other ones.
        self._numbers = torch.arange(1, self._batch + 1)
        self._others: dict[tuple[int, int], Tensor] = {}
        self._where = 0
        self._watch: enclosing.Watch | None = None
        self._follows = False
        self._verdicts: dict[Any, bool] | None = None
        self._places: set[Any] = set()
        self._moved: set[Any] = set()

    def _rows_of(self, args: Any, kwargs: Any, main: str) -> list[int]:
        """The inputs that may have a row for each name and words that can be exchanged, the first one first."""
        named = [v for k, v in kwargs.items() if k == main]
        values = [*named, *args, *kwargs.values()]
        inner = [
            w
            for v in values
            for w in (v.values() if isinstance(v, Mapping) else v if type(v) in (list, tuple) else [v])
        ]
        places = {id(leaf): i for i, leaf in enumerate(self._leaves)}
        dim, out = self._rows.dim, []
        for value in inner:
            fits = isinstance(value, Tensor) and value.dim() > dim and value.size(dim) == self._batch
            if fits and id(value) in places and places[id(value)] not in out and _other(value) is not None:
                out.append(places[id(value)])
        return out[:_MOST_INPUTS]

    def proof(self) -> Proof:
        """Run the model on the base some times, and return where its rows were found."""
        out = Proof()
        if not self._inputs:
            out.why = "none of its inputs has a row for each name, and words to tell them by"
            return out
        # Not every model takes any words at any place (numbers that stand for pictures).
        for self._where in range(3):
            try:
                return self._try()
            except Exception as error:
                out.why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return out

    def _try(self) -> Proof:
        out, more = Proof(), list(self._inputs)
        while more and not any(layout not in (None, TABLE) for layout in out.layouts.values()):
            # The first input that does anything: what an encoder gave is nothing to a decoder that has it in its cache.
            main = more.pop(0)
            out = self._round({}, [main])
        beside = [i for i in more if self._acts_on_rows(out, i)]
        layouts: dict[Any, Layout | None] = {}
        for _ in range(_ROUNDS):
            # What is known of a layer now lets what it gives go on as each tenant's own.
            out.layouts = {**layouts, **self._round(layouts, [main, *beside]).layouts}
            if out.layouts == layouts:
                break
            layouts = out.layouts
        moving = self._moving(layouts, [main, *beside])
        self._forget_moved(out, moving)
        modules = enclosing.around(self._owner.model, out.layouts)
        if modules:
            self._watch = enclosing.Watch(modules)
            out.layouts = {**layouts, **self._round(layouts, [main, *beside]).layouts}
            self._forget_moved(out, moving)
            out.whole = frozenset(self._watch.smallest(out))
            for name in out.whole:
                self._owner.enclose(name, modules[name])
        return out

    def _moving(self, layouts: Mapping[Any, Layout | None], inputs: list[int]) -> dict[Any, bool]:
        """Of each place where rows may move by what is in them, whether they were not seen to."""
        self._follows, self._verdicts, self._places = True, None, set()
        try:
            self._once(layouts, {})
            found = self._round(layouts, inputs).seen if self._places else {}
        finally:
            self._follows = False
        return verdicts(self._places, found)

    def _forget_moved(self, proof: Proof, moving: dict[Any, bool]) -> None:
        """Take back what is said of rows that may be elsewhere in the next batch."""
        if any(moving.values()):
            self._follows, self._verdicts = True, moving
            try:
                self._once(proof.layouts, {})
            finally:
                self._follows = False
            proof.layouts.update(dict.fromkeys(self._moved))

    def _round(self, layouts: Mapping[Any, Layout | None], inputs: list[int]) -> Proof:
        first = self._once(layouts, {})
        codes = {key: torch.zeros(told.shape, dtype=torch.int64) for key, told in first.items()}
        bits = {key: torch.zeros(told.shape, dtype=torch.int64) for key, told in first.items()}
        lost = set()
        for digit in range(int(self._numbers[-1]).bit_length()):
            rows = (self._numbers >> digit & 1).bool()
            seen = self._once(layouts, {i: rows for i in inputs})
            for key, told in first.items():
                if key not in seen or seen[key].shape != told.shape:
                    lost.add(key)
                else:
                    codes[key] += _differs(told, seen[key]).long() << digit
                    bits[key] += _differs(told, seen[key], 0.0).long() << digit
            lost |= seen.keys() - first.keys()
        out = Proof()
        for key, times in (*codes, *lost):
            known = None if (key, times) in lost else self._layout(codes[key, times])
            if known in (None, TABLE) and (key, times) not in lost:
                # What a row's words hardly change (attention to nearly everything alike) they change in some bit, by their own
                # pattern; what the order of sums changes has no such pattern.
                faint = self._layout(bits[key, times])
                known = known if faint in (None, TABLE) else faint
            out.add(key, known)
        return out

    def _layout(self, codes: Tensor) -> Layout | None:
        """Where the rows are in what changed by these patterns."""
        if not codes.any():
            return TABLE
        shape, batch = codes.shape, self._batch
        dims = [d for d in (self._rows.dim, *range(len(shape))) if d < len(shape) and shape[d] == batch]
        for d in dict.fromkeys(dims):
            if self._is(codes.movedim(d, 0).reshape(batch, -1)):
                return "dim", d
        if shape and shape[0] % batch == 0:
            if self._is(codes.reshape(batch, -1)):
                return "flat", 0
            if self._is(codes.reshape(shape[0] // batch, batch, -1).transpose(0, 1).reshape(batch, -1)):
                return "inner", 0
        return None

    def _is(self, codes: Tensor) -> bool:
        """Whether what changes of each row, [batch, n], changes by that row's pattern, and something of each does."""
        own = self._numbers[:, None]
        return bool(((codes == 0) | (codes == own)).all()) and bool((codes == own).any(dim=1).all())

    def _acts_on_rows(self, proof: Proof, index: int) -> bool:
        """Whether this input's rows act on the batch's rows, each on its own, wherever those are known."""
        first = self._once({}, {})
        rows = (self._numbers & 1).bool()
        try:
            seen = self._once({}, {index: rows})
        except Exception:
            return False
        acts = False
        for (key, times), told in first.items():
            layout, after = proof.layouts.get(key), seen.get((key, times))
            if layout in (None, TABLE) or after is None or after.shape != told.shape:
                continue
            changed = _differs(told, after)
            mine = rows[self._rows.index(layout, changed.shape).cpu()]
            if bool((changed & ~mine).any()):
                return False
            acts |= bool(changed.any())
        return acts

    def _once(self, layouts: Mapping[Any, Layout | None], changes: dict[int, Tensor]) -> dict[Any, Tensor]:
        """One run on the base, with other words in these rows of these inputs."""
        leaves = []
        for i, leaf in enumerate(self._leaves):
            if isinstance(leaf, Tensor):
                leaf = leaf.detach().clone()
                if i in changes:
                    if (i, self._where) not in self._others:
                        self._others[i, self._where] = _other(leaf, self._where)
                    shape = [1] * leaf.dim()
                    shape[self._rows.dim] = -1
                    mine = changes[i].reshape(shape).to(leaf.device)
                    leaf = torch.where(mine, self._others[i, self._where], leaf)
            elif leaf is not None and not isinstance(leaf, (bool, int, float, str)):
                leaf = copy.deepcopy(leaf)
            leaves.append(leaf)
        args, kwargs = tree_unflatten(leaves, self._spec)
        recorder, rows = Recorder(self._batch, layouts), self._rows
        kept = KeptState(self._owner.model)
        trials.append(None)
        try:
            with (
                torch.no_grad(),
                torch.random.fork_rng(devices=[d for d in self._devices if d.type != "cpu"]),
                self._owner.active.set(rows.trial(recorder)),
            ):
                torch.manual_seed(0)
                with ExitStack() as stack:
                    if self._watch is not None:
                        stack.enter_context(self._watch.noting(recorder))
                    if self._follows:
                        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
                        recorder.moves = Moves(recorder, given, self._verdicts)
                        stack.enter_context(Listing(recorder.moves))
                        stack.enter_context(recorder.moves)
                    out = self._run(*args, **kwargs)
        finally:
            trials.pop()
            kept.restore()
        for i, leaf in enumerate(opened(out)[1]):
            recorder.note(("output", i), leaf)
        if recorder.moves is not None:
            self._places |= recorder.moves.places
            self._moved = recorder.moved
        return recorder.seen


def _differs(a: Tensor, b: Tensor, share: float = 1e-4) -> Tensor:
    """Where two runs differ by more than what the order of sums may, or, of no `share` of the largest, at all."""
    same = (a == b) | (a.isnan() & b.isnan())
    scale = a[a.isfinite()].abs().max() if bool(a.isfinite().any()) else 0.0
    return ~same & ~((a - b).abs() <= share * scale)


def _other(x: Tensor, where: int = 0) -> Tensor | None:
    """The same with other words in each row, at all positions or at the last or first; None where no others are sure to do."""
    if x.numel() == 0 or x.dtype == torch.bool or x.is_complex():
        return None
    g, x = torch.Generator().manual_seed(x.dim()), x.detach()
    if x.is_floating_point():
        finite = x[x.isfinite()].float()
        spread = float(finite.std()) if finite.numel() > 1 else 0.0
        noise = torch.rand(x.shape, generator=g).to(x.device)
        out = (x.float() + (spread + 0.1) * (noise + 0.5)).to(x.dtype)
    else:
        low, high = int(x.min()), int(x.max())
        if high < 2:
            # Masks and kinds of tokens, at one position only: a row that is masked whole is none.
            out, where = (1 - x if low >= 0 else x), where or 1
        elif low == high:
            out = x - 1
        else:
            step = torch.randint(1, high - low + 1, x.shape, generator=g).to(x.device)
            out = ((x.long() - low + step) % (high - low + 1) + low).to(x.dtype)
    if where and x.dim() > 1:
        kept = torch.ones(x.shape[-1], dtype=torch.bool)
        kept[-1 if where == 1 else 0] = False
        out = torch.where(kept.to(x.device), x, out)
    return out
