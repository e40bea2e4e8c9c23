"""Promise: in a mixed batch on a GPU many rows of one tenant side by side are multiplied for it alone, the others together, and
each row has its own tenant's weights; the plain fine-tuned model says what is expected, in float64.

On the double of a GPU, which knows what is asked and nothing of time.
"""

import copy

import gpu_double
import pytest
import torch
import xorz
from gpu_double import OnGpu, to_gpu
from torch import nn
from xorz.serve import forwards, runs

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a double of a GPU, beside a real one")
NAMES = ["alice", "alice", "bob", None, None, "carol", "alice"]
LONG, SHORT = 70, 5


@pytest.fixture
def gpu(monkeypatch):
    with gpu_double.machine(monkeypatch) as ledger, torch.no_grad():
        yield ledger


def test_rows_are_divided_where_a_tenant_has_many_side_by_side():
    def of(slots, each=1):
        return runs.runs_of(torch.tensor(slots, dtype=torch.int32), each)

    assert of([]) is None and of([0] * 127) is None and of([0, 1] * 400) is None
    assert of([0] * 31 + [1] * 200 + [-1] * 40) == runs.Runs(271, {1: [(31, 231)]}, [(0, 31), (231, 271)])
    # Short runs of a tenant that has many rows elsewhere go with the others.
    assert of([2, 3, 2], 64) == runs.Runs(192, {2: [(0, 64), (128, 192)]}, [(64, 128)])
    assert of([2] * 100 + [3] + [2] * 31 + [3] + [2] * 40).alone == {2: [(0, 100), (133, 173)]}
    assert of([-1] * 128) == runs.Runs(128, {-1: [(0, 128)]}, [])
    whole = of([0] * 200 + [1] * 10)
    assert whole.until(210) is whole
    assert whole.until(150) == runs.Runs(150, {0: [(0, 150)]}, [])
    assert whole.until(220) == runs.Runs(220, {0: [(0, 200)]}, [(200, 210), (210, 220)])
    assert of([1] * 10 + [0] * 200).until(9) is None


def test_every_row_is_in_one_span_whatever_the_batch():
    g = torch.Generator().manual_seed(0)
    for _ in range(300):
        lengths = torch.randint(1, 150, (int(torch.randint(1, 9, (1,), generator=g)),), generator=g)
        slots = torch.cat(
            [torch.full((int(n),), i % 3 - 1, dtype=torch.int32) for i, n in enumerate(lengths)]
        )
        found = runs.runs_of(slots)
        if found is None:
            continue
        whose = torch.full_like(slots, 9)
        for slot, spans in found.alone.items():
            assert sum(end - first for first, end in spans) >= runs.MANY
            for first, end in spans:
                assert (whose[first:end] == 9).all() and (slots[first:end] == slot).all()
                whose[first:end] = slot
        for first, end in found.rest:
            assert (whose[first:end] == 9).all()
            whose[first:end] = slots[first:end]
        assert torch.equal(whose, slots)


def models(dtype):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(40, 96), nn.GELU(), nn.Linear(96, 24, bias=False)).to(dtype).eval()
    plain = {None: base}
    for seed, (name, share) in enumerate({"alice": 0.3, "bob": 0.05, "carol": 1.0}.items()):
        plain[name] = tuned = copy.deepcopy(base)
        g = torch.Generator().manual_seed(seed)
        for p in tuned.parameters():
            step = (torch.randn(p.shape, generator=g) * 0.2).to(dtype)
            p.copy_(torch.where(torch.rand(p.shape, generator=g) < share, p + step, p))
    return copy.deepcopy(base), plain


def attached(base, plain, **options):
    tenants = xorz.attach(to_gpu(base), budget="8 MiB", **options)
    for name, tuned in plain.items():
        if name is not None:
            tenants.load(name, xorz.diff(plain[None].state_dict(), tuned.state_dict()))
    return tenants


