"""How an attached module computes: the one place where a call of it is decided."""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map

from . import experts, split
from .known_ops import embedding_of_each, embedding_rows
from .rows import BASE, TABLE, RowMap, Table, Unknown
from .runs import product as runs_product
from .site import Site
from .weight import Refused, Weight, derive, plain, with_dense

_is_grad_enabled = torch.is_grad_enabled
_in_backward = torch._C._current_graph_task_id
_tracing = torch._C._get_tracing_state
_transforms = torch._C._are_functorch_transforms_active
_is_autocast = torch.is_autocast_enabled
_Below = torch._C._AutoDispatchBelowAutograd
_plain_linear = torch._C._nn.linear
# What the ops' own `__call__` in Python hands its arguments on to.
_delta_linear, _grouped = (
    getattr(op, "_op", op)
    for op in (torch.ops.xorz.delta_linear.default, torch.ops.xorz.delta_linear_grouped.default)
)
_MOST_PLANS = 1 << 16


def call(site: Site, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What the module's `forward` does now: find the active map, and serve each row."""
    rows = site.owner.rows(site)
    if rows is None:
        # The base is served by default: make it the active one, for children and for readers of weights.
        with site.owner.active.set(site.owner.of_base):
            return _base(site, module, args, kwargs)
    if rows.probe is not None:
        return _try(site, module, rows, args, kwargs)
    rows.begin()
    try:
        if site.serves(rows):
            try:
                return _serve(site, module, rows, args, kwargs)
            except Table:
                return _of_table(site, module, rows, args, kwargs)
        return _base(site, module, args, kwargs)
    except Unknown as error:
        raise error.of(site.name) from None
    finally:
        rows.end()


def linear(site: Site, module: nn.Module, input: Tensor) -> Tensor:
    """`call` of an `nn.Linear`. Layers of small models take less time than a look at everything that could be: what it computes
    with is known after the first call (of a mixed batch: of that shape), and nothing is asked twice.
    """
    owner = site.owner
    rows = owner.active.get()
    if rows is None or type(input) is not Tensor:
        return call(site, module, input)
    key = site if rows.only is not None else (site, input.shape[:-1])
    plan = rows.plans.get(key)
    if (
        plan is None
        or owner.generators
        or _is_grad_enabled()
        or _in_backward() != -1
        or _tracing() is not None
        or forward_ad._current_level >= 0
        or _transforms()
        or _is_autocast(site.device.type)
    ):
        out = call(site, module, input)
        if plan is None and rows.probe is None:
            _plan(site, rows, key)
        return out
    root = rows.root
    running = root.running
    running.append(None)
    try:
        if root.closed:
            raise root.ended()
        op, given, mode = plan
        if op is _plain_linear:
            return op(input, *given)
        with _Below():
            return op(input, *given) if mode is None else op(input, *given, mode=mode)
    finally:
        running.pop()
        if root.closed:
            root.give_back()


def _plan(site: Site, rows: RowMap, key: Any) -> None:
    """Remember what these rows are computed with here, which is the same for as long as their tenants are held; nothing for
    what is special.
    """
    if len(rows.plans) > _MOST_PLANS:
        rows.plans.clear()  # a `use` that stays open meets ever more shapes
    weight, bias, mode = site.base["weight"], site.base.get("bias"), site.owner.mode
    # The op's own default is not said again: an argument by name takes half a microsecond.
    said = None if mode == "fast" else mode
    if not site.serves(rows):
        rows.plans[key] = (_plain_linear, (weight, bias), None)
    elif rows.only is None:
        try:
            slots = rows.on(site.device).rows(key[1], site.flattens, site.name, site)
        except Table:
            return
        biases = site.biases("bias")
        given = (weight, biases, *site.grouped("weight", biases), slots)
        runs = site.runs(slots, weight.dtype)
        if runs is None:
            rows.plans[key] = (_grouped, given, said)
        else:
            deltas = functools.partial(site.delta, "weight")
            rows.plans[key] = (functools.partial(runs_product, runs), (*given, deltas), None)
    elif mode != "exact" and not site.alone(rows):
        delta = site.deltas.get(("weight", rows.only))
        if bias is not None:
            bias = site.value("bias", rows.only, bias)
        if delta is not None:
            rows.plans[key] = (_delta_linear, (weight, bias, delta), said)


def _base(site: Site, module: nn.Module, args: Any, kwargs: Any) -> Any:
    if site.kind == "split" and site.plain and split.writes(site, module):
        return split.one(site, module, BASE, args, kwargs)
    if site.kind in ("split", "linear", "embedding") and not site.plain:
        return split.noticed(site, module, lambda: site.original.forward(module, *args, **kwargs))
    return site.original.forward(module, *args, **kwargs)


def _serve(site: Site, module: nn.Module, rows: RowMap, args: Any, kwargs: Any) -> Any:
    if rows.fixed is not None and site.kind in ("attention", "experts"):
        raise Unknown(site.name)
    if args and isinstance(args[0], Weight):
        return _of_weights(site, module, rows, args, kwargs)
    if site.original is nn.Linear and site.kind == "linear" and not site.alone(rows):
        return site.linear(rows, *args, **kwargs)
    # What a forward was seen to keep may be made from weights: each tenant then has an object of its own, and dense weights.
    if site.kind in ("rows", "split") or site.alone(rows) or (site.derived and _may_be_dense(site)):
        return split.forward(site, module, rows, args, kwargs)
    if (
        site.kind == "experts"
        and site.owner.mode == "exact"
        and rows.only is not None
        and not _is_eager(module)
    ):
        # The bits of whatever implementation the model was told to use, on one dense stack for the call.
        return split.one(site, module, rows.only, args, kwargs)
    if site.kind == "experts":
        return experts.forward(site, module, rows, *args, **kwargs)
    if site.kind == "conv1d":
        return _conv1d(site, rows, *args, **kwargs)
    if site.original is nn.Embedding:
        return embedding_rows(site, rows, *args, **kwargs, place=site)
    if site.kind == "attention" and rows.only is None:
        _check_attention(site, module, rows, args, kwargs)
    # A forward of its own: whoever reads its parameters there meets weights.
    if site.plain:
        return site.original.forward(module, *args, **kwargs)
    if site.derived:
        raise RuntimeError(
            f"xorz: {site.name} keeps values in `{min(site.derived)}` that may be made from its weights, and {rows.describe()} "
            'would be given another tenant\'s; it is served on dense weights, whose bits depend on the batch: use mode="fast"'
        )
    out = split.noticed(site, module, lambda: site.original.forward(module, *args, **kwargs))
    for name in site.derived:
        # Put back what was there before, so that no other tenant meets what this forward left.
        module.__dict__[name] = site.known.get(name)
    return out


def _may_be_dense(site: Site) -> bool:
    """Whether torch's own product will do, whose bits depend on the number of rows."""
    return site.owner.mode != "deterministic"


def _try(site: Site, module: nn.Module, rows: RowMap, args: Any, kwargs: Any) -> Any:
    """On the base, where what the module is given is noted; as in a mixed batch, what is of no row is each tenant's, whole."""
    given = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)][:3]
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if args and isinstance(args[0], Weight):
        rows.probe.table(site, args[0].base)
        if all(isinstance(t, Weight) for t in tensors):
            return _of_weights(site, module, rows, args, kwargs)
    noted = [
        rows.probe.note((site, i) if i else site, t) for i, t in enumerate(given) if not isinstance(t, Weight)
    ]
    if noted and all(layout == TABLE for layout in noted):
        return _of_table(site, module, rows, args, kwargs)
    args, kwargs = tree_map(plain, (args, kwargs))
    out = _base(site, module, args, kwargs)
    if site.kind == "split":
        for i, leaf in enumerate(tree_leaves(out)):
            rows.probe.note((site, "out", i), leaf)
    return out


