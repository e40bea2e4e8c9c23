"""`Tenants.verify`: what an attached model computes, held against dense weights on the user's own inputs, by module."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .rows import BASE, RowMap
from .site import Site

_NEAR = {torch.float32: 1e-3, torch.bfloat16: 4e-2, torch.float16: 1e-2}


def verify(
    model: nn.Module,
    modules: dict[str, nn.Module],
    name: str,
    use: Callable[[Any], Any],
    args: Any,
    kwargs: Any,
) -> None:
    """Run the model as the base and as `name`, alone and mixed, and compare; `Tenants.verify` says how."""
    with torch.no_grad():
        alone = {None: _record(model, modules, use(None), args, kwargs, None)}
        alone[name] = _record(model, modules, use(name), args, kwargs, name)
        _verify_mixed(model, modules, name, use, args, kwargs, alone)


def _verify_mixed(
    model: nn.Module,
    modules: dict[str, nn.Module],
    name: str,
    use: Callable[[Any], Any],
    args: Any,
    kwargs: Any,
    alone: dict[str | None, list[tuple[str, list[Tensor]]]],
) -> None:
    """Every row of a batch of two is what it is alone, in each module that is called as often."""
    first = next((t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)), None)
    if first is None or first.dim() == 0 or first.size(0) < 2:
        return
    names = [(name, None)[row % 2] for row in range(first.size(0))]
    mixed = _record(model, modules, use(names), args, kwargs, None)
    if any([where for where, _ in mixed] != [where for where, _ in found] for found in alone.values()):
        # Some module ran once per tenant: what the whole model gives is compared.
        mixed, alone = mixed[-1:], {n: found[-1:] for n, found in alone.items()}
    for (where, got), *others in zip(mixed, *(alone[n] for n in (name, None)), strict=True):
        wanted = {n: found for n, (_, found) in zip((name, None), others, strict=True)}
        for i, tensor in enumerate(got):
            for row, who in enumerate(names):
                want = wanted[who][i]
                if tensor.shape != want.shape or tensor.dim() == 0 or tensor.size(0) != len(names):
                    continue
                _compare(where, f"row {row} ({who!r}) of a mixed batch", tensor[row], want[row])


def _record(
    model: nn.Module, modules: dict[str, nn.Module], active: Any, args: Any, kwargs: Any, name: str | None
) -> list[tuple[str, list[Tensor]]]:
    """(module, its outputs) of each call, in order; the whole model's last. With a name: compared with dense weights, too."""
    out: list[tuple[str, list[Tensor]]] = []
    busy = False

    def hook(where: str) -> Any:
        def after(module: nn.Module, given: Any, named: Any, result: Any) -> None:
            nonlocal busy
            if busy:
                return
            site: Site = module._xorz
            rows = site.owner.now()
            if rows is not None and rows.probe is not None:
                return
            found = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
            out.append((where, [t.detach().clone() for t in found]))
            if name is not None and rows is not None and rows.only is not None and site.touched(rows):
                busy = True
                try:
                    want = _dense(site, module, rows, given, named)
                finally:
                    busy = False
                for got, wanted in zip(
                    found, [t for t in tree_leaves(want) if isinstance(t, Tensor)], strict=True
                ):
                    _compare(where, f"{name!r} alone", got, wanted)

        return after

    handles = [
        m.register_forward_hook(hook(where), with_kwargs=True) for where, m in modules.items() if where
    ]
    try:
        with active:
            result = model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    out.append(("the model", [t for t in tree_leaves(_plain(result)) if isinstance(t, Tensor)]))
    return out


def _plain(result: Any) -> Any:
    """A model's own kind of output as a tuple."""
    return (
        tuple(v for v in result.values() if isinstance(v, (Tensor, tuple)))
        if isinstance(result, dict)
        else result
    )


def _dense(site: Site, module: nn.Module, rows: RowMap, args: Any, kwargs: Any) -> Any:
    """What the module's own class gives with the tenant's tensors in place of the base's, this module's only."""
    other = object.__new__(site.original)
    other.__dict__.update(
        {k: v for k, v in module.__dict__.items() if not k.startswith("_xorz") and k != "forward"}
    )
    slot = rows.only if rows.only is not None else BASE
    for kind in ("_parameters", "_buffers"):
        other.__dict__[kind] = {
            k: site.dense(k, slot) if k in site.base else v for k, v in module.__dict__[kind].items()
        }
    if isinstance(module, nn.RNNBase):
        other.__dict__["_flat_weights"] = [
            other.__dict__["_parameters"].get(n) for n in module._flat_weights_names
        ]
    with _fused(False):
        return other.forward(*tree_map(lambda x: x, args), **kwargs)


@contextmanager
def _fused(on: bool) -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(on)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _compare(where: str, what: str, got: Tensor, want: Tensor) -> None:
    if got.shape != want.shape:
        raise ValueError(
            f"module `{where}`, {what}: gave {list(got.shape)}, but dense weights give {list(want.shape)}"
        )
    if not want.is_floating_point():
        return
    near = _NEAR.get(want.dtype, 1e-3)
    finite = torch.isfinite(want)
    scale = float(want[finite].abs().max()) if bool(finite.any()) else 0.0
    off = (got.double() - want.double()).abs()[finite]
    if off.numel() and float(off.max()) > near * scale + 1e-6:
        raise ValueError(
            f"module `{where}`, {what}: differs from what dense weights give by {float(off.max()):.3g}, of values "
            f"up to {scale:.3g}"
        )
