"""Expert stacks [E, n, k] of transformers' mixture-of-experts modules: each token with its tenant's own experts.

The loop is that of transformers' own `forward` (its "eager" implementation), with the map of rows regrouped as the tokens are.
"""

import torch
from torch import Tensor, nn

from .rows import RowMap
from .site import Site

STACKS = ("gate_up_proj", "up_proj", "down_proj")
_PLAIN = {
    "is_transposed": False,
    "has_bias": False,
    "has_gate": True,
    "has_post_expert_norm": False,
    "is_concatenated": True,
}


def serves(module: nn.Module) -> bool:
    """Whether this is an expert module whose arithmetic is known: gated, not transposed, no bias."""
    params = {name: p for name, p in module._parameters.items() if p is not None}
    if set(params) != {"gate_up_proj", "down_proj"} or any(p.dim() != 3 for p in params.values()):
        return False
    if not type(module).__module__.startswith("transformers.") or getattr(
        module, "_is_expert_parallel", False
    ):
        return False
    return all(getattr(module, name, want) == want for name, want in _PLAIN.items()) and hasattr(
        module, "act_fn"
    )


def forward(
    site: Site,
    module: nn.Module,
    rows: RowMap,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """[tokens, k] to [tokens, k], as the module's own `forward`."""
    slots = rows.rows(hidden_states.shape[:-1], True, site.name)
    gate_up, down = (site.base[name] for name in ("gate_up_proj", "down_proj"))
    count = gate_up.size(0)
    out = torch.zeros_like(hidden_states)
    for expert in top_k_index.unique().tolist():
        if expert >= count:
            continue
        token, position = torch.where(top_k_index == expert)
        # transformers visits a token's choices in the order of their position.
        order = torch.argsort(position, stable=True)
        token, position = token[order], position[order]
        mine = slots[token]
        both = site.product(
            hidden_states[token], gate_up[expert], None, f"gate_up_proj.{expert}", mine, rows.only
        )
        gate, up = both.chunk(2, dim=-1)
        mixed = site.product(
            module.act_fn(gate) * up, down[expert], None, f"down_proj.{expert}", mine, rows.only
        )
        mixed = mixed * top_k_weights[token, position, None]
        out.index_add_(0, token, mixed.to(out.dtype))
    return out
