"""Attached modules: what makes a module compute with the weights of whichever tenant each row belongs to.

A module keeps its class's name, its parameters and its place; its class becomes a subclass made here (as FSDP2 and
`torch.nn.utils.parametrize` do), which is undone by `detach`. Reading a parameter that an active tenant changes gives an
`_Intercept`: products and lookups with it are served, its shape and dtype may be asked for, and anything else raises, so
that no code path can compute with the base's weights by accident (fused fast paths of torch among them).
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import attention, compiled, experts, split
from .rows import BASE, RowMap, lasting

if TYPE_CHECKING:
    from .tenants import Tenants

F = nn.functional
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_PRODUCTS = ("linear", "conv1d", "attention", "experts")
_BY_ROW = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


class Site:
    """One attached module: its tenants' deltas (by slot), and the dense copies of its small changed tensors.

    Attributes:
        name: the module's full name.
        kind: "linear", "conv1d", "embedding", "attention", "experts", "rows" or "split"; says how it is served.
        flattens: its two-dimensional inputs are the batch's tokens, flattened batch first.
        table: parameter name -> int64 [slots, 2], offset and length in the arena.
        pieces: parameter name -> slot -> (offset, length).
        values: slot -> parameter or buffer name -> the tenant's own tensor.
    """

    def __init__(self, owner: "Tenants", name: str, module: nn.Module, kind: str) -> None:
        """Serves nothing yet."""
        self.owner, self.name, self.kind = owner, name, kind
        self.original = type(module)
        self._is_leaf = not module._modules
        self.flattens = False
        self.table: dict[str, Tensor] = {}
        self.pieces: dict[str, dict[int, tuple[int, int]]] = {}
        self._deltas: dict[tuple[str, int], Tensor] = {}
        self.values: dict[int, dict[str, Tensor]] = {}
        self._clones: dict[int, nn.Module] = {}
        self._biases: tuple[Any, ...] | None = None
        self._stack: tuple[Any, ...] | None = None
        # Counts changes of `values`: what a forward makes of them while another thread changes them is not kept.
        self._changes = 0

    def __deepcopy__(self, memo: Any) -> "Site":
        """An attached model cannot be copied or pickled."""
        raise TypeError(
            f"xorz: {self.name} is attached to tenants; call tenants.detach() before copying the model"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As `__deepcopy__`."""
        return self.__deepcopy__(None)

    # What tenants write (under their lock).

    def add_piece(self, param: str, slot: int, offset: int, length: int) -> None:
        """The delta of `param` for `slot`."""
        self.pieces.setdefault(param, {})[slot] = (offset, length)
        with lasting():
            self._deltas[param, slot] = self.owner.arena.tensor[offset : offset + length]
        self._fill(param)

    def add_value(self, param: str, slot: int, value: Tensor) -> None:
        """The tenant's own copy of a small tensor."""
        self.values.setdefault(slot, {})[param] = value
        self._clones.pop(slot, None)
        self._changes += 1

    def drop(self, slot: int) -> None:
        """Forget a slot."""
        for param, pieces in self.pieces.items():
            if pieces.pop(slot, None) is not None:
                self._deltas.pop((param, slot), None)
                self._fill(param)
        if self.values.pop(slot, None) is not None:
            self._clones.pop(slot, None)
            self._changes += 1
            self._biases = self._stack = None

    def _fill(self, param: str) -> None:
        # A new tensor each time: forwards that run in other threads keep the one that they have.
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
            found = any(slot in self.values or any(slot in p for p in pieces) for slot in rows.used)
            rows.touching[self] = found
        return found

    def slots(self, param: str) -> Tensor:
        """The table of `param`, with a row for every slot there is."""
        table = self.table.get(param)
        if table is None or table.size(0) < self.owner.capacity:
            with self.owner.lock:
                self._fill(param)
            table = self.table[param]
        return table

    def value(self, param: str, slot: int, base: Tensor) -> Tensor:
        """`param` of one slot, which is small or the base's."""
        return base if slot == BASE else self.values.get(slot, {}).get(param, base)

    def biases(self, param: str, base: Tensor | None) -> Tensor | None:
        """[slots + 1, n]: each tenant's bias, the base's last; no memory where no tenant changes it."""
        if base is None:
            return None
        key, cached = (self._changes, self.owner.capacity), self._biases
        if cached is None or cached[0] is not base or cached[1] != key:
            with lasting():
                table, own = base.detach().expand(key[1] + 1, -1), self._changed(param, key[1])
                if own:
                    table = table.clone()
                    for slot, value in own.items():
                        table[slot] = value
            cached = self._biases = (base, key, table)
        return cached[2]

    def _changed(self, param: str, capacity: int) -> dict[int, Tensor]:
        """Slots' own values of `param`; not of slots that there were not yet when `capacity` was read."""
        return {s: v[param] for s, v in list(self.values.items()) if param in v and s < capacity}

    def clone(self, module: nn.Module, slot: int) -> nn.Module:
        """The module with the tenant's own small tensors; shares everything else."""
        found = self._clones.get(slot)
        if found is None:
            found = _shallow(module, self.original, self.values.get(slot, {}))
            self._clones[slot] = found
        found.__dict__["training"] = module.training
        return found

    def serves(self, rows: RowMap) -> bool:
        """Whether the module's own forward would not do.

        In deterministic mode, rows of the base go through the op, too: its bits do not depend on a row's company.
        """
        deterministic = self.owner.mode == "deterministic"
        return self.touched(rows) or (deterministic and (self.kind in _PRODUCTS or self.row_by_row))

    @property
    def row_by_row(self) -> bool:
        """Whether this module must run on one batch row at a time, since torch's sums in it depend on their number."""
        convolves = self.kind == "split" and self._is_leaf and not issubclass(self.original, _BY_ROW)
        return self.owner.mode == "deterministic" and convolves

    def stack(self, module: nn.Module, param: str) -> Tensor:
        """[slots + 1, ...]: `param` of each slot, the base's last."""
        base, cached = module._parameters[param], self._stack
        key = (self._changes, self.owner.capacity)
        if cached is None or cached[0] is not base or cached[1] != key:
            with lasting():
                cached = self._stack = (base, key, split.stacked(self._changed(param, key[1]), base, key[1]))
        return cached[2]

    def call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What the module's `forward` does now: find the active map, and serve each row."""
        rows = self.owner.rows(self)
        if rows is None:
            return self.original.forward(module, *args, **kwargs)
        rows.begin()
        try:
            return self._serve(module, rows, args, kwargs)
        finally:
            rows.end()

    def _serve(self, module: nn.Module, rows: RowMap, args: Any, kwargs: Any) -> Any:
        if not self.serves(rows):
            return self.original.forward(module, *args, **kwargs)
        if self.kind in ("rows", "split") or self._is_alone(rows):
            return split.forward(self, module, rows, args, kwargs)
        if self.kind == "experts":
            return experts.forward(self, module, rows, *args, **kwargs)
        if self.kind == "conv1d":
            return self._conv1d(module, rows, *args, **kwargs)
        if self.original is nn.Linear:
            return self.linear(module, rows, *args, **kwargs)
        if self.original is nn.Embedding:
            return lookup(self, module, rows, *args, **kwargs)
        # A forward of its own: what it does with its parameters is intercepted.
        return self.original.forward(module, *args, **kwargs)

    def _is_alone(self, rows: RowMap) -> bool:
        """Whether the one tenant has a weight here that is no delta: of another shape than the base's."""
        return (
            rows.only is not None
            and "weight" in self.values.get(rows.only, ())
            and self.kind in ("linear", "embedding")
        )

    def _conv1d(self, module: nn.Module, rows: RowMap, x: Tensor) -> Tensor:
        """transformers' Conv1D, x @ W + b: the product that is the gradient of a linear layer."""
        weight = module._parameters["weight"].detach()
        slots = rows.rows(x.shape[:-1], self.flattens, self.name)
        biases = self.biases("bias", module._parameters["bias"])
        if self.owner.mode == "exact":
            return self._conv1d_exact(x, weight, biases, slots)
        out = torch.ops.xorz.delta_linear_grouped_grad_input(
            x, weight, self.owner.arena.tensor, self.slots("weight"), slots
        )
        return out + biases[slots.long()].view(out.shape)

    def _conv1d_exact(self, x: Tensor, weight: Tensor, biases: Tensor, slots: Tensor) -> Tensor:
        """As torch computes it, tenant by tenant, on a transient matrix: no panel of W's columns has its bits."""
        flat = x.reshape(-1, x.size(-1))
        out = flat.new_empty(flat.size(0), weight.size(1))
        for slot in slots.unique().tolist():
            index = (slots == slot).nonzero()[:, 0]
            delta = self.delta("weight", slot)
            tuned = weight if delta is None else torch.ops.xorz.delta_restore(weight, delta)
            out = out.index_copy(0, index, torch.addmm(biases[slot], flat[index], tuned))
        return out.view(*x.shape[:-1], -1)

    def linear(self, module: nn.Module, rows: RowMap, input: Tensor) -> Tensor:
        """`input @ W^T + b`, row by row with its tenant's W and b. Differentiable in `input`."""
        delta = None if rows.only is None else self._deltas.get(("weight", rows.only))
        if delta is not None and not (
            self.owner.mode == "exact" or torch.is_autocast_enabled(input.device.type)
        ):
            return self._linear_of_one(module, rows.only, input, delta)
        biases = self.biases("bias", module._parameters["bias"])
        slots = rows.rows(input.shape[:-1], self.flattens, self.name)
        return self.product(input, module._parameters["weight"].detach(), biases, "weight", slots, rows.only)

    def _linear_of_one(self, module: nn.Module, slot: int, input: Tensor, delta: Tensor) -> Tensor:
        """The product of one tenant, which is half of what a grouped one costs to call: 40 us a layer of small models."""
        weight, bias = module._parameters["weight"], module._parameters["bias"]
        if bias is not None:
            bias = self.value("bias", slot, bias).detach()
        mode = self.owner.mode
        return _below_autograd(torch.ops.xorz.delta_linear, input, weight.detach(), bias, delta, mode=mode)

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
        mode, arena = self.owner.mode, self.owner.arena.tensor
        if mode == "exact" and only is not None:
            # torch's bits depend on the input's strides, too: it is not to be gathered.
            bias, delta = None if biases is None else biases[only], self.delta(param, only)
            if delta is None:
                return F.linear(input, weight, bias)
            return torch.ops.xorz.delta_linear(input, weight, bias, delta, mode=mode)
        table = self.slots(param)
        if biases is not None:
            # There may be more slots by now than when the biases were put together.
            table = table[: biases.size(0) - 1]
        return _below_autograd(
            torch.ops.xorz.delta_linear_grouped, input, weight, biases, arena, table, slots, mode=mode
        )

    def delta(self, param: str, slot: int) -> Tensor | None:
        """A slot's resident delta of `param`, in the arena; None if it has the base's words."""
        return self._deltas.get((param, slot))


