"""Layers of a vLLM model that compute each row with its own tenant's weights.

The quantization config `xorz` gives linear layers and embeddings methods that keep the raw base weight and
call one op of xorz's; norms change their class, as modules do in `xorz.attach`. All of them read fixed
tensors: a table of slots, and the tenant of each row, which the manager writes before a step. So graphs hold
addresses and no tenant.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm import ir
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from . import products  # noqa: F401  (its op)
from .experts import XorzExpertsMethod
from .gpu import LEAST_CAPABILITY
from .rows import Site

F = nn.functional


def _product(
    layer: nn.Module, x: Tensor, bias: Tensor | None, rows: Callable[[Site, Tensor], Tensor]
) -> Tensor:
    site: Site | None = getattr(layer, "xorz_weight", None)
    if site is None:
        return F.linear(x, layer.weight, bias)
    own: Site | None = getattr(layer, "xorz_bias", None)
    biases = None
    if bias is not None:
        biases = own.table if own is not None else bias.expand(site.slots.size(0) + 1, -1)
    # Logits are as large as what their products would take more, and their rows are those that are sampled: few.
    if rows is _of_tokens and site.mode == "fast" and site.arena.device.type == "cuda":
        return torch.ops.xorz_vllm.product(x, layer.weight, biases, site.arena, site.slots, rows(site, x))
    return torch.ops.xorz.delta_linear_grouped(
        x, layer.weight, biases, site.arena, site.slots, rows(site, x), mode=site.mode
    )


def _of_tokens(site: Site, x: Tensor) -> Tensor:
    return site.rows.tokens[: site.rows.count(x.shape[:-1])]


def _of_logits(site: Site, x: Tensor) -> Tensor:
    return site.rows.for_logits(x)


class XorzLinearMethod(UnquantizedLinearMethod):
    """y = x W^T + b, each row with its tenant's W and b."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Keeps the words: some backends would repack them, and drop the original."""

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x` is [rows, k], a row for each token of the step, or [1, rows, k]."""
        return _product(layer, x, bias, _of_tokens)


class XorzEmbeddingMethod(UnquantizedEmbeddingMethod):
    """Rows of a table, each its tenant's; and logits, from a table that is tied or a head of its own."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Keeps the words, as `XorzLinearMethod` does."""

    def embedding(self, layer: nn.Module, input_: Tensor) -> Tensor:
        """`input_` holds one id for each token of the step."""
        site: Site | None = getattr(layer, "xorz_weight", None)
        if site is None:
            return F.embedding(input_, layer.weight)
        rows = site.rows.tokens[: site.rows.count(input_.shape)]
        return torch.ops.xorz.delta_embedding(input_, layer.weight, site.arena, site.slots, rows)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x` holds the rows that are sampled from."""
        return _product(layer, x, bias, _of_logits)


class XorzConfig(QuantizationConfig):
    """`--quantization xorz`: not a quantization, but vLLM's way to let a plugin have the layers."""

    def get_name(self) -> str:
        """The name on vLLM's command line: `xorz`."""
        return "xorz"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """The dtypes of activations that `delta_linear_grouped` computes in."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Of a GPU, if there is one: what xorz's kernels need."""
        return LEAST_CAPABILITY

    @staticmethod
    def get_config_filenames() -> list[str]:
        """No files: there is no configuration beside the model's."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "XorzConfig":
        """It has no settings; those of the plugin are in vLLM's `additional_config`."""
        return cls()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """Linear layers, embeddings and routed experts; everything else stays as it is. ValueError for other experts."""
        if isinstance(layer, LinearBase):
            return XorzLinearMethod()
        if isinstance(layer, RoutedExperts):
            return XorzExpertsMethod(layer.moe_config)
        if isinstance(layer, VocabParallelEmbedding):
            return XorzEmbeddingMethod()
        return None


class XorzRMSNorm(RMSNorm):
    """A norm whose weight is each row's tenant's: vLLM's own formula, with a weight for each row."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """`x` is [rows, n], or [rows, heads, n]; of models that see a batch of one, [1, rows, n]."""
        site: Site = self.xorz_weight
        rows = site.rows
        of_tokens = x.shape[:-1] if rows.batched or x.dim() == 2 else x.shape[:1]
        weight = site.table.index_select(0, rows.places[: rows.count(of_tokens)])
        if x.dim() == 3:
            weight = weight.unsqueeze(0 if rows.batched else 1)
        if residual is None:
            return _NORM(x, weight, self.variance_epsilon, self.variance_size_override)
        return _ADD_NORM(x, residual, weight, self.variance_epsilon, self.variance_size_override)


# The formulas that the other implementations must equal, which take a weight of any shape that broadcasts.
_NORM = ir.ops.rms_norm.impls["native"].impl_fn
_ADD_NORM = ir.ops.fused_add_rms_norm.impls["native"].impl_fn
