"""Modules whose parameters no op computes on as they are: run with one tenant's own tensors, on the whole batch.

For one tenant that is the module itself, in another object that shares its children. In a batch of several tenants the module
runs once as it stands, if every op that meets its weights is known (`known_ops`); else once per tenant on the whole batch,
nothing cut, and each row is taken from its tenant's run.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from .known_ops import groups
from .rows import BASE, TABLE, RowMap, Table, Unknown, lead_of
from .site import Site
from .weight import Refused, Weight, with_dense

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)
_OWN = (
    "_parameters",
    "_buffers",
    "_modules",
    "_xorz",
    "_xorz_number",
    "_xorz_width",
    "forward",
    "_old_forward",
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def forward(site: Site, module: nn.Module, rows: RowMap, args: Any, kwargs: Any) -> Any:
    """`module(*args, **kwargs)`, each batch row with its tenant's own values."""
    if site.plain:
        writes(site, module)
    mixed = rows.only is None or site.row_by_row
    if isinstance(module, nn.RNNBase) and mixed:
        return _recurrent(site, module, rows, *args, **kwargs)
    if not mixed and _convolves(site) and site.delta("weight", rows.only) is not None:
        # Whether on the delta or on a dense weight is decided where the weight meets its input.
        return site.original.forward(module, *args, **kwargs)
    if not mixed:
        return one(site, module, rows.only, args, kwargs)
    if site.kind == "rows":
        return _rows(site, module, rows, args, kwargs)
    why = None
    if not site.derived:
        try:
            return noticed(site, module, lambda: site.original.forward(module, *args, **kwargs))
        except Refused as error:
            why = error
    if rows.fixed is not None:
        raise Unknown(site.name) from why
    if rows.only is not None:
        return one(site, module, rows.only, args, kwargs)
    return _whole(site, module, rows, args, kwargs, why)


def _convolves(site: Site) -> bool:
    """Whether its forward is that of torch's convolutions, of whatever class."""
    cls = site.original
    return (
        issubclass(cls, _CONVOLUTIONS)
        and cls.forward in [c.forward for c in _CONVOLUTIONS]
        and cls._conv_forward in [c._conv_forward for c in _CONVOLUTIONS]
    )


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def one(site: Site, module: nn.Module, slot: int, args: Any, kwargs: Any) -> Any:
    """With the tensors of one tenant."""
    if slot == BASE and site.plain and writes(site, module):
        own = {name: raw.clone() for name, raw in site.base.items()}
        return shallow(module, site.original, own).forward(*args, **kwargs)
    if slot == BASE:
        return noticed(site, module, lambda: site.original.forward(module, *args, **kwargs))
    return clone(site, module, slot).forward(*args, **kwargs)


def writes(site: Site, module: nn.Module) -> bool:
    """Whether a layer of torch changes its own weights where it is run: then the base's run has a copy of them. RuntimeError
    where it would count what it is given in training.
    """
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return module.max_norm is not None
    if isinstance(module, _COUNTING) and module.training and module.running_mean is not None:
        raise RuntimeError(
            f"xorz: {site.name} is in training and would change `{site.full('running_mean')}`, which is the base of all "
            "tenants; call its eval() first"
        )
    return False


_COUNTING = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


def pristine(site: Site, module: nn.Module) -> None:
    """Remember the module's attributes as they are when it is attached, before any tenant can have left anything in them."""
    own = {id(t) for t in (*module.parameters(), *module.buffers())}
    for name, value in module.__dict__.items():
        if name in _OWN or name in _HOOKS:
            continue
        site.seen[name] = value
        site.known[name] = _copied(value)
        held = tree_leaves(value) if isinstance(value, (Tensor, dict, list, tuple)) else ()
        if any(isinstance(leaf, Tensor) and id(leaf) not in own for leaf in held):
            site.keeps.append(name)


def _copied(value: Any) -> Any:
    return type(value)(value) if type(value) in (dict, list, set) else value


def noticed(site: Site, module: nn.Module, run: Callable[[], Any]) -> Any:
    """`run()`; what it changes of the module's attributes is remembered as possibly made from weights."""
    state = module.__dict__
    before = {name: _mark(value) for name, value in state.items()}
    out = run()
    for name, value in state.items():
        if before.get(name) != _mark(value) and name not in _OWN:
            site.derived.add(name)
    return out


