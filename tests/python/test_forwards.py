"""Promise: a module whose forward is not its class's own is computed as it says, or refused: replaced on the
instance, fused by torch, traced.
"""

import copy

import pytest
import torch
import xorz
from cases import Case, tuned_of
from torch import nn


def test_an_attached_model_is_not_traced():
    case, x = Case(nn.Sequential(nn.Linear(4, 4))), torch.randn(2, 4)
    with (
        case.tenants.use("a"),
        torch.no_grad(),
        pytest.raises(RuntimeError, match=r"torch\.jit\.trace of an attached"),
    ):
        torch.jit.trace(case.model, x, check_trace=False)
    torch.jit.trace(case.tenants.detach(), x)


def wrapped(module):
    original = module.forward
    module.forward = lambda *args, **kwargs: original(*args, **kwargs) + 1
    return module


LAYERS = {
    "linear": lambda: nn.Linear(4, 4),
    "norm": lambda: nn.LayerNorm(4),
    "rms": lambda: nn.RMSNorm(4),
    "conv": lambda: nn.Conv1d(5, 5, 3, padding=1),
    "batch_norm": lambda: nn.BatchNorm1d(5),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("layer", LAYERS)
def test_forwards_replaced_on_the_instance_are_served(layer, when):
    torch.manual_seed(0)
    base = nn.Sequential(LAYERS[layer]()).eval()
    plain = {None: base, "a": tuned_of(base, 1), "b": tuned_of(base, 2)}
    model = copy.deepcopy(base)
    deltas = {n: xorz.diff(base, plain[n]) for n in "ab"}
    if when == "before":
        wrapped(model[0])
    tenants = xorz.attach(model)
    if when == "after":
        wrapped(model[0])
    for name in "ab":
        tenants.load(name, deltas[name])
    x, names = torch.randn(4, 5, 4), ["a", None, "b", "a"]
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="no tenant is active"):
            model(x)
        for name in (None, "a", "b"):
            with tenants.use(name):
                torch.testing.assert_close(model(x), plain[name](x) + 1, rtol=1e-4, atol=1e-5)
        with tenants.use(names):
            y = model(x)
        for row, name in enumerate(names):
            torch.testing.assert_close(y[row], plain[name](x)[row] + 1, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("names", ["a", None, ["a", None, "b"]], ids=str)
def test_padded_places_of_torchs_encoder_are_zeros_as_in_the_plain_model(names):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    case, x = Case(nn.TransformerEncoder(layer, 2)), torch.randn(3, 5, 8)
    pad = torch.zeros(3, 5, dtype=torch.bool)
    pad[0, 3:] = pad[2, 4:] = True
    with torch.no_grad():
        plain = {n: m(x, src_key_padding_mask=pad) for n, m in case.plain.items()}
        assert not plain["a"][0, 3:].any()
        with case.tenants.use(names):
            got = case.model(x, src_key_padding_mask=pad)
    for row in range(3):
        want = plain[names if not isinstance(names, list) else names[row]]
        torch.testing.assert_close(got[row], want[row], rtol=1e-4, atol=1e-5)