def _of_table(site: Site, module: nn.Module, rows: RowMap, args: Any, kwargs: Any) -> Any:
    """A module that is given what belongs to no row (positions, learned queries): what it gives is as each tenant has it, or,
    if it holds nothing that a tenant could change, everyone's.
    """
    if not site.weights:
        return _base(site, module, args, kwargs)

    def values(slot: int) -> Any:
        with site.owner.active.set(rows.uniform(slot)):
            return call(site, module, *args, **kwargs)

    out = derive(values, list(site.weights.values()), site.name)
    if rows.fixed is not None and site.original is nn.Embedding and len(args) == 1:
        out.each = functools.partial(embedding_of_each, site, args[0])
    return out


def _is_eager(module: nn.Module) -> bool:
    config = getattr(module, "config", None)
    return getattr(config, "_experts_implementation", None) in (None, "eager")


def _of_weights(site: Site, module: nn.Module, rows: RowMap, args: Any, kwargs: Any) -> Any:
    """A module that is given another one's weights (a table of relative positions): what it gives is as each tenant has it."""
    if rows.only is not None and rows.probe is None:
        args, kwargs = with_dense(args, kwargs, rows.only)
        return _serve(site, module, rows, args, kwargs)
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    weights = [leaf for leaf in leaves if isinstance(leaf, Weight)]
    if len(weights) < len(leaves):
        raise Refused(f"xorz: {site.name} is given weights beside other tensors; use one tenant at a time")

    def values(slot: int) -> Any:
        mine, more = with_dense(args, kwargs, slot)
        with site.owner.active.set(rows.uniform(slot)):
            return call(site, module, *mine, **more)

    return derive(values, [*site.weights.values(), *weights], site.name)


def _check_attention(site: Site, module: nn.Module, rows: RowMap, args: Any, kwargs: Any) -> None:
    """torch's layer itself says where the batch is in what it is given; whether it is there must be known."""
    given = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)][:3]
    dim = 0 if module.batch_first else 1
    rows.aligned([((site, i) if i else site, t, dim) for i, t in enumerate(given)], site.name)


def _conv1d(site: Site, rows: RowMap, x: Tensor) -> Tensor:
    """transformers' Conv1D, x @ W + b: the product that is the gradient of a linear layer."""
    weight = site.base["weight"]
    slots = rows.rows(x.shape[:-1], site.flattens, site.name, site)
    biases = site.biases("bias")
    if site.owner.mode == "exact":
        return _conv1d_exact(site, x, weight, biases, slots)
    out = torch.ops.xorz.delta_linear_grouped_grad_input(
        x, weight, site.arena.tensor, site.slots("weight"), slots
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
