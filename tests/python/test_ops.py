"""Promise: each op does what its schema says for every encoding, dtype and shape, is fit for autograd and compilation, and
answers each misuse with a sentence that names the argument and both values."""

import itertools

import pytest
import torch
import xorz
from conftest import close, make_delta, random_weight, same_bits

ops = torch.ops.xorz
F = torch.nn.functional


SHAPES = [(), (1,), (2,), (16,), (17,), (64,), (0,), (2, 3), (2, 0, 4), (1, 1, 5)]


@pytest.mark.parametrize("mode", ["fast", "deterministic", "exact"])
def test_delta_linear_is_the_product_with_the_fine_tuned_weights(encoding, dtype, mode):
    base = random_weight(45, 67, dtype)
    tuned, delta = make_delta(base, encoding)
    if encoding == "raw":
        tuned = torch.nan_to_num(tuned, posinf=1, neginf=1).clamp(-1e3, 1e3)
        delta = xorz.delta_encode(base, tuned, prefer="memory")
    assert encoding == "unchanged" or not torch.equal(tuned, base)
    b = random_weight(1, 45, dtype, seed=5)[0]
    for lead in SHAPES:
        x = random_weight(1, 67 * max(1, torch.Size(lead).numel()), dtype, seed=3)[0]
        x = x[: 67 * torch.Size(lead).numel()].reshape(*lead, 67)
        for bias in (None, b):
            for weight in (base, base.view(torch.int32 if dtype == torch.float32 else torch.int16)):
                y = ops.delta_linear(x, weight, bias, delta, mode=mode)
                assert y.dtype == dtype and y.is_contiguous()
                assert close(y, x, tuned, bias), (lead, bias is not None)
    wide = random_weight(6, 2 * 67, dtype, seed=4)[:, ::2]
    assert not wide.is_contiguous() and close(
        ops.delta_linear(wide, base, b, delta, mode=mode), wide, tuned, b
    )


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (1, 1), (1, 300), (300, 1), (33, 257)])
def test_odd_and_empty_matrices(shape, dtype):
    base = random_weight(*shape, dtype)
    tuned = base + torch.tensor(0.25, dtype=dtype)
    for prefer in ("speed", "memory"):
        delta = ops.delta_encode(base, tuned, prefer=prefer)
        assert same_bits(ops.delta_restore(base, delta), tuned)
        ops.delta_check(delta, base)
        for m in (0, 1, 3, 40):
            x = random_weight(m, shape[1], dtype, seed=2)
            for mode in ("fast", "deterministic", "exact"):
                assert close(ops.delta_linear(x, base, None, delta, mode=mode), x, tuned, None)
            g = random_weight(m, shape[0], dtype, seed=2)
            assert close(ops.delta_linear_grad_input(g, base, delta), g, tuned.T, None)


def test_restore_apply_slice_and_concat_keep_every_bit(encoding, dtype):
    base = random_weight(70, 300, dtype)
    tuned, delta = make_delta(base, encoding)
    assert same_bits(ops.delta_restore(base, delta), tuned)
    assert same_bits(ops.delta_restore(base.view(torch.uint8).view(dtype), delta), tuned)
    mine = base.clone()
    ops.delta_apply_(mine, delta)
    assert same_bits(mine, tuned)
    for dim, cuts in ((0, (0, 1, 16, 33, 70)), (1, (0, 7, 256, 299, 300))):
        parts = []
        for start, end in itertools.pairwise(cuts):
            piece = base.narrow(dim, start, end - start).contiguous()
            cut = ops.delta_slice(delta, base, dim, start, end)
            ops.delta_check(cut, piece)
            assert same_bits(
                ops.delta_restore(piece, cut), tuned.narrow(dim, start, end - start).contiguous()
            )
            parts.append((cut, piece))
        joined = ops.delta_concat([d for d, _ in parts], [p for _, p in parts], dim)
        ops.delta_check(joined, base)
        assert same_bits(ops.delta_restore(base, joined), tuned)


@pytest.mark.parametrize(
    "other", [torch.float64, torch.int64, torch.uint8, torch.int16, torch.bool, torch.uint16]
)
@pytest.mark.parametrize("shape", [(), (7,), (5, 6), (3, 4, 5), (0, 3)])
def test_any_dtype_and_shape_is_stored_bit_for_bit(other, shape):
    base = (torch.rand(shape) * 100).to(other)
    tuned = (torch.rand(shape) * 100).to(other)
    for prefer in ("speed", "memory"):
        delta = ops.delta_encode(base, tuned, prefer=prefer)
        back = ops.delta_restore(base, delta)
        assert back.dtype == other and back.shape == base.shape and torch.equal(back, tuned)


