"""Promise: whoever reads a weight of an attached model, and however, gets the tenant's numbers or an error;
never the base's or another tenant's without a word. Every expectation is the plain fine-tuned model's.
"""

import copy

import numpy as np
import pytest
import torch
import xorz
from cases import Case
from conftest import same_bits
from torch import nn

F = nn.functional


READS = {
    "T": lambda w, x: x @ w.T,
    "t()": lambda w, x: x @ w.t(),
    "mT": lambda w, x: torch.matmul(x, w.mT),
    "transpose": lambda w, x: torch.mm(x, w.transpose(0, 1)),
    "data": lambda w, x: F.linear(x, w.data),
    "detach": lambda w, x: x @ w.detach().T,
    "linear": lambda w, x: F.linear(x, w),
    "real": lambda w, x: F.linear(x, w.real),
    "a view": lambda w, x: F.linear(x, w.view(-1).view(w.shape)),
    "a slice": lambda w, x: F.linear(x, w[:, :]),
    "einsum": lambda w, x: torch.einsum("bk,nk->bn", x, w),
    "mul": lambda w, x: (x[:, None] * w).sum(-1),
    "dlpack": lambda w, x: x @ torch.from_dlpack(w.detach()).T,
    "numpy": lambda w, x: x @ torch.from_numpy(np.asarray(w.detach().numpy())).T,
    "clone": lambda w, x: x @ w.clone().T,
    "bmm": lambda w, x: torch.bmm(x[None], w.T[None])[0],
    "addmm": lambda w, x: torch.addmm(torch.zeros(5), x, w.T),
    "dispatched": lambda w, x: torch.ops.aten.mm.default(x, torch.ops.aten.t.default(w)),
    "norm": lambda w, x: F.linear(x, w / w.norm(dim=1, keepdim=True)),
}


WAYS = {
    "attribute": lambda m: m.inner.weight,
    "_parameters": lambda m: m.inner._parameters["weight"],
    "parameters()": lambda m: next(m.inner.parameters()),
    "state_dict()": lambda m: m.inner.state_dict()["weight"],
    "get_parameter": lambda m: m.get_parameter("inner.weight"),
    "a list": lambda m: m.held[0],
    "a closure": lambda m: m.closure(),
}


class Reader(nn.Module):
    def __init__(self, way, read):
        super().__init__()
        self.inner, self.way, self.read = nn.Linear(5, 5, bias=False), way, read
        self.link()

    def link(self):
        weight = self.inner.weight
        self.held, self.closure = [weight], lambda: weight

    def __deepcopy__(self, memo):
        out = Reader(self.way, self.read)
        out.load_state_dict(self.state_dict())
        return out.eval()

    def forward(self, x):
        return READS[self.read](WAYS[self.way](self), x)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "inference"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("read", READS)
def test_every_way_to_a_weight_gives_the_tenants(way, read, grad):
    torch.manual_seed(0)
    case, x = Case(Reader(way, read)), torch.randn(3, 5)
    with torch.inference_mode(grad):
        case.check_alone(x)
    said = case.check_mixed(torch.randn(4, 5))
    if read in ("T", "t()", "mT", "data", "detach", "linear", "transpose") and way != "state_dict()":
        assert said == "right"


def test_falcons_linear_layer_is_served_with_its_tenants():
    """`class FalconLinear(nn.Linear)` of transformers."""

    class Falcons(nn.Linear):
        def forward(self, x):
            states = x @ self.weight.T
            return states if self.bias is None else states + self.bias

    torch.manual_seed(1)
    for bias in (False, True):
        case = Case(nn.Sequential(Falcons(6, 7, bias=bias), Falcons(7, 3, bias=bias)))
        case.check_alone(torch.randn(2, 4, 6))
        assert case.check_mixed(torch.randn(4, 5, 6)) == "right"
        assert "made dense" not in case.tenants.summary()


def test_a_head_tied_through_parameters_is_the_tenants():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(9, 6)

        def forward(self, ids):
            return F.linear(self.embed(ids), next(self.embed.parameters()))

    case = Case(Tied())
    case.check_alone(torch.arange(8).view(2, 4))
    assert case.check_mixed(torch.arange(8).view(4, 2)) == "right"


def test_an_extension_that_takes_the_address_gets_none():
    case = Case(nn.Sequential(nn.Linear(4, 4)))
    weight = case.model[0]._parameters["weight"]
    assert weight.data_ptr() == case.model[0].weight.data_ptr()  # outside, it is the base's
    with case.tenants.use("a"):
        for read in (lambda: weight.data_ptr(), lambda: weight.untyped_storage(), lambda: weight.storage()):
            with pytest.raises(RuntimeError, match=r"asks where `0.weight` lies while 'a' is active"):
                read()
        # As C++ sees it, past every hook of Python.
        with torch._C.DisableTorchFunctionSubclass():
            assert weight.data_ptr() == 0
            with pytest.raises(RuntimeError, match="storage"):
                weight.untyped_storage().data_ptr()


def test_a_tensor_that_a_tenant_has_untied_is_refused_where_its_name_is_unknown():
    base = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
    base[1].weight = base[0].weight
    untied = copy.deepcopy(base)
    untied[1].weight = nn.Parameter(untied[1].weight.detach() + 1)
    tenants = xorz.attach(copy.deepcopy(base))
    deltas = {
        f"{i}.weight": xorz.delta_encode(base[i].weight.detach(), untied[i].weight.detach()) for i in (0, 1)
    }
    tenants.load("t", deltas)
    with tenants.use("t"), torch.no_grad():
        assert same_bits(tenants.model[1].weight + 0, untied[1].weight)
        with pytest.raises(RuntimeError, match=r"both `0.weight` and `1.weight`.*untied"):
            next(tenants.model[1].parameters()) + 0


