"""A weight of the base while tenants are attached: an object that holds no words, whoever reads it and by whatever way.

Attaching swaps the content of each parameter and persistent buffer for a `Weight`, in place: every name, list, closure or
other module that refers to the tensor meets this object. What it is asked decides what it does:

- shape, dtype and the like are the base's own;
- outside of any `use`, and for tenants that do not change it, it is the base's tensor;
- products, lookups and sums row by row, where the op is known (`known`), are computed on base + delta;
- any other op gets dense values of the one active tenant, made for that call and counted (`Tenants.summary`);
- on a batch of several tenants, what is computed from weights alone is a `Weight` again, one value for each tenant;
- any other op on such a batch raises, and so does whatever would change the base.

`__torch_function__` sees what Python calls, `__torch_dispatch__` what C++ does without asking Python.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from .rows import TABLE, Table, Unknown, lead_of

trials: list[None] = []
"""As many entries as there are runs that find out where rows are, in any thread."""

Place = tuple[Any, str]
"""A site and its own name of a tensor."""


class Refused(RuntimeError):
    """An op on a weight cannot be served for a batch of several tenants."""


class Weight(Tensor):
    """One tensor of the base, or what is computed from such tensors alone, as readers meet it.

    Attributes:
        owner: the tenants.
        places: the tensors of the base that it is made of.
        base: the base's value of it: the very parameter or buffer, or what was computed from those.
        matrix: (site, name, whether it is read transposed) if products with it are computed on deltas.
        each: slots on the device -> [slots, ...], each one's own words, of what is looked up and of no row; else None.
    """

    owner: Any
    places: tuple[Place, ...]
    base: Tensor
    matrix: tuple[Any, str, bool] | None
    each: Callable[[Tensor], Tensor] | None
    _values: Callable[[int], Tensor]

    def __new__(cls, *given: Any, **options: Any) -> "Weight":
        """Whoever makes a tensor anew of a weight's own class would put it in the weight's place."""
        raise RuntimeError(
            "xorz: a weight of an attached model cannot be made anew, moved or offloaded (accelerate does so); call "
            "tenants.detach() first"
        )

    @staticmethod
    def of(raw: Tensor, places: tuple[Place, ...]) -> "Weight":
        """A tensor of the base; `places`: every site that calls it its own."""
        out = Weight._made(raw, places, lambda slot: _own_value(places, slot))
        out.matrix = (*places[0], False)
        # This attribute makes isinstance(weight, nn.Parameter) true.
        out._is_param = isinstance(raw, nn.Parameter)
        return out

    @staticmethod
    def _made(base: Tensor, places: tuple[Place, ...], values: Callable[[int], Tensor]) -> "Weight":
        out = Tensor._make_wrapper_subclass(
            Weight,
            base.size(),
            strides=base.stride(),
            dtype=base.dtype,
            layout=base.layout,
            device=base.device,
        )
        out.owner, out.places, out.base = places[0][0].owner, places, base
        out.matrix, out._values, out.each = None, values, None
        return out

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute an op on base + delta where it is known, on dense values where not; see this module's text."""
        kwargs = kwargs or {}
        if func in _ASKED:
            args, kwargs = tree_map(plain, (args, kwargs))
            return func(*args, **kwargs)
        if trials:
            rows = _tried(args, kwargs)
            if rows is not None:
                return _try(func, args, kwargs, rows)
        served = known.get(func)
        if served is not None:
            try:
                out = served(*args, **kwargs)
            except Table:
                return _of_tables(func, args, kwargs)
            except Refused:
                out = _once_each(func, args, kwargs)
                if out is NotImplemented:
                    raise
            except Unknown as error:
                weights = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Weight)]
                raise error.of(f"{op_of(func)} on `{weights[0].full()}`") from None
            if out is not NotImplemented:
                return out
        return _compute(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What reaches torch past `__torch_function__`."""
        kwargs = kwargs or {}
        for argument, given in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for leaf in tree_leaves(given):
                    if isinstance(leaf, Weight):
                        raise leaf.refuse_change(_called(func))
        return _compute(func, args, kwargs)

    def rows(self) -> Any:
        """The active map of rows, for what lies where the weight does."""
        return self.owner.now(self.base.device if self.owner.is_spread else None)

    def changed(self) -> bool:
        """Whether an active tenant has other words here, or the base's rows are to be computed as a tenant's are."""
        rows = self.owner.now()
        return rows is not None and any(site.changes(param, rows) for site, param in self.places)

    def dense(self, slot: int) -> Tensor:
        """One tenant's own words, as a plain tensor."""
        return self._values(slot)

    def by_row(self, slots: Tensor) -> Tensor:
        """[rows, ...]: of each of these slots its own words, read where they lie on the device; `Unknown` where they do not."""
        if self.each is not None:
            return self.each(slots)
        if self.matrix is None or self.matrix[2] or len(self.places) != 1 or self.dim() > 1:
            raise Unknown
        site, param = self.places[0]
        return site.stack(param)[slots.long()]

    def turned(self) -> "Weight":
        """The transposed matrix, as an object of the same kind."""
        site, param, turned = self.matrix
        out = Weight._made(self.base.t(), self.places, lambda slot: self.dense(slot).t())
        out.matrix = (site, param, not turned)
        return out

    def full(self) -> str:
        """Its full name in the model, for messages."""
        site, param = self.places[0]
        return site.full(param)

    def refuse_change(self, what: str) -> RuntimeError:
        """The error of whatever would write to the base."""
        return RuntimeError(
            f"xorz: {what} would change `{self.full()}`, which is the base of all tenants; call tenants.detach() first"
        )

    def __deepcopy__(self, memo: Any) -> Any:
        """An attached model cannot be copied or pickled."""
        self.places[0][0].__deepcopy__(None)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """An attached model cannot be copied or pickled."""
        self.places[0][0].__deepcopy__(None)


def _own_value(places: tuple[Place, ...], slot: int) -> Tensor:
    """What a tenant has in place of a tensor of the base, which may be called by several names."""
    first, *others = [site.dense(param, slot) for site, param in places]
    (site, param), rest = places[0], places[1:]
    for (other, name), value in zip(rest, others, strict=True):
        if value is not first and not (
            value.shape == first.shape and torch.equal(_bits(value), _bits(first))
        ):
            raise RuntimeError(
                f"xorz: a tensor is read that is both `{site.full(param)}` and `{other.full(name)}`; the active tenant has "
                "untied them, and which one is meant is not to be known; read it as an attribute of its module"
            )
    return first


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def plain(tensor: Any) -> Any:
    """The base's own tensor of a weight; anything else as it is."""
    return tensor.base if isinstance(tensor, Weight) else tensor


def _compute(func: Any, args: Any, kwargs: Any) -> Any:
    """Any op that is not known: on the base's tensors, or on dense ones of the one active tenant."""
    leaves = tree_leaves((args, kwargs))
    weights = [leaf for leaf in leaves if isinstance(leaf, Weight)]
    if not weights:
        return func(*args, **kwargs)
    name = _called(func)
    _refuse_changes(func, name, args, kwargs)
    changed = [w for w in weights if w.changed()]
    if not changed:
        args, kwargs = tree_map(plain, (args, kwargs))
        return func(*args, **kwargs)
    rows = changed[0].rows()
    if func in _ADDRESSES:
        raise RuntimeError(
            f"xorz: {name} asks where `{changed[0].full()}` lies while {rows.describe()} is active, whose words are nowhere"
        )
    if rows.only is None:
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        whole = len(tensors) == len(weights) or _picks(func, args) or _beside_tables(func, name, leaves, rows)
        if whole and name not in _TELLING:
            return derive(lambda slot: _on_dense(func, args, kwargs, slot), weights, name)
        out = _once_each(func, args, kwargs)
        if out is not NotImplemented:
            return out
        raise Refused(
            f"xorz: {name} reads `{changed[0].full()}` directly while {rows.describe()} are active, and no such op on it is "
            "served row by row; use one tenant at a time"
        )
    args, kwargs = with_dense(args, kwargs, rows.only)
    return func(*args, **kwargs)


def _once_each(func: Any, args: Any, kwargs: Any) -> Any:
    """Any op, once for each tenant on all rows, of which each row's is taken: where its rows are proven in what it gives."""
    name, weights = _called(func), [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Weight)]
    rows = weights[0].rows()
    if rows is None or rows.only is not None or rows.proof is None or rows.tokens:
        return NotImplemented
    if weights[0].owner.mode == "deterministic":
        return NotImplemented  # The bits of torch's own op may depend on how many rows there are.
    if _writes(name) or name in _TELLING or func in _ADDRESSES or kwargs.get("out") is not None:
        return NotImplemented
    if name.startswith("embedding"):
        return NotImplemented  # With max_norm it writes to the table.
    each, spec = [], None
    for slot in rows.used:
        leaves, spec = tree_flatten(_on_dense(func, args, kwargs, slot))
        each.append(leaves)
    merged = []
    for i, values in enumerate(zip(*each, strict=True)):
        if not all(isinstance(value, Tensor) and value.shape == values[0].shape for value in values):
            return NotImplemented
        if all(torch.equal(value, values[0]) for value in values[1:]):
            merged.append(values[0])
            continue
        layouts = {rows.where((site, op_of(func), "out", i), values[0]) for site in sites_of(weights)}
        layout = layouts.pop()
        if layouts or layout in (None, TABLE):
            return NotImplemented
        merged.append(rows.picked(layout, lead_of(values[0]), values))
    return tree_unflatten(merged, spec)


