"""Ops on weights that are computed for a batch of several tenants: products and lookups on base + delta, and ops that treat
each batch row alone, tenant by tenant on that tenant's rows.

Where the batch is, is never guessed from a size: it is the dimension that `use` was told, of the tensor that meets the weight.
A size that does not fit raises.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from . import attention, by_row, convolutions
from .rows import TABLE, RowMap, Table, Unknown, lead_of
from .site import Site
from .weight import Refused, Weight, derive, known, op_of

F = torch.nn.functional


def groups(slots: Tensor, rows: RowMap, one_by_one: bool) -> list[tuple[int, Tensor]]:
    """(slot, its rows' numbers) of each tenant, or of each row. On a GPU waits for it, but where these are the batch's rows.
    `Unknown` for the rows of a graph.
    """
    if rows.fixed is not None:
        raise Unknown
    if slots is rows.tensor:
        return rows.groups(one_by_one)
    if one_by_one:
        numbers = torch.arange(slots.numel(), device=slots.device).view(-1, 1).unbind()
        return list(zip(slots.tolist(), numbers, strict=True))
    found = [(slot, (slots == slot).nonzero()[:, 0]) for slot in rows.used]
    return [(slot, index) for slot, index in found if index.numel()]


def by_tokens(
    site: Site, rows: RowMap, x: Tensor, op: Callable[[Tensor, int], Tensor], place: tuple[str, int]
) -> Tensor:
    """`op(x's rows of a tenant, its slot)` of what depends on the last dimension of `x` alone, put together. `place`: the op's
    name, and which of its arguments x is.
    """
    lead = x.shape[:-1]
    slots = rows.rows(lead, site.flattens, site.name, (site, *place))
    flat, out = x.reshape(-1, x.size(-1)), None
    # By token, each product has the same sums in the same order whatever is beside it.
    for slot, index in groups(slots, rows, site.owner.mode == "deterministic"):
        part = op(flat.index_select(0, index), slot)
        out = part.new_empty(flat.size(0), *part.shape[1:]) if out is None else out
        out = out.index_copy(0, index, part)
    return out.view(*lead, *out.shape[1:])


def linear(input: Any, weight: Any, bias: Any = None) -> Any:
    """`F.linear` with an attached weight: one product of the batch, each row with its tenant's weight."""
    if isinstance(input, Weight) or not isinstance(weight, Weight) or not weight.changed():
        return NotImplemented
    rows = weight.rows()
    site, param, turned = weight.matrix or (*weight.places[0], True)
    if turned or not _multiplies(site, param, rows):
        if rows.only is not None and not _row_by_row(weight, F.linear):
            return NotImplemented
        return _grouped(site, rows, input, weight, bias)
    own = isinstance(bias, Weight) and bias.matrix == (site, "bias", False)
    if site.kind == "linear" and param == "weight" and (own or (bias is None and "bias" not in site.base)):
        return site.linear(rows, input, (site, "linear", 0))
    slots = rows.rows(input.shape[:-1], site.flattens, site.name, (site, "linear", 0))
    out = site.product(input, site.base[param], None, param, slots, rows.only)
    return out if bias is None else out + bias


def _multiplies(site: Site, param: str, rows: RowMap) -> bool:
    """Whether a product with this matrix is computed on base + delta; for the rows of a graph, whoever will have them."""
    return site.multiplies(param) and (rows.fixed is None or site.is_delta(param))


def _grouped(site: Site, rows: RowMap, input: Tensor, weight: Weight, bias: Any) -> Tensor:
    def one(part: Tensor, slot: int) -> Tensor:
        return F.linear(part, weight.dense(slot), bias.dense(slot) if isinstance(bias, Weight) else bias)

    return by_tokens(site, rows, input, one, ("linear", 0))


def matmul(left: Any, right: Any, is_second: bool = False, **more: Any) -> Any:
    """`left @ right`, where one of them is a weight; `is_second`: an argument comes before them."""
    if more:
        return NotImplemented
    if isinstance(left, Weight) or not isinstance(right, Weight) or right.dim() != 2 or left.dim() < 1:
        # The other matrix must have its batch before the two dimensions that are multiplied.
        other = right if isinstance(left, Weight) else left
        return elementwise(torch.matmul)(left, right) if other.dim() > 2 else NotImplemented
    rows = right.rows()
    if rows is None or not right.changed():
        return NotImplemented
    place = ("addmm", 1) if is_second else ("matmul", 0)
    if right.matrix is not None and _multiplies(*right.matrix[:2], rows):
        site, param, turned = right.matrix
        slots = rows.rows(left.shape[:-1], site.flattens, site.name, (site, *place))
        if turned:
            return site.product(left, site.base[param], None, param, slots, rows.only)
        if site.owner.mode != "exact" and site.device.type == "cpu":
            table = site.slots(param)
            return torch.ops.xorz.delta_linear_grouped_grad_input(
                left, site.base[param], site.arena.tensor, table, slots
            )
    if rows.only is not None:
        return NotImplemented
    return by_tokens(right.places[0][0], rows, left, lambda part, slot: part @ right.dense(slot), place)


def addmm(bias: Any, left: Any, right: Any, **more: Any) -> Any:
    """`bias + left @ right`."""
    if more:
        return NotImplemented
    out = matmul(left, right, is_second=True)
    return out if out is NotImplemented else out + bias


def embedding(
    input: Any, weight: Any, padding_idx: Any = None, max_norm: Any = None, *_: Any, **__: Any
) -> Any:
    """`F.embedding` with an attached table: each row looked up in its tenant's table."""
    if not isinstance(weight, Weight) or isinstance(input, Weight) or not weight.changed():
        return NotImplemented
    site, param, turned = weight.matrix or (*weight.places[0], True)
    if (
        max_norm is not None
        or turned
        or weight.dim() != 2
        or (weight.rows().fixed is not None and not site.is_delta(param))
        or any(param in own for own in list(site.values.values()))
    ):
        return NotImplemented if weight.rows().only is not None else _look_up(weight, input, max_norm)
    return embedding_rows(site, weight.rows(), input, param, place=(site, "embedding", 0))


def _look_up(weight: Weight, ids: Tensor, max_norm: Any) -> Any:
    if max_norm is not None:
        return NotImplemented
    # The place of ids is that of `ids[..., None]`.
    site, rows, place = weight.places[0][0], weight.rows(), ("embedding", 0)
    return by_tokens(site, rows, ids[..., None], lambda part, slot: weight.dense(slot)[part[:, 0]], place)


def embedding_rows(site: Site, rows: RowMap, ids: Tensor, param: str = "weight", place: Any = None) -> Tensor:
    """Rows of an embedding table, each its tenant's. `place`: see `RowMap.rows`."""
    one_row = ids.dim() == 1 or (rows.dim == 0 and ids.dim() > 1 and ids.size(0) == 1)
    single = rows.fixed is not None and len(rows.slots) == 1
    if (
        rows.only is None
        and rows.proof is None
        and not rows.tokens
        and one_row
        and not (site.flattens or single)
    ):
        # Positions, or one number for each row: no size tells which. What every tenant has there is kept, and rows are taken
        # where it meets the batch.
        return derive(lambda slot: _look_up_one(site, ids, param, slot), [site.weights[param]], site.name)
    slots = rows.rows(ids.shape, site.flattens, site.name, place)
    weight = site.base[param]
    return torch.ops.xorz.delta_embedding(ids, weight, site.arena.tensor, site.slots(param), slots)


def embedding_of_each(site: Site, ids: Tensor, slots: Tensor) -> Tensor:
    """[slots, *ids.shape, k]: the same rows of each slot's table, which are no batch's rows (positions)."""
    count, each = slots.numel(), ids.numel()
    out = torch.ops.xorz.delta_embedding(
        ids.reshape(1, each).expand(count, each).reshape(-1),
        site.base["weight"],
        site.arena.tensor,
        site.slots("weight"),
        slots.view(count, 1).expand(count, each).reshape(-1),
    )
    return out.view(count, *ids.shape, -1)


def _look_up_one(site: Site, ids: Tensor, param: str, slot: int) -> Tensor:
    slots = torch.full((ids.numel(),), slot, dtype=torch.int32, device=ids.device)
    return torch.ops.xorz.delta_embedding(ids, site.base[param], site.arena.tensor, site.slots(param), slots)


def turn(weight: Any, *_: Any) -> Any:
    """`.T` and the like: the object that products are computed with."""
    if not isinstance(weight, Weight) or weight.matrix is None or weight.dim() != 2 or not weight.changed():
        return NotImplemented
    return weight.turned()


def transpose(weight: Any, dim0: Any = None, dim1: Any = None, **names: Any) -> Any:
    """`transpose(0, 1)` of an attached matrix; other dimensions are not served here."""
    if isinstance(dim0, int) and isinstance(dim1, int) and {dim0 % 2, dim1 % 2} == {0, 1}:
        return turn(weight)
    return NotImplemented


def keep(weight: Any, *more: Any, **kwargs: Any) -> Any:
    """`detach`, `.data` and the like, which give the same words: the object itself will do."""
    return (
        weight
        if isinstance(weight, Weight) and not more and not kwargs and weight.changed()
        else NotImplemented
    )


def contiguous(weight: Any, *more: Any, **kwargs: Any) -> Any:
    """`contiguous`, of what is already."""
    is_so = isinstance(weight, Weight) and weight.is_contiguous()
    return keep(weight, *more, **kwargs) if is_so else NotImplemented


def data(weight: Any) -> Any:
    """`.data`, by which the base could be changed unnoticed: the object itself."""
    return weight


def _same(dtype: torch.dtype | None) -> Callable[..., Any]:
    """`.float()` and the like, and `.type(dtype)`, where it is what the weight is already."""

    def served(weight: Any, *more: Any, **kwargs: Any) -> Any:
        wanted = dtype if dtype is not None else more[0] if len(more) == 1 else None
        if (
            isinstance(weight, Weight)
            and not kwargs
            and wanted == weight.dtype
            and (dtype is None or not more)
        ):
            return keep(weight)
        return NotImplemented

    return served


def to(weight: Any, *args: Any, **kwargs: Any) -> Any:
    """`to`, where it is what the weight is already."""
    if (
        isinstance(weight, Weight)
        and len(args) == 1
        and not kwargs
        and args[0] in (weight.dtype, weight.base.device)
    ):
        return keep(weight)
    return NotImplemented


def elementwise(func: Any) -> Callable[..., Any]:
    """An op that keeps batch rows apart, and broadcasts: each tenant's rows with its own weights."""

    def served(*args: Any, **kwargs: Any) -> Any:
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        changed = [leaf for leaf in leaves if isinstance(leaf, Weight) and leaf.changed()]
        others = [leaf for leaf in leaves if not isinstance(leaf, Weight)]
        if not changed or changed[0].rows().only is not None or not others:
            return NotImplemented
        return _rowwise(func, args, kwargs, changed[0], max(leaf.dim() for leaf in leaves))

    return served


def in_place(func: Any) -> Callable[..., Any]:
    """An elementwise op that is written into its first tensor, whose rows must be the batch's."""
    plainly = elementwise(func)

    def served(first: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(first, Weight) or not isinstance(first, Tensor):
            return NotImplemented
        try:
            out = plainly(first, *args, **kwargs)
        except Table:
            return NotImplemented
        if out is NotImplemented:
            return out
        if out.shape != first.shape:
            raise Refused(
                f"xorz: {list(out.shape)} cannot be written into {list(first.shape)}; use one tenant at a time"
            )
        return first.copy_(out)

    return served


def set_masked(first: Any, index: Any, value: Any) -> Any:
    """`x[mask] = weight`: places that a parameter is written to, in each row its tenant's."""
    masked = isinstance(index, Tensor) and not isinstance(index, Weight) and index.dtype == torch.bool
    if isinstance(first, Weight) or not masked or not _changed(value):
        return NotImplemented
    rows, dims = value.rows(), index.dim()
    fits = dims > 0 and index.shape == first.shape[:dims] and value.dim() <= first.dim() - dims
    if rows.only is not None or rows.dim != 0 or not fits:
        return NotImplemented
    try:
        given, op = [(0, first), (1, index)], Tensor.__setitem__
        # Places of a row of `first` are that row's, whatever the mask is; a mask that no row has on or off shows none.
        known_first = rows.where((value.places[0][0], op_of(op), 0), first) == ("dim", 0)
        slots, _ = _whose(value, op, given, [first] if known_first else [first, index], lambda tensor: 0)
    except Table:
        return NotImplemented
    for slot, mine in groups(slots, rows, False):
        part = first.index_select(0, mine)
        part[index.index_select(0, mine)] = value.dense(slot)
        first.index_copy_(0, mine, part)
    return None


def own_rows(func: Any, dims: int | None = None) -> Callable[..., Any]:
    """An op whose first tensor has the batch, and that keeps its rows apart; `dims`: only if it has that many dimensions."""

    def served(*args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else None
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Weight)]
        changed = [leaf for leaf in leaves if leaf.changed()]
        if not changed or (changed[0].rows().only is not None and not _row_by_row(changed[0], func)):
            return NotImplemented
        if (
            not isinstance(first, Tensor)
            or isinstance(first, Weight)
            or (dims is not None and first.dim() != dims)
        ):
            return NotImplemented
        return _rowwise(func, args, kwargs, changed[0], None)

    return served


def convolution(func: Any, dims: int) -> Callable[..., Any]:
    """`F.conv1d` and the like: on base + delta where that is the faster way, else tenant by tenant."""
    apart = own_rows(func, dims + 2)

    def served(
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: Any = 1,
    ) -> Any:
        rest = (stride, padding, dilation, groups)
        found = convolutions.of(dims, input, weight, bias, *rest) if _changed(weight) else None
        rows = None if found is None else weight.rows()
        if rows is not None and rows.fixed is not None:
            raise Unknown
        if rows is None or (rows.only is None and rows.dim != 0) or not found.is_worth_it(rows):
            return apart(input, weight, bias, *rest)
        if rows.only is not None:
            whose = torch.full((input.size(0),), rows.only, dtype=torch.int32, device=input.device)
            return found(input, whose, rows.only)
        whose, _ = _whose(weight, func, [(0, input)], [input], lambda tensor: 0)
        has = torch.tensor([found.site.delta(found.param, slot) is not None for slot in whose.tolist()])
        if bool(has.all()):
            return found(input, whose, None)
        # Rows of the base, and of tenants with copies.
        index, others = (which.nonzero()[:, 0].to(input.device) for which in (has, ~has))
        mine = found(input[index], whose[index], None)
        out = mine.new_empty(input.size(0), *mine.shape[1:]).index_copy(0, index, mine)
        return _on_others(func, out, others, whose, input, weight, bias, *rest)

    return served


def _on_others(
    func: Any,
    out: Tensor,
    others: Tensor,
    whose: Tensor,
    input: Tensor,
    weight: Weight,
    bias: Any,
    *rest: Any,
) -> Tensor:
    """`out` with the rows `others` of a convolution on dense weights."""
    for slot, part in groups(whose[others], weight.rows(), _row_by_row(weight, func)):
        own = [w.dense(slot) if isinstance(w, Weight) else w for w in (weight, bias)]
        out = out.index_copy(0, others[part], func(input[others[part]], *own, *rest))
    return out


def _changed(weight: Any) -> bool:
    return isinstance(weight, Weight) and weight.changed()


def _row_by_row(weight: Weight, func: Any) -> bool:
    """Whether rows are to be computed one by one, since their bits may depend on how many there are."""
    return weight.owner.mode == "deterministic" and func not in _ALIKE


def _rowwise(func: Any, args: Any, kwargs: Any, weight: Weight, width: int | None) -> Any:
    """Tenant by tenant; `width`: dimensions of the result if the op broadcasts, None if its first argument has the batch."""
    rows = weight.rows()
    first = next(
        t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and not isinstance(t, Weight)
    )
    dim = rows.dim

    def at(tensor: Tensor) -> int:
        """Where the batch is in a tensor that broadcasts; negative if it is before the tensor's first dimension."""
        return dim if width is None else dim - (width - tensor.dim())

    leaves = tree_leaves((args, kwargs))
    plain = [(i, t) for i, t in enumerate(leaves) if isinstance(t, Tensor) and not isinstance(t, Weight)]
    if width is None:
        vast = [first]
    else:
        vast = [t for _, t in plain if at(t) >= 0 and t.size(at(t)) != 1]
    fixed = rows.fixed is not None
    if fixed and len(rows.slots) == 1:
        return by_row.computed(func, args, kwargs, rows.tensor, width, False)
    slots, flat = _whose(weight, func, plain, vast, at, leaves)
    if fixed:
        if func is torch.cat:
            raise Unknown
        return by_row.computed(func, args, kwargs, slots, width, weight.owner.mode == "deterministic")
    one_by_one = _row_by_row(weight, func)
    result = None
    for slot, index in groups(slots, rows, one_by_one):

        def own(leaf: Any, slot: int = slot, index: Tensor = index) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            value = leaf.dense(slot) if isinstance(leaf, Weight) else leaf
            where = dim if flat else at(leaf)
            if width is None and leaf is not first:
                return value
            if where >= 0 and leaf.dim() > where and leaf.size(where) == slots.numel():
                return value.index_select(where, index)
            return value

        mine, more = tree_map(own, (args, kwargs))
        part = func(*mine, **more)
        shape = list(part.shape)
        shape[dim] = slots.numel()
        result = part.new_empty(shape) if result is None else result
        result = result.index_copy(dim, index, part)
    return result


def _whose(
    weight: Weight, func: Any, plain: Any, vast: list[Tensor], at: Any, leaves: Sequence[Any] = ()
) -> tuple[Tensor, bool]:
    """The slot of each row of these tensors, and whether rows are flattened tokens. `plain`: (number of the argument, tensor);
    `vast`: those that have the batch, `at` what dimension.
    """
    rows, site = weight.rows(), weight.places[0][0]
    dim, first = rows.dim, plain[0][1]
    batch = len(rows.slots) if rows.only is None else first.size(dim)
    flat = all(t.dim() == 2 for t in vast) and (rows.tokens or site.flattens)
    if rows.only is None and rows.proof is not None:
        flat = _known_rows(rows, (site, op_of(func)), plain, vast, at, flat)
    if flat and vast:
        return rows.rows(vast[0].shape[:1], site.flattens, site.name), flat
    if not vast or any(t.size(at(t)) != batch for t in vast) or rows.tokens:
        shapes = [list(t.shape) for t in leaves or vast if isinstance(t, Tensor)]
        raise Refused(
            f"xorz: `{weight.full()}` meets tensors of shapes {shapes}, but the active tenants map {batch} batch rows "
            f"(dimension {dim}); use one tenant at a time"
        )
    return (rows if dim == 0 else rows.along(0)).rows((batch,), False, site.name), flat


def _known_rows(
    rows: RowMap, op: tuple[Site, str], plain: Any, vast: list[Tensor], at: Any, flat: bool
) -> bool:
    """Whether rows are flattened tokens here; raises `Table` if none of these tensors belongs to any row, and an error unless
    one is proven to be the batch's, and the others to be nothing else.
    """
    site = op[0]
    raws = {id(raw) for raw in site.raws.values()}
    places = [(i, t, TABLE if id(t) in raws else rows.where((*op, i), t)) for i, t in plain]
    if places and all(layout == TABLE for _, _, layout in places):
        raise Table
    found = [(t, layout) for _, t, layout in places if any(t is v for v in vast)]
    own = {layout for _, layout in found if layout != TABLE}
    if own == {("flat", 0)} and flat:
        return True
    for t, layout in found:
        if layout != TABLE and layout != ("dim", at(t)):
            raise Refused(str(rows.unproven(lead_of(t), site.name)))
    return False


def _attention(*args: Any, **kwargs: Any) -> Any:
    changed = [leaf for leaf in tree_leaves((args, kwargs)) if _changed(leaf)]
    if changed and changed[0].rows().fixed is not None:
        raise Unknown
    return attention.forward(*args, **kwargs)


_ELEMENTWISE = "add sub mul div true_divide multiply subtract divide maximum minimum where addcmul lerp pow rsub copysign"
_TENSOR = "__add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __pow__ add sub mul div where lerp pow"

known.update(
    {
        F.linear: linear,
        F.embedding: embedding,
        Tensor.__setitem__: set_masked,
        F.multi_head_attention_forward: _attention,
        torch.matmul: matmul,
        Tensor.matmul: matmul,
        Tensor.__matmul__: matmul,
        torch.mm: matmul,
        Tensor.mm: matmul,
        torch.addmm: addmm,
        Tensor.detach: keep,
        torch.detach: keep,
        Tensor.data.__get__: data,
        Tensor.contiguous: contiguous,
        Tensor.to: to,
        Tensor.type: _same(None),
        Tensor.float: _same(torch.float32),
        Tensor.bfloat16: _same(torch.bfloat16),
        Tensor.half: _same(torch.float16),
        Tensor.t: turn,
        torch.t: turn,
        Tensor.T.__get__: turn,
        Tensor.mT.__get__: turn,
        Tensor.H.__get__: turn,
        Tensor.mH.__get__: turn,
        Tensor.transpose: transpose,
        torch.transpose: transpose,
        Tensor.swapaxes: transpose,
        F.layer_norm: own_rows(F.layer_norm),
        F.rms_norm: own_rows(F.rms_norm),
        F.group_norm: own_rows(F.group_norm),
        F.prelu: own_rows(F.prelu),
        torch.prelu: own_rows(torch.prelu),
        F.conv1d: convolution(F.conv1d, 1),
        F.conv2d: convolution(F.conv2d, 2),
        F.conv3d: convolution(F.conv3d, 3),
        F.conv_transpose1d: own_rows(F.conv_transpose1d, 3),
        F.conv_transpose2d: own_rows(F.conv_transpose2d, 4),
        F.conv_transpose3d: own_rows(F.conv_transpose3d, 5),
        F.instance_norm: own_rows(F.instance_norm),
    }
)
for _name in _ELEMENTWISE.split():
    if hasattr(torch, _name):
        known[getattr(torch, _name)] = elementwise(getattr(torch, _name))
for _name in _TENSOR.split():
    if hasattr(Tensor, _name):
        known[getattr(Tensor, _name)] = elementwise(getattr(Tensor, _name))
for _name in ("add", "sub", "mul", "div"):
    known[getattr(Tensor, f"{_name}_")] = in_place(getattr(torch, _name))
for _name in ("add", "sub", "mul", "truediv"):
    known[getattr(Tensor, f"__i{_name}__")] = in_place(getattr(torch, _name.replace("true", "")))
# Each element is computed alone: its bits do not depend on how many there are.
_ALIKE = {
    f
    for f in known
    if getattr(f, "__name__", "").strip("_")
    in {*_ELEMENTWISE.split(), "radd", "rsub", "rmul", "truediv", "rtruediv"}
}
_ALIKE |= {F.layer_norm, F.rms_norm, F.group_norm, F.prelu, torch.prelu}


def _batch_norm(input: Any, running_mean: Any, running_var: Any, *args: Any, **kwargs: Any) -> Any:
    """In evaluation only: in training, rows are mixed on purpose."""
    training = args[2] if len(args) > 2 else kwargs.get("training", False)
    return (
        NotImplemented
        if training
        else own_rows(F.batch_norm)(input, running_mean, running_var, *args, **kwargs)
    )


def _join(tensors: Any, dim: Any = 0, **more: Any) -> Any:
    """Tensors beside each other, the batch in all of them, or expanded to it."""
    if not isinstance(tensors, (list, tuple)) or any(not isinstance(t, Tensor) for t in tensors):
        return NotImplemented
    changed = [t for t in tensors if isinstance(t, Weight) and t.changed()]
    if (
        more
        or not changed
        or changed[0].rows().only is not None
        or all(isinstance(t, Weight) for t in tensors)
    ):
        return NotImplemented
    rows = changed[0].rows()
    sizes = {t.size(rows.dim) for t in tensors if t.dim() > rows.dim}
    if not isinstance(dim, int) or dim % tensors[0].dim() == rows.dim or sizes != {len(rows.slots)}:
        return NotImplemented
    return _rowwise(torch.cat, (list(tensors), dim), {}, changed[0], tensors[0].dim())


known[F.batch_norm] = _batch_norm
known[torch.cat] = known[torch.concat] = known[torch.concatenate] = _join
_ALIKE.add(torch.cat)
