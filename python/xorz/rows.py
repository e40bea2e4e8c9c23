"""Which tenant each row of a batch belongs to: carried from `Tenants.use` to every attached module, never guessed.

The map lives in a context variable, so that each thread and each asyncio task has its own. It says one slot per batch row;
a module asks for the slots of the rows that it was given, by their leading shape. Shapes that the map cannot explain raise.
"""

import contextvars
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

BASE = -1
"""The slot of the base."""


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
    """

    def __init__(
        self,
        slots: Sequence[int],
        names: Sequence[str | None],
        *,
        dim: int = 0,
        tokens: bool = False,
        release: Callable[[], None] | None = None,
        parent: "RowMap | None" = None,
    ) -> None:
        """`tokens`: the rows are single tokens in an order of the module's own; shapes must then match exactly."""
        self.slots = tuple(slots)
        self.names = tuple(names)
        self.dim = dim
        self.tokens = tokens
        self.used = tuple(dict.fromkeys(self.slots))
        self.only = self.used[0] if len(self.used) == 1 else None
        # A map made from another one lives and ends with it.
        self.root: RowMap = self if parent is None else parent.root
        self.carried = parent.carried if parent is not None else False
        self._release = release
        with lasting():
            self._tensor = torch.tensor(self.slots, dtype=torch.int32)
        self._expanded: dict[Any, Tensor] = {}
        # What modules know of these slots: it cannot change while their tenants are held.
        self.touching: dict[Any, bool] = {}
        self._closed = False
        self._running: list[None] = []
        self._lock = threading.Lock()

    def begin(self) -> None:
        """A forward starts; RuntimeError if the `use` has ended."""
        root = self.root
        root._running.append(None)
        if root._closed:
            self.end()
            raise RuntimeError(
                f"xorz: the use of {_list(self.names)} has ended; a task or thread that outlives its `with tenants.use(...)` "
                "must open its own"
            )

    def end(self) -> None:
        """A forward has ended."""
        root = self.root
        root._running.pop()
        if root._closed:
            root._give_back()

    def describe(self) -> str:
        """The tenants' names, for messages."""
        return _list(self.names)

    def close(self) -> None:
        """The `use` ends; the tenants are given back when the last running forward has."""
        self._closed = True
        self._give_back()

    def _give_back(self) -> None:
        with self._lock:
            release = self._release if self._closed and not self._running else None
            if release is not None:
                self._release = None
        if release is not None:
            release()

    def rows(self, lead: Sequence[int], flattens: bool, who: str) -> Tensor:
        """Slot of each row of an input whose shape but for its last dimension is `lead`, int32, flattened.

        `flattens`: whether two-dimensional inputs of this module are the batch's tokens, flattened batch first.
        """
        key = (*lead, flattens)
        found = self._expanded.get(key)
        if found is None:
            with lasting():
                found = self._expand(tuple(lead), flattens, who)
            if len(self._expanded) > 64:
                self._expanded.clear()
            self._expanded[key] = found
        return found

    def _expand(self, lead: tuple[int, ...], flattens: bool, who: str) -> Tensor:
        count = 1
        for size in lead:
            count *= size
        if self.only is not None:
            return torch.full((count,), self.only, dtype=torch.int32)
        batch = len(self.slots)
        if self.tokens:
            if lead == (batch,):
                return self._tensor
        elif len(lead) > self.dim and lead[self.dim] == batch and not (len(lead) == 1 and self.dim):
            shape = [batch if i == self.dim else 1 for i in range(len(lead))]
            return self._tensor.reshape(shape).expand(lead).reshape(-1)
        elif len(lead) == 1 and flattens and lead[0] % batch == 0 and self.dim == 0:
            return self._tensor.repeat_interleave(lead[0] // batch)
        what = "tokens" if self.tokens else "batch rows"
        raise RuntimeError(
            f"xorz: {who} was given rows of shape {list(lead)}, but the active tenants map {batch} {what} "
            f"(dimension {self.dim}); give one name for each row of the batch, or regroup the map with them (tenants.regroup)"
        )

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

    def uniform(self, slot: int) -> "RowMap":
        """A map whose rows are all of one slot."""
        return RowMap((slot,), self.names, parent=self)


def _list(names: Sequence[str | None]) -> str:
    shown = ["the base" if n is None else repr(n) for n in dict.fromkeys(names)]
    return ", ".join(shown[:4]) + (", ..." if len(shown) > 4 else "")


class Active:
    """The map that is active in this thread or task, for one attached model."""

    def __init__(self) -> None:
        """None is active."""
        self._var: contextvars.ContextVar[RowMap | None] = contextvars.ContextVar("xorz_rows", default=None)

    def get(self) -> RowMap | None:
        """The active map."""
        return self._var.get()

    @contextmanager
    def set(self, rows: RowMap | None) -> Iterator[None]:
        """`rows` is active inside."""
        token = self._var.set(rows)
        try:
            yield
        finally:
            self._var.reset(token)
