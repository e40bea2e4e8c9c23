"""Promise: XorDeltaLinear stands in for nn.Linear: same call, state_dict, copies, moves, autocast, training
and tracing, and it never computes on bits that are not the fine-tune's."""

import copy
import io
import pickle

import pytest
import torch
import xorz
from conftest import bits, make_delta, random_weight, same_bits
from torch import nn
from xorz import XorDeltaLinear

F = torch.nn.functional


def layer(encoding="sparse", dtype=torch.bfloat16, n=24, k=40, bias=True, seed=0):
    linear = nn.Linear(k, n, bias=bias).to(dtype)
    with torch.no_grad():
        linear.weight.copy_(random_weight(n, k, dtype, seed))
    tuned, delta = make_delta(linear.weight.detach(), encoding)
    return linear, tuned, XorDeltaLinear.from_linear(linear, delta)


def test_from_linear_shares_the_base_and_to_linear_is_exact(encoding, dtype):
    linear, tuned, module = layer(encoding, dtype)
    assert module.weight_bits.data_ptr() == linear.weight.data_ptr()
    assert not module.weight_bits.is_floating_point()
    assert same_bits(module.weight, linear.weight.detach())
    assert module.bias is linear.bias
    back = module.to_linear()
    assert type(back) is nn.Linear and same_bits(back.weight, tuned) and same_bits(back.bias, linear.bias)
    assert (back.in_features, back.out_features) == (40, 24)
    assert not back.weight.requires_grad and back.bias.requires_grad
    x = random_weight(5, 40, dtype)
    if encoding != "raw":
        torch.testing.assert_close(module(x), back(x), rtol=2e-2, atol=2e-2)
    assert same_bits(XorDeltaLinear.from_linear(linear, module.delta, mode="exact")(x), back(x))


def test_bias_of_the_fine_tune():
    linear, tuned, module = layer(dtype=torch.float32)
    other = torch.randn(24)
    x = torch.randn(3, 40)
    for bias in (other, nn.Parameter(other), None):
        m = XorDeltaLinear.from_linear(linear, module.delta, bias=bias)
        assert (m.bias is None) == (bias is None)
        torch.testing.assert_close(m(x), F.linear(x, tuned, None if bias is None else bias.detach()))
    assert not XorDeltaLinear.from_linear(linear, module.delta, bias=other).bias.requires_grad
    with pytest.raises(ValueError, match=r"bias must be torch.float32 \[24\], but is torch.float32 \[23\]"):
        XorDeltaLinear.from_linear(linear, module.delta, bias=other[:23])
    with pytest.raises(ValueError, match=r"bias must be torch.float32 \[24\], but is torch.float64"):
        XorDeltaLinear.from_linear(linear, module.delta, bias=other.double())


def test_wrong_arguments_raise_what_python_users_expect():
    linear, _, module = layer()
    other = copy.deepcopy(linear)
    with torch.no_grad():
        other.weight[3, 4] += 1
    with pytest.raises(ValueError, match=r"digest [0-9a-f]{32}.*digest [0-9a-f]{32}"):
        XorDeltaLinear.from_linear(other, module.delta)
    with pytest.raises(
        ValueError, match=r"delta is of torch.bfloat16 \[24, 40\], but weight is torch.bfloat16 \[24, 41\]"
    ):
        XorDeltaLinear.from_linear(nn.Linear(41, 24).bfloat16(), module.delta)
    with pytest.raises(ValueError, match=r"torch.bfloat16 \[24, 40\], but weight is torch.float32"):
        XorDeltaLinear.from_linear(nn.Linear(40, 24), module.delta)
    damaged = module.delta.clone()
    damaged[-70] ^= 0xFF
    with pytest.raises(ValueError):
        XorDeltaLinear.from_linear(linear, damaged)
    with pytest.raises(TypeError, match=r"must be an nn.Linear, but is Conv1d"):
        XorDeltaLinear.from_linear(nn.Conv1d(1, 1, 1), module.delta)
    with pytest.raises(TypeError, match="delta must be a tensor, but is bytes"):
        XorDeltaLinear.from_linear(linear, b"delta")
    with pytest.raises(TypeError, match=r"but is torch\.float64"):
        XorDeltaLinear.from_linear(linear.double(), module.delta)
    with pytest.raises(ValueError, match=r"mode must be one of .* but is 'quick'"):
        XorDeltaLinear.from_linear(layer()[0], module.delta, mode="quick")
    with pytest.raises(ValueError, match="1-D uint8"):
        XorDeltaLinear.from_linear(layer()[0], module.delta.int())
    with pytest.raises(RuntimeError, match=r"input is bfloat16 \[2, 39\]"):
        module(torch.zeros(2, 39, dtype=torch.bfloat16))