class Depthwise(nn.Module):
    """As Mamba's mixers read their convolution."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(6, 6, 3, groups=6)

    def forward(self, x):
        weight, x = self.conv.weight.squeeze(1), F.pad(x.transpose(1, 2), (2, 0))
        return F.conv1d(x, weight.unsqueeze(1), self.conv.bias, groups=6).transpose(1, 2)


class StepOfConvolution(Depthwise):
    """As they do for one token."""

    def forward(self, x):
        return (x[:, -3:].transpose(1, 2) * self.conv.weight.squeeze(1)).sum(-1) + self.conv.bias


class Positions(nn.Module):
    """As Whisper's decoder, which never calls its embedding."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 6)

    def forward(self, x):
        return x + self.table.weight[2 : 2 + x.size(1)]


class PositionsByNumber(Positions):
    def forward(self, x):
        return x + self.table.weight[torch.arange(x.size(1))]


class PositionsGathered(Positions):
    """As ProphetNet, by an op that nothing here knows, and numbers that are no row's."""

    def forward(self, x):
        numbers = torch.arange(x.size(1))[:, None].expand(-1, 6)
        return x + torch.gather(self.table.weight, 0, numbers)


class PositionsProjected(nn.Module):
    """A table of constants through a matrix, by an op that nothing here knows."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(6, 4))

    def forward(self, x):
        table = torch.sin(torch.arange(x.size(1))[:, None] * torch.arange(1, 5) * 0.3)
        return x + torch.einsum("tk,nk->tn", table, self.matrix)


class Relative(nn.Module):
    """As DeBERTa's relative embeddings, which go through a norm."""

    def __init__(self):
        super().__init__()
        self.table, self.norm = nn.Embedding(7, 6), nn.LayerNorm(6)

    def forward(self, x):
        table = self.norm(self.table.weight)
        return torch.softmax(x @ table.T, -1) @ table


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.scales = nn.ParameterList(nn.Parameter(torch.rand(6) + 0.5) for _ in range(2))

    def forward(self, x):
        for scale in self.scales:
            x = x * scale
        return x


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.held = nn.ParameterDict({"scale": torch.rand(6), "shift": torch.rand(6)})

    def forward(self, x):
        return x * self.held["scale"] + self.held["shift"]


class NormOfAChild(nn.Module):
    """The parent applies its child's norm by itself."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        return F.layer_norm(x, (6,), self.norm.weight, self.norm.bias, self.norm.eps)


class RootOfNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(6)

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + self.norm.weight)


class Bag(nn.Module):
    """Weights of all layers in one tensor, of which each takes its own."""

    def __init__(self):
        super().__init__()
        self.all = nn.Parameter(torch.randn(3, 6, 6))

    def forward(self, x):
        for weight in self.all.unbind(0):
            x = torch.tanh(F.linear(x, weight))
        return x


PARTS = [
    Depthwise, StepOfConvolution, Positions, PositionsByNumber, PositionsGathered, PositionsProjected, Relative, Listed, Named,
    NormOfAChild, RootOfNorm, Bag,
]  # fmt: skip


@pytest.mark.parametrize("mode", ["fast", "deterministic"])
@pytest.mark.parametrize("made", PARTS)
def test_what_a_module_computes_with_parts_of_its_weights_is_the_tenants(made, mode):
    torch.manual_seed(0)
    case = Case(nn.Sequential(made(), nn.Linear(6, 5)), mode=mode)
    case.check_alone(torch.randn(2, 5, 6))
    assert case.check_mixed(torch.randn(4, 5, 6)) == "right"
    assert case.tenants.apart is None  # row by row, in one run of the model


@pytest.mark.parametrize("mode", ["fast", "deterministic"])
@pytest.mark.parametrize(
    "ids", [torch.tensor([[3, 1, 3], [1, 2, 4], [3, 3, 3], [0, 3, 8]]), torch.full((4, 3), 3)]
)
def test_a_parameter_that_is_written_to_places_of_each_row_is_its_tenants(ids, mode):
    """As T5Gemma 2's embedding does, and as models of images and sound put their placeholders."""

    class Marked(nn.Embedding):
        def __init__(self):
            super().__init__(9, 6)
            self.special = nn.Parameter(torch.randn(6))

        def forward(self, ids):
            out = super().forward(ids)
            out[ids == 3] = self.special
            return out

    torch.manual_seed(0)
    case = Case(nn.Sequential(Marked(), nn.Linear(6, 5)), mode=mode)
    case.check_alone(ids)
    other = torch.arange(12).view(4, 3) % 9
    for given in (other, ids):
        assert case.check_mixed(given) == "right"
    assert case.tenants.apart is None


def test_attention_of_linear_layers_of_ones_own_keeps_their_biases():
    """As WavLM calls torch's function: with weights of three layers, and their biases joined."""

    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x):
            x = x.transpose(0, 1)
            bias = torch.cat([self.q.bias, self.k.bias, self.v.bias])
            y, _ = F.multi_head_attention_forward(
                x, x, x, 8, 2, torch.empty(0), bias, None, None, False, 0.0, self.out.weight, self.out.bias, self.training,
                use_separate_proj_weight=True, q_proj_weight=self.q.weight, k_proj_weight=self.k.weight,
                v_proj_weight=self.v.weight,
            )  # fmt: skip
            return y.transpose(0, 1)

    torch.manual_seed(0)
    case = Case(Attends())
    case.check_alone(torch.randn(3, 5, 8))
    assert case.check_mixed(torch.randn(4, 5, 8)) in ("right", "refused")
