"""Ops on small weights (norms, scales, biases) whose values are read row by row from a device's tables, where nobody on the
host knows who has which row: the rows of a CUDA graph.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .rows import Unknown
from .weight import Weight

F = torch.nn.functional


def computed(func: Any, args: Any, kwargs: Any, slots: Tensor, width: int | None, one_by_one: bool) -> Any:
    """`func` with the words that the tenant of each row has.

    Args:
        func: keeps rows apart, which are dimension 0.
        args, kwargs: what it is given, weights among it.
        slots: the slot of each row, int32 on the device; of one row alone all is that row's.
        width: dimensions of the result if it broadcasts, None if its first argument has the rows.
        one_by_one: bits must be those of the row alone.

    Raises:
        Unknown: a weight lies in no table of small values, or has rows of its own.
    """
    weights = {id(leaf): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Weight)}
    try:
        own = {key: weight.by_row(slots) for key, weight in weights.items()}
    except Unknown as error:
        raise error.of(f"`{next(iter(weights.values())).full()}`") from None
    if slots.numel() == 1:
        return _with(func, args, kwargs, {key: value[0] for key, value in own.items()})
    if width is not None:
        return _with(func, args, kwargs, {key: _shaped(value, width) for key, value in own.items()})
    norm = None if one_by_one else _NORMS.get(func)
    if norm is not None:
        return norm(*_arguments(func, args, kwargs, own))
    first, *rest = args
    parts = []
    for row, part in enumerate(first.split(1)):
        mine = {key: value[row] for key, value in own.items()}
        parts.append(_with(func, (part, *rest), kwargs, mine))
    return torch.cat(parts)


def _with(func: Any, args: Any, kwargs: Any, values: dict[int, Tensor]) -> Any:
    args, kwargs = tree_map(lambda leaf: values.get(id(leaf), leaf), (args, kwargs))
    return func(*args, **kwargs)


def _shaped(value: Tensor, width: int) -> Tensor:
    """[rows, ...] as it meets a tensor of `width` dimensions whose first are the rows."""
    rows, *own = value.shape
    if len(own) == width and own[0] == 1:
        own = own[1:]
    if len(own) >= width:
        raise Unknown
    return value.view(rows, *[1] * (width - 1 - len(own)), *own)


def _arguments(func: Any, args: Any, kwargs: Any, own: dict[int, Tensor]) -> tuple[Any, ...]:
    """(x, normalized shape, weight, bias, eps) of a norm, each row's own weights as `_shaped` makes them."""
    names = ("input", "normalized_shape", "weight", "bias", "eps")
    names = names if func is F.layer_norm else tuple(name for name in names if name != "bias")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    found = [given.get(name) for name in ("input", "normalized_shape", "weight", "bias")]
    own = {key: _shaped(value, found[0].dim()) for key, value in own.items()}
    eps = given.get("eps", 1e-5 if func is F.layer_norm else None)
    return (*(own.get(id(value), value) for value in found), eps)


def _layer_norm(x: Tensor, shape: Any, weight: Any, bias: Any, eps: float) -> Tensor:
    """In f32 and rounded once, as torch's own kernel does."""
    out = F.layer_norm(x.float(), shape, eps=eps)
    return _scaled(out, weight, bias).to(x.dtype)


def _rms_norm(x: Tensor, shape: Any, weight: Any, bias: Any, eps: float | None) -> Tensor:
    if eps is None:
        # What torch takes then follows from the dtype.
        return _scaled(F.rms_norm(x, shape), weight, bias)
    return _scaled(F.rms_norm(x.float(), shape, eps=eps), weight, bias).to(x.dtype)


def _scaled(x: Tensor, weight: Any, bias: Any) -> Tensor:
    out = x
    for op, value in ((torch.mul, weight), (torch.add, bias)):
        if value is not None:
            out = op(out, value.to(x.dtype))
    return out


_NORMS: dict[Any, Callable[..., Tensor]] = {F.layer_norm: _layer_norm, F.rms_norm: _rms_norm}
