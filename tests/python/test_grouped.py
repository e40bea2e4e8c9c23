"""Promise: a batch of many tenants on one base gives each row what `delta_linear` gives it with its tenant's
delta: bit for bit in deterministic mode, `F.linear` in exact mode; it is fit for autograd and compilation,
and refuses misuse in words."""

import random

import pytest
import torch
import xorz
from conftest import ENCODINGS, make_delta, random_weight, same_bits
from torch.library import opcheck

ops = torch.ops.xorz
F = torch.nn.functional
N, K = 45, 130


class Fleet:
    """One tenant of each encoding and an empty slot, in an arena whose gaps are full of rubbish."""

    def __init__(self, dtype, n=N, k=K, encodings=(*ENCODINGS, "empty", "sparse"), with_bias=True):
        self.base = random_weight(n, k, dtype)
        self.tuned, self.deltas, slots, parts, at = [], [], [], [], 0
        for i, encoding in enumerate(encodings):
            if encoding == "empty":
                self.tuned.append(self.base)
                self.deltas.append(None)
                slots.append((77, 0))
                continue
            tuned, delta = make_delta(self.base, encoding, seed=10 + i)
            if encoding == "raw":
                tuned = torch.nan_to_num(tuned, posinf=1, neginf=1).clamp(-1e3, 1e3)
                delta = xorz.delta_encode(self.base, tuned, prefer="memory")
            slots.append((at, delta.numel()))
            fill = torch.full((64 + -delta.numel() % 64,), 0xEE, dtype=torch.uint8)
            parts += [delta, fill]
            at += delta.numel() + fill.numel()
            self.tuned.append(tuned)
            self.deltas.append(delta)
        self.arena = torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)
        self.slots = torch.tensor(slots, dtype=torch.int64).reshape(-1, 2)
        self.biases = random_weight(len(slots) + 1, n, dtype, seed=5) if with_bias else None
        self.unchanged = xorz.delta_encode(self.base, self.base)

    def __call__(self, x, rows, mode="fast"):
        rows = torch.as_tensor(rows, dtype=torch.int32)
        return ops.delta_linear_grouped(x, self.base, self.biases, self.arena, self.slots, rows, mode=mode)

    def bias(self, tenant):
        return None if self.biases is None else self.biases[tenant]

    def weight(self, tenant):
        return self.base if tenant < 0 else self.tuned[tenant]

    def alone(self, x, tenant, mode):
        """What `delta_linear` gives these rows of one tenant."""
        delta = None if tenant < 0 else self.deltas[tenant]
        delta = self.unchanged if delta is None else delta
        return ops.delta_linear(x, self.base, self.bias(tenant), delta, mode=mode)


def maps(s, m, seed=0):
    """Row maps: all different, all one, the base alone, most of one tenant, any."""
    r = random.Random(seed)
    yield [i % (s + 1) - 1 for i in range(m)]
    yield [r.randrange(s)] * m
    yield [-1] * m
    yield [0 if r.random() < 0.8 else r.randrange(-1, s) for _ in range(m)]
    yield [r.randrange(-1, s) for _ in range(m)]


@pytest.mark.parametrize("m", [1, 2, 7, 16, 17, 40])
def test_deterministic_rows_are_those_of_the_tenant_alone(dtype, m):
    fleet = Fleet(dtype)
    x = random_weight(m, K, dtype, seed=3)
    for rows in maps(len(fleet.slots), m, seed=m):
        y = fleet(x, rows, "deterministic")
        for i, tenant in enumerate(rows):
            assert same_bits(y[i : i + 1], fleet.alone(x[i : i + 1], tenant, "deterministic")), (i, tenant)


