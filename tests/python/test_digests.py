"""Promise: `delta_digest` gives what deltas and packages know their base by, for every dtype and shape; words on a GPU are
compared, and changed in place, where they lie, with what the plain fine-tune has as the result.
"""

import copy
import re

import gpu_double
import pytest
import torch
import xorz
from gpu_double import OnGpu, to_gpu
from torch import nn
from xorz import _core
from xorz.digests import digests_of

ops = torch.ops.xorz
SHAPES = [(), (0,), (1,), (513,), (3, 0), (0, 3), (1, 7), (64, 5), (65, 5), (300, 33), (3, 4, 5)]


def words(shape, dtype) -> torch.Tensor:
    count = torch.Size(shape).numel() * dtype.itemsize
    g = torch.Generator().manual_seed(count)
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8, generator=g)
    return raw.view(dtype).reshape(shape)


@pytest.mark.parametrize("dtype", list(_core.DTYPES))
def test_a_digest_is_the_one_that_deltas_keep_of_their_base(dtype):
    seen = set()
    for shape in SHAPES:
        base = words(shape, dtype)
        found = ops.delta_digest(base)
        assert found.dtype == torch.uint8 and found.shape == (16,)
        assert bytes(found.tolist()).hex() == xorz.delta_info(ops.delta_encode(base, base)).base_digest
        seen.add(bytes(found.tolist()))
    # A number and a vector of it are one row; an empty one has its shape alone.
    assert len(seen) >= len(SHAPES) - 1


def test_a_digest_tells_words_dtypes_and_shapes_apart():
    base = words((70, 9), torch.bfloat16)
    other = base.clone()
    other.view(torch.int16)[69, 8] ^= 1
    alike = [base, other, base.view(torch.float16), base.view(torch.int16), base.reshape(9, 70)]
    assert len({bytes(ops.delta_digest(t).tolist()) for t in alike}) == len(alike)
    negative = torch.tensor([0.0, -0.0])
    assert not torch.equal(ops.delta_digest(negative), ops.delta_digest(negative.abs()))


def test_what_has_no_digest_is_refused_by_name():
    with pytest.raises(RuntimeError, match=r"xorz::delta_digest: base float32 \[4, 3\] must be contiguous"):
        ops.delta_digest(torch.zeros(3, 4).t())
    with pytest.raises(RuntimeError, match="xorz::delta_digest: base is complex64"):
        ops.delta_digest(torch.zeros(3, dtype=torch.complex64))
    with pytest.raises(TypeError, match="w must be a dense tensor"):
        digests_of({"w": torch.zeros(3, 3).to_sparse()})
    # Of a base that trains, too: it is no product.
    assert not xorz.delta_digest(torch.zeros(3, requires_grad=True)).requires_grad


def test_digests_are_traced_and_mapped():
    base = words((6, 40), torch.float32)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = ops.delta_digest(mode.from_tensor(base))
    assert fake.shape == (16,) and fake.dtype == torch.uint8
    each = torch.stack([ops.delta_digest(row) for row in base])
    assert torch.equal(torch.vmap(ops.delta_digest)(base), each)
    compiled = torch.compile(lambda t: ops.delta_digest(t), backend="eager", fullgraph=True)
    assert torch.equal(compiled(base), ops.delta_digest(base))


