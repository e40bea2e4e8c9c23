"""Promise: experts compute as their own class does, however much they look like another one's."""

import copy

import pytest
import torch
import xorz
from cases import Case
from torch import nn

F = nn.functional


def tiny(name, **more):
    """A causal model of transformers with experts."""
    import transformers

    cls = getattr(transformers, f"{name}ForCausalLM")
    sizes = {
        "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "num_local_experts": 4, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "kv_lora_rank": 16,
        "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_shared_experts": 1,
        "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": 1,
    }  # fmt: skip
    config = cls.config_class()
    for key, value in {**sizes, **more}.items():
        if hasattr(config, key):
            setattr(config, key, value)
    if isinstance(getattr(config, "layer_types", None), list):
        config.layer_types = config.layer_types[:2]
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = cls(config).eval().float()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape))
    return model


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids, use_cache=False).logits


def clamped(model, limit=0.2):
    """Every experts module's gate is clamped, by its class."""
    for module in model.modules():
        if hasattr(module, "_apply_gate"):

            def gate(self, both):
                a, b = both.chunk(2, dim=-1)
                return torch.nn.functional.silu(a.clamp(max=limit)) * b.clamp(-limit, limit)

            def forward(self, hidden_states, top_k_index, top_k_weights):
                out = torch.zeros_like(hidden_states)
                for e in range(self.num_experts):
                    token, place = torch.where(top_k_index == e)
                    mine = self._apply_gate(F.linear(hidden_states[token], self.gate_up_proj[e]))
                    mine = F.linear(mine, self.down_proj[e]) * top_k_weights[token, place, None]
                    out.index_add_(0, token, mine)
                return out

            cls = type("ClampedExperts", (type(module),), {"_apply_gate": gate, "forward": forward})
            cls.__module__ = "transformers.models.nobody"
            module.__class__ = cls
    return model


@pytest.mark.parametrize(
    "name",
    ["Mixtral", "DeepseekV3", "DeepseekV2", "Glm4Moe", "GraniteMoe", "GptOss", "DeepseekV4", "clamped"],
)
@pytest.mark.parametrize("mode", ["fast", "deterministic"])
def test_experts_compute_as_their_class_does(name, mode):
    base = clamped(tiny("Mixtral")) if name == "clamped" else tiny(name)
    case = Case(Logits(base), mode=mode)
    for plain in case.plain.values():
        # Near enough for the routers to choose alike.
        with torch.no_grad():
            for p, q in zip(plain.parameters(), base.parameters(), strict=True):
                p.copy_(q + (p - q) * 0.2)
    tenants = xorz.attach(copy.deepcopy(case.base), mode=mode)
    for n in "ab":
        tenants.load(n, xorz.diff(case.base, case.plain[n]))
    ids, names = (
        torch.randint(1, 60, (4, 6), generator=torch.Generator().manual_seed(3)),
        ["a", None, "b", "a"],
    )
    with torch.no_grad():
        want = {n: m(ids) for n, m in case.plain.items()}
        near = 1e-3 * float(want["a"].abs().max())
        assert float((want["a"] - want["b"]).abs().max()) > 20 * near
        if (name, mode) == ("DeepseekV4", "deterministic"):
            # Its blocks are given token numbers, too: nothing is cut that is not declared.
            with (
                tenants.use("a"),
                pytest.raises(RuntimeError, match="is given other tensors beside its rows"),
            ):
                tenants.model(ids)
            return
        for n in case.plain:
            with tenants.use(n):
                assert float((tenants.model(ids) - want[n]).abs().max()) < near
        with tenants.use(names):
            got = tenants.model(ids)
    for row, n in enumerate(names):
        assert float((got[row] - want[n][row]).abs().max()) < near, (row, n)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_exact_gives_the_bits_of_the_implementation_that_the_model_was_told_to_use(implementation):
    base = tiny("DeepseekV3").bfloat16()
    base.config._experts_implementation = implementation
    case, ids = Case(Logits(base), mode="exact"), torch.arange(1, 13).view(2, 6)
    with torch.no_grad():
        want = {n: m(ids) for n, m in case.plain.items()}
        assert not torch.equal(want["a"], want["b"])
        for name in (None, "a", "b"):
            with case.tenants.use(name):
                assert torch.equal(case.model(ids), want[name]), name
