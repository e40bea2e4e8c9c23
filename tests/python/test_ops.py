"""Promise: each op does what its schema says for every encoding, dtype and shape, is fit for autograd and
compilation. What it refuses: test_misuse.py."""

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


ROWS = (None, (0, 90), (0, 0), (90, 90), (16, 48), (31, 32), (3, 89))
COLUMNS = (None, (0, 1100), (5, 5), (1100, 1100), (64, 128), (1099, 1100), (7, 1093))


def test_parts_are_those_of_the_whole(encoding, dtype):
    base = random_weight(90, 1100, dtype)
    tuned, delta = make_delta(base, encoding)
    for rows, columns in itertools.product(ROWS, COLUMNS):
        want = tuned[slice(*rows or (None,)), slice(*columns or (None,))].contiguous()
        part = ops.delta_restore(base, delta, rows=rows, columns=columns)
        assert same_bits(part, want), (rows, columns)
        assert part.is_contiguous() and part.untyped_storage().nbytes() == want.nbytes
    words = base.view(torch.int32 if dtype == torch.float32 else torch.int16)
    part = xorz.delta_restore(words, delta, rows=[2, 20], columns=(3, 1000))
    assert part.dtype == words.dtype and same_bits(part.view(dtype), tuned[2:20, 3:1000].contiguous())


@pytest.mark.parametrize("other", [torch.float64, torch.int64, torch.uint8, torch.int16, torch.bool])
def test_parts_of_other_dtypes_and_shapes(other):
    for shape in ((300,), (9, 70), (40, 3, 8), (0, 3)):
        base, tuned = ((torch.rand(shape) * 9).to(other) for _ in range(2))
        for prefer in ("speed", "memory"):
            delta = ops.delta_encode(base, tuned, prefer=prefer)
            if len(shape) < 2:
                assert torch.equal(ops.delta_restore(base, delta, columns=(17, 290)), tuned[17:290])
                continue
            n = shape[0]
            assert torch.equal(ops.delta_restore(base, delta, rows=(n // 3, n)), tuned[n // 3 :])
            if len(shape) == 2:
                assert torch.equal(ops.delta_restore(base, delta, columns=(1, 3)), tuned[:, 1:3])


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
    assert not ops.delta_restore(trained, delta, rows=(1, 3)).requires_grad
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
