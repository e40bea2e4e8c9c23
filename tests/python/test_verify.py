"""Promise: `verify` names the first module that differs from the plain fine-tune, and `example` refuses on
load what a client would find out.
"""

import copy

import pytest
import torch
import xorz
from cases import Case, tuned_of
from torch import nn


def test_verify_names_the_first_module_that_differs(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)).eval()
    case, x = Case(model), torch.randn(4, 8)
    case.tenants.verify("a", x)
    with pytest.raises(KeyError, match="no tenant is called 'c'"):
        case.tenants.verify("c", x)
    site = case.tenants.sites["2"]
    right = type(site).linear

    def wrong(self, rows, input):
        out = right(self, rows, input)
        return out + 0.1 if self is site and rows.only not in (None, -1) else out

    monkeypatch.setattr(type(site), "linear", wrong)
    with pytest.raises(ValueError, match=r"module `2`, 'a' alone: differs .* by 0\.1"):
        case.tenants.verify("a", x)

    def swapped(self, rows, input):
        out = right(self, rows, input)
        return out.flip(0) if self is case.tenants.sites["0"] and rows.only is None else out

    monkeypatch.setattr(type(site), "linear", swapped)
    with pytest.raises(ValueError, match=r"module `0`, row 0 \('a'\) of a mixed batch"):
        case.tenants.verify("a", x)


def test_an_example_refuses_on_load_what_a_client_would_find_out():
    class Unmixable(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.rand(4))

        def forward(self, x, state):
            return x * float(self.w.sum()), state

    base = nn.Sequential(nn.Linear(4, 4)).eval()
    tuned = tuned_of(base, 1)
    tenants = xorz.attach(copy.deepcopy(base), example=torch.randn(3, 4))
    tenants.load("a", xorz.diff(base, tuned))
    assert tenants.names() == ["a"]
    odd = Unmixable().eval()
    served = xorz.attach(copy.deepcopy(odd), example=(torch.randn(3, 4), object()))
    with pytest.raises(ValueError, match=r"'a' cannot be served: xorz: .*use one tenant at a time"):
        served.load("a", xorz.diff(odd, tuned_of(odd, 1)))
    assert served.names() == [] and served.memory()["copies"] == 0
