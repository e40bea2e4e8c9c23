"""Promises of exactness, and proof that the tests would notice: weights to the bit, one-hot rows, exact sums,
the bound, one result whatever the threads or the company, non-finite values, and mode="exact" equal to
F.linear bit for bit."""

import json
import random
from pathlib import Path

import pytest
import torch
import xorz
from conftest import DTYPES, ENCODINGS, bits, fine_tune, make_delta, random_weight, same_bits

ops = torch.ops.xorz
F = torch.nn.functional
HALF = (torch.bfloat16, torch.float16)
PAIRS = Path(__file__).parents[2] / ".." / "shared" / "pairs"


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_exact_mode_is_linear_bit_for_bit_at_every_m(encoding, dtype):
    base = random_weight(129, 97, dtype)
    tuned, delta = make_delta(base, encoding)
    bias = random_weight(1, 129, dtype, seed=2)[0]
    x = random_weight(300, 97, dtype, seed=3) * 20
    for m in (*range(1, 40), 63, 64, 65, 100, 127, 128, 129, 200, 255, 256, 257, 299, 300):
        for b in (None, bias):
            assert same_bits(
                ops.delta_linear(x[:m], base, b, delta, mode="exact"), F.linear(x[:m], tuned, b)
            ), m


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "k"),
    [(1, 1), (2, 1), (5, 1), (1, 1000), (3, 4097), (1000, 3), (517, 1031), (64, 70001), (2049, 512)],
)
def test_exact_mode_on_odd_shapes(n, k, dtype):
    base = random_weight(n, k, dtype)
    tuned = fine_tune(base, "sparse")
    delta = xorz.delta_encode(base, tuned)
    for lead in ((1,), (), (2,), (7,), (40,), (2, 5), (3, 1), (0,), (2, 0)):
        count = torch.Size(lead).numel()
        x = random_weight(count, k, dtype, seed=4).reshape(*lead, k)
        for b in (None, random_weight(1, n, dtype)[0]):
            assert same_bits(ops.delta_linear(x, base, b, delta, mode="exact"), F.linear(x, tuned, b)), lead
    strided = random_weight(6, 2 * k, dtype)[:, ::2]
    assert same_bits(ops.delta_linear(strided, base, None, delta, mode="exact"), F.linear(strided, tuned))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("threads", [1, 2])
def test_exact_mode_takes_panels_within_its_scratch(dtype, threads):
    base = random_weight(6000, 1024, dtype)
    tuned = fine_tune(base, "sparse")
    delta = xorz.delta_encode(base, tuned)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for m in (1, 3, 300):
            x = random_weight(m, 1024, dtype, seed=4)
            ops.delta_linear(x[:1], base, None, delta, mode="exact")
            xorz._core.reset_counters()
            y = ops.delta_linear(x, base, None, delta, mode="exact")
            assert same_bits(y, F.linear(x, tuned))
            if xorz._core.panels_restored() > 1:
                assert xorz._core.scratch_peak_bytes() <= 2 << 20
            else:
                # The probe found that this machine's torch multiplies panels otherwise: one transient matrix.
                assert xorz._core.scratch_peak_bytes() >= base.nbytes // threads
    finally:
        torch.set_num_threads(before)


def test_exact_float32_counts_its_transient_matrix():
    base = random_weight(300, 400, torch.float32)
    _, delta = make_delta(base, "sparse")
    xorz._core.reset_counters()
    ops.delta_linear(torch.randn(3, 400), base, None, delta, mode="exact")
    assert xorz._core.panels_restored() == 1
    assert xorz._core.scratch_peak_bytes() >= base.nbytes // torch.get_num_threads()


def test_few_rows_restore_no_panel_and_take_little_scratch():
    base = random_weight(2048, 1024, torch.bfloat16)
    tuned = fine_tune(base, "sparse")
    for prefer in ("speed", "memory"):
        delta = xorz.delta_encode(base, tuned, prefer=prefer)
        for m in (1, 2, 8, 16):
            xorz._core.reset_counters()
            ops.delta_linear(random_weight(m, 1024, torch.bfloat16), base, None, delta)
            assert xorz._core.panels_restored() == 0, (prefer, m)
            assert xorz._core.scratch_peak_bytes() <= 2 << 20
        for m in (64, 300):
            xorz._core.reset_counters()
            ops.delta_linear(random_weight(m, 1024, torch.bfloat16), base, None, delta)
            assert xorz._core.scratch_peak_bytes() <= 2 << 20


@pytest.mark.parametrize("mode", ["fast", "deterministic"])
def test_one_hot_rows_give_columns_exactly(encoding, dtype, mode):
    base = random_weight(50, 60, dtype)
    tuned, delta = make_delta(base, encoding)
    finite = torch.isfinite(tuned)
    y = ops.delta_linear(torch.eye(60, dtype=dtype), base, None, delta, mode=mode).T
    y = y + torch.tensor(0.0, dtype=dtype)  # -0.0 of a sum is +0.0
    want = tuned + torch.tensor(0.0, dtype=dtype)
    if dtype == torch.float32:
        torch.testing.assert_close(y[finite], want[finite], rtol=1e-5, atol=1e-6)
    else:
        assert finite.all() and same_bits(y, want)