def _beside_tables(func: Any, name: str, leaves: list[Any], rows: Any) -> bool:
    """Whether all that this op is given beside weights is known to belong to no row, as `_try` has noted it."""
    weights = [leaf for leaf in leaves if isinstance(leaf, Weight)]
    others = [(i, t) for i, t in enumerate(leaves) if isinstance(t, Tensor) and not isinstance(t, Weight)]
    return (
        rows.proof is not None
        and not _writes(name)
        and all(
            rows.where((site, op_of(func), i), t) == TABLE for site in sites_of(weights) for i, t in others
        )
    )


def _tried(args: Any, kwargs: Any) -> Any:
    """The map of the run that finds out where rows are, if this is one."""
    weight = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Weight)), None)
    rows = None if weight is None else weight.owner.active.get()
    return None if rows is None or rows.probe is None else rows


def _try(func: Any, args: Any, kwargs: Any, rows: Any) -> Any:
    """On the base; what is given beside weights is noted. What is made of weights alone is a weight, as in a mixed batch."""
    leaves = tree_leaves((args, kwargs))
    weights = [leaf for leaf in leaves if isinstance(leaf, Weight)]
    _refuse_changes(func, _called(func), args, kwargs)
    others = [(i, t) for i, t in enumerate(leaves) if isinstance(t, Tensor) and not isinstance(t, Weight)]
    if not others or _picks(func, args):
        served = known.get(func)
        out = NotImplemented if served is None else served(*args, **kwargs)
        if out is not NotImplemented:
            return out
        if _called(func) not in _TELLING:
            return derive(lambda slot: _on_dense(func, args, kwargs, slot), weights, _called(func))
    else:
        noted = [rows.probe.note((site, op_of(func), i), t) for site in sites_of(weights) for i, t in others]
        if all(layout == TABLE for layout in noted) and not _writes(_called(func)):
            return _of_tables(func, args, kwargs)
    args, kwargs = tree_map(_telling, (args, kwargs))
    out = func(*args, **kwargs)
    if others:
        for i, leaf in enumerate(tree_leaves(out)):
            for site in sites_of(weights):
                rows.probe.note((site, op_of(func), "out", i), leaf)
    return out


