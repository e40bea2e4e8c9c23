"""Promise: where rows go inside of a module where no layer can follow (experts of one's own that are given the tokens which a
router chose; sorted, packed, padded rows), the smallest module around it runs once per tenant, and each row is its own
tenant's; where a run would leave something behind, or the module's rows are not proven either, it is refused. Every expectation
is the plain fine-tuned model's.
"""

import copy

import pytest
import torch
import xorz
from cases import Case, tuned_of
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, SwitchTransformersConfig
from transformers import SwitchTransformersForConditionalGeneration as Switch

F = nn.functional


class Kept:
    """What a model gives beside its output, so that the whole model cannot be run once for each tenant."""


class Experts(nn.Module):
    """Two of four experts for each token, each given its tokens alone, as people write it."""

    def __init__(self, width):
        super().__init__()
        self.gate = nn.Linear(width, 4, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 16), nn.SiLU(), nn.Linear(16, width)) for _ in range(4)
        )

    def forward(self, x):
        flat = x.reshape(-1, x.size(-1))
        weights, chosen = self.gate(flat).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(chosen == number)
            if token.numel():
                out.index_add_(0, token, expert(flat[token]) * weights[token, place, None])
        return out.view_as(x)


class Sorted(nn.Module):
    """Tokens in the order of their norms, and back."""

    def __init__(self, width):
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x):
        flat = x.reshape(-1, x.size(-1))
        order = flat.norm(dim=-1).argsort()
        return self.inner(flat[order])[order.argsort()].view_as(x)


class Packed(nn.Module):
    """Only tokens that are not masked, in one row, under a name of its own for each argument."""

    def __init__(self, width):
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x, *, scale=2.0):
        kept = x[..., 0] > 0
        out = torch.zeros_like(x)
        out[kept] = self.inner(x[kept]) * scale
        return out


class InPlace(Packed):
    """Adds to what it is given."""

    def forward(self, x, *, scale=2.0):
        return x.add_(super().forward(x, scale=scale))


class Counting(Packed):
    """Keeps what it gave last."""

    def forward(self, x, *, scale=2.0):
        self.last = super().forward(x, scale=scale)
        return self.last


class Listing(Packed):
    """Keeps a list of all that it gave, as caches do."""

    def __init__(self, width):
        super().__init__(width)
        self.all = []

    def forward(self, x, *, scale=2.0):
        self.all.append(super().forward(x, scale=scale))
        return self.all[-1]


class Capped(Experts):
    """No expert takes more than four tokens of the batch, so that a row depends on the others'."""

    def forward(self, x):
        flat = x.reshape(-1, x.size(-1))
        chosen = self.gate(flat).argmax(-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token = torch.where(chosen == number)[0][:4]
            out[token] = expert(flat[token])
        return out.view_as(x)


class Around(nn.Module):
    """[batch, 6, 8] through a layer, the module, and another layer."""

    def __init__(self, cls):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(8, 8), cls(8), nn.Linear(8, 8)

    def forward(self, x):
        return self.last(self.middle(self.first(x))), Kept()


@pytest.mark.parametrize("rows", [2, 3, 6])
@pytest.mark.parametrize("mode", ["fast", "deterministic"])
@pytest.mark.parametrize("cls", [Experts, Sorted, Packed])
def test_the_smallest_module_whose_rows_are_proven_runs_once_per_tenant(cls, mode, rows):
    torch.manual_seed(0)
    case, x = Case(Around(cls), mode=mode), torch.randn(rows, 6, 8)
    case.check_alone(call=lambda m: m(x)[0])
    assert case.check_mixed(x, call=lambda m, x: m(x)[0]) == "right"
    # Other rows, as many of other lengths, and no tenant at all.
    longer = torch.randn(rows, 9, 8)
    assert case.check_mixed(longer, call=lambda m, x: m(x)[0]) == "right"
    case.check_alone(call=lambda m: m(x)[0])
    assert type(case.tenants.detach().middle) is cls


@pytest.mark.parametrize("cls", [InPlace, Counting, Listing, Capped])
def test_what_leaves_something_behind_or_mixes_rows_is_refused(cls):
    torch.manual_seed(0)
    case, x = Case(Around(cls)), torch.randn(4, 6, 8)
    with torch.no_grad(), case.tenants.use(["a", None, "b", "a"]):
        with pytest.raises(RuntimeError, match=r"one tenant at a time|one name for each row"):
            case.model(x)
    with torch.no_grad(), case.tenants.use("b"):
        torch.testing.assert_close(case.model(x)[0], case.plain["b"](x)[0])


def generated(model, ids):
    return model.generate(ids, max_new_tokens=6, do_sample=False)


def test_a_model_with_experts_of_its_own_generates_mixed_with_its_cache():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, num_key_value_heads=2, pad_token_id=0, eos_token_id=2, **sizes)
    ).eval()
    for layer in base.model.layers:
        layer.mlp = Experts(32)
    case = Case(base, mode="deterministic")
    ids = torch.randint(3, 64, (5, 7))
    names = ["a", None, "b", "b", "a"]
    with case.tenants.use(names):
        got = generated(case.model, ids)
    for row, name in enumerate(names):
        assert torch.equal(got[row], generated(case.plain[name], ids)[row]), row


def test_an_encoder_that_generate_calls_on_its_own_is_proven_too():
    torch.manual_seed(0)
    base = Switch(
        SwitchTransformersConfig(
            vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4, num_experts=4,
            num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, expert_capacity=64, decoder_start_token_id=0,
        )
    ).eval()  # fmt: skip
    model = copy.deepcopy(base)
    plain = {None: base, "a": tuned_of(base, 1, 0.05), "b": tuned_of(base, 2, 0.05)}
    tenants = xorz.attach(model)
    for name in "ab":
        tenants.load(name, xorz.diff(base, plain[name]))
    ids, names = torch.randint(3, 64, (4, 7)), ["b", "a", None, "a"]
    with tenants.use(names):
        got = generated(model, ids)
    for row, name in enumerate(names):
        assert torch.equal(got[row], generated(plain[name], ids)[row]), row
