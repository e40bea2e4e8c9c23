"""Routed experts of mixtures, as vLLM keeps them, computing each token with its own tenant's.

vLLM holds the experts of a layer as two stacks, `w13_weight` [E, 2 i, k] (gates above ups) and `w2_weight` [E, k, i]. Its
kernels for the CPU repack them; here they keep their words, and each expert's rows go through the grouped products that linear
layers go through. A token's tenant goes with it to its experts and back.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.activation import MoEActivation, apply_moe_activation
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from ..serve.rows import capturing
from .rows import Site

_ACTIVATIONS = (MoEActivation.SILU, MoEActivation.GELU, MoEActivation.GELU_TANH)


def unserved(moe: Any) -> str | None:
    """What of a mixture (vLLM's `FusedMoEConfig`) is not served; None if all of it is."""
    parallel = moe.moe_parallel_config
    clamped = [getattr(moe, f"swiglu_{name}", None) for name in ("limit", "alpha", "beta")]
    unfit = {
        f"the activation {moe.activation.value}": moe.activation not in _ACTIVATIONS,
        "biases of experts": moe.has_bias,
        "activations with limits": any(value is not None for value in clamped),
        "expert parallelism": parallel.use_ep,
        "data parallelism": parallel.dp_size > 1,
        "context parallelism": parallel.pcp_size > 1,
        "sequence parallelism": parallel.is_sequence_parallel,
    }
    return next((name for name, is_so in unfit.items() if is_so), None)


class XorzExpertsMethod(FusedMoEMethodBase):
    """Each token with its tenant's experts; sums are of float32, in the order of the experts' numbers."""

    # Where weights lie and how they are loaded is vLLM's.
    create_weights = UnquantizedFusedMoEMethod.create_weights
    get_fused_moe_quant_config = UnquantizedFusedMoEMethod.get_fused_moe_quant_config

    def __init__(self, moe: Any) -> None:
        """ValueError for mixtures that compute otherwise, or that give layers other rows than the step's."""
        why = unserved(moe)
        if why is not None:
            raise ValueError(f"xorz: mixtures of experts with {why} are not served")
        super().__init__(moe)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Keeps the words: vLLM's kernels would repack them."""

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """`x` is [rows, k], a row for each token of the step; `topk_ids` [rows, choices], with their weights.

        The experts that all tokens share are vLLM's to run, as the layers that they are.
        """
        up: Site | None = getattr(layer, "xorz_w13_weight", None)
        down: Site | None = getattr(layer, "xorz_w2_weight", None)
        own = [None] * 4 if up is None or down is None else [up.arena, up.slots, down.slots, _rows(up, x)]
        out = torch.ops.xorz_vllm.routed_experts(
            x.flatten(0, -2),
            layer.w13_weight,
            layer.w2_weight,
            topk_weights,
            topk_ids,
            *own,
            "" if up is None else up.mode,
            layer.activation.value,
            layer.apply_router_weight_on_input,
        )
        return out.view(x.shape)


def _rows(site: Site, x: Tensor) -> Tensor:
    return site.rows.tokens[: site.rows.count(x.shape[:-1])]


@torch.library.custom_op("xorz_vllm::routed_experts", mutates_args=())
def _routed_experts(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    weights: Tensor,
    ids: Tensor,
    arena: Tensor | None,
    up_slots: Tensor | None,
    down_slots: Tensor | None,
    rows: Tensor | None,
    mode: str,
    activation: str,
    on_input: bool,
) -> Tensor:
    """The sum of each row's experts; one op, since which experts have rows is known when it runs.

    Args:
        x: [r, k].
        up: [E, 2 i, k]. down: [E, k, i].
        weights: [r, c]. ids: [r, c], experts; those below 0 are none.
        arena: of deltas, and with it up_slots and down_slots, int64 [E, s, 2], and rows, int32 [r]. None: all are the base's.
        mode: of the products. on_input: whether weights are multiplied into `x`.
    """

    def product(of: Tensor, stack: Tensor, slots: Tensor | None, expert: int, token: Tensor) -> Tensor:
        if arena is None:
            return nn.functional.linear(of, stack[expert])
        return torch.ops.xorz.delta_linear_grouped(
            of, stack[expert], None, arena, slots[expert], rows[token], mode=mode
        )

    if capturing(x.device):
        raise RuntimeError(
            "xorz: experts cannot be captured in a CUDA graph: how many rows each has is read back; start the engine with "
            "--enforce-eager"
        )
    out = x.new_zeros(x.shape, dtype=torch.float32)
    choices, how = ids.size(1), MoEActivation(activation)
    # All choices by expert, and those of an expert by token.
    flat = ids.flatten().long()
    order = flat.argsort(stable=True)
    # How many each expert has, and before the first those of none: the one thing that is waited for on a GPU.
    counts = (
        flat.new_zeros(up.size(0) + 1).scatter_add_(0, flat.clamp(min=-1) + 1, torch.ones_like(flat)).cpu()
    )
    for expert, place in enumerate(order.split(counts.tolist()), -1):
        if expert < 0 or not place.numel():
            continue
        token = place // choices
        scale = weights.flatten()[place, None]
        given = x[token] * scale.to(x.dtype) if on_input else x[token]
        both = product(given, up, up_slots, expert, token)
        inner = both.new_empty(both.size(0), both.size(1) // 2)
        apply_moe_activation(how, inner, both)
        mixed = product(inner, down, down_slots, expert, token).float()
        out.index_add_(0, token, mixed if on_input else mixed * scale)
    return out.to(x.dtype)


@_routed_experts.register_fake
def _(x, up, down, weights, ids, arena, up_slots, down_slots, rows, mode, activation, on_input):
    return torch.empty_like(x)