@pytest.mark.parametrize("m", [1, 3, 16, 40, 90])
def test_fast_rows_are_products_with_the_tenants_weights(dtype, m):
    fleet = Fleet(dtype)
    x = random_weight(m, K, dtype, seed=3)
    for rows in maps(len(fleet.slots), m, seed=m):
        y = fleet(x, rows)
        for i, tenant in enumerate(rows):
            w, b = fleet.weight(tenant).double(), fleet.bias(tenant).double()
            want = x[i].double() @ w.T + b
            size = x[i].double().abs() @ w.abs().T + b.abs()
            limit = size * ((K + 8) * 2.0**-23 + 2 * torch.finfo(dtype).eps) + 1e-30
            assert bool(((y[i].double() - want).abs() <= limit).all()), (i, tenant)
        assert same_bits(fleet(x, rows), y)


@pytest.mark.parametrize("m", [1, 2, 9, 40])
def test_exact_rows_are_those_of_linear(dtype, m):
    fleet = Fleet(dtype)
    x = random_weight(m, K, dtype, seed=3)
    for rows in maps(len(fleet.slots), m, seed=m):
        y = fleet(x, rows, "exact")
        for tenant in set(rows):
            mine = torch.tensor(rows) == tenant
            assert same_bits(y[mine], F.linear(x[mine], fleet.weight(tenant), fleet.bias(tenant)))


def test_gradients_are_those_of_each_tenants_linear():
    fleet = Fleet(torch.float32)
    rows = torch.tensor([3, -1, 0, 1, 1, 5, 4, 2, -1, 0, 1, 5], dtype=torch.int32)
    x = torch.randn(3, 4, K, requires_grad=True)
    biases = fleet.biases.requires_grad_()
    g = torch.randn(3, 4, N)
    y = ops.delta_linear_grouped(x, fleet.base, biases, fleet.arena, fleet.slots, rows)
    got = torch.autograd.grad(y, (x, biases), g)
    flat = x.reshape(-1, K)
    want = torch.stack([F.linear(flat[i], fleet.weight(t), biases[t]) for i, t in enumerate(rows.tolist())])
    want = torch.autograd.grad(want.reshape(3, 4, N), (x, biases), g)
    for a, c in zip(got, want, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-3)
    # Each row has the bits that the op for one tenant gives it.
    grads = ops.delta_linear_grouped_grad_input(g, fleet.base, fleet.arena, fleet.slots, rows).reshape(-1, K)
    for i, t in enumerate(rows.tolist()):
        delta = fleet.unchanged if t < 0 or fleet.deltas[t] is None else fleet.deltas[t]
        alone = ops.delta_linear_grad_input(g.reshape(-1, N)[i], fleet.base, delta)
        assert same_bits(grads[i], alone)
    # Linear in its argument.
    h = g.clone().requires_grad_()
    out = ops.delta_linear_grouped_grad_input(h, fleet.base, fleet.arena, fleet.slots, rows)
    (twice,) = torch.autograd.grad(out, (h,), x.detach())
    plain = ops.delta_linear_grouped(x.detach(), fleet.base, None, fleet.arena, fleet.slots, rows)
    assert same_bits(twice, plain)


def test_odd_and_empty_sizes(dtype):
    for n, k in [(0, 5), (5, 0), (1, 1), (33, 257), (1, 300), (300, 1)]:
        fleet = Fleet(dtype, n, k, encodings=("unchanged", "empty"))
        for mode in ("fast", "deterministic", "exact"):
            for m in (0, 1, 3, 40):
                x = random_weight(m, k, dtype, seed=2)
                rows = [i % 3 - 1 for i in range(m)]
                y = fleet(x, rows, mode)
                assert y.shape == (m, n)
                for i, t in enumerate(rows):
                    assert mode == "exact" or same_bits(y[i : i + 1], fleet.alone(x[i : i + 1], t, mode))
        none = Fleet(dtype, n, k, encodings=())
        x = random_weight(3, k, dtype, seed=2)
        y = none(x.reshape(3, 1, k), [-1] * 3, "deterministic")
        assert same_bits(y.reshape(3, n), none.alone(x, -1, "deterministic"))
        g = random_weight(3, n, dtype, seed=2)
        rows = torch.tensor([-1, 0, 1], dtype=torch.int32)
        gx = ops.delta_linear_grouped_grad_input(g, fleet.base, fleet.arena, fleet.slots, rows)
        assert same_bits(gx, ops.delta_linear_grad_input(g, fleet.base, fleet.unchanged))


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # torch's own, in opcheck
def test_opcheck(dtype):
    fleet = Fleet(dtype)
    x = random_weight(6, K, dtype).requires_grad_()
    rows = torch.tensor([4, -1, 0, 2, 2, 3], dtype=torch.int32)
    biases = fleet.biases.clone().requires_grad_()
    rest = (fleet.arena, fleet.slots, rows)
    opcheck(ops.delta_linear_grouped.default, (x, fleet.base, biases, *rest))
    opcheck(
        ops.delta_linear_grouped.default,
        (x.detach().reshape(2, 3, K), fleet.base, None, *rest),
        {"mode": "deterministic"},
    )
    opcheck(ops.delta_linear_grouped.default, (x.detach(), fleet.base, None, *rest), {"mode": "exact"})
    g = random_weight(6, N, dtype).requires_grad_()
    opcheck(ops.delta_linear_grouped_grad_input.default, (g, fleet.base, *rest))