def _telling(leaf: Any) -> Any:
    """As `plain`; but zeros (gates, scales and last layers that training began with) hide every row of what they are
    multiplied with, so that other numbers stand for them.
    """
    if not isinstance(leaf, Weight):
        return leaf
    base = leaf.base
    if not base.is_floating_point() or not base.numel() or base[(0,) * base.dim()] != 0 or base.any():
        return base
    g = torch.Generator().manual_seed(base.numel())
    return (0.5 * torch.randn(base.shape, generator=g) + 0.1).to(base.device, base.dtype)


def sites_of(weights: list[Weight]) -> list[Any]:
    """The modules whose tensors they are made of."""
    return list(dict.fromkeys(site for w in weights for site, _ in w.places))


def _of_tables(func: Any, args: Any, kwargs: Any) -> Any:
    """An op on weights and tensors that belong to no row: what it gives is as each tenant has it, whole."""
    weights = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Weight)]
    return derive(lambda slot: _on_dense(func, args, kwargs, slot), weights, _called(func))


def _on_dense(func: Any, args: Any, kwargs: Any, slot: int) -> Any:
    args, kwargs = with_dense(args, kwargs, slot)
    return func(*args, **kwargs)


def with_dense(args: Any, kwargs: Any, slot: int) -> Any:
    """Arguments with one tenant's dense values in place of weights, each made once."""
    made: dict[int, Tensor] = {}

    def own(leaf: Any) -> Any:
        if not isinstance(leaf, Weight):
            return leaf
        if id(leaf) not in made:
            made[id(leaf)] = leaf.dense(slot)
        return made[id(leaf)]

    return tree_map(own, (args, kwargs))


def _picks(func: Any, args: Any) -> bool:
    """Whether rows of a weight are taken by number: then every tenant has such rows, whatever the numbers are."""
    return func in _PICKING and isinstance(args[0] if args else None, Weight)


