"""Mixtures of experts in an engine that captures CUDA graphs: they run between the pieces of its graphs.

How many rows each expert has is read back, which nothing that is captured may do. vLLM cuts a model's graph at its
`splitting_ops`, captures the pieces one by one, and runs those ops between them in each step: "piecewise". What such an op
gives to the piece behind it must lie where it lay when that was captured. vLLM's own op of a mixture makes it anew; this one
writes it into memory that the piece before has made, as vLLM's attention does.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm import envs
from vllm.config import CompilationMode, CUDAGraphMode
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.layers.fused_moe.runner import moe_runner

from .experts import XorzExpertsMethod

logger = init_logger("vllm.xorz")

OP = "xorz_vllm::mixture"
"""As vLLM's `splitting_ops` call it."""

_SERVED = (
    "mixtures of experts are served on a GPU between the pieces of piecewise CUDA graphs, or without graphs (--enforce-eager), "
    "since how many rows each expert has is read back"
)
_PIECEWISE = """--compilation-config '{"cudagraph_mode": "PIECEWISE"}'"""


def captures(config: Any) -> bool:
    """Whether an engine captures CUDA graphs, of whatever kind, in which nothing can wait."""
    return getattr(config.compilation_config.cudagraph_mode, "name", None) != "NONE"


def leave_out(config: Any) -> None:
    """Make an engine on a GPU leave mixtures out of its graphs, where that can be: `unserved` has what cannot.

    vLLM has resolved everything else by then, and has captured and compiled nothing. It goes from a mode with full graphs to
    piecewise ones in the same way, later yet, where its attention has none.
    """
    if not config.model_config.is_moe or not captures(config) or any(_unfit(config).values()):
        return
    own = config.compilation_config
    before = own.cudagraph_mode
    own.cudagraph_mode = CUDAGraphMode.PIECEWISE
    if OP not in own.splitting_ops:
        own.splitting_ops = [*own.splitting_ops, OP]
    logger.info(
        "xorz: mixtures of experts run between the pieces of CUDA graphs, which captures of whole steps have not: "
        "cudagraph_mode is PIECEWISE (it was %s), and %s one of splitting_ops",
        before.name,
        OP,
    )


def unserved(config: Any) -> dict[str, bool]:
    """What of an engine on a GPU with mixtures is refused: a sentence each, and whether it is so."""
    if not config.model_config.is_moe or not captures(config):
        return {}
    own = config.compilation_config
    left_out = own.cudagraph_mode == CUDAGraphMode.PIECEWISE and OP in (own.splitting_ops or ())
    why = _unfit(config) | {
        f"this engine's cudagraph_mode is {own.cudagraph_mode}, and its splitting_ops have not been settled by vLLM's "
        "EngineArgs.create_engine_config, as those of its own entry points are": not left_out
    }
    return {f"{_SERVED}: {text}": is_so for text, is_so in why.items()}


def _unfit(config: Any) -> dict[str, bool]:
    """Why an engine has no pieces, or has others; the first that is so is the one to say."""
    own = config.compilation_config
    return {
        # Those are cut while they are captured, at ops that vLLM has marked; it compiles nothing then.
        "vLLM's breakable graphs capture them (VLLM_USE_BREAKABLE_CUDAGRAPH=1, of some models by default); set it to 0": bool(
            envs.VLLM_USE_BREAKABLE_CUDAGRAPH
        ),
        "vLLM's Transformers backend calls them by an op of its own, which would be captured": bool(
            config.model_config.using_transformers_backend()
        ),
        f"there are no pieces without vLLM's compilation (mode {own.mode}); leave compilation-config's mode out": own.mode
        != CompilationMode.VLLM_COMPILE,
        "pieces that Inductor makes (use_inductor_graph_partition) were never tried; leave that out": bool(
            own.use_inductor_graph_partition
        ),
        "splitting_ops have not vLLM's attention, which is captured then; leave them out, as pass_config's "
        "fuse_attn_quant, which takes it away": not own.splitting_ops_contain_attention(),
        f"cudagraph_mode {own.cudagraph_mode} captures whole steps alone; leave it out, or give "
        f"{_PIECEWISE}": own.cudagraph_mode is None or not own.cudagraph_mode.has_piecewise_cudagraphs(),
    }


def check_model(model: nn.Module, config: Any) -> None:
    """ValueError for a mixture that this engine's graphs would capture, by its layer's name."""
    if not captures(config):
        return
    for name, module in model.named_modules():
        ours = isinstance(getattr(module, "quant_method", None), XorzExpertsMethod)
        runner = model.get_submodule(name.rpartition(".")[0]) if ours else None
        if ours and getattr(runner, "_forward_entry", None) not in (run, run_beside_shared):
            raise ValueError(f"xorz: {_SERVED}: `{name}` would be captured, by {type(runner).__name__}")


def select(plain: Any) -> Any:
    """vLLM's choice of the op that a mixture is run by, where this engine leaves it out of its graphs."""
    from vllm.config.vllm import get_current_vllm_config_or_none

    def select_forward(self: MoERunner) -> Any:
        config = get_current_vllm_config_or_none()
        ours = isinstance(self.routed_experts.quant_method, XorzExpertsMethod)
        if not ours or config is None or OP not in (config.compilation_config.splitting_ops or ()):
            return plain(self)
        return run if self._shared_experts is None else run_beside_shared

    return select_forward


def run(
    hidden_states: Tensor,
    router_logits: Tensor,
    shared_experts_input: Tensor | None,
    input_ids: Tensor | None,
    layer_name: Any,
    hidden_dim_unpadded: int,
) -> Tensor:
    """In place of `vllm::moe_forward`: [rows, k], as `hidden_states` is."""
    out = torch.empty_like(hidden_states)
    torch.ops.xorz_vllm.mixture(
        hidden_states, router_logits, shared_experts_input, input_ids, layer_name, [out]
    )
    return out


def run_beside_shared(
    hidden_states: Tensor,
    router_logits: Tensor,
    shared_experts_input: Tensor | None,
    input_ids: Tensor | None,
    layer_name: Any,
    hidden_dim_unpadded: int,
) -> tuple[Tensor, Tensor]:
    """In place of `vllm::moe_forward_shared`: what the experts that all tokens share give, and what the others do."""
    shared = torch.empty_like(hidden_states if shared_experts_input is None else shared_experts_input)
    out = torch.empty_like(hidden_states)
    torch.ops.xorz_vllm.mixture(
        hidden_states, router_logits, shared_experts_input, input_ids, layer_name, [shared, out]
    )
    return shared, out


@torch.library.custom_op(OP, mutates_args=("out",))
def _mixture(
    hidden_states: Tensor,
    router_logits: Tensor,
    shared_experts_input: Tensor | None,
    input_ids: Tensor | None,
    layer_name: moe_runner._layer_name_type,
    out: list[Tensor],
) -> None:
    """vLLM's runner of that layer: its router, its experts, and those that all tokens share.

    Args:
        out: is written to, one for each tensor that vLLM's op gives.
    """
    found = moe_runner._moe_forward(
        hidden_states, router_logits, shared_experts_input, input_ids, layer_name, 0
    )
    for place, tensor in zip(out, found if isinstance(found, tuple) else (found,), strict=True):
        place.copy_(tensor)


@_mixture.register_fake
def _(hidden_states, router_logits, shared_experts_input, input_ids, layer_name, out):
    return None
