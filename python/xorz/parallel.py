"""Tensor parallelism by torch's own door: styles for `torch.distributed.tensor.parallel.parallelize_module`.

    plan = {"mlp.up": XorzColwiseParallel(), "mlp.down": XorzRowwiseParallel()}
    parallelize_module(model, mesh, plan)

Each rank keeps its part of the base's words and of the delta, cut by `delta_slice`; no fine-tuned matrix is made anywhere. The
parts are plain tensors, not DTensors: a delta is no tensor that could be sharded, and DTensor's own rules for ops are private.
Sharding as in Megatron-LM (Shoeybi et al. 2019, "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model
Parallelism").
"""

from abc import abstractmethod
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from . import _ops
from .linear import XorDeltaLinear


class _Style(ParallelStyle):
    """What both styles share: where the input is to be, and where the output goes."""

    dim: int
    wanted: Placement

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        """Describe where inputs are and outputs are to be, as for torch's own styles.

        Args:
            input_layouts: of an input that is no DTensor.
            output_layouts: of the output.
            use_local_output: whether the output is a plain tensor, this rank's part, or a DTensor.
        """
        super().__init__()
        self.input_layouts = input_layouts or self.wanted
        self.output_layouts = output_layouts or (Shard(-1) if self.dim == 0 else Replicate())
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        kind = type(self).__name__
        if not isinstance(module, XorDeltaLinear):
            raise TypeError(
                f"{kind} is for XorDeltaLinear, but the module is a {type(module).__name__}; torch's own styles are for plain "
                "layers, and an attached model is cut before it is attached"
            )
        if hasattr(module, "_xorz_whole"):
            raise ValueError(
                f"this layer was cut already, from {list(module._xorz_whole)}; {kind} is for a whole one"
            )
        if device_mesh.ndim != 1:
            raise ValueError(
                f"the mesh has {device_mesh.ndim} dimensions; {kind} takes one, mesh['tp'] for example"
            )
        self._cut(module, device_mesh)
        module.register_forward_pre_hook(partial(self._enter, mesh=device_mesh))
        module.register_forward_hook(partial(self._leave, mesh=device_mesh))
        return module

    def _cut(self, module: XorDeltaLinear, mesh: DeviceMesh) -> None:
        whole = (module.out_features, module.in_features)
        start, end = _range(whole[self.dim], mesh.size(), mesh.get_local_rank())
        words, delta = module.weight_bits, module.delta
        # Digests are compared here, once, on every rank.
        module.delta = _ops.delta_slice(delta, words, self.dim, start, end)
        # A copy, so that the whole base is let go.
        module.weight_bits = words.narrow(self.dim, start, end - start).clone(
            memory_format=torch.contiguous_format
        )
        module.out_features, module.in_features = module.weight_bits.shape
        module._xorz_whole = whole
        self._cut_bias(module, start, end)

    @abstractmethod
    def _cut_bias(self, module: XorDeltaLinear, start: int, end: int) -> None: ...

    def _enter(self, module: nn.Module, inputs: tuple[Any, ...], *, mesh: DeviceMesh) -> tuple[Any, ...]:
        x = inputs[0]
        if not isinstance(x, DTensor):
            if self.input_layouts == self.wanted:
                return _to_all(inputs, mesh) if self.dim == 0 else inputs
            x = _given(x, mesh, self.input_layouts, module._xorz_whole[1])
        x = x.redistribute(placements=[self.wanted])
        return (x.to_local(grad_placements=[Partial()] if self.dim == 0 else None), *inputs[1:])

    def _leave(self, module: nn.Module, inputs: Any, out: Tensor, *, mesh: DeviceMesh) -> Any:
        n = module._xorz_whole[0]
        made: Placement = Shard(out.dim() - 1) if self.dim == 0 else Partial()
        given = _given(out, mesh, made, n).redistribute(placements=[_of(self.output_layouts, out.dim())])
        given = self._finish(module, given)
        return given.to_local() if self.use_local_output else given

    def _finish(self, module: nn.Module, out: DTensor) -> DTensor:
        return out

    def __repr__(self) -> str:
        """The style with its layouts."""
        layouts = f"input_layouts={self.input_layouts}, output_layouts={self.output_layouts}"
        return f"{type(self).__name__}({layouts}, use_local_output={self.use_local_output})"


class XorzColwiseParallel(_Style):
    """Each rank computes some of the outputs: rows of W, delta and bias are cut. What a rank computes has the bits that one
    rank alone gives these outputs in mode="deterministic".

    By default the input is whole on every rank, and the output is cut along its last dimension.
    """

    dim, wanted = 0, Replicate()

    def _cut_bias(self, module: XorDeltaLinear, start: int, end: int) -> None:
        if module.bias is not None:
            part = module.bias.detach()[start:end].clone()
            module.bias = nn.Parameter(part, requires_grad=module.bias.requires_grad)


class XorzRowwiseParallel(_Style):
    """Each rank computes a part of every sum: columns of W and delta are cut, and ranks' sums, rounded to the dtype, are added.
    So its bits are not one rank's: each of the R sums and each of the R - 1 additions is rounded.

    By default the input is cut along its last dimension, as `XorzColwiseParallel` leaves it, and the output is whole on every
    rank. The bias is whole on every rank, and added once, to the sum.
    """

    dim, wanted = 1, Shard(-1)

    def _cut_bias(self, module: XorDeltaLinear, start: int, end: int) -> None:
        # Out of the product's sight: it is added to the sum of all ranks.
        module.total_bias, module.bias = module.bias, None

    def _finish(self, module: nn.Module, out: DTensor) -> DTensor:
        bias = module.total_bias
        if bias is None:
            return out
        mesh = out.device_mesh
        local = DTensor.from_local(bias, mesh, [Replicate()], run_check=False)
        return out + local


def _range(size: int, ranks: int, rank: int) -> tuple[int, int]:
    """The part of a rank, as `torch.chunk` and DTensor cut."""
    step = -(-size // ranks)
    return min(size, step * rank), min(size, step * (rank + 1))


def _of(layout: Placement, dims: int) -> Placement:
    """The same place with a dimension that is not negative, which is how a DTensor says it."""
    return Shard(layout.dim % dims) if isinstance(layout, Shard) else layout


def _given(local: Tensor, mesh: DeviceMesh, layout: Placement, last: int) -> DTensor:
    """This rank's part as a DTensor; a last dimension that is cut may be cut unevenly."""
    layout = _of(layout, local.dim())
    if not isinstance(layout, Shard) or layout.dim != local.dim() - 1:
        return DTensor.from_local(local, mesh, [layout], run_check=False)
    shape = torch.Size((*local.shape[:-1], last))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, [layout], run_check=False, shape=shape, stride=stride)


def _to_all(inputs: tuple[Any, ...], mesh: DeviceMesh) -> tuple[Any, ...]:
    """An input that every rank has whole: in the backward pass the ranks' gradients are added."""
    x = inputs[0]
    if not (torch.is_grad_enabled() and x.requires_grad):
        return inputs
    given = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
    return (given.to_local(grad_placements=[Partial()]), *inputs[1:])