def test_arenas_biases_and_maps_of_any_memory_layout():
    fleet = Fleet(torch.bfloat16)
    rows = torch.tensor([0, 4, -1, 2, 3, 5], dtype=torch.int32)
    x = random_weight(6, K, torch.bfloat16, seed=3)
    want = fleet(x, rows, "deterministic")
    op, base, arena, slots = ops.delta_linear_grouped, fleet.base, fleet.arena, fleet.slots

    def same(*args):
        return same_bits(op(*args, mode="deterministic"), want)

    assert same(x, base.view(torch.int16), fleet.biases, arena, slots, rows)
    strided = torch.stack([x, x], -1)[..., 0]
    assert not strided.is_contiguous() and same(strided, base, fleet.biases, arena, slots, rows)
    wide = torch.zeros(len(slots) + 1, 2 * N, dtype=torch.bfloat16)
    wide[:, :N] = fleet.biases
    assert same(x, base, wide[:, :N], arena, slots, rows)
    every = torch.stack([slots, slots * 0 - 1], 1)
    assert same(x, base, fleet.biases, arena, every[:, 0], rows)
    assert same(x, base, fleet.biases, arena, slots, torch.stack([rows, rows], 1)[:, 0])
    # An arena at an odd address, and integers at one.
    odd = torch.cat([torch.zeros(3, dtype=torch.uint8), arena])[3:]
    assert same(x, base, fleet.biases, odd, slots, rows)
    raw = bytearray(b"xyz" + slots.numpy().tobytes())
    unaligned = torch.frombuffer(raw, dtype=torch.int64, offset=3).reshape(-1, 2)
    assert same(x, base, fleet.biases, arena, unaligned, rows)
    one = random_weight(1, N, torch.bfloat16, seed=8)
    shared = op(x, base, one.expand(len(slots) + 1, N), arena, slots, rows, mode="deterministic")
    copied = op(x, base, one.repeat(len(slots) + 1, 1), arena, slots, rows, mode="deterministic")
    assert same_bits(shared, copied)
    lead = op(x.reshape(2, 1, 3, K), base, fleet.biases, arena, slots, rows, mode="deterministic")
    assert same_bits(lead.reshape(6, N), want)


def test_an_arena_larger_than_memory_is_read_where_slots_say():
    import mmap

    fleet = Fleet(torch.bfloat16)
    size = 1 << 40
    # Linux; Python names it from 3.13 on.
    reserve_nothing = getattr(mmap, "MAP_NORESERVE", 0x4000)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserve_nothing
    try:
        memory = mmap.mmap(-1, size, flags=flags)
    except OSError:
        pytest.skip("no terabyte of address space here")
    arena = torch.frombuffer(memory, dtype=torch.uint8)
    slots, far = fleet.slots.clone(), size - (1 << 20)
    arena[far : far + fleet.arena.numel()] = fleet.arena
    slots[:, 0] += far * (slots[:, 1] > 0)
    rows = torch.tensor([0, 4, -1, 2, 3, 5], dtype=torch.int32)
    x = random_weight(6, K, torch.bfloat16, seed=3)
    got = ops.delta_linear_grouped(x, fleet.base, fleet.biases, arena, slots, rows, mode="deterministic")
    assert same_bits(got, fleet(x, rows, "deterministic"))