def test_repr_tells_encoding_and_size(encoding):
    _, _, module = layer(encoding)
    text = repr(module)
    assert f"encoding={encoding}" in text and "in_features=40, out_features=24, bias=True" in text
    assert f"bits_per_element={module.delta.numel() * 8 / (24 * 40):.2f}" in text
    assert "bias=False" in repr(layer(bias=False)[2])
    assert "XorDeltaLinear" in repr(module.to("meta"))


def test_state_dict_is_strict_both_ways(encoding, dtype):
    linear, _, module = layer(encoding, dtype)
    state = module.state_dict()
    assert list(state) == ["bias", "weight_bits", "delta"]
    fresh = XorDeltaLinear(40, 24, dtype=dtype)
    assert fresh.load_state_dict(state, strict=True) == ([], [])
    x = random_weight(3, 40, dtype)
    assert same_bits(fresh(x), module(x)) and same_bits(fresh.to_linear().weight, module.to_linear().weight)
    assert fresh.weight_bits.data_ptr() != linear.weight.data_ptr()
    assigned = XorDeltaLinear(40, 24, dtype=dtype)
    assigned.load_state_dict(state, assign=True)
    assert assigned.weight_bits.data_ptr() == linear.weight.data_ptr() and same_bits(assigned(x), module(x))
    # A layer inside of a model, saved to a file and loaded without pickle.
    model = nn.Sequential(module, nn.ReLU())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = nn.Sequential(XorDeltaLinear(40, 24, dtype=dtype), nn.ReLU())
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert same_bits(other(x), model(x))
    for key in state:
        with pytest.raises(RuntimeError, match=f"Missing key.*{key}"):
            XorDeltaLinear(40, 24, dtype=dtype).load_state_dict({k: v for k, v in state.items() if k != key})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        fresh.load_state_dict({**state, "more": torch.zeros(1)})


def test_load_state_dict_refuses_other_bits():
    linear, _, module = layer()
    _, _, other = layer(seed=7)
    state = module.state_dict()

    def refused(part, **changes):
        fresh = copy.deepcopy(module)
        with pytest.raises(RuntimeError, match=part):
            fresh.load_state_dict({**state, **changes})
        assert same_bits(fresh.to_linear().weight, module.to_linear().weight)

    refused("weight_bits is torch.bfloat16, but must be torch.int16", weight_bits=linear.weight.detach())
    refused("weight_bits is torch.int32, but must be torch.int16", weight_bits=state["weight_bits"].int())
    refused("bias is torch.float32, but must be torch.bfloat16", bias=state["bias"].float())
    refused("delta must be a 1-D uint8", delta=state["delta"].int())
    refused("digest", delta=other.delta)
    refused("digest", weight_bits=other.weight_bits)
    refused("delta: ", delta=state["delta"][:-64].clone())
    refused("size mismatch|delta", weight_bits=state["weight_bits"][:3])
    wide = layer(k=41)[2]
    refused(r"is of torch.bfloat16 \[24, 41\], but must be of torch.bfloat16 \[24, 40\]", delta=wide.delta)
    # Another delta of the same base is another tenant, and longer or shorter.
    tuned, delta = make_delta(linear.weight.detach(), "exponent")
    module.load_state_dict({"delta": delta}, strict=False)
    assert same_bits(module.to_linear().weight, tuned)


def test_copies_are_whole(encoding, tmp_path):
    _, _, module = layer(encoding)
    x = random_weight(3, 40, torch.bfloat16)
    want = module(x)
    torch.save(module, tmp_path / "module.pt")
    for other in (
        copy.copy(module),
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(tmp_path / "module.pt", weights_only=False),
    ):
        assert same_bits(other(x), want) and repr(other) == repr(module)
    assert copy.deepcopy(module).weight_bits.data_ptr() != module.weight_bits.data_ptr()


