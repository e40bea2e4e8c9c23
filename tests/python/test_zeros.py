"""Promise: a base whose gates, scales and last layers are zeros, as training begins with them, hides no row of a batch: each
row is its own tenant's, whose words there are no zeros. Every expectation is the plain fine-tuned model's.
"""

import pytest
import torch
from cases import Case
from torch import nn


class AdaptiveNorm(nn.Module):
    """The shift, scale and gate of a diffusion transformer, which zeros give (adaLN-Zero)."""

    def __init__(self):
        super().__init__()
        self.norm, self.made = nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 24)
        self.inner, self.after = nn.Linear(8, 8), nn.Linear(8, 8)
        self.zeros = ("made.weight", "made.bias")

    def forward(self, x):
        shift, scale, gate = self.made(x.mean(1, keepdim=True)).chunk(3, -1)
        return self.after(x + gate * self.inner(self.norm(x) * (1 + scale) + shift))


class Gated(nn.Module):
    """Attention behind a gate of zero and a norm (Flamingo)."""

    def __init__(self):
        super().__init__()
        self.query, self.gate = nn.Linear(8, 8), nn.Parameter(torch.randn(()))
        self.norm, self.out = nn.LayerNorm(8), nn.Linear(8, 8)
        self.zeros = ("gate",)

    def forward(self, x):
        seen = torch.softmax(self.query(x) @ x.transpose(1, 2), -1) @ x
        return self.out(self.norm(seen * self.gate.tanh()))


class ZeroConvolution(nn.Module):
    """What is beside a network, brought in by a convolution of zeros (ControlNet)."""

    def __init__(self):
        super().__init__()
        self.first, self.zero, self.after = nn.Conv1d(8, 8, 3, padding=1), nn.Conv1d(8, 8, 1), nn.Linear(8, 8)
        self.zeros = ("zero.weight", "zero.bias")

    def forward(self, x):
        return self.after(self.zero(self.first(x.transpose(1, 2))).transpose(1, 2)).relu()


class ZeroLast(nn.Module):
    """A last layer of zeros, summed over positions and given to a head."""

    def __init__(self):
        super().__init__()
        self.inner, self.last, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.zeros = ("last.weight", "last.bias")

    def forward(self, x):
        return self.head(self.last(self.inner(x).relu()).mean(1))


class Scaled(nn.Module):
    """A scale that is read where no module is called, beside a matrix of zeros (AltUp, LayerScale, ReZero)."""

    def __init__(self):
        super().__init__()
        self.inner, self.after = ScaledInner(), nn.Linear(8, 8)
        self.zeros = ("inner.scale", "inner.matrix")

    def forward(self, x):
        return self.after(self.inner(x))


class ScaledInner(nn.Module):
    """The module that owns both."""

    def __init__(self):
        super().__init__()
        self.scale, self.matrix = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return torch.einsum("bth,hk->btk", x, self.matrix) * self.scale + torch.cumsum(x * self.scale, 1)


@pytest.mark.parametrize("rows", [3, 5, 8])
@pytest.mark.parametrize("cls", [AdaptiveNorm, Gated, ZeroConvolution, ZeroLast, Scaled])
def test_zeros_of_the_base_hide_no_row(cls, rows):
    torch.manual_seed(0)
    base = cls().eval()
    words = dict(base.named_parameters())
    with torch.no_grad():
        for name in base.zeros:
            words[name].zero_()
    case = Case(base, mode="deterministic")
    case.check_alone(torch.randn(rows, 8, 8))
    assert case.check_mixed(torch.randn(rows, 8, 8)) == "right"