def _below_autograd(op: Any, *args: Any, **kwargs: Any) -> Tensor:
    """`op`, past the Python kernel that differentiates it where nothing can be: it takes longer than a small product."""
    transformed = forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
    if transformed or torch.is_grad_enabled():
        return op(*args, **kwargs)
    with torch._C._AutoDispatchBelowAutograd():
        return op.default(*args, **kwargs)


def _shallow(module: nn.Module, cls: type, values: dict[str, Tensor]) -> nn.Module:
    """Another module object of class `cls` that shares everything with `module` but the tensors named in `values`."""
    clone = object.__new__(cls)
    clone.__dict__.update(module.__dict__)
    clone.__dict__.pop("_xorz", None)
    for kind in ("_parameters", "_buffers"):
        clone.__dict__[kind] = {k: values.get(k, v) for k, v in module.__dict__[kind].items()}
    # Hooks belong to the module that is called.
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        clone.__dict__[hooks] = type(module.__dict__[hooks])()
    return clone


class _Intercept(Tensor):
    """A base parameter as seen while a tenant that changes it is active; see the module's docs."""

    @staticmethod
    def of(site: Site, module: nn.Module, param: str, rows: RowMap) -> "_Intercept":
        out = module._parameters[param].detach().as_subclass(_Intercept)
        out._xorz = (site, module, param, rows)
        return out

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "__get__" or func in _ASKED:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        served = _SERVED.get(func)
        if served is not None:
            out = served(*args, **kwargs)
            if out is not NotImplemented:
                return out
        site, _module, param, rows = _first(args, kwargs)._xorz
        raise RuntimeError(
            f"xorz: {getattr(func, '__name__', func)} reads `{site.name}.{param}` directly while {rows.describe()} is active, "
            "whose weights it is not"
        )


