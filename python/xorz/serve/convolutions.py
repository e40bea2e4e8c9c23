"""Convolutions on base + delta: positions of the input, gathered as rows, are the input of a linear layer (im2col).

That saves the dense weight, and costs a copy of each word of the input for every place of the kernel. So it is done where a
call has few positions beside output channels (patches of an image, last stages, short sequences), for kernels that are not cut
into groups; elsewhere a dense weight made for the call, or a copy that is kept (`max_copies`), is faster. Gathered rows never
take more memory than that weight would.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .rows import RowMap
from .site import FLOATS, Site
from .weight import Weight

F = torch.nn.functional

_FEW = 3
"""Positions are few where this many times them are no more than output channels: measured, see docs/limits.md."""


class Convolution:
    """One call of torch's function for a weight [n, k, ...] without groups.

    Attributes:
        matrix: the base's weight as [n, k * places of the kernel].
        positions: of the output, for one row of the batch.
    """

    def __init__(
        self, site: Site, param: str, input: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any
    ) -> None:
        """`input` is [batch, k, ...]; the other arguments as torch's function takes them."""
        self.site, self.param, self._input = site, param, input
        weight = site.base[param]
        dims = weight.dim() - 2
        self._kernel = tuple(weight.shape[2:])
        self._stride, self._dilation = _each(stride, dims), _each(dilation, dims)
        self._padding = _pads(padding, self._kernel, self._dilation, dims)
        self.matrix = weight.view(weight.size(0), -1)
        self._bias = bias
        # A bias that no tenant changes is met as it is.
        self._is_own = bias is not None and (
            bias is site.raws.get("bias")
            or (isinstance(bias, Weight) and bias.matrix == (site, "bias", False))
        )
        sizes = zip(input.shape[2:], self._padding, self._kernel, self._stride, self._dilation, strict=True)
        self._out = tuple((n + sum(p) - d * (k - 1) - 1) // s + 1 for n, p, k, s, d in sizes)
        self.positions = math.prod(max(0, n) for n in self._out)

    def is_worth_it(self, rows: RowMap) -> bool:
        """Whether rows are few enough; of a row alone where its bits must not depend on the batch."""
        n, slots = self.matrix.size(0), [s for s in rows.used if self.site.delta(self.param, s) is not None]
        if not slots or min(self._out) <= 0:
            return False
        if not self._is_own and (
            isinstance(self._bias, Weight) or (rows.only is None and self._bias is not None)
        ):
            return False
        if self.site.owner.mode == "deterministic":
            return _FEW * self.positions <= n
        mine = self._input.size(0) if rows.only is not None else sum(slot in slots for slot in rows.slots)
        return _FEW * self.positions * mine <= n * len(slots)

    def __call__(self, x: Tensor, slots: Tensor, only: int | None) -> Tensor:
        """Of these rows of the input, int32 slots [batch], all of tenants that have a delta."""
        n, dims = self.matrix.size(0), len(self._kernel)
        pads = [side for both in reversed(self._padding) for side in both]
        padded = F.pad(x, pads) if any(pads) else x
        each = max(1, n // self.positions)
        parts = []
        for first in range(0, x.size(0), each):
            some = padded[first : first + each]
            whose = slots[first : first + each].repeat_interleave(self.positions)
            rows = self._gathered(some).reshape(whose.numel(), -1)
            parts.append(self._product(rows, whose, only))
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        out = out.view(x.size(0), *self._out, n).movedim(-1, 1)
        return out.contiguous(memory_format=_format(x, dims))

    def _product(self, rows: Tensor, slots: Tensor, only: int | None) -> Tensor:
        site, is_autocast = self.site, torch.is_autocast_enabled(rows.device.type)
        if only is None or is_autocast or self._bias is None or self._is_own:
            biases = site.biases("bias") if self._is_own else None
            out = site.product(rows, self.matrix, biases, self.param, slots, only)
            return out if self._bias is None or self._is_own else out + self._bias.to(out.dtype)
        delta = site.delta(self.param, only)
        return torch.ops.xorz.delta_linear(rows, self.matrix, self._bias, delta, mode=site.owner.mode)

    def _gathered(self, x: Tensor) -> Tensor:
        """[batch, *out, k, *kernel]: a view of the padded input."""
        batch, channels, *inner = x.stride()
        sizes = (x.size(0), *self._out, x.size(1), *self._kernel)
        steps = [step * s for step, s in zip(inner, self._stride, strict=True)]
        places = [step * d for step, d in zip(inner, self._dilation, strict=True)]
        return x.as_strided(sizes, (batch, *steps, channels, *places), x.storage_offset())


def _format(x: Tensor, dims: int) -> torch.memory_format:
    """As torch's own: channels last where the input is so, and not contiguous otherwise."""
    last = {2: torch.channels_last, 3: torch.channels_last_3d}.get(dims)
    if last is not None and not x.is_contiguous() and x.is_contiguous(memory_format=last):
        return last
    return torch.contiguous_format


def _each(value: Any, dims: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    return tuple(int(v) for v in (values * dims if len(values) == 1 else values))


def _pads(
    padding: Any, kernel: tuple[int, ...], dilation: tuple[int, ...], dims: int
) -> tuple[tuple[int, int], ...]:
    """Places added before and after each dimension."""
    if padding == "valid":
        return ((0, 0),) * dims
    if padding == "same":
        whole = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((w // 2, w - w // 2) for w in whole)
    return tuple((p, p) for p in _each(padding, dims))


def of(
    dims: int, input: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: Any
) -> Convolution | None:
    """The convolution that is asked for, if it is one that can be computed on deltas."""
    if not isinstance(weight, Weight) or weight.matrix is None or isinstance(input, Weight):
        return None
    site, param, _ = weight.matrix
    base = site.base[param]
    if groups != 1 or base.dim() != dims + 2 or base.dtype not in FLOATS or not base.is_contiguous():
        return None
    if not isinstance(input, Tensor) or input.dim() != dims + 2:
        return None
    if input.size(1) != base.size(1) or site.owner.mode == "exact" or min(input.shape) == 0:
        return None
    # Torch's function is to say what is wrong with an input.
    if input.dtype != base.dtype and not torch.is_autocast_enabled(input.device.type):
        return None
    return Convolution(site, param, input, bias, stride, padding, dilation)