def wrong(got, x, plain):
    """Rows of a batch that are not their tenant's own model's, in float64, but for the rounding of each layer."""
    own = got.words if isinstance(got, OnGpu) else got
    out = []
    for row, name in enumerate(NAMES):
        want = copy.deepcopy(plain[name]).double()(x[row].double())
        if float((own[row].double() - want).abs().max()) > 0.03 * float(want.abs().max()):
            out.append((row, name))
    return out


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_each_row_has_its_tenants_weights(gpu, monkeypatch, dtype, planned):
    base, plain = models(dtype)
    tenants = attached(base, plain)
    x = torch.randn(len(NAMES), LONG, 40, generator=torch.Generator().manual_seed(5)).to(dtype)
    if planned:
        monkeypatch.setattr(forwards, "Tensor", OnGpu)
    with tenants.use(NAMES):
        for _ in range(3):  # the first one finds out what the next ones know
            gpu.ops.clear()
            gpu.waits.clear()
            got = base(OnGpu(x))
            assert wrong(got, x, plain) == []
    # Of each layer: alice's and the base's rows alone, bob's and carol's in a stretch each.
    asked = {name: gpu.ops.count(name) for name in ("delta_linear", "linear", "delta_linear_grouped")}
    assert asked["delta_linear"] == 2 and asked["delta_linear_grouped"] == 4, asked
    assert gpu.waits == []
    # The words differ, so that any tenant's in another's place would have been seen.
    assert all(float((plain[a](x) - plain[b](x)).abs().max()) > 0.2 for a in plain for b in plain if a != b)


@pytest.mark.parametrize(
    ("length", "options", "dtype"),
    [
        (SHORT, {}, torch.bfloat16),
        (LONG, {"mode": "deterministic"}, torch.bfloat16),
        (LONG, {}, torch.float32),
    ],
    ids=["few rows", "deterministic", "float32"],
)
def test_elsewhere_the_grouped_product_has_all_rows(gpu, length, options, dtype):
    base, plain = models(dtype)
    tenants = attached(base, plain, **options)
    x = torch.randn(len(NAMES), length, 40, generator=torch.Generator().manual_seed(5)).to(dtype)
    with tenants.use(NAMES):
        base(OnGpu(x))
        gpu.ops.clear()
        assert wrong(base(OnGpu(x)), x, plain) == []
    assert gpu.ops.count("delta_linear_grouped") == 2 and "delta_linear" not in gpu.ops


def test_gradients_go_through_the_grouped_product(gpu):
    base, plain = models(torch.bfloat16)
    tenants = attached(base, plain)
    x = torch.randn(len(NAMES), LONG, 40, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    want = []
    for row, name in enumerate(NAMES):
        mine = x[row].clone().requires_grad_()
        with torch.enable_grad():
            plain[name](mine).sum().backward()
        want.append(mine.grad)
    given = OnGpu(x).requires_grad_()
    with tenants.use(NAMES), torch.enable_grad():
        base(given).sum().backward()
    assert "delta_linear" not in gpu.ops
    for row, mine in enumerate(want):
        got = given.grad.words[row]
        assert float((got - mine).abs().max()) <= 0.03 * float(mine.abs().max()), NAMES[row]


def test_rows_that_do_not_lie_side_by_side_are_not_taken_for_such(gpu):
    base, plain = models(torch.bfloat16)
    tenants = attached(base, plain)
    x = torch.randn(len(NAMES), LONG, 40, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    with tenants.use(NAMES, dim=1):
        for _ in range(2):
            got = base(OnGpu(x.transpose(0, 1).contiguous()))
            assert wrong(got.words.transpose(0, 1), x, plain) == []
    assert "delta_linear" not in gpu.ops


def test_rows_of_graphs_are_the_grouped_products(gpu):
    base, plain = models(torch.bfloat16)
    tenants = attached(base, plain)
    x = torch.randn(len(NAMES), LONG, 40, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    rows = tenants.graph_rows(len(NAMES))
    rows.set(NAMES)
    with tenants.use(rows):
        base(OnGpu(x))
        gpu.ops.clear()
        assert wrong(base(OnGpu(x)), x, plain) == []
    assert "delta_linear" not in gpu.ops and gpu.ops.count("delta_linear_grouped") == 2


def test_an_expert_without_tokens_is_no_batch():
    """On the CPU, in mode deterministic, where a map of no tokens is asked for, too."""
    with torch.no_grad():
        base, plain = models(torch.float32)
    tenants = xorz.attach(base, mode="deterministic")
    for name in ("alice", "bob"):
        tenants.load(name, xorz.diff(plain[None].state_dict(), plain[name].state_dict()))
    x = torch.randn(2, 3, 40)
    with torch.no_grad(), tenants.use(["alice", "bob"]):
        for chosen in (torch.tensor([0, 4]), torch.tensor([], dtype=torch.int64)):
            with tenants.regroup(chosen, x.shape[:-1]):
                got = base(x.flatten(0, 1)[chosen])
            want = [plain[("alice", "bob")[int(i) // 3]](x.flatten(0, 1)[i]) for i in chosen]
            assert got.shape == (len(chosen), 24)
            assert all(torch.allclose(mine, other, atol=1e-5) for mine, other in zip(got, want, strict=True))