def _mark(value: Any) -> Any:
    """What tells that an attribute is another one, or holds more."""
    return (id(value), len(value)) if isinstance(value, (dict, list, set)) else id(value)


def clone(site: Site, module: nn.Module, slot: int) -> nn.Module:
    """The module with the tenant's own tensors; it shares children and hooks' effects, but no attribute that may hold what
    was made from weights.
    """
    found = site.clones.get(slot)
    if found is None:
        found = object.__new__(site.original)
        found.__dict__.update({name: _copied(value) for name, value in site.known.items()})
        found.__dict__.update({hooks: type(module.__dict__[hooks])() for hooks in _HOOKS})
        site.clones[slot] = found
    # Attributes that its user has set since then, never those that a forward has set.
    for name, value in module.__dict__.items():
        if site.seen.get(name, _mark) is not value and not (
            name in _OWN or name in _HOOKS or name in site.derived
        ):
            site.seen[name], site.known[name] = value, _copied(value)
            for other in list(site.clones.values()):
                other.__dict__[name] = _copied(value)
    values = dict(site.values.get(slot, {}))
    pieces = list(site.pieces.items())
    names = {name.partition(".")[0] for name, slots in pieces if slot in slots}
    transient = {name: site.dense(name, slot) for name in sorted(names)}
    if transient:
        # A copy for one call; its dense tensors are dropped with it.
        values.update(transient)
        kept, found = found, object.__new__(site.original)
        found.__dict__.update(kept.__dict__)
    for kind in ("_parameters", "_buffers"):
        found.__dict__[kind] = {
            k: values[k] if k in values else (site.raws[k] if k in site.raws else v)
            for k, v in module.__dict__[kind].items()
        }
    found.__dict__["_modules"] = module.__dict__["_modules"]
    found.__dict__["training"] = module.training
    if isinstance(module, nn.RNNBase):
        found.__dict__["_flat_weights"] = [
            found.__dict__["_parameters"].get(n) for n in module._flat_weights_names
        ]
    return found


def _rows(site: Site, module: nn.Module, rows: RowMap, args: Any, kwargs: Any) -> Any:
    """A norm that ends in `weight * x`: its weight becomes [..., k], one for each row of x."""
    (x,) = args if not kwargs else (*args, *kwargs.values())
    slots = rows.rows(x.shape[:-1], site.flattens, site.name, site)
    weight = site.stack("weight")[slots.long()].view(*x.shape[:-1], -1)
    return shallow(module, site.original, {"weight": weight}).forward(x)


def shallow(module: nn.Module, cls: type, values: dict[str, Tensor]) -> nn.Module:
    """Another module object of class `cls` that shares everything with `module` but the tensors named in `values`."""
    out = object.__new__(cls)
    out.__dict__.update(module.__dict__)
    for name in ("_xorz", "forward"):
        out.__dict__.pop(name, None)
    for kind in ("_parameters", "_buffers"):
        out.__dict__[kind] = {k: values.get(k, v) for k, v in module.__dict__[kind].items()}
    # Hooks belong to the module that is called.
    for hooks in _HOOKS:
        out.__dict__[hooks] = type(module.__dict__[hooks])()
    return out


