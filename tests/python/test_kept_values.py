"""Promise: what a module keeps beside its weights is the tenant's or refused: buffers, values made from
weights. Attributes are everyone's.
"""

import copy

import pytest
import torch
import xorz
from cases import Case, tuned_of
from torch import nn

F = nn.functional


def scaled(cls):
    class Scaled(cls):
        def __init__(self, *args):
            super().__init__(*args)
            self.register_buffer("k", torch.tensor([1.5]))

        def forward(self, x):
            return super().forward(x) * self.k

    return Scaled


def test_buffers_are_the_tenants():
    torch.manual_seed(0)
    case = Case(nn.Sequential(scaled(nn.Linear)(4, 4), scaled(nn.Linear)(4, 4)))
    case.check_alone(torch.randn(2, 4))
    assert case.check_mixed(torch.randn(4, 4)) == "right"
    case = Case(scaled(nn.Embedding)(6, 4))
    case.check_alone(torch.arange(6).view(2, 3))
    assert case.check_mixed(torch.arange(8).view(4, 2) % 6) == "right"
    case = Case(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    case.check_alone(torch.randn(2, 4))
    assert case.check_mixed(torch.randn(4, 4)) == "right"


class Keeps(nn.Module):
    """As LeViT keeps its biases of attention: made once, in evaluation."""

    def __init__(self, how):
        super().__init__()
        self.bias, self.how = nn.Parameter(torch.randn(6)), how
        self.index, self.cache = [0, 2, 4, 1], {} if how == "dict" else None

    def forward(self, x):
        if self.how == "dict":
            if "b" not in self.cache:
                self.cache["b"] = self.bias[self.index]
            return x + self.cache["b"]
        if self.cache is None:
            self.cache = self.bias[self.index]
        return x + self.cache


@pytest.mark.parametrize("how", ["attribute", "dict"])
@pytest.mark.parametrize("base_first", [True, False])
def test_values_made_from_weights_are_not_shared(how, base_first):
    torch.manual_seed(0)
    case, x = Case(Keeps(how)), torch.randn(4, 4)
    if base_first:
        with torch.no_grad(), case.tenants.use(None):
            assert torch.allclose(case.model(x), copy.deepcopy(case.base)(x))
    with torch.no_grad():
        for name in ("a", "b", None, "a", "b"):
            with case.tenants.use(name):
                got = case.model(x)
            torch.testing.assert_close(got, copy.deepcopy(case.plain[name])(x))
    for plain in case.plain.values():
        plain.cache = {} if how == "dict" else None
    case.check_mixed(torch.randn(4, 4), call=lambda m, x: m(x))


def test_what_was_kept_before_attach_is_refused_on_load():
    base = Keeps("attribute").eval()
    tuned = tuned_of(base, 1)
    with torch.no_grad():
        base(torch.randn(2, 4))
    tenants = xorz.attach(base)
    with pytest.raises(ValueError, match=r"`bias` is changed, and Keeps keeps tensors in `cache`"):
        tenants.load("a", {"bias": xorz.delta_encode(base.bias.detach(), tuned.bias.detach())})


def test_a_parent_that_keeps_what_it_makes_of_its_childrens_weights_is_refused():
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.both = nn.Linear(4, 4), nn.Linear(4, 4), None

        def forward(self, x):
            if self.both is None:
                self.both = torch.cat([self.q.weight, self.k.weight])
            return F.linear(x, self.both)

    case, x = Case(Fused()), torch.randn(2, 4)
    with torch.no_grad():
        with case.tenants.use("a"):
            assert torch.allclose(case.model(x), copy.deepcopy(case.plain["a"])(x), atol=1e-5)
        for name in ("b", None):
            with pytest.raises(
                RuntimeError, match=r"Fused reads weights of another module and kept .* `both`"
            ):
                case.tenants.use(name).__enter__()


def test_attributes_that_are_set_after_attach_are_everyones():
    class Times(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.factor = nn.Parameter(torch.ones(3)), 1.0

        def forward(self, x):
            return x * self.w * self.factor

    case, x = Case(Times()), torch.randn(2, 3)
    case.check_alone(x)
    for model in (*case.plain.values(), case.model):
        model.factor = 3.0
    case.check_alone(x)
