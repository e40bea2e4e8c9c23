"""What forwards read of one module on a device: where each slot's deltas lie, and each slot's small values, at addresses that
stay, since a captured CUDA graph reads them again at each replay.

A slot's entries are written before anybody can name the slot. When its tenant goes they are left as they are, and emptied by
the next load, when the device is done with whatever may read them: neither a forward nor an unload waits for it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .rows import lasting, refuse_in_capture


class DeviceTables:
    """Not for the host, whose threads each keep the table that they began with.

    Attributes:
        tables: parameter name -> int64 [slots, 2], offset and length in the arena; 0 and 0 is the base.
        stacks: parameter or buffer name -> [slots + 1, ...], each slot's own value, the base's last.
    """

    def __init__(
        self,
        owner: Any,
        name: str,
        base: Mapping[str, Tensor],
        tables: dict[str, Tensor],
        device: torch.device,
    ) -> None:
        """Tables of the module `name` of `owner`, whose tensors are `base`, on `device`, to be kept in `tables`."""
        self._owner, self._name, self._base, self._device = owner, name, base, device
        self.tables = tables
        self.stacks: dict[str, Tensor] = {}
        self._left: set[tuple[str, int]] = set()

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(t.nbytes for t in (*list(self.tables.values()), *list(self.stacks.values())))

    def put(self, param: str, slot: int, piece: tuple[int, int]) -> None:
        """The delta of a slot that nobody can name yet. It is there, for every stream, when this returns."""
        self._table(param)[slot].copy_(torch.tensor(piece))

    def put_value(self, param: str, slot: int, value: Tensor) -> None:
        """A small value of such a slot; there for those who follow on this stream."""
        stack = self.stacks.get(param)
        if stack is not None and slot < stack.size(0) - 1 and value.shape == stack.shape[1:]:
            stack[slot].copy_(value)

    def leave(self, param: str, slot: int) -> None:
        """The slot's tenant has gone. Nothing is written: kernels that are on their way may still read it."""
        self._left.add((param, slot))

    def settle(self) -> None:
        """Empty what was left. The device must be done with whatever was asked before."""
        for param, slot in self._left:
            table, stack = self.tables.get(param), self.stacks.get(param)
            if table is not None and slot < table.size(0):
                table[slot].zero_()
            if stack is not None and slot < stack.size(0) - 1:
                stack[slot].copy_(self._base[param])
        self._left.clear()

    def table(self, param: str) -> Tensor:
        """The table of `param`, with an entry for every slot there is."""
        found = self.tables.get(param)
        if found is None or found.size(0) < self._owner.capacity:
            with self._owner.lock:
                found = self._table(param)
                # Made on the stream of a forward: a load on another one waits for it.
                self._owner.unsettled = True
        return found

    def _table(self, param: str) -> Tensor:
        old = self.tables.get(param)
        if old is not None and old.size(0) >= self._owner.capacity:
            return old
        refuse_in_capture(self._device, f"the table of `{self._name}.{param}` would be made")
        with lasting():
            found = torch.zeros(self._owner.capacity, 2, dtype=torch.int64, device=self._device)
            if old is not None:
                found[: old.size(0)].copy_(old)
        self.tables[param] = found
        return found

    def stack(self, param: str, values: Mapping[int, Mapping[str, Tensor]]) -> Tensor:
        """Each slot's own `param`, the base's last, so that -1 finds it; `values`: slot -> name -> value."""
        found = self.stacks.get(param)
        if found is None or found.size(0) <= self._owner.capacity:
            with self._owner.lock:
                found = self.stacks.get(param)
                if found is None or found.size(0) <= self._owner.capacity:
                    found = self._stack(param, values)
                    self._owner.unsettled = True
        return found

    def _stack(self, param: str, values: Mapping[int, Mapping[str, Tensor]]) -> Tensor:
        base = self._base[param]
        refuse_in_capture(self._device, f"the values of `{self._name}.{param}` would be put together")
        with lasting():
            found = base.expand(self._owner.capacity + 1, *base.shape).clone()
            for slot, own in values.items():
                if param in own and own[param].shape == base.shape:
                    found[slot].copy_(own[param])
        self.stacks[param] = found
        return found