def test_moves_keep_bits_and_dtype_changes_are_refused(dtype):
    _, tuned, module = layer(dtype=dtype)
    for change in (
        lambda m: m.double(),
        lambda m: m.to(torch.float64),
        lambda m: m.type(torch.float64),
        lambda m: m.half() if dtype != torch.float16 else m.float(),
        lambda m: nn.Sequential(m).to(torch.float64),
    ):
        with pytest.raises(TypeError, match=f"keeps its weight in {dtype}: a change to torch.float"):
            change(module)
    assert same_bits(module.to_linear().weight, tuned) and module.bias.dtype == dtype
    assert module.to("cpu") is module and module.to(dtype) is module and module.to("cpu", dtype) is module
    assert same_bits(module.to_linear().weight, tuned)
    meta = copy.deepcopy(module).to("meta")
    assert meta(torch.empty(3, 40, dtype=dtype, device="meta")).shape == (3, 24)
    empty = meta.to_empty(device="cpu")
    empty.load_state_dict(module.state_dict())
    assert same_bits(empty.to_linear().weight, tuned)
    with torch.device("meta"):
        assert XorDeltaLinear(40, 24, dtype=dtype).weight.is_meta
    module.share_memory()
    assert same_bits(module.to_linear().weight, tuned)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_dtype_of_linear_and_the_bits_of_the_fine_tune(dtype, autocast):
    linear, tuned, module = layer(dtype=dtype)
    tuned_linear = module.to_linear()
    for x in (random_weight(3, 40, torch.float32), random_weight(3, 40, dtype)):
        exact = XorDeltaLinear.from_linear(linear, module.delta, mode="exact")
        for m in (module, exact, torch.jit.script(module)):
            with torch.autocast("cpu", dtype=autocast):
                y, like = m(x), tuned_linear(x)
            assert y.dtype == like.dtype == autocast
            want = F.linear(x.to(dtype).float(), tuned.float(), linear.bias.detach().float())
            torch.testing.assert_close(y.detach().float(), want, rtol=2e-2, atol=2e-2)
            with torch.autocast("cpu", dtype=autocast, enabled=False):
                assert m(x.to(dtype)).dtype == dtype


def test_training_moves_the_bias_and_the_layers_around():
    torch.manual_seed(0)
    _, _, module = layer(dtype=torch.float32)
    model = nn.Sequential(nn.Linear(16, 40), module, nn.Linear(24, 1))
    frozen = module.weight_bits.clone()
    reference = copy.deepcopy(nn.Sequential(model[0], module.to_linear(), model[2]))
    x, y = torch.randn(32, 16), torch.randn(32, 1)
    for m in (model, reference):
        optimiser = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.05)
        for _ in range(5):
            optimiser.zero_grad()
            F.mse_loss(m(x), y).backward()
            optimiser.step()
    torch.testing.assert_close(model(x), reference(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(module.weight_bits, frozen)
    assert {n for n, _ in module.named_parameters()} == {"bias"}


def test_gradient_checkpointing_and_hooks_see_an_ordinary_module():
    from torch.utils.checkpoint import checkpoint

    _, _, module = layer(dtype=torch.float32)
    x = torch.randn(3, 40, requires_grad=True)
    seen = []
    handle = module.register_forward_hook(lambda *_: seen.append(1))
    (plain,) = torch.autograd.grad(module(x).sum(), (x,))
    (again,) = torch.autograd.grad(checkpoint(module, x, use_reentrant=False).sum(), (x,))
    handle.remove()
    assert torch.equal(plain, again) and len(seen) >= 2


def test_modes_and_gradients_agree_on_exact_sums():
    base = torch.randint(-4, 5, (30, 50), generator=torch.Generator().manual_seed(1)).float()
    tuned = base.clone()
    tuned.view(-1)[::7] += 1
    linear = nn.Linear(50, 30, bias=False)
    linear.weight = nn.Parameter(base)
    delta = xorz.delta_encode(base, tuned)
    x = torch.randint(-4, 5, (20, 50), generator=torch.Generator().manual_seed(2)).float()
    want = x @ tuned.T
    for mode in ("fast", "deterministic", "exact"):
        module = XorDeltaLinear.from_linear(linear, delta, mode=mode)
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        assert torch.equal(y, want) and bits(y) is not None
        y.backward(torch.ones_like(y))
        assert torch.equal(leaf.grad, torch.ones_like(y) @ tuned)