def test_adversarial_words_are_restored(dtype):
    words = torch.arange(0, 2**16, dtype=torch.int32)
    base = words.to(torch.int16).view(torch.bfloat16 if dtype == torch.float32 else dtype).view(256, 256)
    other = words.flip(0).to(torch.int16).view(base.dtype).view(256, 256)
    if dtype == torch.float32:
        base = torch.cat([base.view(torch.int16)] * 2, 1).contiguous().view(torch.float32)
        other = torch.cat([other.view(torch.int16)] * 2, 1).contiguous().view(torch.float32)
    mixed = torch.where(torch.rand(256, 256) < 0.05, other, base)
    for tuned in (other, mixed):
        for prefer in ("speed", "memory"):
            delta = ops.delta_encode(base, tuned, prefer=prefer)
            assert same_bits(ops.delta_restore(base, delta), tuned)
            mine = base.clone()
            ops.delta_apply_(mine, delta)
            assert same_bits(mine, tuned)


def test_gradients_are_those_of_linear(encoding):
    base = random_weight(40, 50, torch.float32)
    tuned, delta = make_delta(base, encoding)
    if encoding == "raw":
        tuned = torch.randn(40, 50)
        delta = xorz.delta_encode(base, tuned, prefer="memory")
    x, b = torch.randn(3, 4, 50, requires_grad=True), torch.randn(40, requires_grad=True)
    g = torch.randn(3, 4, 40)
    got = torch.autograd.grad(ops.delta_linear(x, base, b, delta), (x, b), g)
    want = torch.autograd.grad(F.linear(x, tuned, b), (x, b), g)
    for a, c in zip(got, want, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-4)
    (only,) = torch.autograd.grad(ops.delta_linear(x, base, None, delta), (x,), g)
    torch.testing.assert_close(only, want[0], rtol=1e-4, atol=1e-4)
    # Linear in x: the gradient of the gradient is the product again.
    y = g.clone().requires_grad_()
    (twice,) = torch.autograd.grad(ops.delta_linear_grad_input(y, base, delta), (y,), x.detach())
    torch.testing.assert_close(twice, F.linear(x.detach(), tuned), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["fast", "deterministic", "exact"])
def test_a_weight_that_requires_grad_is_refused_and_none_leaks_through_kernels(mode):
    base = random_weight(8, 9, torch.float32)
    tuned, delta = base + 1, xorz.delta_encode(base, base + 1)
    trained, x, g = base.clone().requires_grad_(), torch.randn(2, 9), torch.randn(2, 8)
    for rows in (x, x.clone().requires_grad_()):
        with pytest.raises(
            RuntimeError,
            match=r"delta_linear: weight requires grad, but it is frozen; pass weight\.detach\(\)",
        ):
            ops.delta_linear(rows, trained, None, delta, mode=mode)
    for rows in (g, g.clone().requires_grad_()):
        with pytest.raises(
            RuntimeError, match="delta_linear_grad_input: weight requires grad, but it is frozen"
        ):
            ops.delta_linear_grad_input(rows, trained, delta)
    for quiet in (torch.no_grad, torch.inference_mode):
        with quiet():
            y = ops.delta_linear(x.clone().requires_grad_(), trained, None, delta, mode=mode)
            assert not y.requires_grad and close(y, x, tuned, None)
            assert close(ops.delta_linear_grad_input(g, trained, delta), g, tuned.T, None)
    assert torch.is_grad_enabled()
    assert ops.delta_linear(x, base, None, delta, mode=mode).grad_fn is None
    y = ops.delta_linear(x.clone().requires_grad_(), trained.detach(), None, delta, mode=mode)
    assert "Addmm" not in y.grad_fn.name() and y.grad_fn.next_functions[0][0].name().endswith(
        "AccumulateGrad"
    )
    assert not ops.delta_restore(trained, delta).requires_grad
    assert not ops.delta_encode(trained, tuned).requires_grad


def test_apply_bumps_the_version_and_respects_autograd():
    base = random_weight(16, 16, torch.float32)
    tuned, delta = make_delta(base, "sparse")
    weight = base.clone()
    x = torch.randn(2, 16, requires_grad=True)
    y = F.linear(x, weight)
    before = weight._version
    xorz.delta_apply_(weight, delta)
    assert weight._version == before + 1 and same_bits(weight, tuned)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()

    leaf = torch.nn.Parameter(base.clone())
    with pytest.raises(RuntimeError, match="delta_apply_: weight is a leaf that requires grad"):
        ops.delta_apply_(leaf, delta)
    assert same_bits(leaf, base)
    with torch.no_grad():
        ops.delta_apply_(leaf, delta)
    assert same_bits(leaf, tuned)
    with pytest.raises(RuntimeError, match="weight requires grad, and a delta has no gradient"):
        ops.delta_apply_(torch.nn.Parameter(base.clone()) * 1, delta)
    with torch.inference_mode():
        mine = base.clone()
        ops.delta_apply_(mine, delta)
        assert same_bits(mine, tuned)


