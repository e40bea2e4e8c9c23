"""Promise: the base of an attached model does not change unnoticed: what would change it is refused at once,
or found at the next use.
"""

import copy

import pytest
import torch
import xorz
from cases import Case, tuned_of
from conftest import same_bits
from torch import nn


def load_in_place(model):
    with torch.no_grad():
        model[0].weight.detach().copy_(torch.ones(4, 4))


def replace_module(model):
    model[0] = nn.Linear(4, 4)


def replace_parameter(model):
    model[0].weight = nn.Parameter(torch.ones(4, 4))


@pytest.mark.parametrize("change", [load_in_place, replace_module, replace_parameter])
def test_a_base_that_changes_is_noticed_at_the_next_use(change):
    case = Case(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    change(case.model)
    with pytest.raises(
        RuntimeError, match=r"`0(\.weight)?` of the (base was changed|attached model was replaced)"
    ):
        with case.tenants.use("a"):
            pass


def test_what_would_change_the_base_through_any_other_name_is_refused_at_once():
    case = Case(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    weight = next(case.model.parameters())
    with torch.no_grad():
        for change in (
            lambda: weight.add_(1),
            lambda: case.model[0].weight.add_(1),
            lambda: case.model[0].weight.data.copy_(torch.ones(4, 4)),
            lambda: weight.mul_(2),
            lambda: weight.copy_(torch.ones(4, 4)),
            lambda: weight.__setitem__(0, 1),
            lambda: setattr(weight, "data", torch.ones(4, 4)),
            lambda: torch.add(weight, 1, out=weight),
            lambda: nn.init.normal_(weight),
            lambda: torch.ops.aten.add_.Tensor(weight, weight),
            lambda: xorz.apply_(case.model, xorz.diff(case.base, case.plain["a"])),
            lambda: torch._foreach_add_([weight], 1.0),
        ):
            with pytest.raises((RuntimeError, ValueError, TypeError), match=r"xorz|detach"):
                change()
            with case.tenants.use(None):
                assert same_bits(case.model(torch.ones(1, 4)), case.base(torch.ones(1, 4)))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_optimizers_step_is_refused(optimizer, when):
    """Made before or after attach, it holds the very parameters."""
    base = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
    model = copy.deepcopy(base)
    steps = [optimizer(model.parameters(), lr=0.1)] if when == "before" else []
    tenants = xorz.attach(model)
    tenants.load("a", xorz.diff(base, tuned_of(base, 1)))
    steps = steps or [optimizer(model.parameters(), lr=0.1)]
    with pytest.raises(RuntimeError, match=r"xorz: .*`0\.(weight|bias)`"):
        for p in steps[0].param_groups[0]["params"]:
            p.grad = torch.ones(p.shape)
        steps[0].step()
    with tenants.use(None):
        assert same_bits(model(torch.ones(1, 4)), base(torch.ones(1, 4)))


def test_resized_embeddings_are_noticed():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=2)  # fmt: skip
    base = LlamaForCausalLM(config).eval()
    model = copy.deepcopy(base)
    tenants = xorz.attach(model)
    tenants.load("a", xorz.diff(base, tuned_of(base, 1)))
    try:
        model.resize_token_embeddings(40)
    except (RuntimeError, TypeError, ValueError) as error:
        assert "xorz" in str(error)
        return
    with pytest.raises(RuntimeError, match="was replaced or removed"), tenants.use("a"):
        pass
