"""The ops of `torch.ops.xorz` as functions, and their shapes without data (fakes), which torch traces with.

Gradients and vmap are in `_transforms`; the kernels are in the library.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _core, _library, _transforms  # noqa: F401

_library.load()
_ops = torch.ops.xorz


_BITS = {torch.int32: (torch.float32,), torch.int16: (torch.bfloat16, torch.float16)}
_MODES = ("fast", "deterministic", "exact")


def check_rows(op: str, name: str, rows: Tensor, weight: Tensor, dim: int) -> None:
    """The left operand of a product beside the weight, or its bits."""
    torch._check(
        weight.dim() == 2, lambda: f"xorz::{op}: weight must be 2-D [n, k], but has {weight.dim()} dimensions"
    )
    torch._check(rows.dim() >= 1, lambda: f"xorz::{op}: {name} must have at least one dimension")
    torch._check(
        rows.size(-1) == weight.size(dim),
        lambda: (
            f"xorz::{op}: {name} has a last dimension of {rows.size(-1)}, but weight.shape[{dim}] is {weight.size(dim)}"
        ),
    )
    torch._check(
        rows.dtype in _BITS.get(weight.dtype, (weight.dtype,)),
        lambda: f"xorz::{op}: {name} is {rows.dtype}, but weight is {weight.dtype}",
    )


def _check_linear(op: str, name: str, rows: Tensor, weight: Tensor, delta: Tensor, dim: int) -> None:
    check_rows(op, name, rows, weight, dim)
    _check_delta(op, delta)


def check_devices(op: str, **tensors: Tensor | None) -> None:
    """A fake that takes tensors of several devices would answer with memory that nobody wrote."""
    given = {name: t.device for name, t in tensors.items() if t is not None}
    first, device = next(iter(given.items()))
    strays = [name for name, other in given.items() if other != device]
    torch._check(
        not strays,
        lambda: (
            f"xorz::{op}: {first} is on {device}, but {strays[0]} is on {given[strays[0]]}; all must be on one device"
        ),
    )


def _check_delta(op: str, delta: Tensor, name: str = "delta") -> None:
    torch._check(
        delta.dim() == 1 and delta.dtype == torch.uint8,
        lambda: (
            f"xorz::{op}: {name} must be a 1-D uint8 tensor, but is {delta.dtype} of {delta.dim()} dimensions"
        ),
    )


@torch.library.register_fake("xorz::delta_linear")
def _(input, weight, bias, delta, *, mode="fast"):
    check_devices("delta_linear", input=input, weight=weight, bias=bias, delta=delta)
    _check_linear("delta_linear", "input", input, weight, delta, 1)
    torch._check(
        mode in _MODES,
        lambda: f'xorz::delta_linear: mode must be "fast", "deterministic" or "exact", but is "{mode}"',
    )
    if bias is not None:
        torch._check(
            bias.dim() == 1 and bias.size(0) == weight.size(0) and bias.dtype == input.dtype,
            lambda: f"xorz::delta_linear: bias must be {input.dtype} [{weight.size(0)}]",
        )
    return input.new_empty((*input.shape[:-1], weight.size(0)))


@torch.library.register_fake("xorz::delta_linear_grad_input")
def _(grad, weight, delta):
    check_devices("delta_linear_grad_input", grad=grad, weight=weight, delta=delta)
    _check_linear("delta_linear_grad_input", "grad", grad, weight, delta, 0)
    return grad.new_empty((*grad.shape[:-1], weight.size(1)))


def _length(name: str, span: Sequence[int] | None, size: int) -> int:
    """Of a range of `size` rows or columns."""
    if span is None:
        return size
    torch._check(
        len(span) == 2,
        lambda: f"xorz::delta_restore: {name} must be a pair (first, end), but holds {len(span)} numbers",
    )
    first, end = span
    for fits in (first >= 0, end >= first, end <= size):
        torch._check(
            fits, lambda: f"xorz::delta_restore: {name} = ({first}, {end}) must lie within 0 to {size}"
        )
    return end - first


@torch.library.register_fake("xorz::delta_restore")
def _(base, delta, *, rows=None, columns=None):
    check_devices("delta_restore", base=base, delta=delta)
    _check_delta("delta_restore", delta)
    dims = base.dim()
    torch._check(
        rows is None or dims >= 2,
        lambda: f"xorz::delta_restore: rows are of a base of two dimensions or more, but base has {dims}",
    )
    torch._check(
        columns is None or dims in (1, 2),
        lambda: f"xorz::delta_restore: columns are of a base of one dimension or two, but base has {dims}",
    )
    sizes = list(base.shape)
    if rows is not None:
        sizes[0] = _length("rows", rows, sizes[0])
    if columns is not None:
        sizes[-1] = _length("columns", columns, sizes[-1])
    return base.new_empty(sizes)


@torch.library.register_fake("xorz::delta_apply_")
def _(weight, delta):
    check_devices("delta_apply_", weight=weight, delta=delta)
    _check_delta("delta_apply_", delta)


@torch.library.register_fake("xorz::delta_check")
def _(delta, base):
    check_devices("delta_check", delta=delta, base=base)
    _check_delta("delta_check", delta)


@torch.library.register_fake("xorz::delta_digest")
def _(base):
    return base.new_empty(16, dtype=torch.uint8)


def _bytes_of_unknown_length(op: str, like: Tensor) -> Tensor:
    torch._check(
        type(like) is not Tensor,
        lambda: f"xorz::{op}: the length of its result follows from values, which meta tensors have not",
    )
    length = torch.library.get_ctx().new_dynamic_size(min=0)
    return like.new_empty(length, dtype=torch.uint8)


@torch.library.register_fake("xorz::delta_encode")
def _(base, fine_tuned, *, prefer="auto"):
    check_devices("delta_encode", base=base, fine_tuned=fine_tuned)
    torch._check(
        base.dtype == fine_tuned.dtype and base.dim() == fine_tuned.dim(),
        lambda: (
            f"xorz::delta_encode: base is {base.dtype} of {base.dim()} dimensions, "
            f"but fine_tuned is {fine_tuned.dtype} of {fine_tuned.dim()}"
        ),
    )
    return _bytes_of_unknown_length("delta_encode", base)


@torch.library.register_fake("xorz::delta_slice")
def _(delta, base, dim, start, end):
    check_devices("delta_slice", delta=delta, base=base)
    _check_delta("delta_slice", delta)
    return _bytes_of_unknown_length("delta_slice", delta)


@torch.library.register_fake("xorz::delta_concat")
def _(deltas, bases, dim):
    torch._check(
        len(deltas) == len(bases) and len(deltas) > 0,
        lambda: f"xorz::delta_concat: there are {len(deltas)} deltas, but {len(bases)} bases",
    )
    numbered = {
        f"{name}[{i}]": t for name, ts in (("deltas", deltas), ("bases", bases)) for i, t in enumerate(ts)
    }
    check_devices("delta_concat", **numbered)
    for i, delta in enumerate(deltas):
        _check_delta("delta_concat", delta, f"deltas[{i}]")
    return _bytes_of_unknown_length("delta_concat", deltas[0])


def delta_linear(
    input: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None = None, *, mode: str = "fast"
) -> Tensor:
    """`input @ (weight (+) delta)^T + bias`, without building the fine-tuned matrix.

    Args:
        input: `[..., k]`, float32, bfloat16 or float16.
        weight: the base, `[n, k]`, contiguous, of the same dtype, or its bits as int32 or int16.
        delta: its resident delta, 1-D uint8 (see `delta_encode`).
        bias: the fine-tune's bias `[n]`, same dtype.
        mode: "fast"; "deterministic" (a row's bits never depend on the other rows); "exact" (bit-identical to
            `torch.nn.functional.linear` on the fine-tuned weights; float32 builds one transient matrix for
            it).

    Returns:
        `[..., n]`. Gradients flow to `input` and `bias`, in reverse and forward mode; the weight is frozen.

    On CUDA, mode="exact" restores one transient matrix, and a delta that does
    not fit gives NaN, which the next call on that device reports: no call waits for the device.

    Under `torch.func.vmap` a batch of inputs is one call on more rows; a batch of weights, deltas or biases
    is a loop of calls.

    Raises:
        RuntimeError: naming the argument and both values, where shapes, dtypes, devices or the delta do not
            fit, or where `weight` requires grad in grad mode.
    """
    return _ops.delta_linear(input, weight, bias, delta, mode=mode)


def delta_linear_grad_input(grad: Tensor, weight: Tensor, delta: Tensor) -> Tensor:
    """`grad [..., n] @ (weight (+) delta)`: the gradient of `delta_linear` for its input, `[..., k]`."""
    return _ops.delta_linear_grad_input(grad, weight, delta)


def delta_restore(
    base: Tensor,
    delta: Tensor,
    *,
    rows: tuple[int, int] | None = None,
    columns: tuple[int, int] | None = None,
) -> Tensor:
    """The fine-tuned tensor, bit for bit; of `base`'s shape and dtype (bits for bits). No gradient flows
    through it.

    With `rows=(a, b)` and `columns=(c, d)` the same as `[a:b, c:d]` of that, in memory of its own, without
    restoring the rest: only the tiles that they touch are read. `sparse` and `raw` then cost little more than
    the words asked; `exponent` is a stream, of which every tile is decoded from its start to the last word
    asked. `rows` are along dim 0 of two dimensions or more, `columns` along the last of one or two. On CUDA
    the whole is restored and cut.
    """
    return _ops.delta_restore(base, delta, rows=rows, columns=columns)


def delta_apply_(weight: Tensor, delta: Tensor) -> Tensor:
    """Turn `weight` from base into fine-tune, in place, and give it back. Its digest is checked first: what is refused has
    changed no word.

    RuntimeError if it is another base, or requires grad in grad mode. On CUDA the device checks: another base is an error of
    the next call there, or of `cuda_status`.
    """
    _ops.delta_apply_(weight, delta)
    return weight


def delta_encode(base: Tensor, fine_tuned: Tensor, *, prefer: str = "auto") -> Tensor:
    """The resident delta (1-D uint8) from `base` to `fine_tuned`: same shape, any dtype.

    `prefer`: "memory" for the smallest form; "speed" for the one that few rows are multiplied with fastest on
    any machine; "auto" for "memory" where this machine decodes it about as fast as memory is read (AVX-512
    VBMI2 and BF16), else "speed". CUDA tensors take "auto" for "speed".
    """
    return _ops.delta_encode(base, fine_tuned, prefer=prefer)


def delta_slice(delta: Tensor, base: Tensor, dim: int, start: int, end: int) -> Tensor:
    """The delta of rows (`dim` 0) or columns (`dim` 1) `start` to `end` of `base`, for tensor parallelism."""
    return _ops.delta_slice(delta, base, dim, start, end)


def delta_concat(deltas: Sequence[Tensor], bases: Sequence[Tensor], dim: int) -> Tensor:
    """The delta of `torch.cat(bases, dim)`, for fused projections."""
    if not deltas:
        raise RuntimeError("xorz::delta_concat: deltas is empty")
    return _ops.delta_concat(list(deltas), list(bases), dim)


def cuda_status(device: torch.device | int | str | None = None) -> None:
    """Raise what kernels on a CUDA device have reported since the last op there, or the last call of this.

    A kernel that meets a delta it must refuse writes NaN and reports; the next op on the device raises that, and then it is
    forgotten. A process that only replays CUDA graphs calls no op, and asks here. Nothing is waited for: call
    `torch.cuda.synchronize()` first to hear of all that was launched.

    Args:
        device: None is torch's current one.

    Raises:
        RuntimeError: the report, which names the op, the device and the slot; ValueError: no CUDA device is meant.
    """
    if device is None:
        device = torch.cuda.current_device()
    found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if found.type != "cuda":
        raise ValueError(f"device must be a CUDA device, but is {found}")
    index = torch.cuda.current_device() if found.index is None else found.index
    try:
        _core.cuda_status(index)
    except ValueError as error:
        raise RuntimeError(str(error)) from None


def delta_check(delta: Tensor, base: Tensor) -> None:
    """Validate a delta in full, and that it belongs to `base`, digest included; RuntimeError if not. On CUDA it waits."""
    _ops.delta_check(delta, base)


def delta_digest(base: Tensor) -> Tensor:
    """What deltas and packages know their base by: 16 bytes, as uint8 `[16]` on `base`'s device; of its dtype, shape and words.

    `base` is contiguous, of any shape and of a dtype that deltas know. A tree of xxh3-128 (SPEC.md): it finds mistakes, not who
    makes other words of the same digest. On CUDA nothing waits, and no word is copied to the host.

    Raises:
        RuntimeError: another dtype, or `base` is not contiguous. What earlier ops on the device have reported is not said here,
            but by the next other op, or `cuda_status`.
    """
    return _ops.delta_digest(base)
