"""How torch differentiates and maps the ops: reverse and forward mode, `torch.func`, `vmap`. The weight is always frozen."""

from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from . import _library

_library.load()
_ops = torch.ops.xorz
# Kept alive, since its registrations are dropped with it.
_registrations = torch.library.Library("xorz", "IMPL")


def _below(op: Any, keyset: Any, *args: Any, **kwargs: Any) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)


def _forward(op: Any, keyset: Any, *args: Any, **kwargs: Any) -> Tensor:
    if not torch._C._are_functorch_transforms_active():
        return _below(op, keyset, *args, **kwargs)
    # An autograd.Function's forward runs without gradients, but the transforms around this one have to see
    # the op.
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        return _below(op, keyset, *args, **kwargs)


def _is_differentiated(op: str, weight: Tensor, *others: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        if weight is not None and weight.requires_grad:  # None: the kernel says so
            raise RuntimeError(f"xorz::{op}: weight requires grad, but it is frozen; pass weight.detach()")
        if any(t is not None and t.requires_grad for t in others):
            return True
    # Only the autograd.Function knows whether tangents are computed: a compiled jvp sets no level that Python
    # could see.
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def _refuse_tangent(op: str, tangent: Tensor | None) -> None:
    if tangent is not None:
        raise RuntimeError(
            f"xorz::{op}: weight has a forward-mode tangent, but it is frozen; pass weight.detach()"
        )


# torch.library.register_autograd knows neither forward mode, where a tangent would silently be lost, nor
# torch.func.grad. The dispatcher calls the functions below once per level of torch.func transforms, hence
# `single level`.
class _Linear(_SingleLevelFunction):
    @staticmethod
    def forward(ctx, keyset, mode, input, weight, bias, delta):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight, delta)
        ctx.save_for_forward(weight, delta)
        ctx.mode, ctx.lead = mode, input.shape[:-1]
        return _forward(_ops.delta_linear.default, keyset, input, weight, bias, delta, mode=mode)

    @staticmethod
    def backward(ctx, grad):
        weight, delta = ctx.saved_tensors
        _, _, needs_input, _, needs_bias, _ = ctx.needs_input_grad
        grad_input = grad_bias = None
        if grad is not None and needs_input:
            grad_input = _ops.delta_linear_grad_input(grad, weight, delta)
        if grad is not None and needs_bias:
            grad_bias = grad.sum(tuple(range(grad.dim() - 1))) if grad.dim() > 1 else grad
        return None, None, grad_input, None, grad_bias, None

    @staticmethod
    def jvp(ctx, _keyset, _mode, input, weight, bias, _delta):
        _refuse_tangent("delta_linear", weight)
        weight, delta = ctx.saved_tensors
        if input is None:
            return None if bias is None else bias.expand(*ctx.lead, bias.size(0)).contiguous()
        return _ops.delta_linear(input, weight, bias, delta, mode=ctx.mode)


class _GradInput(_SingleLevelFunction):
    @staticmethod
    def forward(ctx, keyset, grad, weight, delta):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight, delta)
        ctx.save_for_forward(weight, delta)
        return _forward(_ops.delta_linear_grad_input.default, keyset, grad, weight, delta)

    @staticmethod
    def backward(ctx, grad):
        # Linear in its argument: the gradient of g @ W is grad @ W^T.
        weight, delta = ctx.saved_tensors
        back = None if grad is None else _ops.delta_linear(grad, weight, None, delta)
        return None, back, None, None

    @staticmethod
    def jvp(ctx, _keyset, grad, weight, _delta):
        _refuse_tangent("delta_linear_grad_input", weight)
        weight, delta = ctx.saved_tensors
        return None if grad is None else _ops.delta_linear_grad_input(grad, weight, delta)


def _linear(keyset, input, weight, bias, delta, *, mode="fast"):
    if _is_differentiated("delta_linear", weight, input, bias):
        with enable_single_level_autograd_function():
            return _Linear.apply(keyset, mode, input, weight, bias, delta)
    return _below(_ops.delta_linear.default, keyset, input, weight, bias, delta, mode=mode)


def _grad_input(keyset, grad, weight, delta):
    if _is_differentiated("delta_linear_grad_input", weight, grad):
        with enable_single_level_autograd_function():
            return _GradInput.apply(keyset, grad, weight, delta)
    return _below(_ops.delta_linear_grad_input.default, keyset, grad, weight, delta)


