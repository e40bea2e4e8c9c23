"""Promise: in a mixed batch each module runs once, where rows can be served side by side; what no tenant changes
runs once, too.
"""

import pytest
import torch
from cases import Case
from torch import nn


class Counted(nn.Module):
    """Counts its calls, without changing an attribute of its own."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def __deepcopy__(self, memo):
        out = type(self)(self.calls)
        out.load_state_dict(self.state_dict())
        return out

    def count(self):
        self.calls.append(type(self).__name__)


class Rotary(Counted):
    """A buffer alone, which no checkpoint holds."""

    def __init__(self, calls):
        super().__init__(calls)
        self.register_buffer("frequencies", torch.arange(1, 4) * 0.3, persistent=False)

    def forward(self, x):
        self.count()
        angles = torch.arange(x.size(1))[:, None] * self.frequencies
        return torch.cat([angles.cos(), angles.sin()], -1)


class Untouched(Counted):
    """A saved buffer that no tenant changes."""

    def __init__(self, calls):
        super().__init__(calls)
        self.register_buffer("table", torch.arange(6))

    def forward(self, x):
        self.count()
        return x[..., self.table]


class Body(Counted):
    def __init__(self, calls):
        super().__init__(calls)
        self.layer, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)

    def forward(self, x):
        self.count()
        return self.norm(torch.tanh(self.layer(x)))


class Rooted(nn.Module):
    """As ViT and CLIP: parameters of the model itself, beside its layers."""

    def __init__(self, calls):
        super().__init__()
        self.token, self.places = nn.Parameter(torch.randn(1, 1, 6)), nn.Parameter(torch.randn(1, 6, 6))
        self.scale = nn.Parameter(torch.tensor(0.3))
        self.rotary, self.untouched, self.body = Rotary(calls), Untouched(calls), Body(calls)

    def forward(self, x):
        x = torch.cat([self.token.expand(x.size(0), -1, -1), x], dim=1) + self.places
        x = self.untouched(x) + self.rotary(x)
        return self.body(x) * self.scale.exp()


@pytest.mark.parametrize("mode", ["fast", "deterministic"])
def test_roots_norms_and_untouched_modules_run_once_in_a_mixed_batch(mode):
    torch.manual_seed(0)
    calls = []
    case, x = Case(Rooted(calls), mode=mode), torch.randn(4, 5, 6)
    case.check_alone(x)
    assert case.check_mixed(x) == "right"  # where its rows are is known from here on
    calls.clear()
    with torch.no_grad(), case.tenants.use(["a", None, "b", "a"]):
        case.model(x)
    assert sorted(calls) == ["Body", "Rotary", "Untouched"]