def test_compiled_whole_and_not_again_for_other_numbers_of_tenants():
    traced = []

    def counting(graph, inputs):
        traced.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=counting)
    def layer(x, base, biases, arena, slots, rows):
        return xorz.delta_linear_grouped(x * 2, base, arena, slots, rows, biases, mode="deterministic") + 1

    torch._dynamo.reset()
    for s, m in [(5, 7), (3, 11), (8, 2), (4, 30)]:
        fleet = Fleet(torch.float32, encodings=(*ENCODINGS, *("sparse", "empty") * 2)[:s])
        rows = torch.tensor([i % (s + 1) - 1 for i in range(m)], dtype=torch.int32)
        x = random_weight(m, K, torch.float32, seed=m)
        got = layer(x, fleet.base, fleet.biases, fleet.arena, fleet.slots, rows)
        assert same_bits(got, fleet(x * 2, rows, "deterministic") + 1)
    assert len(traced) == 1


def test_a_compiled_training_step_has_the_gradients_of_an_eager_one():
    fleet = Fleet(torch.float32)
    rows = torch.tensor([0, 4, -1, 2, 3, 5], dtype=torch.int32)
    x = random_weight(6, K, torch.float32, seed=3).requires_grad_()
    biases = fleet.biases.clone().requires_grad_()

    def loss(x, biases):
        y = xorz.delta_linear_grouped(x, fleet.base, fleet.arena, fleet.slots, rows, biases)
        return y.square().sum()

    torch._dynamo.reset()
    want = torch.autograd.grad(loss(x, biases), (x, biases))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x, biases), (x, biases))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_inference_mode_profiler_and_threads():
    fleet = Fleet(torch.bfloat16)
    rows = torch.tensor([0, 4, -1, 2, 3, 5], dtype=torch.int32)
    x = random_weight(6, K, torch.bfloat16, seed=3)
    want = fleet(x, rows, "deterministic")
    with torch.inference_mode():
        assert same_bits(fleet(x.clone(), rows.clone(), "deterministic"), want)
    with torch.profiler.profile() as profile:
        fleet(x, rows)
    assert "xorz::delta_linear_grouped" in {e.key for e in profile.key_averages()}
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert same_bits(fleet(x, rows, "deterministic"), want)
    finally:
        torch.set_num_threads(threads)
    y = xorz.delta_linear_grouped(x, fleet.base, fleet.arena, fleet.slots, rows, fleet.biases)
    assert same_bits(y, fleet(x, rows)) and y.grad_fn is None
    g = random_weight(6, N, torch.bfloat16, seed=4)
    rest = (fleet.base, fleet.arena, fleet.slots, rows)
    assert same_bits(
        xorz.delta_linear_grouped_grad_input(g, *rest), ops.delta_linear_grouped_grad_input(g, *rest)
    )