@pytest.fixture
def gpu(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("a double of a GPU, beside a real one")
    with gpu_double.machine(monkeypatch) as ledger, torch.no_grad():
        yield ledger


def pair(step: int = 40):
    torch.manual_seed(5)
    old = nn.Sequential(nn.Linear(40, 70), nn.LayerNorm(70), nn.Linear(70, 9, dtype=torch.bfloat16))
    new = nn.Sequential(nn.Linear(40, 70), nn.LayerNorm(70), nn.Linear(70, 9, dtype=torch.bfloat16))
    new.load_state_dict(old.state_dict())
    with torch.no_grad():
        for p in new.parameters():
            p.view(-1)[::step] += 0.125
    return old, new


def same(got: nn.Module, want: nn.Module) -> bool:
    there = dict(got.named_parameters())
    return all(torch.equal(there[n].words, t) for n, t in want.named_parameters())


@pytest.mark.parametrize(("prefer", "step"), [("speed", 40), ("memory", 1)])
def test_a_model_on_a_gpu_is_changed_where_its_words_lie(gpu, prefer, step):
    old, new = pair(step)
    delta = xorz.diff(old.state_dict(), new.state_dict(), prefer=prefer)
    by_host = [n for n, d in delta.deltas.items() if xorz.delta_info(d).encoding == "exponent"]
    assert ("0.weight" in by_host) == (prefer == "memory")
    model = to_gpu(old)
    parameters = dict(model.named_parameters())
    gpu.fetched.clear()
    xorz.apply_(model, delta)
    assert same(model, new)
    # What is decoded to the end before a word changes is copied to be looked at and to be changed.
    there = [n for n in delta.deltas if n not in by_host]
    assert sum(gpu.fetched) == 16 * len(there) + 2 * sum(parameters[n].nbytes for n in by_host)
    assert gpu.synchronized == (2 if there else 0)


def test_another_base_on_a_gpu_is_refused_by_name_and_stays(gpu):
    old, new = pair()
    delta = xorz.diff(old.state_dict(), new.state_dict(), prefer="speed")
    kept = {n: t.clone() for n, t in old.named_parameters()}
    kept["2.weight"].view(torch.int16)[8, 69] ^= 1
    with torch.no_grad():
        old[2].weight.copy_(kept["2.weight"])
    model = to_gpu(old)
    with pytest.raises(
        ValueError, match=r"tensor `2.weight`: .*digest [0-9a-f]{32}, but .*digest [0-9a-f]{32}"
    ):
        xorz.apply_(model, delta)
    assert all(torch.equal(t.words, kept[n]) for n, t in model.named_parameters())
    delta.deltas["2.weight"][-1] ^= 1
    with pytest.raises(ValueError, match=r"tensor `2.weight`: .*bytes have digest"):
        xorz.apply_(model, delta)


def refused_before(gpu) -> None:
    """Somebody's op on the device is refused, and nobody has heard of it yet."""
    base = words((9, 40), torch.bfloat16)
    ops.delta_apply_(OnGpu(base + 1), OnGpu(ops.delta_encode(base, base.flip(0))))
    gpu.catch_up()
    assert gpu.heard


def test_what_ops_before_have_reported_is_said_before_a_word_changes(gpu):
    old, new = pair()
    delta = xorz.diff(old.state_dict(), new.state_dict(), prefer="speed")
    state = {n: t if n == "0.weight" else OnGpu(t.clone()) for n, t in old.state_dict().items()}
    kept = state["0.weight"].clone()
    refused_before(gpu)
    with pytest.raises((RuntimeError, ValueError), match="an earlier delta_apply_"):
        xorz.apply_(state, delta)
    assert torch.equal(state["0.weight"], kept)
    assert all(torch.equal(state[n].words, t) for n, t in old.state_dict().items() if n != "0.weight")
    xorz.apply_(state, delta)
    assert all(torch.equal(getattr(state[n], "words", state[n]), t) for n, t in new.state_dict().items())


def test_a_load_takes_nobodys_report_for_its_own(gpu, tmp_path):
    old, new = pair()
    xorz.pack(old.state_dict(), new.state_dict(), tmp_path / "alice.xorz", prefer="speed", codec="resident")
    model = to_gpu(old)
    tenants = xorz.attach(model, budget="8 MiB", prefer="speed")
    refused_before(gpu)
    tenants.load("alice", tmp_path / "alice.xorz")
    with pytest.raises((RuntimeError, ValueError), match="an earlier delta_apply_"):
        xorz.cuda_status(0)


def test_only_tensors_of_the_package_are_asked_for_digests(gpu, tmp_path):
    old, new = pair()
    some = {n: t for n, t in old.state_dict().items() if n.startswith("0.")}
    after = {n: new.state_dict()[n] for n in some}
    xorz.pack(some, after, tmp_path / "some.xorz", prefer="speed", codec="resident")
    there = {n: OnGpu(t.clone()) for n, t in old.state_dict().items()}
    gpu.ops.clear()
    got = xorz.load_deltas(there, tmp_path / "some.xorz", prefer="speed", skip=("0.bias",))
    assert list(got) == ["0.weight"] and gpu.ops.count("delta_digest") == 1


def test_a_forged_delta_is_refused_of_a_base_on_a_gpu_too(gpu):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(96, 64, bias=False)).bfloat16()
    weight = base[0].weight.detach()
    forged = ops.delta_encode(weight, (weight.float() + 1e-3).bfloat16(), prefer="memory").clone()
    other = weight * 64
    # Both digests are made good, so that the streams alone are too short for these words.
    for at, told in ((112, r"this base has digest (\w{32})"), (160, r"its bytes have digest (\w{32})")):
        with pytest.raises(RuntimeError) as caught:
            ops.delta_check(forged, other)
        digest = bytes.fromhex(re.search(told, str(caught.value))[1])
        forged[at : at + 16] = torch.tensor(list(digest), dtype=torch.uint8)
    assert xorz.delta_info(forged).encoding == "exponent"
    with torch.no_grad():
        base[0].weight.copy_(other)
    for prefer in ("memory", None):
        tenants = xorz.attach(to_gpu(copy.deepcopy(base)), budget="8 MiB", prefer=prefer)
        with pytest.raises(ValueError, match=r"tensor `0.weight`: .*more bits than it has"):
            tenants.load("x", {"0.weight": forged})