def _recurrent(site: Site, module: Any, rows: RowMap, input: Tensor, hx: Any = None) -> Any:
    """torch's recurrent layers: the batch is dimension 0 or 1 of inputs and outputs, and 1 of every state."""
    if not isinstance(input, Tensor) or input.dim() != 3:
        raise RuntimeError(f"xorz: {site.name} needs a padded batch [.., .., k] where tenants are mixed")
    dim = 0 if module.batch_first else 1
    count = input.size(dim)
    if rows.only is None and (count != len(rows.slots) or rows.tokens):
        raise RuntimeError(
            f"xorz: {site.name} was given {count} sequences in dimension {dim}, but the active tenants map {len(rows.slots)} "
            "batch rows; give one name for each row of the batch"
        )
    if rows.only is None:
        rows.aligned([(site, input, dim)], site.name)
    slots = rows.rows((count,), False, site.name) if rows.only is not None else rows.tensor
    outputs, states, order = [], [], []
    for slot, index in groups(slots, rows, site.row_by_row):
        part = None
        if hx is not None:
            part = (
                tuple(h.index_select(1, index) for h in hx)
                if isinstance(hx, tuple)
                else hx.index_select(1, index)
            )
        with site.owner.active.set(rows.uniform(slot)):
            out, state = one(site, module, slot, (input.index_select(dim, index), part), {})
        outputs.append(out)
        states.append(state)
        order.append(index)
    back = torch.cat(order).argsort()
    output = torch.cat(outputs, dim).index_select(dim, back)
    if isinstance(states[0], tuple):
        return output, tuple(torch.cat(each, 1).index_select(1, back) for each in zip(*states, strict=True))
    return output, torch.cat(states, 1).index_select(1, back)