def misuses():
    fleet = Fleet(torch.bfloat16, 8, 12, encodings=("sparse", "sparse", "empty"))
    base, arena, slots, biases = fleet.base, fleet.arena, fleet.slots, fleet.biases
    x, rows = torch.zeros(3, 12, dtype=torch.bfloat16), torch.tensor([0, 1, -1], dtype=torch.int32)
    op = ops.delta_linear_grouped

    def slot(offset, length):
        other = slots.clone()
        other[1] = torch.tensor([offset, length])
        return lambda mode="fast": op(x, base, None, arena, other, rows, mode=mode)

    def tenant(value, mode="fast"):
        return lambda: op(
            x, base, None, arena, slots, torch.tensor([0, value, 0], dtype=torch.int32), mode=mode
        )

    other = Fleet(torch.float16, 8, 12, encodings=("sparse",))
    tall = Fleet(torch.bfloat16, 12, 8, encodings=("sparse",))
    at = slots[1].tolist()
    yield (
        "input columns",
        lambda: op(x[:, :5], base, None, arena, slots, rows),
        r"input is bfloat16 \[3, 5\].*= 12",
    )
    yield (
        "input dtype",
        lambda: op(x.float(), base, None, arena, slots, rows),
        r"input is float32.*weight is bfloat16",
    )
    yield (
        "input integers",
        lambda: op(x.int(), base, None, arena, slots, rows),
        r"input is int32.*only float32",
    )
    yield "weight dims", lambda: op(x, base[0], None, arena, slots, rows), r"weight must be 2-D \[n, k\]"
    yield (
        "weight strides",
        lambda: op(x, base.T.contiguous().T, None, arena, slots, rows),
        r"weight .* contiguous",
    )
    yield (
        "arena dtype",
        lambda: op(x, base, None, arena.int(), slots, rows),
        r"arena must be a 1-D uint8.*int32",
    )
    yield "arena dims", lambda: op(x, base, None, arena[None], slots, rows), r"arena must be.*uint8 \[1, "
    yield "arena strides", lambda: op(x, base, None, arena[::2], slots, rows), r"arena .* must be contiguous"
    yield (
        "slots dtype",
        lambda: op(x, base, None, arena, slots.int(), rows),
        r"slots must be int64 .*int32 \[3, 2\]",
    )
    yield (
        "slots shape",
        lambda: op(x, base, None, arena, slots.T, rows),
        r"slots must be int64 .*int64 \[2, 3\]",
    )
    yield (
        "map dtype",
        lambda: op(x, base, None, arena, slots, rows.long()),
        r"tenant_of_row is int64.*int32 \[3\]",
    )
    yield (
        "map length",
        lambda: op(x, base, None, arena, slots, rows[:2]),
        r"tenant_of_row is int32 \[2\].*\[3\]",
    )
    yield "map dims", lambda: op(x, base, None, arena, slots, rows[None]), r"tenant_of_row is int32 \[1, 3\]"
    for mode in ("fast", "deterministic", "exact"):
        yield f"high {mode}", tenant(3, mode), r"tenant_of_row\[1\] is 3, but .* of 3 slots"
        yield f"low {mode}", tenant(-2, mode), r"tenant_of_row\[1\] is -2"
        yield f"outside {mode}", lambda m=mode: slot(0, 1 << 40)(m), r"slots\[1\] .*1099511627776.*arena has"
    yield "offset", slot(at[0] + 8, at[1]), rf"slots\[1\] has offset {at[0] + 8} .*multiple of 64"
    yield "negative", slot(at[0], -3), r"slots\[1\] .*length -3.*negative"
    yield "short", slot(at[0], 100), r"slots\[1\]: "
    yield (
        "delta dtype",
        lambda: op(x, base, None, other.arena, other.slots, rows * 0),
        r"slots\[0\]: the delta is of a \[8, 12\] matrix of F16, but the base is a \[8, 12\] matrix of BF16",
    )
    yield (
        "delta shape",
        lambda: op(x, base, None, tall.arena, tall.slots, rows * 0, mode="exact"),
        r"slots\[0\]: the delta is of a \[12, 8\] matrix of BF16, but the base is a \[8, 12\] matrix of BF16",
    )
    yield (
        "biases rows",
        lambda: op(x, base, biases[:3], arena, slots, rows),
        r"biases is .*\[3, 8\], but .*\[4, 8\]",
    )
    yield (
        "biases dtype",
        lambda: op(x, base, biases.float(), arena, slots, rows),
        r"biases is float32.*bfloat16",
    )
    yield (
        "biases strides",
        lambda: op(x, base, torch.stack([biases, biases], -1)[..., 0], arena, slots, rows),
        r"biases has a stride of 2 along its last dimension",
    )
    yield "mode", lambda: op(x, base, None, arena, slots, rows, mode="quick"), r'mode must be.*but is "quick"'
    grad = ops.delta_linear_grouped_grad_input
    yield "grad columns", lambda: grad(x, base, arena, slots, rows), r"grad is .*weight\.shape\[0\] = 8"
    yield (
        "grad tenant",
        lambda: grad(x[:, :8].contiguous(), base, arena, slots, rows + 3),
        r"tenant_of_row\[0\] is 3",
    )


