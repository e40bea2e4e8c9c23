"""Modules whose parameters no op can mix: run once per tenant on that tenant's rows, with the tenant's own small tensors.

Norms of the `x * weight` kind need no split: they take a weight for each row.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from .rows import RowMap

if TYPE_CHECKING:
    from .sites import Site

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


def forward(site: "Site", module: nn.Module, rows: RowMap, args: Any, kwargs: Any) -> Any:
    """`module(*args, **kwargs)`, each batch row with its tenant's own values."""
    if rows.only is not None and not site.row_by_row:
        return _one(site, module, rows.only, args, kwargs)
    if site.kind == "rows":
        return _rows(site, module, rows, args, kwargs)
    return _split(site, module, rows, args, kwargs)


def _one(site: "Site", module: nn.Module, slot: int, args: Any, kwargs: Any) -> Any:
    return site.clone(module, slot).forward(*args, **kwargs)


def _rows(site: "Site", module: nn.Module, rows: RowMap, args: Any, kwargs: Any) -> Any:
    """A norm that ends in `weight * x`: its weight becomes [..., k], one for each row of x."""
    from .sites import _shallow

    (x,) = args if not kwargs else (*args, *kwargs.values())
    slots = rows.rows(x.shape[:-1], site.flattens, site.name)
    weight = site.stack(module, "weight")[slots.long()].view(*x.shape[:-1], -1)
    return _shallow(module, site.original, {"weight": weight}).forward(x)


def _split(site: "Site", module: nn.Module, rows: RowMap, args: Any, kwargs: Any) -> Any:
    leaves, spec = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    for leaf in leaves:
        if not isinstance(leaf, (Tensor, *_PLAIN)):
            raise RuntimeError(
                f"xorz: {site.name} has weights of its own that differ between {rows.describe()}, and cannot be run row by "
                f"row: it was given a {type(leaf).__name__}; use one tenant at a time"
            )
    count, slots = _count(site, rows, tensors)
    if count == 0:
        return _one(site, module, rows.used[0], args, kwargs)
    if site.row_by_row:
        groups = [(int(slot), torch.tensor([row])) for row, slot in enumerate(slots)]
    else:
        groups = [(slot, (slots == slot).nonzero()[:, 0]) for slot in rows.used]
    outputs = []
    for slot, index in groups:

        def cut(leaf: Any, index: Tensor = index) -> Any:
            return leaf.index_select(0, index) if _is_batched(leaf, count) else leaf

        part_args, part_kwargs = tree_unflatten([cut(leaf) for leaf in leaves], spec)
        with site.owner.active.set(rows.uniform(slot)):
            outputs.append((index, _one(site, module, slot, part_args, part_kwargs)))
    return _merge(site, outputs, count)


def _is_batched(leaf: Any, count: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.size(0) == count


def _count(site: "Site", rows: RowMap, tensors: list[Tensor]) -> tuple[int, Tensor]:
    """Entries of the first dimension that the map speaks of, and the slot of each."""
    for tensor in tensors:
        if rows.dim == 0 and tensor.dim() > 1:
            lead = tensor.shape[:1]
            flat = site.flattens and tensor.dim() == 2
            if rows.only is not None or lead[0] == len(rows.slots) or flat or rows.tokens:
                return lead[0], rows.rows(lead, flat, site.name)
    if rows.dim == 1 and tensors and tensors[0].dim() > 2:
        raise RuntimeError(
            f"xorz: {site.name} cannot be run row by row in a model whose batch is dimension 1"
        )
    shapes = [list(t.shape) for t in tensors]
    raise RuntimeError(
        f"xorz: {site.name} was given shapes {shapes}, but the active tenants map {len(rows.slots)} batch rows; "
        "use one tenant at a time"
    )


def _merge(site: "Site", outputs: list[tuple[Tensor, Any]], count: int) -> Any:
    """Outputs of all tenants, rows back in their order; what is the same for a whole batch becomes one for each row."""
    flat = [tree_flatten(value) for _, value in outputs]
    spec = flat[0][1]
    merged = []
    for i, first in enumerate(flat[0][0]):
        if not isinstance(first, Tensor):
            merged.append(first)
            continue
        parts = [(index, leaves[i]) for (index, _), (leaves, _) in zip(outputs, flat, strict=True)]
        out = first.new_empty(count, *first.shape[1:])
        for index, part in parts:
            if part.dim() == 0 or part.size(0) not in (1, index.numel()) or part.shape[1:] != first.shape[1:]:
                raise RuntimeError(
                    f"xorz: {site.name} gave {list(part.shape)} for {index.numel()} rows; its rows cannot be told apart"
                )
            out = out.index_copy(0, index, part.expand(index.numel(), *part.shape[1:]))
        merged.append(out)
    return tree_unflatten(merged, spec)


def stacked(own: dict[int, Tensor], base: Tensor, capacity: int) -> Tensor:
    """[slots + 1, ...]: each slot's own value, the base's where it has none, and last (so that BASE = -1 finds it)."""
    table = base.detach().expand(capacity + 1, *base.shape).clone()
    for slot, value in own.items():
        table[slot] = value
    return table