def _apply(keyset, weight, delta):
    # The kernel's own check sees no leaf under torch.compile, which runs it on a stand-in.
    if torch.is_grad_enabled() and weight is not None and weight.requires_grad:
        what = (
            "is a leaf that requires grad" if weight.is_leaf else "requires grad, and a delta has no gradient"
        )
        raise RuntimeError(f"xorz::delta_apply_: weight {what}; use torch.no_grad() or weight.detach()")
    _below(_ops.delta_apply_.default, keyset, weight, delta)


def _restore(keyset, base, delta, *, rows=None, columns=None):
    # The result is as frozen as the weight: it does not require grad, since torch has no gradient for it.
    return _below(_ops.delta_restore.default, keyset, base, delta, rows=rows, columns=columns)


_registrations.impl("delta_apply_", _apply, "Autograd", with_keyset=True)
_registrations.impl("delta_restore", _restore, "Autograd", with_keyset=True)
_registrations.impl("delta_linear", _linear, "Autograd", with_keyset=True)
_registrations.impl("delta_linear_grad_input", _grad_input, "Autograd", with_keyset=True)

# torch drops a call without a result or a mutation from compiled and exported programs.
torch.fx.node.has_side_effect(_ops.delta_check.default)


def _first(args: Any, in_dims: Any) -> list[Any]:
    return [arg if dim is None else arg.movedim(dim, 0) for arg, dim in zip(args, in_dims, strict=True)]


def _one_by_one(op: Any, info: Any, in_dims: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """A loop over the batch, where each sample has a matrix, a delta or a bias of its own. Kernels take contiguous ones."""
    args = _first(args, in_dims)
    if info.batch_size == 0:
        shapes = (a if d is None else a[:0].sum(0, dtype=a.dtype) for a, d in zip(args, in_dims, strict=True))
        like = op(*(s.to("meta") if isinstance(s, Tensor) else s for s in shapes), **kwargs)
        return (None, None) if like is None else (args[0].new_empty((0, *like.shape), dtype=like.dtype), 0)
    results = [
        op(*(a if d is None else a[i].contiguous() for a, d in zip(args, in_dims, strict=True)), **kwargs)
        for i in range(info.batch_size)
    ]
    return (torch.stack(results), 0) if isinstance(results[0], Tensor) else (None, None)


def _map_rows(op: Any) -> Any:
    """The rule of an op whose first argument is rows: a batch of those alone is one call on more rows."""

    def rule(info, in_dims, *args, **kwargs):
        if any(dim is not None for dim in in_dims[1:]):
            return _one_by_one(op, info, in_dims, args, kwargs)
        return op(*_first(args, in_dims), **kwargs), 0

    return rule


def _map_one_by_one(op: Any) -> Any:
    def rule(info, in_dims, *args, **kwargs):
        return _one_by_one(op, info, in_dims, args, kwargs)

    return rule


def _map_apply(info, in_dims, weight, delta):
    if in_dims[0] is None:
        raise RuntimeError(
            "xorz::delta_apply_: vmap maps delta, but not weight, which can hold one result only"
        )
    weight, delta = _first((weight, delta), in_dims)
    pairs = [
        (weight[i], delta if in_dims[1] is None else delta[i].contiguous()) for i in range(info.batch_size)
    ]
    # Check every pair before any is changed: all deltas are applied, or none.
    for one, its_delta in pairs:
        _ops.delta_check(its_delta, one)
    for one, its_delta in pairs:
        _ops.delta_apply_(one, its_delta)
    return None, None


def _refuse_map(name: str) -> Any:
    def rule(info, in_dims, *args, **kwargs):
        raise RuntimeError(
            f"xorz::{name}: deltas differ in length, so that vmap cannot stack them; loop instead"
        )

    return rule


for _name, _rule in {
    "delta_linear": _map_rows(_ops.delta_linear),
    "delta_linear_grad_input": _map_rows(_ops.delta_linear_grad_input),
    "delta_restore": _map_one_by_one(_ops.delta_restore),
    "delta_check": _map_one_by_one(_ops.delta_check),
    "delta_digest": _map_one_by_one(_ops.delta_digest),
    "delta_apply_": _map_apply,
    **{name: _refuse_map(name) for name in ("delta_encode", "delta_slice", "delta_concat")},
}.items():
    torch.library.register_vmap(f"xorz::{_name}", _rule)