def derive(values: Callable[[int], Any], weights: list[Weight], what: str) -> Any:
    """What is computed from weights alone is one, too: `values(slot)` is computed when somebody needs it."""
    with torch.no_grad():
        base = values(-1)
    places = tuple(dict.fromkeys(place for w in weights for place in w.places))

    def made(index: int | None, like: Tensor) -> Weight:
        def value(slot: int) -> Tensor:
            with torch.no_grad():
                out = values(slot)
            return out if index is None else out[index]

        return Weight._made(like.detach(), places, value)

    if isinstance(base, Tensor):
        return made(None, base)
    if isinstance(base, (tuple, list)) and all(isinstance(t, Tensor) for t in base):
        return type(base)(made(i, t) for i, t in enumerate(base))
    raise Refused(
        f"xorz: {what} asks for a value of `{weights[0].full()}` while {weights[0].rows().describe()} are active, which have "
        "each their own; use one tenant at a time"
    )


def _writes(name: str) -> bool:
    """Whether an op of this name changes its first argument."""
    in_place = name.endswith("_") and not name.endswith("__") and name not in _HARMLESS
    return in_place or name == "__setitem__" or (name.startswith("__i") and name in _IN_PLACE)


def _refuse_changes(func: Any, name: str, args: Any, kwargs: Any) -> None:
    """RuntimeError for what would write to a weight."""
    writes = _writes(name)
    if writes:
        # torch.nn.init passes by name.
        for leaf in tree_leaves(args[0] if args else kwargs.get("tensor")):
            if isinstance(leaf, Weight):
                raise leaf.refuse_change(name)
    if name == "__set__" and isinstance(args[0], Weight):
        raise args[0].refuse_change(f"setting `.{func.__self__.__name__}`")
    for leaf in tree_leaves(kwargs.get("out")):
        if isinstance(leaf, Weight):
            raise leaf.refuse_change(f"{name}(out=...)")


def _called(func: Any) -> str:
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        return f"`.{getattr(func.__self__, '__name__', '?')}`"
    if isinstance(func, torch._ops.OpOverload):
        return func._schema.name.split("::")[-1]
    return name


def op_of(func: Any) -> str:
    """One name for whatever calls an op has: methods, operators, in place or not."""
    name = _called(func).strip("_")
    if f"__{name}__" in _IN_PLACE:
        name = name[1:]
    return _SAME.get(name, name)


_SAME = {"mm": "matmul", "truediv": "div", "true_divide": "div", "concat": "cat", "concatenate": "cat"}


def _get(name: str) -> Any:
    return getattr(Tensor, name).__get__


_ASKED = {
    *(
        _get(name)
        for name in (
            "shape dtype device layout ndim requires_grad is_leaf grad grad_fn itemsize nbytes _version output_nr names "
            "is_cuda is_cpu is_meta is_sparse is_quantized is_nested is_mkldnn is_mps is_xpu is_xla is_vulkan is_ipu is_maia "
            "is_mtia is_hpu is_sparse_csr _backward_hooks _post_accumulate_grad_hooks retains_grad _base name"
        ).split()
        if hasattr(Tensor, name)
    ),
    *(
        getattr(Tensor, name)
        for name in (
            "size dim numel nelement stride element_size is_floating_point is_complex is_contiguous __len__ __hash__ "
            "is_inference storage_offset is_signed ndimension get_device is_shared is_pinned has_names is_conj is_neg _is_view "
            "register_hook register_post_accumulate_grad_hook requires_grad_ retain_grad is_same_size is_set_to dim_order"
        ).split()
        if hasattr(Tensor, name)
    ),
    _get("requires_grad").__self__.__set__,
    _get("grad").__self__.__set__,
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
    torch.is_inference,
    torch.is_same_size,
}
_ADDRESSES = {
    getattr(Tensor, name)
    for name in "data_ptr untyped_storage storage _typed_storage share_memory_".split()
    if hasattr(Tensor, name)
}
_IN_PLACE = {f"__i{name}__" for name in "add sub mul div truediv pow and or xor".split()}
_HARMLESS = {"requires_grad_", "retain_grad_", "share_memory_"}
# Rows of a weight taken by number, or a weight brought into another tensor's shape or dtype: every tenant's own has that.
_PICKING = {Tensor.__getitem__, torch.index_select, Tensor.index_select, torch.select, Tensor.select}
_PICKING |= {Tensor.expand_as, Tensor.view_as, Tensor.reshape_as, Tensor.type_as}
# Functions whose result is no tensor, but depends on the words.
_TELLING = {
    "item",
    "tolist",
    "numpy",
    "__array__",
    "__bool__",
    "equal",
    "allclose",
    "__repr__",
    "__dlpack__",
    "__contains__",
}

known: dict[Any, Callable[..., Any]] = {}
"""What is computed on base + delta: function -> what to do, which may answer NotImplemented. `known_ops` fills it."""