@pytest.mark.parametrize(("call", "sentence"), [pytest.param(c, s, id=i) for i, c, s in misuses()])
def test_each_misuse_has_its_sentence(call, sentence, capfd):
    with pytest.raises(RuntimeError, match=sentence) as caught:
        call()
    text = str(caught.value)
    assert text.startswith("xorz::delta_linear_grouped") and ".cpp" not in text and "/" not in text
    assert capfd.readouterr().err == ""


def test_fakes_refuse_what_the_kernels_refuse():
    fleet = Fleet(torch.bfloat16, 8, 12, encodings=("sparse", "empty"))
    good = [torch.zeros(3, 12, dtype=torch.bfloat16), fleet.base, fleet.biases, fleet.arena, fleet.slots]
    good.append(torch.tensor([0, 1, -1], dtype=torch.int32))
    wrong = [good[0][:, :5], good[1][0], good[2][:2], good[3][None], good[4].int(), good[5][:2]]
    with torch._subclasses.FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in good]
        assert ops.delta_linear_grouped(*fake).shape == (3, 8)
        for i, bad in enumerate(wrong):
            args = [*fake]
            args[i] = mode.from_tensor(bad)
            with pytest.raises(RuntimeError, match="xorz::delta_linear_grouped: "):
                ops.delta_linear_grouped(*args)


def test_exact_mode_refuses_autocast_to_another_dtype():
    fleet = Fleet(torch.float32)
    rows = torch.tensor([0, -1], dtype=torch.int32)
    x = random_weight(2, K, torch.float32)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(RuntimeError, match=r"delta_linear_grouped: .*autocast"),
    ):
        fleet(x, rows, "exact")


def test_a_weight_that_is_trained_is_refused_in_grad_mode():
    base = random_weight(8, 12, torch.float32)
    delta = xorz.delta_encode(base, base + 1)
    arena = torch.nn.functional.pad(delta, (0, -delta.numel() % 64))
    slots, rows = torch.tensor([[0, delta.numel()]]), torch.tensor([0, -1], dtype=torch.int32)
    trained = torch.nn.Parameter(base.clone())
    x, grad = random_weight(2, 12, torch.float32), random_weight(2, 8, torch.float32)
    for op, call in (
        ("delta_linear_grouped", lambda: ops.delta_linear_grouped(x, trained, None, arena, slots, rows)),
        (
            "delta_linear_grouped_grad_input",
            lambda: ops.delta_linear_grouped_grad_input(grad, trained, arena, slots, rows),
        ),
    ):
        with pytest.raises(
            RuntimeError, match=rf"^xorz::{op}: weight requires grad, but it is frozen; pass weight"
        ):
            call()
        with torch.no_grad():
            assert not call().requires_grad


def test_a_fake_refuses_bits_of_another_dtype():
    base = random_weight(8, 12, torch.float32)
    delta = xorz.delta_encode(base, base + 1)
    arena = torch.nn.functional.pad(delta, (0, -delta.numel() % 64))
    slots, rows = torch.tensor([[0, delta.numel()]]), torch.tensor([0, -1], dtype=torch.int32)
    x = torch.zeros(2, 12, dtype=torch.bfloat16, device="meta")
    given = [t.to("meta") for t in (base.view(torch.int32), arena, slots, rows)]
    with pytest.raises(RuntimeError, match=r"input is torch\.bfloat16, but weight is torch\.int32"):
        ops.delta_linear_grouped(x, given[0], None, *given[1:])
    assert ops.delta_linear_grouped(x.float(), given[0], None, *given[1:]).shape == (2, 8)
