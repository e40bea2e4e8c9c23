"""Expert stacks [E, n, k] of transformers' mixture-of-experts modules: each token with its tenant's own experts.

The loop is that of transformers' own `forward` (its "eager" implementation), with the map of rows regrouped as the tokens are.
"""

import ast
import functools
import inspect
import textwrap

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


# transformers' own loops over experts, as `ast.unparse` writes them. A class with other code runs that code as it stands.
_HEAD = """with torch.no_grad():
    expert_mask = torch.nn.functional.one_hot(top_k_index, num_classes=self.num_experts + 1)
    expert_mask = expert_mask.permute(2, 1, 0)
    expert_hit = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero()
for expert_idx in expert_hit:
    expert_idx = expert_idx[0]
    if expert_idx == self.num_experts:
        continue
    top_k_pos, token_idx = torch.where(expert_mask[expert_idx])
"""
_CHUNKED = (
    "final_hidden_states = torch.zeros_like(hidden_states)\n"
    + _HEAD
    + """    current_state = hidden_states[token_idx]
    gate, up = nn.functional.linear(current_state, self.gate_up_proj[expert_idx]).chunk(2, dim=-1)
    current_hidden_states = self.act_fn(gate) * up
    current_hidden_states = nn.functional.linear(current_hidden_states, self.down_proj[expert_idx])
    current_hidden_states = current_hidden_states * top_k_weights[token_idx, top_k_pos, None]
    final_hidden_states.index_add_(0, token_idx, current_hidden_states.to(final_hidden_states.dtype))
return final_hidden_states"""
)
_GATED = """final = torch.zeros_like(hidden_states)
with torch.no_grad():
    mask = F.one_hot(top_k_index, num_classes=self.num_experts + 1).permute(2, 1, 0)
    hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
for expert_idx in hit:
    expert_idx = expert_idx[0]
    if expert_idx == self.num_experts:
        continue
    top_k_pos, token_idx = torch.where(mask[expert_idx])
    current = self._apply_gate(F.linear(hidden_states[token_idx], self.gate_up_proj[expert_idx]))
    current = F.linear(current, self.down_proj[expert_idx]) * top_k_weights[token_idx, top_k_pos, None]
    final.index_add_(0, token_idx, current.to(final.dtype))
return final"""
_LOOPS = {_CHUNKED: "chunked", _GATED: "gated"}


@functools.cache
def _loop(cls: type) -> str | None:
    """Which of the loops this class has as its forward; None for any other code."""
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(cls.forward)))
        (function,) = ast.parse(source).body
    except (OSError, SyntaxError, TypeError, ValueError):
        return None
    if not isinstance(function, ast.FunctionDef):
        return None
    if [a.arg for a in function.args.args] != ["self", "hidden_states", "top_k_index", "top_k_weights"]:
        return None
    body = [b for b in function.body if not (isinstance(b, ast.Expr) and isinstance(b.value, ast.Constant))]
    return _LOOPS.get("\n".join(ast.unparse(statement) for statement in body))


def serves(module: nn.Module) -> bool:
    """Whether this is an expert module whose arithmetic is known: gated, not transposed, no bias."""
    params = {name: p for name, p in module._parameters.items() if p is not None}
    if set(params) != {"gate_up_proj", "down_proj"} or any(p.dim() != 3 for p in params.values()):
        return False
    if _loop(type(module)) is None:
        return False
    if not type(module).__module__.startswith("transformers.") or getattr(
        module, "_is_expert_parallel", False
    ):
        return False
    return all(getattr(module, name, want) == want for name, want in _PLAIN.items()) and hasattr(
        module, "act_fn"
    )


def stacked(module: nn.Module) -> bool:
    """Whether this holds experts, one matrix below the other [E, n, k], whatever it computes with them."""
    stacks = [p for p in module._parameters.values() if p is not None and p.dim() == 3 and p.size(0) > 1]
    return bool(stacks) and "expert" in type(module).__name__.lower()


def forward(
    site: Site,
    module: nn.Module,
    rows: RowMap,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """[tokens, k] to [tokens, k], as the module's own `forward`."""
    slots = rows.rows(hidden_states.shape[:-1], True, site.name, site)
    gate_up, down = (site.base[name] for name in ("gate_up_proj", "down_proj"))
    count, gated = gate_up.size(0), _loop(site.original) == "gated"
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
        if gated:
            inner = module._apply_gate(both)
        else:
            gate, up = both.chunk(2, dim=-1)
            inner = module.act_fn(gate) * up
        mixed = site.product(inner, down[expert], None, f"down_proj.{expert}", mine, rows.only)
        mixed = mixed * top_k_weights[token, position, None]
        out.index_add_(0, token, mixed.to(out.dtype))
    return out