def misuses():
    base = random_weight(8, 12, torch.bfloat16)
    tuned = base + 1
    delta = xorz.delta_encode(base, tuned)
    x, b = torch.zeros(2, 12, dtype=torch.bfloat16), torch.zeros(8, dtype=torch.bfloat16)
    lin, f32 = ops.delta_linear, torch.float32
    damaged = delta.clone()
    damaged[12] = 99
    as_i64 = xorz.delta_encode(base.long(), base.long() + 1)
    yield (
        "weight shape",
        lambda: lin(x, base[:4], None, delta),
        r"weight is bfloat16 \[4, 12\].*delta is of bfloat16 \[8, 12\]",
    )
    yield (
        "weight dtype",
        lambda: lin(x, base.to(f32), None, delta),
        r"weight is float32 \[8, 12\].*delta is of bfloat16",
    )
    yield (
        "weight bits",
        lambda: lin(x, base.view(torch.int16).int(), None, delta),
        r"weight is int32 \[8, 12\].*bfloat16",
    )
    yield (
        "weight dims",
        lambda: lin(x, base[0], None, delta),
        r"weight must be 2-D \[n, k\], but is bfloat16 \[12\]",
    )
    yield (
        "weight strides",
        lambda: lin(x, base.T.contiguous().T, None, delta),
        r"weight bfloat16 \[8, 12\] must be contiguous",
    )
    yield (
        "input columns",
        lambda: lin(x[:, :5], base, None, delta),
        r"input is bfloat16 \[2, 5\].*weight\.shape\[1\] = 12",
    )
    yield (
        "input dtype",
        lambda: lin(x.to(f32), base, None, delta),
        r"input is float32 \[2, 12\].*delta's dtype is bfloat16",
    )
    yield "input 0-D", lambda: lin(x[0, 0], base, None, delta), r"input is bfloat16 \[\].*= 12"
    yield (
        "bias size",
        lambda: lin(x, base, b[:3], delta),
        r"bias is bfloat16 \[3\], but must be bfloat16 \[8\]",
    )
    yield (
        "bias dtype",
        lambda: lin(x, base, b.to(f32), delta),
        r"bias is float32 \[8\], but must be bfloat16 \[8\]",
    )
    yield "mode", lambda: lin(x, base, None, delta, mode="quick"), r'mode must be "fast".*but is "quick"'
    yield (
        "delta dtype",
        lambda: lin(x, base, None, delta.int()),
        r"delta must be a 1-D uint8 tensor.*but is int32",
    )
    yield (
        "delta dims",
        lambda: lin(x, base, None, delta[None]),
        r"delta must be a 1-D uint8 tensor.*uint8 \[1, ",
    )
    yield (
        "delta strides",
        lambda: lin(x, base, None, torch.cat([delta, delta])[::2]),
        r"delta .* must be contiguous",
    )
    yield "delta empty", lambda: lin(x, base, None, delta[:0]), r"delta: .*0 bytes"
    yield "delta short", lambda: lin(x, base, None, delta[:-64].clone()), r"delta: "
    yield "delta damaged", lambda: lin(x, base, None, damaged), r"delta: "
    yield (
        "delta of integers",
        lambda: lin(x, base.long(), None, as_i64),
        r"the delta is of int64; only float32",
    )
    yield (
        "complex",
        lambda: ops.delta_encode(x.to(torch.complex64), x.to(torch.complex64)),
        r"base has a dtype",
    )
    yield (
        "encode shapes",
        lambda: ops.delta_encode(base, tuned[:4]),
        r"base is bfloat16 \[8, 12\].*fine_tuned is bfloat16 \[4, 12\]",
    )
    yield (
        "encode dtypes",
        lambda: ops.delta_encode(base, tuned.float()),
        r"base is bfloat16.*fine_tuned is float32",
    )
    yield (
        "encode prefer",
        lambda: ops.delta_encode(base, tuned, prefer="size"),
        r'prefer must be "speed" or "memory", but is "size"',
    )
    yield "restore", lambda: ops.delta_restore(base.float(), delta), r"base is float32.*delta is of bfloat16"
    yield (
        "apply base",
        lambda: ops.delta_apply_(tuned.clone(), delta),
        r"delta_apply_: .*digest [0-9a-f]{32}.*digest [0-9a-f]{32}",
    )
    yield "apply alias", lambda: ops.delta_apply_(delta, delta), r"delta_apply_: "
    yield (
        "check base",
        lambda: ops.delta_check(delta, tuned),
        r"delta_check: .*digest [0-9a-f]{32}.*digest [0-9a-f]{32}",
    )
    yield (
        "grad columns",
        lambda: ops.delta_linear_grad_input(x, base, delta),
        r"grad is bfloat16 \[2, 12\].*weight\.shape\[0\] = 8",
    )
    yield (
        "slice dim",
        lambda: ops.delta_slice(delta, base, 2, 0, 1),
        r"dim must be 0 \(rows\) or 1 \(columns\), but is 2",
    )
    yield (
        "slice range",
        lambda: ops.delta_slice(delta, base, 0, 3, 9),
        r"start = 3 and end = 9 must lie within 0 to 8",
    )
    yield "slice order", lambda: ops.delta_slice(delta, base, 1, 5, 4), r"start = 5 and end = 4"
    yield "slice negative", lambda: ops.delta_slice(delta, base, 1, -1, 4), r"start = -1"
    yield "concat empty", lambda: xorz.delta_concat([], [], 0), r"delta_concat: deltas is empty"
    yield "concat lengths", lambda: ops.delta_concat([delta], [], 0), r"1 deltas, but 0 bases"
    yield (
        "concat part",
        lambda: ops.delta_concat([delta, delta], [base, base[:2]], 0),
        r"bases\[1\] is bfloat16 \[2, 12\]",
    )
    yield "concat dim", lambda: ops.delta_concat([delta], [base], -1), r"dim must be 0 .* but is -1"


