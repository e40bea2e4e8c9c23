"""Promise: an op that nobody taught xorz, which meets a weight and the rows of a batch, is computed once for each tenant, and
each row is its own tenant's, where its rows are proven; else it is refused. Every expectation is the plain fine-tuned model's.
"""

import pytest
import torch
import xorz
from cases import Case
from torch import nn


class Kept:
    """What a model gives beside its output, so that the whole model cannot be run once for each tenant."""


class Held(nn.Module):
    """Parameters that another module reads."""

    def __init__(self):
        super().__init__()
        self.matrix, self.stack = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(3, 8, 8))
        self.scale = nn.Parameter(torch.rand(8) + 0.5)


class Ops(nn.Module):
    """[batch, 4, 8] and a weight in an op; `how` says which, and where the rows are then."""

    def __init__(self, how):
        super().__init__()
        self.how, self.first, self.last = how, nn.Linear(8, 8), nn.Linear(8, 8)
        self.table, self.held = nn.Embedding(4, 8), Held()

    def forward(self, x):
        return self.last(HOW[self.how](self, self.first(x))), Kept()


def distances(m, h):
    """Queries with a table of relative positions (Shaw's attention, as speech encoders have it)."""
    steps = torch.arange(4)
    near = m.table((steps[:, None] - steps[None]).clamp(0, 3))
    return h + torch.einsum("bld,lrd->blr", h, near).softmax(-1) @ h


def batch_second(m, h):
    """What an op gives has the batch in another dimension than what it was given."""
    return torch.einsum("bld,de->lbe", h, m.held.matrix).transpose(0, 1)


def tensordot(m, h):
    return torch.tensordot(h, m.held.stack[0], dims=([2], [1]))


def distance(m, h):
    """Distances of each token to learned centres."""
    return torch.cdist(h, m.held.matrix)


def interpolated(m, h):
    return torch.lerp(h, h.flip(1), m.held.scale)


def several(m, h):
    """An op with two outputs, of which one is the same for everybody."""
    found, info = torch.linalg.solve_ex(m.held.matrix, h.transpose(1, 2))
    return found.transpose(1, 2) + info.sum()


def bilinear(m, h):
    return nn.functional.bilinear(h, h.tanh(), m.held.stack.repeat(3, 1, 1)[:8])


HOW = {f.__name__: f for f in (distances, batch_second, tensordot, distance, interpolated, several, bilinear)}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("rows", [2, 3, 4, 5])
def test_an_op_that_is_not_known_is_each_rows_own(how, rows):
    torch.manual_seed(0)
    case = Case(Ops(how))
    x = torch.randn(rows, 4, 8)
    case.check_alone(call=lambda m: m(x)[0])
    assert case.check_mixed(x, call=lambda m, x: m(x)[0]) == "right"


def test_where_bits_may_not_depend_on_company_such_an_op_is_refused():
    case, x = Case(Ops("distances"), mode="deterministic"), torch.randn(3, 4, 8)
    case.check_alone(call=lambda m: m(x)[0])
    with case.tenants.use(["a", None, "b"]), pytest.raises(RuntimeError, match="one tenant at a time"):
        case.model(x)


def together(m, h):
    """An op that mixes the rows of the batch, in which no row is one tenant's."""
    return torch.einsum("bld,cld,de->ble", h, h.tanh(), m.held.matrix)


def bmm(m, h):
    """Three matrices by three copies of all tokens, flattened."""
    tokens = h.reshape(1, -1, 8).expand(3, -1, -1)
    return torch.bmm(tokens, m.held.stack).sum(0).view_as(h)


@pytest.mark.parametrize("how", [together, bmm])
def test_an_op_whose_rows_are_not_proven_is_refused(how, monkeypatch):
    monkeypatch.setitem(HOW, "one", how)
    case, x = Case(Ops("one")), torch.randn(3, 4, 8)
    case.check_alone(call=lambda m: m(x)[0])
    with case.tenants.use(["a", None, "b"]), pytest.raises(RuntimeError, match="one tenant at a time"):
        case.model(x)


def test_a_module_called_on_its_own_is_refused_since_nothing_is_proven_of_it():
    inner = Ops("distances")
    model = nn.Sequential(inner, nn.Linear(8, 8))
    tenants = xorz.attach(model)
    tenants.load(
        "a", {"0.held.matrix": xorz.delta_encode(inner.held.matrix.detach(), inner.held.matrix.detach() + 1)}
    )
    with tenants.use(["a", None, "a"]), pytest.raises(RuntimeError, match="xorz"):
        torch.einsum("bld,de->ble", torch.randn(3, 4, 8), inner.held.matrix)
