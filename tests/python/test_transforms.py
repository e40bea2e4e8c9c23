"""Promise: torch.func's transforms of the ops, one by one and nested, are those of F.linear on the fine-tuned
weights; what has no meaning is refused with a sentence."""

import copy
import warnings

import pytest
import torch
import xorz
from conftest import make_delta, random_weight, same_bits
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from xorz import XorDeltaLinear

ops = torch.ops.xorz
F = torch.nn.functional


@pytest.fixture
def pair(encoding):
    """(delta_linear of a delta, F.linear of its fine-tune), each a function of input and bias."""
    base = random_weight(20, 30, torch.float32)
    tuned, delta = make_delta(base, encoding)
    if encoding == "raw":  # of a size at which numbers can be compared
        tuned = random_weight(20, 30, torch.float32, seed=8)
        delta = xorz.delta_encode(base, tuned, prefer="memory")

    def ours(x, b=None):
        return ops.delta_linear(x, base, b, delta)

    def theirs(x, b=None):
        return F.linear(x, tuned, b)

    return ours, theirs


def draws(*shapes):
    g = torch.Generator().manual_seed(11)
    return [torch.randn(s, generator=g) for s in shapes]


def same(transform, pair, *args, tolerance=1e-4):
    got, want = transform(pair[0])(*args), transform(pair[1])(*args)
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    return want


def cubes(f):
    return lambda *args: f(*args).pow(3).sum()


def test_gradients_tangents_and_jacobians(pair):
    x, v, b, c = draws((5, 30), (5, 30), (20,), (20,))
    same(lambda f: grad(cubes(f), (0, 1)), pair, x, b)
    same(lambda f: lambda *a: vjp(f, *a)[1](f(*a)), pair, x, b)
    same(lambda f: lambda x, b: jvp(f, (x, b), (v, c)), pair, x, b)
    same(lambda f: lambda x: jvp(f, (x,), (v,)), pair, x)
    same(lambda f: lambda b: jvp(lambda b: f(x, b), (b,), (c,)), pair, b)
    for jacobian in (jacrev, jacfwd):
        same(lambda f, j=jacobian: j(f, (0, 1)), pair, x[0], b)


def test_second_derivatives_in_every_nesting(pair):
    """A level that does not see the op gives zeros here, silently."""
    (x, b) = draws((30,), (20,))
    for outer in (jacrev, jacfwd):
        for inner in (jacrev, jacfwd):
            want = same(lambda f, o=outer, i=inner: o(i(cubes(f))), pair, x, b, tolerance=1e-3)
            assert want.abs().max() > 0.1
    same(lambda f: hessian(cubes(f)), pair, x, b, tolerance=1e-3)
    twice = same(lambda f: grad(lambda x: grad(cubes(f))(x).square().sum()), pair, x, tolerance=1e-3)
    assert twice.abs().max() > 0.1


def test_forward_mode_without_torch_func(pair):
    ours, theirs = pair
    x, v, b = draws((5, 30), (5, 30), (20,))
    with forward_ad.dual_level():
        for f_grad in (torch.enable_grad, torch.no_grad):
            with f_grad():
                got, want = (
                    forward_ad.unpack_dual(f(forward_ad.make_dual(x, v), b)).tangent for f in (ours, theirs)
                )
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        assert forward_ad.unpack_dual(ours(x, b)).tangent is None


def test_vmap_folds_a_batch_of_inputs_into_one_call(pair):
    ours, _ = pair
    x, b = draws((3, 4, 30), (20,))
    with torch.profiler.profile() as profile:
        y = vmap(lambda v: ours(v, b))(x)
    assert [e.name for e in profile.events()].count(
        "xorz::delta_linear"
    ) <= 2  # the batched level's, and one below it
    assert same_bits(y, ours(x, b))
    for in_dims, args in ((0, (x,)), (1, (x,)), (-1, (x.movedim(0, -1),)), (2, (x.movedim(0, 2),))):
        same(lambda f, d=in_dims: vmap(lambda v: f(v, b), d), pair, *args)
    same(lambda f: vmap(vmap(f)), pair, x)
    same(lambda f: vmap(vmap(f, 0), 1), pair, x)
    same(lambda f: vmap(f, out_dims=1), pair, x)
    same(lambda f: vmap(f, chunk_size=2), pair, x)
    assert vmap(ours)(x[:0]).shape == (0, 4, 20)
    same(lambda f: vmap(grad(cubes(f))), pair, x)
    same(lambda f: grad(lambda v: vmap(cubes(f))(v).sum()), pair, x)
    same(lambda f: vmap(lambda v: jvp(f, (v,), (v,))[1]), pair, x)