@pytest.mark.parametrize(("call", "sentence"), [pytest.param(c, s, id=i) for i, c, s in misuses()])
def test_each_misuse_has_its_sentence(call, sentence, capfd):
    with pytest.raises(RuntimeError, match=sentence) as caught:
        call()
    text = str(caught.value)
    assert text.startswith("xorz::") and ".cpp" not in text and "/" not in text
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("position", [0, 8, 10, 11, 12, 13, 16, 24, 32, 40, 100])
def test_a_broken_header_never_crashes(position, encoding):
    base = random_weight(33, 70, torch.bfloat16)
    _, delta = make_delta(base, encoding)
    x = torch.ones(2, 70, dtype=torch.bfloat16)
    for value in (0, 1, 3, 127, 128, 255):
        broken = delta.clone()
        broken[position] = value
        for call in (
            lambda d=broken: ops.delta_linear(x, base, None, d),
            lambda d=broken: ops.delta_restore(base, d),
            lambda d=broken: ops.delta_slice(d, base, 0, 1, 20),
        ):
            try:
                call()
            except RuntimeError as error:
                assert str(error).startswith("xorz::")


def test_calls_from_many_threads_agree():
    import threading

    base = random_weight(64, 256, torch.float32)
    _, delta = make_delta(base, "sparse")
    x = random_weight(4, 256, torch.float32, seed=9)
    want = ops.delta_linear(x, base, None, delta)
    wrong = []

    def work():
        for _ in range(50):
            if not same_bits(ops.delta_linear(x, base, None, delta), want):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_the_python_functions_are_the_ops(encoding):
    base = random_weight(20, 30, torch.bfloat16)
    tuned, delta = make_delta(base, encoding)
    x = random_weight(3, 30, torch.bfloat16)
    bias = random_weight(1, 20, torch.bfloat16)[0]
    assert same_bits(xorz.delta_linear(x, base, delta, bias), ops.delta_linear(x, base, bias, delta))
    assert same_bits(xorz.delta_restore(base, delta), tuned)
    assert same_bits(xorz.delta_apply_(base.clone(), delta), tuned)
    xorz.delta_check(delta, base)
    g = random_weight(3, 20, torch.bfloat16)
    assert same_bits(
        xorz.delta_linear_grad_input(g, base, delta), ops.delta_linear_grad_input(g, base, delta)
    )
    assert torch.equal(xorz.delta_slice(delta, base, 0, 0, 20), ops.delta_slice(delta, base, 0, 0, 20))
    assert torch.equal(xorz.delta_concat([delta], [base], 0), ops.delta_concat([delta], [base], 0))
    info = xorz.delta_info(delta)
    assert (info.encoding, info.dtype, info.shape) == (encoding, torch.bfloat16, (20, 30))
    assert info.changed == int((base.view(torch.int16) != tuned.view(torch.int16)).sum())
