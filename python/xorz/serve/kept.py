"""What modules keep that was made of the model's weights before it was attached: views, results, functions that hold either.

Tenants can have no part in those, so that a fine-tune that changes such a weight is refused when it is loaded. A view is told
by its address, a result by the graph that torch keeps for gradients. What was computed under `no_grad` and copied cannot be
told.
"""

import bisect
import functools
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_NOT_LOOKED_AT = ("_parameters", "_modules", "_buffers", "_non_persistent_buffers_set", "training")
_MOST = 10_000
_DEEPEST = 6


def kept(model: nn.Module) -> dict[str, str]:
    """Name of a tensor in the model's state_dict -> who keeps something that was made of it, for messages."""
    own: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            own.setdefault(id(tensor), []).append(name)
            tensors[id(tensor)] = tensor
    spans = sorted((*_span(t), i) for i, t in tensors.items() if _has_words(t))
    # No span before the first of these reaches as far as the one asked for.
    longest = max((end - start for start, end, _ in spans), default=0)
    out: dict[str, str] = {}
    for where, module in model.named_modules():
        for attribute, leaf in _attributes(module):
            if id(leaf) in own:
                continue
            for found in _made_of(leaf, spans, longest, tensors):
                for name in own[found]:
                    out.setdefault(name, f"`{attribute}` of {where or type(module).__name__}")
    return out


def _has_words(tensor: Tensor) -> bool:
    return tensor.device.type in ("cpu", "cuda") and tensor.layout == torch.strided and tensor.numel() > 0


def _span(tensor: Tensor) -> tuple[int, int]:
    """First address of its words, and the one after the last."""
    words = sum((n - 1) * abs(step) for n, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return tensor.data_ptr(), tensor.data_ptr() + words * tensor.element_size()


def _made_of(
    leaf: Any, spans: list[tuple[int, int, int]], longest: int, tensors: Mapping[int, Tensor]
) -> Iterator[int]:
    """Ids of the model's tensors whose memory it shares, or that it was computed from."""
    if isinstance(leaf, Tensor):
        if _has_words(leaf):
            yield from _overlapping(_span(leaf), spans, longest)
        for variable in _leaves_of_graph(leaf.grad_fn):
            if id(variable) in tensors:
                yield id(variable)
        return
    described = leaf.__array_interface__
    start = described["data"][0] if described.get("data") else 0
    yield from _overlapping((start, start + max(1, leaf.nbytes)), spans, longest)


def _overlapping(asked: tuple[int, int], spans: list[tuple[int, int, int]], longest: int) -> Iterator[int]:
    at = bisect.bisect_left(spans, (asked[0] - longest, 0, 0))
    while at < len(spans) and spans[at][0] < asked[1]:
        if spans[at][1] > asked[0]:
            yield spans[at][2]
        at += 1


def _leaves_of_graph(node: Any) -> Iterator[Tensor]:
    """The tensors that a result's gradients would reach."""
    seen, todo = set(), [node]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        todo += [further for further, _ in node.next_functions]


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """(attribute, tensor or array) of all that a module holds beside a checkpoint's, also in containers and functions."""
    hooked = _recomputed(module)
    for name, value in list(module.__dict__.items()):
        if name not in _NOT_LOOKED_AT and name not in hooked:
            for leaf in _leaves(value):
                yield name, leaf
    for name in module._non_persistent_buffers_set:
        if module._buffers.get(name) is not None:
            yield name, module._buffers[name]


def _recomputed(module: nn.Module) -> set[str]:
    """Attributes that torch's own hooks make anew before each forward: old weight and spectral norms, pruning."""
    hooks = [h for h in module._forward_pre_hooks.values() if type(h).__module__.startswith("torch.nn.utils")]
    return {getattr(h, "name", getattr(h, "_tensor_name", "")) for h in hooks}


def _leaves(value: Any) -> Iterator[Any]:
    """Tensors and arrays in it, as far as one can look; of a cycle or a very long list, not all."""
    todo: list[tuple[Any, int]] = [(value, 0)]
    seen: set[int] = set()
    while todo and len(seen) < _MOST:
        value, depth = todo.pop()
        if id(value) in seen or depth > _DEEPEST:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor) or hasattr(type(value), "__array_interface__"):
            yield value
        elif not isinstance(value, (nn.Module, type, str, bytes, int, float)):
            todo += [(inner, depth + 1) for inner in _inside(value)]


def _inside(value: Any) -> Iterable[Any]:
    # Not of any mapping: there are some that read a file for each value.
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)
    if isinstance(value, functools.partial):
        return (value.func, *value.args, *value.keywords.values())
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _filled(cell)]
        return (*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
    if isinstance(value, types.MethodType):
        return (value.__func__, value.__self__)
    return list(getattr(value, "__dict__", {}).values()) if not isinstance(value, types.ModuleType) else ()


def _filled(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True