def exact_sums(encoding, dtype, n, k, seed):
    """Integers small enough that every partial sum is exact in float32."""
    g = torch.Generator().manual_seed(seed)
    base = torch.randint(-3, 4, (n, k), generator=g).to(dtype)
    share = {"unchanged": 0.0, "sparse": 0.03, "exponent": 0.4, "raw": 1.0}[encoding]
    other = torch.randint(-3, 4, (n, k), generator=g).to(dtype)
    tuned = torch.where(torch.rand(n, k, generator=g) < share, other, base)
    return base, tuned, g


@pytest.mark.parametrize("mode", ["fast", "deterministic", "exact"])
@pytest.mark.parametrize("n_k", [(1, 1), (7, 1), (33, 65), (130, 300), (16, 70000)])
def test_exact_sums_equal_float64_bit_for_bit(encoding, dtype, mode, n_k):
    n, k = n_k
    base, tuned, g = exact_sums(encoding, dtype, n, k, 1)
    for prefer in ("speed", "memory"):
        delta = xorz.delta_encode(base, tuned, prefer=prefer)
        for m in (1, 2, 3, 5, 16, 17, 33, 100, 300) if k < 1000 else (1, 9):
            x = torch.randint(-2, 3, (m, k), generator=g).to(dtype)
            y = ops.delta_linear(x, base, None, delta, mode=mode)
            want = (x.double() @ tuned.double().T).to(torch.float32).to(dtype)
            assert same_bits(y + 0.0, want + 0.0), (
                m
            )  # the sign of a zero sum is anyone's, torch's own kernels differ


def test_mutants_are_noticed(dtype):
    """The comparison above fails when the delta is ignored, one change is dropped, or one lands a column off."""
    base, tuned, g = exact_sums("sparse", dtype, 33, 65, 1)
    x = torch.randint(-2, 3, (200, 65), generator=g).to(dtype)
    want = x.double() @ tuned.double().T
    (at,) = torch.nonzero((tuned != base).view(-1))[5]
    dropped = tuned.clone()
    dropped.view(-1)[at] = base.view(-1)[at]
    shifted = dropped.clone()
    shifted.view(-1)[at + 1] += tuned.view(-1)[at] - base.view(-1)[at]
    for mutant in (base, dropped, shifted):
        y = ops.delta_linear(x, base, None, xorz.delta_encode(base, mutant))
        assert not same_bits(y, want.to(torch.float32).to(dtype))


def test_same_bits_whatever_the_threads(encoding, dtype):
    base = random_weight(200, 300, dtype)
    _, delta = make_delta(base, encoding)
    before = torch.get_num_threads()
    try:
        for mode in ("fast", "deterministic"):
            for m in (1, 5, 16, 64, 300):
                x = random_weight(m, 300, dtype, seed=m)
                seen = []
                for threads in (1, 2, 4):
                    torch.set_num_threads(threads)
                    seen.append(ops.delta_linear(x, base, None, delta, mode=mode))
                assert all(same_bits(s, seen[0]) for s in seen), (mode, m)
    finally:
        torch.set_num_threads(before)


def test_deterministic_rows_do_not_depend_on_their_company(encoding, dtype):
    base = random_weight(70, 200, dtype)
    _, delta = make_delta(base, encoding)
    x = random_weight(300, 200, dtype, seed=3)
    whole = ops.delta_linear(x, base, None, delta, mode="deterministic")
    for first, count in ((0, 1), (5, 2), (17, 16), (40, 100), (299, 1)):
        some = ops.delta_linear(x[first : first + count], base, None, delta, mode="deterministic")
        assert same_bits(some, whole[first : first + count])


def test_a_row_does_not_depend_on_the_values_of_others(dtype):
    base = random_weight(70, 200, dtype)
    _, delta = make_delta(base, "sparse")
    for m in (2, 16, 64):
        x = random_weight(m, 200, dtype, seed=3)
        other = x.clone()
        other[1:] = float("nan")
        a, b = (ops.delta_linear(v, base, None, delta) for v in (x, other))
        assert same_bits(a[:1], b[:1])