def _first(args: Any, kwargs: Any) -> _Intercept:
    from torch.utils._pytree import tree_leaves

    return next(a for a in tree_leaves((args, kwargs)) if isinstance(a, _Intercept))


def _own(value: Any, site: Site, param: str) -> bool:
    """Whether `value` is what `site` reads as its `param`."""
    return isinstance(value, _Intercept) and value._xorz[0] is site and value._xorz[2] == param


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if isinstance(input, _Intercept) or not isinstance(weight, _Intercept):
        return NotImplemented
    site, module, param, rows = weight._xorz
    own = bias is None if module._parameters.get("bias") is None else _own(bias, site, "bias")
    if site.kind != "linear" or param != "weight" or not own:
        return NotImplemented
    return site.linear(module, rows, input)


def _embedding(
    input: Tensor, weight: Tensor, padding_idx: Any = None, max_norm: Any = None, *_: Any, **__: Any
) -> Any:
    if not isinstance(weight, _Intercept) or max_norm is not None:
        return NotImplemented
    site, module, _param, rows = weight._xorz
    return lookup(site, module, rows, input) if site.kind == "embedding" else NotImplemented


def lookup(site: Site, module: nn.Module, rows: RowMap, ids: Tensor) -> Tensor:
    """Rows of an embedding table, each its tenant's."""
    if rows.only is None and not rows.tokens and rows.dim == 0 and ids.dim() > 1 and ids.size(0) == 1:
        # Positions, the same for the whole batch: one copy for each batch row.
        ids = ids.expand(len(rows.slots), *ids.shape[1:])
    slots = rows.rows(ids.shape, site.flattens, site.name)
    weight = module._parameters["weight"].detach()
    return torch.ops.xorz.delta_embedding(ids, weight, site.owner.arena.tensor, site.slots("weight"), slots)


