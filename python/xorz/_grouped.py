"""The ops on many tenants at once, as functions, with what torch needs to trace and differentiate them."""

from typing import Any, NoReturn

import torch
from torch import Tensor

from ._ops import check_devices, check_rows

_ops = torch.ops.xorz


def _check_grouped(
    op: str,
    name: str,
    rows: Tensor,
    weight: Tensor,
    arena: Tensor,
    slots: Tensor,
    tenant_of_row: Tensor,
    dim: int,
) -> None:
    check_rows(op, name, rows, weight, dim)
    count = 1
    for size in rows.shape[:-1]:
        count = count * size
    _check_tenants(op, arena, slots, tenant_of_row, count, f"row of {name}")


def _check_tenants(op: str, arena: Tensor, slots: Tensor, tenant_of_row: Tensor, count: int, of: str) -> None:
    torch._check(
        arena.dim() == 1 and arena.dtype == torch.uint8,
        lambda: (
            f"xorz::{op}: arena must be a 1-D uint8 tensor, but is {arena.dtype} of {arena.dim()} dimensions"
        ),
    )
    torch._check(
        slots.dim() == 2 and slots.dtype == torch.int64,
        lambda: f"xorz::{op}: slots must be int64 [s, 2], but is {slots.dtype} of {slots.dim()} dimensions",
    )
    torch._check(
        slots.size(1) == 2, lambda: f"xorz::{op}: slots must be int64 [s, 2], but is [s, {slots.size(1)}]"
    )
    torch._check(
        tenant_of_row.dim() == 1 and tenant_of_row.dtype == torch.int32,
        lambda: (
            f"xorz::{op}: tenant_of_row must be int32, one for each {of}, but is {tenant_of_row.dtype} "
            f"of {tenant_of_row.dim()} dimensions"
        ),
    )
    torch._check(
        tenant_of_row.size(0) == count,
        lambda: (
            f"xorz::{op}: tenant_of_row has {tenant_of_row.size(0)} entries, but must have {count}, one for each {of}"
        ),
    )


@torch.library.register_fake("xorz::delta_linear_grouped")
def _(input, weight, biases, arena, slots, tenant_of_row, *, mode="fast"):
    op = "delta_linear_grouped"
    check_devices(
        op,
        input=input,
        weight=weight,
        biases=biases,
        arena=arena,
        slots=slots,
        tenant_of_row=tenant_of_row,
    )
    _check_grouped(op, "input", input, weight, arena, slots, tenant_of_row, 1)
    if biases is not None:
        torch._check(
            biases.dim() == 2 and biases.dtype == input.dtype,
            lambda: (
                f"xorz::{op}: biases must be {input.dtype} [s + 1, n], but is {biases.dtype} "
                f"of {biases.dim()} dimensions"
            ),
        )
        torch._check(
            biases.size(0) == slots.size(0) + 1,
            lambda: (
                f"xorz::{op}: biases has {biases.size(0)} rows, but there are {slots.size(0)} slots and the base"
            ),
        )
        torch._check(
            biases.size(1) == weight.size(0),
            lambda: (
                f"xorz::{op}: biases has {biases.size(1)} columns, but weight.shape[0] is {weight.size(0)}"
            ),
        )
    return input.new_empty((*input.shape[:-1], weight.size(0)))


@torch.library.register_fake("xorz::delta_linear_grouped_grad_input")
def _(grad, weight, arena, slots, tenant_of_row):
    op = "delta_linear_grouped_grad_input"
    check_devices(op, grad=grad, weight=weight, arena=arena, slots=slots, tenant_of_row=tenant_of_row)
    _check_grouped(op, "grad", grad, weight, arena, slots, tenant_of_row, 0)
    return grad.new_empty((*grad.shape[:-1], weight.size(1)))


@torch.library.register_fake("xorz::delta_embedding")
def _(indices, weight, arena, slots, tenant_of_row):
    op = "delta_embedding"
    check_devices(op, indices=indices, weight=weight, arena=arena, slots=slots, tenant_of_row=tenant_of_row)
    torch._check(
        indices.dtype in (torch.int64, torch.int32),
        lambda: f"xorz::{op}: indices must be int64 or int32, but is {indices.dtype}",
    )
    torch._check(
        weight.dim() == 2, lambda: f"xorz::{op}: weight must be 2-D [V, k], but has {weight.dim()} dimensions"
    )
    _check_tenants(op, arena, slots, tenant_of_row, indices.numel(), "element of indices")
    return weight.new_empty((*indices.shape, weight.size(1)))


def _frozen(op: str, weight: Tensor) -> None:
    if weight.requires_grad:
        raise RuntimeError(f"xorz::{op}: weight requires grad, but it is frozen; pass weight.detach()")


def _setup_linear(ctx, inputs, keyword_only_inputs, output):
    _input, weight, biases, arena, slots, tenant_of_row = inputs
    _frozen("delta_linear_grouped", weight)
    ctx.save_for_backward(weight, arena, slots, tenant_of_row)
    ctx.biases = biases is not None and biases.requires_grad


def _backward_linear(ctx, grad):
    weight, arena, slots, tenant_of_row = ctx.saved_tensors
    grad_input = grad_biases = None
    if ctx.needs_input_grad[0]:
        grad_input = _ops.delta_linear_grouped_grad_input(grad, weight, arena, slots, tenant_of_row)
    if ctx.biases:
        # A row of the batch adds to the bias that it was given: its slot's, or the base's, which is the last.
        base = slots.size(0)
        row = torch.where(tenant_of_row < 0, base, tenant_of_row)
        grad_biases = grad.new_zeros((base + 1, grad.size(-1)))
        grad_biases = grad_biases.index_add(0, row, grad.reshape(-1, grad.size(-1)))
    return grad_input, None, grad_biases, None, None, None