def test_vmap_over_biases_weights_and_deltas_is_a_loop(encoding):
    base = random_weight(8, 12, torch.bfloat16)
    weights = torch.stack([random_weight(8, 12, torch.bfloat16, seed=i) for i in range(3)])
    pairs = [make_delta(w, encoding) for w in weights]
    longest = max(d.numel() for _, d in pairs)
    if any(d.numel() != longest for _, d in pairs):
        weights = torch.stack([base] * 3)
        pairs = [make_delta(base, encoding)] * 3
    deltas = torch.stack([d for _, d in pairs])
    x, b = draws((3, 5, 12), (3, 8))
    x, b, g = x.bfloat16(), b.bfloat16(), b[:, None].expand(3, 4, 8).bfloat16()

    def loop(f, *batches):
        return torch.stack([f(*(t[i].contiguous() for t in batches)) for i in range(3)])

    linear, back = ops.delta_linear, ops.delta_linear_grad_input
    cases = [
        (lambda v, c: linear(v, base, c, deltas[0]), (x, b)) if torch.equal(weights[0], base) else None,
        (lambda v, c, w, d: linear(v, w, c, d, mode="exact"), (x, b, weights, deltas)),
        (lambda v, w, d: linear(v, w, None, d), (x, weights, deltas)),
        (lambda w, d: linear(x[0], w, None, d), (weights, deltas)),
        (lambda c: linear(x[0], weights[0], c, deltas[0]), (b,)),
        (lambda v, c: linear(v, weights[0], c, deltas[0]), (x, b)),
        (back, (g, weights, deltas)),
        (lambda w, d: back(g[0], w, d), (weights, deltas)),
        (ops.delta_restore, (weights, deltas)),
        (lambda w, d: ops.delta_restore(w, d, rows=(1, 6), columns=(2, 11)), (weights, deltas)),
    ]
    for f, batches in filter(None, cases):
        want = loop(f, *batches)
        assert same_bits(vmap(f)(*batches), want)
        moved = [t.movedim(0, -1).contiguous() for t in batches]
        assert same_bits(vmap(f, in_dims=-1)(*moved), want)
        if encoding == "sparse":
            assert vmap(f)(*(t[:0] for t in batches)).shape == (0, *want.shape[1:])


def test_vmap_of_the_ops_that_check_and_write(encoding):
    base = random_weight(8, 12, torch.bfloat16)
    tuned, delta = make_delta(base, encoding)

    def changed(w):
        ops.delta_check(delta, w)
        ops.delta_apply_(w, delta)
        return w

    batch = torch.stack([base] * 3)
    before = batch._version
    assert same_bits(vmap(changed)(batch), torch.stack([tuned] * 3)) and batch._version > before
    other = torch.stack([base, base, base + 1])
    kept = other.clone()
    with pytest.raises(RuntimeError, match=r"delta_check: .*digest [0-9a-f]{32}.*digest"):
        vmap(changed)(other)
    with pytest.raises(RuntimeError, match=r"digest [0-9a-f]{32}.*digest"):
        vmap(lambda w: xorz.delta_apply_(w, delta))(other)
    assert same_bits(other, kept)
    with pytest.raises(RuntimeError, match="vmap maps delta, but not weight"):
        vmap(lambda d: ops.delta_apply_(base.clone(), d))(torch.stack([delta, delta]))
    for name, f in (
        ("delta_encode", lambda w: ops.delta_encode(base, w)),
        ("delta_slice", lambda w: ops.delta_slice(delta, w, 0, 0, 2)),
        ("delta_concat", lambda w: ops.delta_concat([delta, delta], [w, w], 0)),
    ):
        with pytest.raises(RuntimeError, match=f"xorz::{name}: deltas differ in length, so that vmap cannot"):
            vmap(f)(batch)


def test_the_frozen_weight_is_refused_by_every_transform():
    base = random_weight(8, 12, torch.float32)
    delta = xorz.delta_encode(base, base + 1)
    x, g = draws((3, 12), (3, 8))

    def product(w):
        return ops.delta_linear(x, w, None, delta).sum()

    def back(w):
        return ops.delta_linear_grad_input(g, w, delta).sum()

    for op, f in (("delta_linear", product), ("delta_linear_grad_input", back)):
        for differentiate in (grad, jacrev):
            with pytest.raises(RuntimeError, match=rf"xorz::{op}: weight requires grad, but it is frozen"):
                differentiate(f)(base)
        for forward in (jacfwd, lambda f: lambda w: jvp(f, (w,), (w,))):
            with pytest.raises(
                RuntimeError, match=rf"xorz::{op}: weight has a forward-mode tangent, but it is"
            ):
                forward(f)(base)
        # What does not ask for the weight's derivative may map it or pass it as it is.
        assert torch.isfinite(grad(lambda v, f=f: f(base.detach()) * v.sum())(x)).all()


def module(encoding="sparse", dtype=torch.float32, bias=True, seed=0):
    linear = nn.Linear(30, 20, bias=bias).to(dtype)
    with torch.no_grad():
        linear.weight.copy_(random_weight(20, 30, dtype, seed))
    _, delta = make_delta(linear.weight.detach(), encoding)
    return XorDeltaLinear.from_linear(linear, delta)


def test_functional_call_and_per_sample_gradients(encoding):
    layer = module(encoding)
    reference = layer.to_linear()
    (x,) = draws((5, 30))
    other = {"bias": torch.linspace(-1, 1, 20)}
    got, want = (functional_call(m, other, (x,)) for m in (layer, reference))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())
    everything = dict(layer.named_parameters()) | dict(layer.named_buffers())
    assert same_bits(functional_call(layer, everything, (x,)), layer(x))
    # Another tenant of the same base.
    tuned, delta = make_delta(layer.weight.contiguous(), "exponent", seed=9)
    got = functional_call(layer, {"delta": delta}, (x,))
    torch.testing.assert_close(got, F.linear(x, tuned, layer.bias))

    def per_sample(m):
        params = {"bias": m.bias.detach()}
        return vmap(grad(lambda p, v: functional_call(m, p, (v,)).square().sum()), (None, 0))(params, x)[
            "bias"
        ]

    got, want = per_sample(layer), per_sample(reference)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


def test_an_ensemble_of_layers_is_mapped_at_once():
    layer, twin = module(), module()
    with torch.no_grad():
        twin.bias = nn.Parameter(twin.bias + 1)
    params, buffers = stack_module_state([layer, twin])
    (x,) = draws((5, 30))
    skeleton = copy.deepcopy(layer).to("meta")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = vmap(lambda p, b, v: functional_call(skeleton, (p, b), (v,)), (0, 0, None))(params, buffers, x)
    assert same_bits(out, torch.stack([layer(x), twin(x)]))