def _attention(*args: Any, **kwargs: Any) -> Any:
    return attention.forward(*args, **kwargs)


_SERVED = {
    F.linear: _linear,
    F.embedding: _embedding,
    F.multi_head_attention_forward: _attention,
}
_ASKED = {
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.stride,
    Tensor.element_size,
    Tensor.is_floating_point,
    Tensor.is_contiguous,
    Tensor.__len__,
    Tensor.__hash__,
    Tensor.__repr__,
    torch.is_floating_point,
    torch.numel,
}


def _parameter(name: str) -> property:
    """A class attribute that gives the module's own parameter, or an `_Intercept` where a tenant changes it."""

    def get(self: nn.Module) -> Any:
        param = self._parameters[name]
        site = self.__dict__.get("_xorz")
        if param is None or site is None or torch.compiler.is_compiling():
            return param
        rows = site.owner.active.get()
        if rows is None or not site.serves(rows):
            return param
        return _Intercept.of(site, self, name, rows)

    return property(get)


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return self._xorz.call(self, *args, **kwargs)


def _forward_compiled(self: nn.Module, input: Tensor) -> Any:
    # One input, one output whose width is known: the compiler gets an op that it cannot see into.
    if torch.compiler.is_compiling():
        return compiled.call(self, input, self._xorz_width)
    return self._xorz.call(self, input)


