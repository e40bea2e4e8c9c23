"""How an attached module computes: the one place where a call of it is decided."""

from typing import Any

import torch
from torch import Tensor, nn

from . import experts, split
from .known_ops import lookup
from .rows import RowMap
from .site import Site


def call(site: Site, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What the module's `forward` does now: find the active map, and serve each row."""
    rows = site.owner.rows(site)
    if rows is None:
        # The base by default: children and readers of weights are to know.
        with site.owner.active.set(site.owner.of_base):
            return _base(site, module, args, kwargs)
    rows.begin()
    try:
        if site.serves(rows):
            return _serve(site, module, rows, args, kwargs)
        return _base(site, module, args, kwargs)
    finally:
        rows.end()


def _base(site: Site, module: nn.Module, args: Any, kwargs: Any) -> Any:
    if site.kind in ("split", "linear", "embedding") and not site.plain:
        return split.noticed(site, module, lambda: site.original.forward(module, *args, **kwargs))
    return site.original.forward(module, *args, **kwargs)


def _serve(site: Site, module: nn.Module, rows: RowMap, args: Any, kwargs: Any) -> Any:
    if site.original is nn.Linear and not site.alone(rows):
        return site.linear(rows, *args, **kwargs)
    if site.kind in ("rows", "split") or site.alone(rows):
        return split.forward(site, module, rows, args, kwargs)
    if site.kind == "experts":
        return experts.forward(site, module, rows, *args, **kwargs)
    if site.kind == "conv1d":
        return _conv1d(site, rows, *args, **kwargs)
    if site.original is nn.Embedding:
        return lookup(site, rows, *args, **kwargs)
    # A forward of its own: whoever reads its parameters there meets weights.
    if site.plain:
        return site.original.forward(module, *args, **kwargs)
    if site.derived:
        raise RuntimeError(
            f"xorz: {site.name} keeps values in `{min(site.derived)}` that may be made from its weights, and {rows.describe()} "
            "would be given another tenant's; it cannot be served"
        )
    out = split.noticed(site, module, lambda: site.original.forward(module, *args, **kwargs))
    for name in site.derived:
        # Nobody else is given it.
        module.__dict__[name] = site.known.get(name)
    return out


def _conv1d(site: Site, rows: RowMap, x: Tensor) -> Tensor:
    """transformers' Conv1D, x @ W + b: the product that is the gradient of a linear layer."""
    weight = site.base["weight"]
    slots = rows.rows(x.shape[:-1], site.flattens, site.name)
    biases = site.biases("bias")
    if site.owner.mode == "exact":
        return _conv1d_exact(site, x, weight, biases, slots)
    out = torch.ops.xorz.delta_linear_grouped_grad_input(
        x, weight, site.owner.arena.tensor, site.slots("weight"), slots
    )
    return out + biases[slots.long()].view(out.shape)


def _conv1d_exact(site: Site, x: Tensor, weight: Tensor, biases: Tensor, slots: Tensor) -> Tensor:
    """As torch computes it, tenant by tenant, on a transient matrix: no panel of W's columns has its bits."""
    flat = x.reshape(-1, x.size(-1))
    out = flat.new_empty(flat.size(0), weight.size(1))
    for slot in slots.unique().tolist():
        index = (slots == slot).nonzero()[:, 0]
        delta = site.delta("weight", slot)
        tuned = weight if delta is None else torch.ops.xorz.delta_restore(weight, delta)
        out = out.index_copy(0, index, torch.addmm(biases[slot], flat[index], tuned))
    return out.view(*x.shape[:-1], -1)