def test_a_gpu_without_kernels_is_asked_for_nothing(gpu, monkeypatch):
    monkeypatch.setattr(_core, "cuda_serves", lambda device: False)
    old, new = pair()
    delta = xorz.diff(old.state_dict(), new.state_dict(), prefer="speed")
    want = {n: bytes(ops.delta_digest(t).tolist()) for n, t in old.named_parameters()}
    model = to_gpu(old)
    gpu.ops.clear()
    assert digests_of(dict(model.named_parameters())) == want
    xorz.apply_(model, delta)
    assert same(model, new)
    assert not {"delta_digest", "delta_apply_"} & set(gpu.ops)


def test_versions_of_a_model_on_a_gpu_know_its_base_by_digests(gpu, tmp_path):
    old, new = pair()
    before, after = old.state_dict(), new.state_dict()
    on_host = xorz.Versions(before, tmp_path / "host")
    there = {n: OnGpu(t.clone()) for n, t in before.items()}
    gpu.fetched.clear()
    run = xorz.Versions(there, tmp_path / "run")
    assert run.digest(0) == on_host.digest(0) and sum(gpu.fetched) == 16 * len(before)
    assert run.publish(after) == 1
    assert run.digest(1) == on_host.digest(on_host.publish(after))


def test_what_gpu_check_will_run_on_a_gpu_passes_on_the_double(gpu, monkeypatch):
    from xorz.gpu_check import models
    from xorz.gpu_check.report import Report

    real = nn.Module.to
    monkeypatch.setattr(
        nn.Module,
        "to",
        lambda self, to: real(self, to) if isinstance(to, torch.dtype) else to_gpu(self, {"": to}),
    )
    report = Report("a double")
    models.check_applied(report, gpu_double.CUDA, 48)
    models.check_model(report, gpu_double.CUDA, 48)
    assert len(report.checks) > 20 and report.passed, report.checks
    # Prompts of several tenants, each tenant's rows alone; and words that were changed where they lie.
    assert {"delta_linear", "delta_linear_grouped", "delta_apply_", "delta_digest"} <= set(gpu.ops)