@torch.compiler.disable
def _forward_disabled(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return self._xorz.call(self, *args, **kwargs)


def _compute_bias(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """T5's relative positions: [1, heads, q, k] for all; one for each batch row where tenants differ."""
    owner = self._xorz_owner
    rows, plain = owner.active.get(), type(self).__mro__[1].compute_bias
    if rows is None or rows.only is not None:
        return plain(self, *args, **kwargs)
    each = {}
    for slot in rows.used:
        with owner.active.set(rows.uniform(slot)):
            each[slot] = plain(self, *args, **kwargs)
    return torch.cat([each[slot] for slot in rows.slots])


def _apply(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
    for param in self._parameters.values():
        if param is not None:
            probe = fn(torch.empty(0, dtype=param.dtype, device=param.device))
            if probe.dtype != param.dtype or probe.device != param.device:
                raise RuntimeError(
                    f"xorz: the model is attached to tenants, whose deltas are of {param.dtype} on {param.device}; call "
                    f"tenants.detach() before moving it to {probe.dtype} on {probe.device}"
                )
            break
    return super(type(self), self)._apply(fn, recurse)


def _load(self: nn.Module, state_dict: dict, prefix: str, *args: Any) -> None:
    if any(prefix + name in state_dict for name in (*self._parameters, *self._buffers)):
        raise RuntimeError(
            f"xorz: {self._xorz.name} is attached to tenants of its weights; call tenants.detach() before loading others"
        )
    super(type(self), self)._load_from_state_dict(state_dict, prefix, *args)


_classes: dict[Any, type] = {}


def swap(module: nn.Module, site: Site) -> None:
    """Attach `site` to `module`: its class becomes a subclass of itself."""
    names = tuple(module._parameters)
    width = _width(module, site)
    key = (type(module), site.kind, names, width is not None)
    if key not in _classes:
        forward = _forward_disabled if width is None else _forward_compiled
        body: dict[str, Any] = {"forward": forward, "_apply": _apply, "_load_from_state_dict": _load}
        body |= {name: _parameter(name) for name in names}
        if hasattr(type(module), "compute_bias"):
            body["compute_bias"] = _compute_bias
        body["__module__"] = type(module).__module__
        _classes[key] = type(type(module).__name__, (type(module),), body)
    module.__dict__["_xorz"] = site
    module.__dict__["_xorz_number"] = compiled.register(module)
    module.__dict__["_xorz_width"] = width
    module.__class__ = _classes[key]


def swap_method(module: nn.Module, owner: "Tenants") -> None:
    """For a module without parameters of its own whose method must run once per tenant."""
    key = (type(module), "compute_bias")
    if key not in _classes:
        body = {"compute_bias": _compute_bias, "__module__": type(module).__module__}
        _classes[key] = type(type(module).__name__, (type(module),), body)
    module.__dict__["_xorz_owner"] = owner
    module.__class__ = _classes[key]


def _width(module: nn.Module, site: Site) -> int | None:
    """Last dimension of what the module gives, if a compiler can be told: one input, a known output."""
    if type(module) is nn.Linear:
        return module.out_features
    if type(module) is nn.Embedding:
        return module.embedding_dim
    if site.kind == "conv1d":
        return module.nf
    if site.kind == "rows" or type(module) in (nn.LayerNorm, nn.RMSNorm):
        return next(p.size(-1) for p in module._parameters.values() if p is not None)
    return None


def restore_class(module: nn.Module) -> None:
    """Undo `swap` and `swap_method`."""
    module.__class__ = type(module).__mro__[1]
    for name in ("_xorz", "_xorz_number", "_xorz_width", "_xorz_owner"):
        module.__dict__.pop(name, None)