@pytest.mark.parametrize("mode", ["fast", "deterministic", "exact"])
def test_non_finite_values_are_those_of_the_fine_tune(dtype, mode):
    top = torch.finfo(dtype).max
    base = random_weight(40, 48, dtype)
    tuned = fine_tune(base, "sparse")
    base[3, 4], tuned[3, 4] = float("nan"), 0.5  # a NaN that the fine-tune cured
    base[4, 4], tuned[4, 4] = 0.5, float("nan")
    base[5, 4], tuned[5, 4] = float("inf"), -1.0
    base[6, 4], tuned[6, 4] = 0.25, float("-inf")
    base[7, 4], tuned[7, 4] = top, 1.0
    base[8, 4], tuned[8, 4] = -top, top
    base[9, 4], tuned[9, 4] = 0.0, -0.0
    base[10, 4], tuned[10, 4] = torch.finfo(dtype).smallest_normal / 2, 0.0
    base[11, 4], tuned[11, 4] = float("inf"), float("inf")
    for prefer in ("speed", "memory"):
        delta = xorz.delta_encode(base, tuned, prefer=prefer)
        assert same_bits(ops.delta_restore(base, delta), tuned)
        for m in (1, 4, 16, 40, 100):
            x = random_weight(m, 48, dtype, seed=3)
            x[:, 4] = 1.0
            y = ops.delta_linear(x, base, None, delta, mode=mode)
            want = F.linear(x.double(), tuned.double()).to(dtype)
            assert torch.equal(torch.isnan(y), torch.isnan(want)), (prefer, m)
            assert torch.equal(torch.isinf(y), torch.isinf(want)), (prefer, m)
            assert torch.equal(y[torch.isinf(y)] > 0, want[torch.isinf(want)] > 0)
            # The bound of the fast modes counts what cancels: a base of 3e38 that the fine-tune makes 1 hides
            # its row.
            parts = [
                torch.nan_to_num(t.double(), 0, 0, 0).abs() for t in (base, tuned.double() - base.double())
            ]
            slack = x.double().abs() @ (parts[0] + parts[1]).T * (56 * 2.0**-23) + 2 * torch.finfo(dtype).eps
            slack = slack * (1 + want.double().abs())
            finite = torch.isfinite(want)
            assert ((y.double() - want.double()).abs()[finite] <= slack[finite]).all(), (prefer, m)
            assert int((finite & (slack < 0.2)).sum()) > y.numel() // 2


@pytest.mark.parametrize("seed", range(12))
def test_random_words_shapes_and_encodings(seed):
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    dtype = rng.choice(DTYPES)
    n, k = rng.choice([1, 2, 15, 16, 17, 100]), rng.choice([1, 2, 31, 255, 256, 257, 700])
    base = random_weight(n, k, dtype, seed)
    words = bits(base).clone()
    chosen = torch.rand(words.shape, generator=g) < rng.choice([0.002, 0.03, 0.3, 0.9])
    wild = torch.randint(-(2**15), 2**15, words.shape, generator=g).to(words.dtype)
    if words.dtype == torch.int32:
        wild = wild * 65536 + torch.randint(0, 65536, words.shape, generator=g).to(torch.int32)
    near = words + torch.randint(-9, 10, words.shape, generator=g).to(words.dtype)
    tuned = torch.where(chosen, wild if rng.random() < 0.5 else near, words).view(dtype)
    for prefer in ("speed", "memory"):
        delta = xorz.delta_encode(base, tuned, prefer=prefer)
        ops.delta_check(delta, base)
        assert same_bits(ops.delta_restore(base, delta), tuned)
        x = random_weight(rng.choice([1, 4, 16, 50]), k, dtype, seed)
        for mode in ("fast", "deterministic"):
            y = ops.delta_linear(x, base, None, delta, mode=mode).double()
            want = (x.double() @ tuned.double().T).to(dtype).double()
            magnitude = x.double().abs() @ (tuned.double().abs() + base.double().abs()).T
            slack = magnitude * ((k + 8) * 2.0**-23 + 2 * torch.finfo(dtype).eps) + 1e-30
            calm = torch.isfinite(want) & torch.isfinite(slack) & (slack < torch.finfo(dtype).max / 4)
            assert ((y - want).abs()[calm] <= slack[calm]).all()


def test_real_pairs_are_exact():
    manifest = PAIRS / "MANIFEST.json"
    if not manifest.exists():
        pytest.skip(f"no real pairs at {PAIRS}: this promise is tested where they are")
    safetensors = pytest.importorskip("safetensors")
    assert json.loads(manifest.read_text())
    tried = 0
    for path in sorted(PAIRS.glob("*.ft*.safetensors")):
        base_path = path.with_name(path.name.split(".ft")[0] + ".base.safetensors")
        with safetensors.safe_open(base_path, "pt") as old, safetensors.safe_open(path, "pt") as new:
            names = [n for n in new.keys() if n in old.keys() and len(new.get_slice(n).get_shape()) == 2]
            for name in sorted(names, key=lambda n: -new.get_slice(n).get_shape()[0])[1:4]:
                base, tuned = old.get_tensor(name)[:512].contiguous(), new.get_tensor(name)[:512].contiguous()
                if base.shape != tuned.shape or base.dtype != tuned.dtype or base.dtype not in DTYPES:
                    continue
                x = random_weight(9, base.shape[1], base.dtype)
                for prefer in ("speed", "memory"):
                    delta = xorz.delta_encode(base, tuned, prefer=prefer)
                    assert same_bits(ops.delta_restore(base, delta), tuned), (path.name, name)
                    y = ops.delta_linear(x, base, None, delta, mode="exact")
                    assert same_bits(y, F.linear(x, tuned)), (path.name, name)
                    if base.dtype != torch.float32:
                        eye = torch.eye(base.shape[1], dtype=base.dtype)[:64]
                        assert torch.equal(ops.delta_linear(eye, base, None, delta), tuned.T[:64])
                tried += 1
    assert tried >= 5
