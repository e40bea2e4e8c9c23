"""What is stored of one attached module: the base's tensors, and for each tenant its deltas and small dense tensors."""

from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .arena import Arena
from .fixed import DeviceTables
from .rows import BASE, HOST, RowMap, lasting
from .runs import DTYPES, Runs, known_of
from .runs import product as runs_product
from .weight import Weight

F = nn.functional
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
PRODUCTS = ("linear", "conv1d", "attention", "experts")
COMPUTING = (*PRODUCTS, "embedding")
_BY_ROW = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


class Owner(Protocol):
    """What a site needs of the `Tenants` that it belongs to."""

    mode: str
    devices: tuple[torch.device, ...]
    is_spread: bool
    capacity: int
    arenas: Mapping[torch.device, Arena]
    lock: Any
    unsettled: bool

    def now(self, device: torch.device | None = None) -> RowMap | None:
        """The map of rows that is active in this thread or task, or None; for what lies on this device, if one is given."""

    def rows(self, site: "Site") -> RowMap | None:
        """The active map, for a module that is called."""

    def count_dense(self, name: str, size: int) -> None:
        """A dense value of a tenant's tensor was made for one call."""

    def suspect(self, reader: nn.Module) -> None:
        """A module read a weight of another one."""


def restored_as(base: Tensor, delta: Tensor) -> Tensor:
    """The words that `delta` makes of `base`, in the layout of `base`: torch may compute in another way by that, and other bits
    come of it. What is no block of words (a view, channels last) was encoded row by row.
    """
    words = torch.ops.xorz.delta_restore(base.contiguous(), delta)
    return words if base.is_contiguous() else torch.empty_like(base).copy_(words)