def block(owner: Any, name: str, rows: RowMap, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """`run(x, ...)` of a module of which is declared that its first argument is [batch, length, k] and that each row of what it
    gives, by batch or by token, is that row's: once per tenant on the whole batch, or row by row where bits must not depend
    on company.
    """
    x, *more = args if args else (kwargs.pop("hidden_states"),)
    fits = isinstance(x, Tensor) and x.dim() == 3 and not rows.tokens and rows.dim == 0
    if not fits or (rows.only is None and x.size(0) != len(rows.slots)):
        shape = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise RuntimeError(
            f"xorz: {name} was given {shape} for {len(rows.slots)} batch rows; use one tenant at a time"
        )
    if rows.only is None:
        try:
            rows.aligned([(("block", name), x, 0)], name)
        except Table:
            raise rows.unproven(lead_of(x), name) from None
    slots = rows.slots if rows.only is None else (rows.only,) * x.size(0)
    found: dict[int, list[Any]] = {}
    one_by_one, outputs, spec = owner.mode == "deterministic", [], None
    if one_by_one and any(isinstance(t, Tensor) for t in tree_leaves((more, kwargs))):
        raise RuntimeError(
            f"xorz: {name} is given other tensors beside its rows, and cannot be run row by row, as "
            'mode="deterministic" needs; use mode="fast"'
        )
    for row, slot in enumerate(slots):
        if one_by_one or slot not in found:
            given = x[row : row + 1] if one_by_one else x
            others, named = with_dense(more, kwargs, slot)
            with owner.active.set(rows.uniform(slot)):
                found[slot], spec = tree_flatten(run(given, *others, **named))
        outputs.append([_of_row(name, leaf, given, 0 if one_by_one else row) for leaf in found[slot]])
    merged = [
        torch.cat(each) if isinstance(each[0], Tensor) else each[0] for each in zip(*outputs, strict=True)
    ]
    return tree_unflatten(merged, spec)


def _of_row(name: str, leaf: Any, x: Tensor, row: int) -> Any:
    """A batch row's part of one output, by batch or by token."""
    batch, length = x.shape[:2]
    if isinstance(leaf, _PLAIN):
        return leaf
    if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.size(0) not in (batch, batch * length):
        shape = list(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
        raise RuntimeError(f"xorz: {name} gave {shape} for rows {[batch, length]}; use one tenant at a time")
    each = leaf.size(0) // batch
    return leaf[row * each : (row + 1) * each]


def apart(
    owner: Any, rows: RowMap, run: Callable[..., Any], args: Any, kwargs: Any, why: RuntimeError
) -> Any:
    """The whole model, once per tenant, since something in it cannot be served row by row; never with a cache, which each run
    would add to. Rows are taken of what it gives where it is proven to have them.

    Once it is seen to give a tenant the same on that tenant's rows alone, it is run on those.
    """
    leaves, spec = tree_flatten((args, kwargs))
    if rows.tokens or rows.proof is None or any(not isinstance(leaf, (Tensor, *_PLAIN)) for leaf in leaves):
        raise why
    found = groups(rows.tensor, rows, owner.mode == "deterministic")
    fits = [
        isinstance(t, Tensor) and t.dim() > rows.dim and t.size(rows.dim) == len(rows.slots) for t in leaves
    ]
    kind = (tuple(_shape(leaf) for leaf in leaves), rows.dim, len(found), rows.used)

    def cut(which: list[bool]) -> Any:
        parts = []
        for slot, index in found:
            mine = [
                leaf.index_select(rows.dim, index.to(leaf.device)) if w else leaf
                for leaf, w in zip(leaves, which, strict=True)
            ]
            mine, more = tree_unflatten(mine, spec)
            with owner.active.set(rows.uniform(slot)):
                parts.append(opened(run(*mine, **more)))
        return _together(parts, [index for _, index in found], rows.dim, why)

    known = owner.cut.get(kind)
    if known is not None and any(known):
        return cut(known)
    whole = _picked(owner, rows, run, args, kwargs, why)
    if known is None:
        # A load in another thread may forget it at once.
        known = owner.cut[kind] = _cuts(cut, fits, whole)
    if owner.mode == "deterministic":
        # Bits are not to depend on who else is in the batch.
        if not any(known):
            raise why
        return cut(known)
    return whole


def _cuts(cut: Callable[[list[bool]], Any], fits: list[bool], whole: Any) -> list[bool]:
    """Which inputs may be cut into tenants' rows, so that it gives what it gives on the whole batch; none if that is not so."""
    first = [fit and i == fits.index(True) for i, fit in enumerate(fits)]
    for which in (fits, first):
        try:
            if any(which) and _alike(opened(cut(which))[1], opened(whole)[1]):
                return which
        except (RuntimeError, ValueError, IndexError, TypeError):
            continue
    return [False] * len(fits)


def _picked(
    owner: Any, rows: RowMap, run: Callable[..., Any], args: Any, kwargs: Any, why: RuntimeError
) -> Any:
    """Each tenant's rows of what the model gives with that tenant on the whole batch."""
    merged, each = [], []
    for slot in rows.used:
        with owner.active.set(rows.uniform(slot)):
            each.append(opened(run(*args, **kwargs)))
    for i, values in enumerate(zip(*(leaves for _, leaves in each), strict=True)):
        first = values[0]
        if not isinstance(first, Tensor) or all(
            t.shape == first.shape and torch.equal(t, first) for t in values[1:]
        ):
            if not isinstance(first, (Tensor, *_PLAIN)):
                raise why
            merged.append(first)
            continue
        layout = rows.where(("output", i), first)
        if layout is None or layout == TABLE or any(t.shape != first.shape for t in values):
            raise why
        merged.append(rows.picked(layout, lead_of(first), values))
    return each[0][0](merged)


def _shape(leaf: Any) -> Any:
    return tuple(leaf.shape) if isinstance(leaf, Tensor) else None


def _together(parts: list[Any], order: list[Tensor], dim: int, why: RuntimeError) -> Any:
    """Outputs of parts of a batch as the whole one's."""
    back, merged = torch.cat(order).argsort(), []
    for each in zip(*(found for _, found in parts), strict=True):
        if all(isinstance(t, _PLAIN) for t in each):
            merged.append(each[0])
        elif all(_has(t, dim, index.numel()) for t, index in zip(each, order, strict=True)):
            merged.append(torch.cat(each, dim).index_select(dim, back.to(each[0].device)))
        else:
            raise why
    return parts[0][0](merged)


def _alike(ones: list[Any], others: list[Any]) -> bool:
    """Whether two outputs are the same but for what the order of sums does."""
    if len(ones) != len(others):
        return False
    for a, b in zip(ones, others, strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            if a.shape != b.shape or a.dtype != b.dtype:
                return False
            near = 1e-3 if a.dtype in (torch.float32, torch.float64) else 5e-2
            scale = float(b[b.isfinite()].abs().max()) if bool(b.isfinite().any()) else 0.0
            off = (a.double() - b.double()).abs()
            if a.is_floating_point() and bool(((off > near * scale) & b.isfinite()).any()):
                return False
        elif isinstance(a, Tensor) or isinstance(b, Tensor):
            return False
    return True


def settled(out: Any, rows: RowMap) -> Any:
    """What a model gives, with rows taken of what is each tenant's still."""
    if not any(isinstance(leaf, Weight) for leaf in tree_leaves(opened(out)[1])):
        return out
    build, leaves = opened(out)
    done = []
    for leaf in leaves:
        if isinstance(leaf, Weight):
            if rows.tokens or rows.proof is not None or not _has(leaf, rows.dim, len(rows.slots)):
                raise Refused(
                    f"xorz: an output {list(leaf.shape)} is made of `{leaf.full()}` alone; use one tenant at a time"
                )
            whole = leaf.dense(rows.used[0]).clone()
            for slot, index in rows.on(leaf.base.device).groups(False):
                part = leaf.dense(slot).index_select(rows.dim, index)
                whole = whole.index_copy(rows.dim, index, part)
            leaf = whole
        done.append(leaf)
    return build(done)


def _has(value: Any, dim: int, count: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > dim and value.size(dim) == count


def opened(out: Any) -> tuple[Callable[[list[Any]], Any], list[Any]]:
    """How an output is put together again, and its parts."""
    if isinstance(out, Mapping) and hasattr(out, "to_tuple"):
        keys, nested = list(out.keys()), [opened(v) for v in out.values()]
    elif isinstance(out, (tuple, list)):
        keys, nested = None, [opened(v) for v in out]
    else:
        return (lambda flat: flat[0]), [out]
    sizes = [len(parts) for _, parts in nested]

    def together(flat: list[Any]) -> Any:
        at, values = 0, []
        for (build, _), size in zip(nested, sizes, strict=True):
            values.append(build(flat[at : at + size]))
            at += size
        return type(out)(values) if keys is None else type(out)(**dict(zip(keys, values, strict=True)))

    return together, [part for _, parts in nested for part in parts]


def _whole(
    site: Site,
    module: nn.Module,
    rows: RowMap,
    args: Any,
    kwargs: Any,
    why: RuntimeError | None,
) -> Any:
    """Any other module, once per tenant on the whole batch, nothing cut. Rows are taken from outputs that have as many of
    them as there are names in the batch's dimension and in no other; what could be two things is refused.
    """
    leaves, _ = tree_flatten((args, kwargs))
    strange = [leaf for leaf in leaves if not isinstance(leaf, (Tensor, *_PLAIN))]
    if strange:
        raise RuntimeError(
            f"xorz: {site.name} has weights of its own that differ between {rows.describe()}, and cannot be run once for each: "
            f"it was given a {type(strange[0]).__name__}; use one tenant at a time"
            + (f" ({why})" if why else "")
        )
    inputs = [t for t in leaves if isinstance(t, Tensor) and t.dim() > 1]
    if rows.proof is None:
        _sure(site, rows, inputs, "was given")
    outputs = []
    for slot in rows.used:
        with site.owner.active.set(rows.uniform(slot)):
            outputs.append(tree_flatten(one(site, module, slot, args, kwargs)))
    spec = outputs[0][1]
    merged = []
    for i, first in enumerate(outputs[0][0]):
        if not isinstance(first, Tensor):
            merged.append(first)
            continue
        each = [found[i] for found, _ in outputs]
        if all(t.shape == first.shape and torch.equal(t, first) for t in each[1:]):
            merged.append(first)
            continue
        if rows.proof is None:
            _sure(site, rows, [first], "gave")
        layout = rows.where((site, "out", i), first)
        if layout is None or layout == TABLE:
            raise rows.unproven(lead_of(first), f"whoever takes what {site.name} gives")
        merged.append(rows.picked(layout, lead_of(first), each))
    return tree_unflatten(merged, spec)


def _sure(site: Site, rows: RowMap, tensors: list[Tensor], did: str) -> None:
    """RuntimeError unless the batch is in its dimension of one of these tensors, and can be nowhere else in any."""
    batch, dim = len(rows.slots), rows.dim
    places = [[i for i, size in enumerate(t.shape) if size == batch] for t in tensors]
    if rows.tokens or [dim] not in places or any(p not in ([], [dim]) for p in places):
        shapes = [list(t.shape) for t in tensors]
        raise RuntimeError(
            f"xorz: {site.name} {did} shapes {shapes}, but the active tenants map {batch} batch rows (dimension {dim}): where "
            "those are is not to be known for sure; use one tenant at a time, or another number of rows"
        )
