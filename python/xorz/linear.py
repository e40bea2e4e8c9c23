"""`XorDeltaLinear`: `nn.Linear` of a fine-tune that is never built, from the base's weight and a resident delta."""

from typing import Any

import torch
from torch import Tensor, nn

from . import _core, _ops

_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
_MODES = ("fast", "deterministic", "exact")
_SAME: Any = object()


class XorDeltaLinear(nn.Module):
    """`y = x @ (weight (+) delta)^T + bias`, in place of an `nn.Linear` of the fine-tuned weights.

    The base weight is kept as integer bits in the buffer `weight_bits`, which shares memory with the module
    it came from; `delta` is the resident delta, 1-D uint8. Both travel with `state_dict`, `torch.save`,
    `copy.deepcopy` and `.to(device)`; `torch.jit.script` and `torch.compile` take the module as it is. Only
    `bias` is trained.

    A dtype change (`.half()`, `.to(torch.float32)`) is refused with TypeError: it would ruin the bits. Under
    autocast the product is computed in the weight's own dtype, so that it stays the fine-tune's, and given in
    autocast's dtype, as by `nn.Linear`.
    """

    # These attributes are not compiled by TorchScript.
    __jit_unused_properties__ = ["weight"]  # noqa: RUF012
    __constants__ = ["in_features", "mode", "out_features"]  # noqa: RUF012
    bias: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        mode: str = "fast",
    ) -> None:
        """A layer of zeros with a delta that changes nothing, to be filled by `load_state_dict`; see `from_linear`."""
        super().__init__()
        dtype = torch.get_default_dtype() if dtype is None else dtype
        device = torch.get_default_device() if device is None else torch.device(device)
        if device.type == "meta":
            weight = torch.empty(out_features, in_features, dtype=dtype, device=device)
            delta = torch.empty(0, dtype=torch.uint8, device=device)
        else:
            weight = torch.zeros(out_features, in_features, dtype=dtype, device="cpu")
            delta = torch.ops.xorz.delta_encode(weight, weight)
        self._fill(weight.to(device), delta.to(device), mode)
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None

    def _fill(self, weight: Tensor, delta: Tensor, mode: str) -> None:
        if weight.dtype not in _BITS:
            raise TypeError(f"weight must be float32, bfloat16 or float16, but is {weight.dtype}")
        if weight.layout != torch.strided:
            raise TypeError(f"weight must be a dense tensor, but is {weight.layout}")
        if weight.is_neg():
            raise ValueError("weight is a negated view, its memory holds other words; call .resolve_neg()")
        if mode not in _MODES:
            raise ValueError(f"mode must be one of {', '.join(_MODES)}, but is {mode!r}")
        self.out_features, self.in_features = weight.shape
        self.mode = mode
        self.dtype = weight.dtype
        self.register_buffer("weight_bits", weight.detach().view(_BITS[weight.dtype]))
        self.register_buffer("delta", delta.detach())

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, delta: Tensor, *, bias: Tensor | None = _SAME, mode: str = "fast"
    ) -> "XorDeltaLinear":
        """The fine-tune of `linear`, whose weight is the base and is shared, not copied.

        Args:
            linear: the base layer, contiguous, float32, bfloat16 or float16.
            delta: resident delta of `linear.weight`, as `delta_encode` or `load_deltas` gives it.
            bias: the fine-tune's bias `[out_features]`, or None for none; left out, the base's own.
            mode: see `delta_linear`.

        Raises:
            TypeError: `linear` is no `nn.Linear`, or of a dtype that does not compute.
            ValueError: the delta is damaged or was made against another weight; both digests are named.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be an nn.Linear, but is {type(linear).__name__}")
        weight = linear.weight.detach()
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._fill(weight, delta if isinstance(delta, Tensor) else torch.empty(0), mode)
        _check(delta, weight)
        bias = linear.bias if bias is _SAME else bias
        if bias is not None and (bias.dtype != weight.dtype or tuple(bias.shape) != (self.out_features,)):
            raise ValueError(
                f"bias must be {weight.dtype} [{self.out_features}], but is {bias.dtype} {list(bias.shape)}"
            )
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
        self.bias = bias
        return self.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """An `nn.Linear` of the fine-tuned weights, bit for bit; the one place where they are built."""
        weight = _ops.delta_restore(self.weight_bits, self.delta).view(self.dtype)
        out = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        out.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            out.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return out.train(self.training)

    def check_base(self) -> None:
        """Validate the delta in full, and that `weight_bits` still is its base: nobody has trained or changed
        it since.

        Products do not look, since this reads and decodes everything: about ten times the work of one row's
        product.

        Raises:
            ValueError: the delta is damaged, or the base has changed; both digests are named.
        """
        _check(self.delta, self.weight)

    @property
    def weight(self) -> Tensor:
        """The base weight `[out_features, in_features]`, a view of `weight_bits`: not the fine-tune's (see `to_linear`)."""
        return self.weight_bits.view(self.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        if torch.jit.is_scripting():
            # TorchScript cannot ask for the CPU's autocast (torch.is_autocast_cpu_enabled crashes it): look
            # at its effect.
            probe = input.new_empty([0, 0], dtype=torch.float32)
            autocast = torch.mm(probe, probe).dtype
            if autocast != torch.float32 and input.is_floating_point() and input.dtype != torch.float64:
                rows = input.to(self.dtype)
                out = torch.ops.xorz.delta_linear(
                    rows, self.weight_bits, self.bias, self.delta, mode=self.mode
                )
                return out.to(autocast)
        else:
            device = input.device.type
            eligible = input.is_floating_point() and input.dtype != torch.float64
            if eligible and not input.is_meta and torch.is_autocast_enabled(device):
                autocast = torch.get_autocast_dtype(device)
                with torch.autocast(device, enabled=False):
                    rows = input.to(self.dtype)
                    out = torch.ops.xorz.delta_linear(
                        rows, self.weight_bits, self.bias, self.delta, mode=self.mode
                    )
                    return out.to(autocast)
        return torch.ops.xorz.delta_linear(input, self.weight_bits, self.bias, self.delta, mode=self.mode)

    def extra_repr(self) -> str:
        """Sizes, encoding and how many bits of delta there are per weight."""
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )
        text += f", dtype={str(self.dtype).removeprefix('torch.')}, mode={self.mode}"
        if self.delta.is_meta:
            return text
        bits = self.delta.numel() * 8 / max(1, self.weight_bits.numel())
        return f"{text}, encoding={_core.delta_info(self.delta).encoding}, bits_per_element={bits:.2f}"

    def _apply(self, fn: Any, recurse: bool = True) -> "XorDeltaLinear":
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.weight_bits.device))
        if probe.dtype != self.dtype:
            raise TypeError(
                f"XorDeltaLinear keeps its weight in {self.dtype}: a change to {probe.dtype} would ruin its bits; "
                "restore it with to_linear() first"
            )
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        errors = args[-1]
        before = len(errors)
        weight, delta = state_dict.get(prefix + "weight_bits"), state_dict.get(prefix + "delta")
        if weight is not None and weight.dtype != self.weight_bits.dtype:
            # torch would copy values, not bits.
            errors.append(f"{prefix}weight_bits is {weight.dtype}, but must be {self.weight_bits.dtype}")
        if delta is not None and not (delta.is_meta or self.weight_bits.is_meta):
            against = self.weight_bits if weight is None else weight
            try:
                info = _core.delta_info(delta)
                if (info.dtype, info.shape) != (self.dtype, (self.out_features, self.in_features)):
                    shape = [self.out_features, self.in_features]
                    raise ValueError(
                        f"is of {info.dtype} {list(info.shape)}, but must be of {self.dtype} {shape}"
                    )
                if len(errors) == before and not against.is_meta:
                    _check(delta.cpu(), against.detach().cpu())
            except ValueError as error:
                errors.append(f"{prefix}delta: {error}")
        bias = state_dict.get(prefix + "bias")
        if bias is not None and bias.dtype != self.dtype:
            errors.append(f"{prefix}bias is {bias.dtype}, but must be {self.dtype}")
        if len(errors) > before:
            # Nothing was copied; keys that torch would have listed as missing or unexpected are listed all
            # the same.
            _, strict, missing, _, _ = args
            expected = ["weight_bits", "delta"] + ([] if self.bias is None else ["bias"])
            missing.extend(prefix + key for key in expected if strict and prefix + key not in state_dict)
            return
        if delta is not None and delta.shape != self.delta.shape:
            # Deltas of one weight differ in length.
            self.delta = torch.empty_like(delta, device=self.delta.device)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _check(delta: Tensor, weight: Tensor) -> None:
    info = _core.delta_info(delta)
    float_dtype = weight.dtype.is_floating_point
    if (float_dtype and info.dtype != weight.dtype) or info.shape != tuple(weight.shape):
        raise ValueError(
            f"delta is of {info.dtype} {list(info.shape)}, but weight is {weight.dtype} {list(weight.shape)}"
        )
    try:
        _ops.delta_check(delta, weight)
    except RuntimeError as error:
        raise ValueError(str(error)) from None