def _setup_grad(ctx, inputs, output):
    _grad, weight, arena, slots, tenant_of_row = inputs
    _frozen("delta_linear_grouped_grad_input", weight)
    ctx.save_for_backward(weight, arena, slots, tenant_of_row)


def _backward_grad(ctx, grad):
    # Linear in its argument: the gradient of x @ W is grad @ W^T.
    weight, arena, slots, tenant_of_row = ctx.saved_tensors
    grad = _ops.delta_linear_grouped(grad, weight, None, arena, slots, tenant_of_row)
    return grad, None, None, None, None


torch.library.register_autograd("xorz::delta_linear_grouped", _backward_linear, setup_context=_setup_linear)
torch.library.register_autograd(
    "xorz::delta_linear_grouped_grad_input", _backward_grad, setup_context=_setup_grad
)


def _refuse(ctx: Any, inputs: Any, output: Any) -> None:
    _frozen("delta_embedding", inputs[1])


def _no_gradient(ctx: Any, grad: Tensor) -> NoReturn:
    # Only the weight could require grad: everything else is of integers.
    raise RuntimeError("xorz::delta_embedding: it has no gradient")


torch.library.register_autograd("xorz::delta_embedding", _no_gradient, setup_context=_refuse)


def delta_linear_grouped(
    input: Tensor,
    weight: Tensor,
    arena: Tensor,
    slots: Tensor,
    tenant_of_row: Tensor,
    biases: Tensor | None = None,
    *,
    mode: str = "fast",
) -> Tensor:
    """`delta_linear` of a batch whose rows belong to different tenants of one base, in one pass over the
    base.

    Args:
        input: `[..., k]`, float32, bfloat16 or float16.
        weight: the base, `[n, k]`, contiguous, of the same dtype, or its bits as int32 or int16.
        arena: 1-D uint8, contiguous: the tenants' resident deltas (see `delta_encode`) side by side. It may
            hold others too, and be larger than memory: only bytes of slots that `tenant_of_row` uses are
            read.
        slots: int64 `[s, 2]`: byte offset (a multiple of 64) and length in the arena of each tenant's delta.
            Length 0 is an empty slot: that tenant's weights are the base's own.
        tenant_of_row: int32, a slot for each row of `input` flattened to `[rows, k]`; -1 is the base.
        biases: `[s + 1, n]`, same dtype, the base's bias last. Any stride from row to row, 0 included.
        mode: "fast"; "deterministic" (a row's bits are those of `delta_linear` on that row alone, whatever
            the batch, the other tenants and the threads); "exact" (the rows of a tenant, in their order, are
            bit-identical to `torch.nn.functional.linear` on its fine-tuned weights).

    Returns:
        `[..., n]`. Gradients flow to `input` and `biases`; weight and deltas are frozen. Slots and arena that
        a backward pass still needs must not change before it.

    On CUDA rows whose slot or delta does not fit come out as
    NaN, which the next call on that device reports. Nothing waits for the device, and a call can be captured
    in a CUDA graph; but for mode="exact", which reads who has which row, and restores one matrix at a time.

    Raises:
        RuntimeError: naming the argument, the row or the slot, and both values, where something does not fit.
    """
    return _ops.delta_linear_grouped(input, weight, biases, arena, slots, tenant_of_row, mode=mode)


def delta_linear_grouped_grad_input(
    grad: Tensor, weight: Tensor, arena: Tensor, slots: Tensor, tenant_of_row: Tensor
) -> Tensor:
    """The gradient of `delta_linear_grouped` for its input: `grad [..., n]`, row by row with its tenant's weights."""
    return _ops.delta_linear_grouped_grad_input(grad, weight, arena, slots, tenant_of_row)


def delta_embedding(
    indices: Tensor, weight: Tensor, arena: Tensor, slots: Tensor, tenant_of_row: Tensor
) -> Tensor:
    """`F.embedding` of a batch whose rows belong to different tenants of one base: rows are patched as they
    are read.

    `out[i]` is row `indices[i]` of the fine-tuned table of i's tenant, bit for bit; no table is restored. Of
    `sparse` and `raw` deltas only the rows asked are read; of an `exponent` delta whole bands of up to 256
    rows are decoded, each once per call, so prefer="speed" is the better choice for tables.

    Args:
        indices: int64 or int32 of any shape, each within 0 to V - 1.
        weight: the base's table `[V, k]`, contiguous, of any dtype that deltas know, or the bits of the
            deltas' dtype as int32 or int16.
        arena: 1-D uint8, contiguous: the tenants' resident deltas of `weight` (see `delta_encode`) side by
            side. It may hold others too, and be larger than memory: only bytes of slots that `tenant_of_row`
            uses are read.
        slots: int64 `[s, 2]`: byte offset (a multiple of 64) and length in the arena of each tenant's delta.
            Length 0 is an empty slot: that tenant's table is the base's own.
        tenant_of_row: int32 `[indices.numel()]`, a slot for each element of `indices`, row-major; -1 is the
            base.

    Returns:
        `[*indices.shape, k]` of `weight`'s dtype (bits for bits). No gradient: the weight is frozen.

    On CUDA an index outside of the table, or a slot or delta that does not fit, gives rows of NaN (all bits
    set), which the next call on that device reports. An `exponent` row is decoded from the top of its tile
    there, for each row asked.

    Raises:
        RuntimeError: naming the argument, the position or the slot, and both values, where something does not
            fit, or where `weight` requires grad in grad mode.
    """
    return _ops.delta_embedding(indices, weight, arena, slots, tenant_of_row)
