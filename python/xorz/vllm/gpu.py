"""What of an engine on a GPU is not served: said when it starts, by name, and what to do instead.

Whatever is not refused here computes there by the code that serves the CPU: the same layers, rows and slots, at fixed addresses
in the device's memory, which captured CUDA graphs read anew at each replay.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from . import pieces

LEAST_CAPABILITY = 80
"""Of the CUDA kernels: 8.0."""

_WHERE_OTHERS_READ = "vllm.models."
"""Models whose layers vLLM writes anew for one make of GPU, with kernels of their own."""


def unserved(config: Any, device: Any, settings: Any) -> dict[str, bool]:
    """What an engine on this device may ask for that is refused: a sentence each, and whether it is so; none for the CPU."""
    kind = torch.device(device).type
    if kind != "cuda":
        return of_device(device)
    model, parallel = config.model_config, config.parallel_config
    own = {
        "on a GPU say how much of its memory tenants may take, which is taken before vLLM measures what is left "
        """(--additional-config '{"xorz": {"memory": "8 GiB"}}')""": settings.memory is None,
        'mode="exact" is served on a GPU without CUDA graphs alone: it has to know on the host who has which row, in each '
        "product, so that nothing would be left for graphs to hold; start the engine with --enforce-eager, or with the mode "
        '"fast" or "deterministic"': settings.mode == "exact" and pieces.captures(config),
        "models with a state beside keys and values (Mamba, hybrids) are not served on a GPU: their kernels read parameters "
        "past the layers": model.is_hybrid or model.is_attention_free,
        "batch-sharded sampling (--enable-batch-sharded-sampling) is not served: it computes logits in another "
        "order": getattr(parallel, "enable_batch_sharded_sampling", False),
        # Of vLLM 0.31; those after it have none.
        "sequence parallelism (pass_config.enable_sp) is not served: norms are given other rows than the step's": bool(
            getattr(config.compilation_config.pass_config, "enable_sp", False)
        ),
    }
    return of_device(device) | of_memory(config) | own | pieces.unserved(config)


def of_device(device: Any) -> dict[str, bool]:
    """Of the device alone, in the same way."""
    kind = torch.device(device).type
    if kind == "cpu":
        return {}
    if kind != "cuda":
        return {f"device {device} is not served; the CPU and CUDA are": True}
    return {"AMD's GPUs are not served: the kernels are CUDA's": torch.version.hip is not None}


def of_memory(config: Any) -> dict[str, bool]:
    """Of where weights lie on a GPU, and whether they stay there, in the same way."""
    model, offload = config.model_config, config.offload_config
    return {
        "sleep mode (--enable-sleep-mode) is not served on a GPU: it takes memory away that tenants or weights lie in": getattr(
            model, "enable_sleep_mode", False
        ),
        "weights that are kept on the host (--cpu-offload-gb, --offload-group-size) are not served on a GPU": bool(
            offload.uva.cpu_offload_gb or offload.prefetch.offload_group_size
        ),
    }


def check_model(model: nn.Module) -> None:
    """ValueError for a model whose layers are not those that tenants are served in."""
    cls = type(model)
    if cls.__module__.startswith(_WHERE_OTHERS_READ):
        raise ValueError(
            f"xorz: {cls.__name__} is not served on a GPU: vLLM has written it for GPUs of one make ({cls.__module__}), with "
            "kernels that read weights past the layers"
        )


def read_past(model: nn.Module) -> set[int]:
    """Ids of layers whose weights the modules around them read themselves, as fused kernels do: nobody can serve those by rows.

    By their code, which tells what it would do on any device; whoever only asks for a dtype, device or shape reads nothing.
    """
    out = set()
    for module in model.modules():
        names = _read_by(type(module))
        out |= {id(child) for name, child in module.named_children() if name in names}
    return out


_BEFORE = ("__init__", "load_weights", "tie_weights")
"""Methods that run before anything is served."""

_HARMLESS = ("dtype", "device", "shape", "size", "numel", "is_meta", "ndim", "dim")


def _read_by(cls: type) -> set[str]:
    """Names of children whose `weight` or `bias` the methods of a class read, of vLLM's own classes."""
    out = set()
    for base in cls.__mro__:
        if base.__module__.startswith("torch.") or base is object:
            continue
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        except (OSError, SyntaxError, TypeError, ValueError):
            continue  # made at run time
        for method in ast.walk(tree):
            if isinstance(method, (ast.FunctionDef, ast.AsyncFunctionDef)) and method.name not in _BEFORE:
                out |= set(_weights_in(method))
    return out


def _weights_in(method: ast.AST) -> Iterator[str]:
    harmless = {
        id(node.value)
        for node in ast.walk(method)
        if isinstance(node, ast.Attribute) and node.attr in _HARMLESS
    }
    for node in ast.walk(method):
        if not isinstance(node, ast.Attribute) or node.attr not in ("weight", "bias") or id(node) in harmless:
            continue
        owner = node.value
        if isinstance(owner, ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield owner.attr


class Order:
    """The stream that steps run on: what is written beside them is asked of it, from whichever thread and stream."""

    def __init__(self, device: Any) -> None:
        """No step has run yet: whatever is written goes on its own stream, which the first one waits for."""
        self._device = torch.device(device)
        self._stream: Any = None

    def step(self) -> None:
        """A step begins, on the current stream, which lets what was written on another one come first; the host waits not."""
        if self._device.type != "cuda":
            return
        now = torch.cuda.current_stream(self._device)
        if self._stream is not None and now != self._stream:
            now.wait_stream(self._stream)
        self._stream = now

    def settle(self) -> None:
        """Wait until the device has done all that it was asked: whoever reads it from another thread reads that."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def beside(self) -> AbstractContextManager[Any]:
        """Inside, copies are in order with steps: those that were asked before read what was there before."""
        if self._device.type != "cuda":
            return nullcontext()
        if self._stream is None:
            self._stream = torch.cuda.current_stream(self._device)
        return torch.cuda.stream(self._stream)


def check_kernels(arena: Tensor) -> None:
    """Run each op once, on nothing: RuntimeError of theirs where this installation or this driver has no kernels."""
    device = arena.device
    some = torch.zeros(1, 64, dtype=torch.bfloat16, device=device)
    slots = torch.zeros(1, 2, dtype=torch.int64, device=device)
    rows = torch.full((1,), -1, dtype=torch.int32, device=device)
    torch.ops.xorz.delta_linear_grouped(some, some, None, arena, slots, rows)
    torch.ops.xorz.delta_embedding(rows.long() + 1, some, arena, slots, rows)