class Site:
    """One attached module: its tenants' deltas (by slot), and the dense copies of its small changed tensors.

    Attributes:
        name: the module's full name.
        kind: "linear", "conv1d", "embedding", "attention", "experts", "rows" or "split"; says how it is served.
        device: where all its tensors are; arena: of deltas there.
        flattens: its two-dimensional inputs are the batch's tokens, flattened batch first.
        raws: name -> the module's own parameter or buffer; base: the same words, without gradients.
        weights: name -> what readers of the attribute meet; see `Weight`.
        table: parameter name -> int64 [slots, 2], offset and length in the arena.
        fixed: on a device, what keeps these tables and tenants' small values at addresses that stay; None on the host.
        pieces: parameter name -> slot -> (offset, length).
        values: slot -> parameter or buffer name -> the tenant's own tensor.
        derived: attributes that the module was seen to change in a forward: they may be made from its weights.
        plain: its class is torch's own, which keeps nothing that is made from weights.
        keeps: attributes that held tensors when it was attached.
        seen, known: its attributes, and copies of what they were when it was attached or its user set them.
    """

    def __init__(
        self, owner: Owner, name: str, module: nn.Module, kind: str, device: torch.device = HOST
    ) -> None:
        """A site of `module`, whose tensors are on `device`, that no tenant has changed yet."""
        self.owner, self.name, self.kind = owner, name, kind
        self.device, self.arena = device, owner.arenas[device]
        self.original = type(module)
        self.is_leaf = not module._modules
        # torch's own classes are known to keep nothing that they made from their weights.
        self.plain = type(module).__module__.startswith("torch.nn.")
        self.flattens = False
        self.raws: dict[str, Tensor] = {}
        self.base: dict[str, Tensor] = {}
        self.weights: dict[str, Weight] = {}
        self.table: dict[str, Tensor] = {}
        self.pieces: dict[str, dict[int, tuple[int, int]]] = {}
        self.deltas: dict[tuple[str, int], Tensor] = {}
        self.values: dict[int, dict[str, Tensor]] = {}
        self.clones: dict[int, nn.Module] = {}
        self.derived: set[str] = set()
        self.keeps: list[str] = []
        self.seen: dict[str, Any] = {}
        self.known: dict[str, Any] = {}
        self._biases: tuple[Any, ...] | None = None
        self._stack: tuple[Any, ...] | None = None
        # Counts changes of `values`. A forward that sees the count change while it reads them does not keep what it made.
        self._changes = 0
        on_host = device.type == "cpu"
        self.fixed = None if on_host else DeviceTables(owner, name, self.base, self.table, device)

    def __deepcopy__(self, memo: Any) -> "Site":
        """An attached model cannot be copied or pickled."""
        raise TypeError(
            f"xorz: {self.name} is attached to tenants; call tenants.detach() before copying or saving the model itself "
            "(its state_dict can be saved)"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """An attached model cannot be copied or pickled."""
        return self.__deepcopy__(None)

    def full(self, param: str) -> str:
        """The tensor's full name, for messages."""
        return f"{self.name}.{param}"

    # What tenants write (under their lock).

    def add_piece(self, param: str, slot: int, offset: int, length: int) -> None:
        """The delta of `param` for `slot`."""
        self.pieces.setdefault(param, {})[slot] = (offset, length)
        with lasting():
            self.deltas[param, slot] = self.arena.tensor[offset : offset + length]
        self.clones.pop(slot, None)
        if self.fixed is not None:
            self.fixed.put(param, slot, (offset, length))
        else:
            self._fill(param)

    def add_value(self, param: str, slot: int, value: Tensor) -> None:
        """The tenant's own copy of a small tensor."""
        self.values.setdefault(slot, {})[param] = value
        if self.fixed is not None:
            self.fixed.put_value(param, slot, value)
        self.clones.pop(slot, None)
        self._changes += 1

    def drop(self, slot: int) -> None:
        """Forget everything that the tenant in `slot` changed here. Never fails for lack of memory: a tenant that is half
        forgotten would be half the base.
        """
        for param, pieces in self.pieces.items():
            if pieces.pop(slot, None) is not None:
                self.deltas.pop((param, slot), None)
                if self.fixed is not None:
                    self.fixed.leave(param, slot)
                else:
                    self._empty(param)
        self.clones.pop(slot, None)
        values = self.values.pop(slot, None)
        if values is not None:
            self._changes += 1
            self._biases = self._stack = None
            for param in values if self.fixed is not None else ():
                self.fixed.leave(param, slot)

    def _empty(self, param: str) -> None:
        try:
            self._fill(param)
        except (MemoryError, RuntimeError):  # torch says either
            # The old table would give the slot's next tenant this one's words. Without one the next reader makes it.
            self.table.pop(param, None)

    def _fill(self, param: str) -> None:
        # On the host a new tensor each time: forwards that run in other threads keep the one that they have.
        with lasting():
            table = torch.zeros(self.owner.capacity, 2, dtype=torch.int64)
            for slot, piece in self.pieces.get(param, {}).items():
                table[slot] = torch.tensor(piece)
            self.table[param] = table

    # What forwards read.

    def touched(self, rows: RowMap) -> bool:
        """Whether a row's tenant changes anything here."""
        found = rows.touching.get(self)
        if found is None:
            pieces = list(self.pieces.values())  # a load in another thread may add one
            found = rows.fixed is not None or any(
                slot in self.values or any(slot in p for p in pieces) for slot in rows.used
            )
            rows.touching[self] = found
        return found

    def serves(self, rows: RowMap) -> bool:
        """Whether the module's own forward on the base would not do.

        In deterministic mode, rows of the base go through the op, too: its bits do not depend on a row's company.
        """
        deterministic = self.owner.mode == "deterministic"
        return self.touched(rows) or (deterministic and (self.kind in PRODUCTS or self.row_by_row))

    def changes(self, param: str, rows: RowMap) -> bool:
        """Whether readers of `param` may not have the base's tensor; of computing modules, all parameters are alike."""
        if rows.probe is not None:
            return True
        key = (self, param)
        found = rows.touching.get(key)
        if found is None:
            found = (
                self.serves(rows)
                if self.kind in COMPUTING or self.row_by_row or rows.fixed is not None
                else any(map(self._has(param), rows.used))
            )
            rows.touching[key] = found
        return found

    def _has(self, param: str) -> Any:
        pieces = list(self.pieces.items())
        mine = [p for name, p in pieces if name == param or name.startswith(f"{param}.")]
        return lambda slot: param in self.values.get(slot, ()) or any(slot in p for p in mine)

    def multiplies(self, param: str) -> bool:
        """Whether a product with this matrix is computed on base + delta, in either orientation."""
        base = self.base[param]
        return (
            base.dim() == 2
            and base.dtype in FLOATS
            and base.is_contiguous()
            and not any(param in own for own in list(self.values.values()))
        )

    def is_delta(self, param: str) -> bool:
        """Whether each tenant of a mixed batch that changes this matrix has a delta of it, never a dense copy (`prepare`)."""
        base = self.base[param]
        if self.kind in ("linear", "conv1d", "embedding") and param == "weight":
            return True
        is_matrix = base.dim() == 2 and base.dtype in FLOATS and base.is_contiguous() and min(base.shape) > 1
        return is_matrix and not self.plain and self.kind not in ("attention", "experts")

    def read(self, param: str, rows: RowMap) -> Tensor:
        """What a reader of the module's attribute is given in a forward."""
        if not self.changes(param, rows):
            return self.raws[param]
        if rows.probe is not None:
            return self.weights[param]
        if rows.only is not None and self.kind not in COMPUTING and not self.row_by_row:
            value = self.values.get(rows.only, {}).get(param)
            if value is not None:
                return value
        return self.weights[param]

    def dense(self, param: str, slot: int) -> Tensor:
        """`param` of one slot as a plain tensor: the base's, a copy that is kept, or one that is made now."""
        base = self.base[param]
        if slot == BASE:
            return base
        own = self.values.get(slot, {}).get(param)
        if own is not None:
            return own
        delta = self.delta(param, slot)
        if delta is not None:
            self.owner.count_dense(self.full(param), base.nbytes)
            return restored_as(base, delta)
        deltas = list(self.deltas.items())
        parts = {name: d for (name, s), d in deltas if s == slot and name.startswith(f"{param}.")}
        if not parts:
            return base
        self.owner.count_dense(self.full(param), base.nbytes)
        out = base.clone()
        for name, part in parts.items():
            expert = int(name.rpartition(".")[2])
            out[expert] = torch.ops.xorz.delta_restore(base[expert], part)
        return out

    def alone(self, rows: RowMap) -> bool:
        """Whether the one tenant has a weight here that is no delta: of another shape than the base's."""
        if rows.only is None or self.kind not in ("linear", "embedding"):
            return False
        own = self.values.get(rows.only)
        return own is not None and "weight" in own

    def slots(self, param: str) -> Tensor:
        """The table of `param`, with a row for every slot there is."""
        if self.fixed is not None:
            return self.fixed.table(param)
        table = self.table.get(param)
        if table is None or table.size(0) < self.owner.capacity:
            with self.owner.lock:
                self._fill(param)
            table = self.table[param]
        return table

    def value(self, param: str, slot: int, base: Tensor) -> Tensor:
        """`param` of one slot, which is small or the base's."""
        return base if slot == BASE else self.values.get(slot, {}).get(param, base)

    def biases(self, param: str) -> Tensor | None:
        """[slots + 1, n]: each tenant's bias, the base's last; no memory where no tenant changes it."""
        base = self.base.get(param)
        if base is None:
            return None
        if self.fixed is not None:
            return self.fixed.stack(param, self.values)
        key, cached = (self._changes, self.owner.capacity), self._biases
        if cached is None or cached[0] is not base or cached[1] != key:
            with lasting():
                table, own = base.expand(key[1] + 1, -1), self._changed(param, key[1])
                if own:
                    table = table.clone()
                    for slot, value in own.items():
                        table[slot] = value
            cached = self._biases = (base, key, table)
        return cached[2]

    def _changed(self, param: str, capacity: int) -> dict[int, Tensor]:
        """Slots' own values of `param`; not of slots that there were not yet when `capacity` was read."""
        return {s: v[param] for s, v in list(self.values.items()) if param in v and s < capacity}

    @property
    def row_by_row(self) -> bool:
        """Whether this module must run on one batch row at a time, since torch's sums in it depend on their number."""
        convolves = self.kind == "split" and self.is_leaf and not issubclass(self.original, _BY_ROW)
        return self.owner.mode == "deterministic" and convolves

    def stack(self, param: str) -> Tensor:
        """[slots + 1, ...]: `param` of each slot, the base's last (so that BASE = -1 finds it)."""
        if self.fixed is not None:
            return self.fixed.stack(param, self.values)
        base, cached = self.base[param], self._stack
        key = (self._changes, self.owner.capacity)
        if cached is None or cached[0] is not base or cached[1] != key:
            with lasting():
                table = base.expand(key[1] + 1, *base.shape).clone()
                for slot, value in self._changed(param, key[1]).items():
                    table[slot] = value
            cached = self._stack = (base, key, table)
        return cached[2]

    def delta(self, param: str, slot: int) -> Tensor | None:
        """A slot's resident delta of `param`, in the arena; None if it has the base's words."""
        return self.deltas.get((param, slot))

    def linear(self, rows: RowMap, input: Tensor, place: Any = None) -> Tensor:
        """`input @ W^T + b`, row by row with its tenant's W and b. Differentiable in `input`. `place`: see `RowMap.rows`."""
        delta = None if rows.only is None else self.deltas.get(("weight", rows.only))
        if delta is not None and not (
            self.owner.mode == "exact" or torch.is_autocast_enabled(input.device.type)
        ):
            return self._linear_of_one(rows.only, input, delta)
        slots = rows.rows(input.shape[:-1], self.flattens, self.name, place or self)
        return self.product(input, self.base["weight"], self.biases("bias"), "weight", slots, rows.only)

    def _linear_of_one(self, slot: int, input: Tensor, delta: Tensor) -> Tensor:
        """The product of one tenant, which is half of what a grouped one costs to call: 40 us a layer of small models."""
        base = self.base
        bias = base.get("bias")
        if bias is not None:
            bias = self.value("bias", slot, bias)
        return _below_autograd(_LINEAR, input, base["weight"], bias, delta, mode=self.owner.mode)

    def product(
        self,
        input: Tensor,
        weight: Tensor,
        biases: Tensor | None,
        param: str,
        slots: Tensor,
        only: int | None,
    ) -> Tensor:
        """One grouped product; under autocast in the weight's own dtype, given in autocast's. `only`: see `RowMap`."""
        device = input.device.type
        if not torch.is_autocast_enabled(device):
            return self._product(input, weight, biases, param, slots, only)
        if input.is_floating_point():
            input = input.to(weight.dtype)
        with torch.autocast(device, enabled=False):
            out = self._product(input, weight, biases, param, slots, only)
            return out.to(torch.get_autocast_dtype(device))

    def _product(
        self,
        input: Tensor,
        weight: Tensor,
        biases: Tensor | None,
        param: str,
        slots: Tensor,
        only: int | None,
    ) -> Tensor:
        mode = self.owner.mode
        if mode == "exact" and only is not None:
            # torch's bits depend on the input's strides, too, so that the input must not be gathered.
            bias, delta = None if biases is None else biases[only], self.delta(param, only)
            if delta is None:
                return F.linear(input, weight, bias)
            return torch.ops.xorz.delta_linear(input, weight, bias, delta, mode=mode)
        grouped = self.grouped(param, biases)
        runs = None if torch.is_grad_enabled() or _is_transformed() else self.runs(slots, input.dtype)
        if runs is not None:
            return runs_product(runs, input, weight, biases, *grouped, slots, partial(self.delta, param))
        return _below_autograd(
            torch.ops.xorz.delta_linear_grouped, input, weight, biases, *grouped, slots, mode=mode
        )

    def runs(self, slots: Tensor, dtype: torch.dtype) -> Runs | None:
        """What is multiplied for one tenant alone of rows with these slots; None if the grouped kernel takes all."""
        return known_of(slots) if self.owner.mode == "fast" and dtype in DTYPES else None

    def grouped(self, param: str, biases: Tensor | None) -> tuple[Tensor, Tensor]:
        """The arena, and where each slot's delta of `param` lies in it, for a product with these biases."""
        table = self.slots(param)
        if biases is not None:
            # There may be more slots by now than when the biases were put together.
            table = table[: biases.size(0) - 1]
        return self.arena.tensor, table


_LINEAR = torch.ops.xorz.delta_linear


def _below_autograd(op: Any, *args: Any, **kwargs: Any) -> Tensor:
    """`op`, past the Python kernel that differentiates it where nothing can be: it takes longer than a small product."""
    if torch.is_grad_enabled() or _is_transformed():
        return op(*args, **kwargs)
    with torch._C._AutoDispatchBelowAutograd():
        return op.default(*args, **kwargs)


def _is_transformed() -> bool:
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
