"""Promise: on a GPU, too, an update of a running model changes every word that it says and no other, where they lie, and the
host knows of each step whether it was done: whatever fails, and whenever it is heard of, the words are those of one version, or
the error says that they are not.

On the double of a GPU, whose `delta_apply_` tells of a refusal when the device was waited for, not before. What is expected are
the words of the version's own file, loaded by the model's own loader.
"""

import threading

import gpu_double
import pytest
import test_vllm_update as on_host
import torch
from gpu_double import CUDA, OnGpu, to_gpu
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from xorz import _ops
from xorz.vllm import on_device, update
from xorz.vllm.packages import Checkpoint
from xorz.vllm.plan import plan

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a double of a GPU, beside a real one")


@pytest.fixture
def gpu(monkeypatch):
    with gpu_double.machine(monkeypatch) as ledger, torch.no_grad():
        yield ledger


@pytest.fixture
def made(tmp_path):
    """The words of a base and of two versions after it; their packages are in the folder."""
    return on_host.versions(tmp_path, 2)


def on_gpu(model, folder, group=None):
    """The model's parameters go to the device; what its loader does is looked at before."""
    with _disable_current_modes():
        base = Checkpoint(folder / "v0")
        followed = plan(model, base.tensors)
    hand = on_device.OnDevice(CUDA)
    return update.Words(to_gpu(model), base, followed, group or update.Group(), hand)


def start(folder, made):
    with _disable_current_modes():
        model = on_host.loaded(made[0])
    return model, on_gpu(model, folder)


def holds(model, words):
    """Whether every parameter has, bit for bit, what the model's loader makes of a version's file."""
    with _disable_current_modes():
        wanted = on_host.loaded(words)
        pairs = zip(model.parameters(), wanted.parameters(), strict=True)
        return all(torch.equal(a.words.view(torch.int16), b.view(torch.int16)) for a, b in pairs)


def test_steps_there_and_back_where_the_words_lie(gpu, tmp_path, made):
    model, words = start(tmp_path, made)
    assert all(isinstance(p, OnGpu) for p in model.parameters())
    places = [p.data_ptr() for p in model.parameters()]
    ways = []
    for number in (1, 2):
        gpu.ops.clear()
        staged = on_host.prepared(words, tmp_path / f"{number}.xorz")
        assert holds(model, made[number - 1]) and "delta_apply_" not in gpu.ops
        assert staged.changed == sum(
            int((made[number][n] != made[number - 1][n]).sum()) for n in on_host.SHAPES
        )
        # There and back.
        assert staged.bytes == sum(step.at[1] + step.other[1] for step in staged.steps)
        gpu.ops.clear()
        ways.append(update.apply(words, staged))
        assert holds(model, made[number])
        # What was not changed is not read, and nothing is copied to the host.
        assert gpu.ops.count("delta_apply_") == len(staged.steps) == len(on_host.SHAPES)
    assert [p.data_ptr() for p in model.parameters()] == places
    again = update.apply(words, update.backwards([ways[1], ways[0]]))
    assert holds(model, made[0])
    update.apply(words, update.backwards([again]))
    assert holds(model, made[2]) and [p.data_ptr() for p in model.parameters()] == places


def test_each_step_is_waited_for_before_the_next_one_is_asked(gpu, tmp_path, made, monkeypatch):
    _model, words = start(tmp_path, made)
    staged, plain, waited, free = on_host.prepared(words, tmp_path / "1.xorz"), _ops.delta_apply_, [], []

    def watching(weight, delta):
        waited.append(gpu.synchronized)
        thread = threading.Thread(target=lambda: free.append(update.REPORTS.acquire(blocking=False)))
        thread.start()
        thread.join()
        plain(weight, delta)

    monkeypatch.setattr(_ops, "delta_apply_", watching)
    update.apply(words, staged)
    # Before the first one, too: what the engine asked for before has read the old words.
    assert waited[0] >= 1 and len(waited) == len(set(waited)) == len(on_host.SHAPES)
    assert gpu.synchronized > waited[-1] and set(gpu.settled) == {CUDA}
    # Nobody else hears what a step reports.
    assert not any(free)


def test_blocks_of_a_large_parameter_and_what_the_device_holds_meanwhile(gpu, tmp_path, monkeypatch):
    monkeypatch.setitem(on_host.SHAPES, "embed.weight", (1000, 96))
    monkeypatch.setattr(on_device, "_BLOCK_BYTES", 100 * 192)
    made = on_host.versions(tmp_path, 1, share=1.0)
    model, words = start(tmp_path, made)
    staged, plain, held = on_host.prepared(words, tmp_path / "1.xorz"), _ops.delta_apply_, []
    assert sum(step.span[0] == "embed" for step in staged.steps) == 10
    before = gpu_double.held()

    def watching(weight, delta):
        held.append(gpu_double.held() - before)
        plain(weight, delta)

    monkeypatch.setattr(_ops, "delta_apply_", watching)
    way = update.apply(words, staged)
    assert holds(model, made[1]) and max(held) < 2 * on_device._BLOCK_BYTES
    update.apply(words, update.backwards([way]))
    assert holds(model, made[0]) and gpu_double.held() == before


def test_a_jump_is_compared_with_the_words_that_are_there(gpu, tmp_path, made):
    model, words = start(tmp_path, made)
    staged = update.Staged()
    for name in on_host.SHAPES:
        update.between(words, name, made[0][name], made[2][name], staged)
    update.apply(words, staged)
    assert holds(model, made[2])
    with pytest.raises(
        ValueError, match=r"`qkv` does not hold the words of `q\.weight` of the version before"
    ):
        update.between(words, "q.weight", made[0]["q.weight"], made[1]["q.weight"], update.Staged())


def test_digests_and_sums_are_those_of_the_same_words_on_the_host(gpu, tmp_path, made):
    _model, words = start(tmp_path, made)
    for name, word in made[0].items():
        assert update.digest_of(words.whole(name)) == update.digest_of(word)
        assert update.sha256_of(words.whole(name)) == update.sha256_of(word)
    with pytest.raises(ValueError, match=r"digest"):  # of another base than the one that is there
        on_host.prepared(words, tmp_path / "2.xorz")


WRITTEN = {"a word that the update changes": True, "one that it leaves alone": False}


@pytest.mark.parametrize("changes", WRITTEN.values(), ids=WRITTEN)
def test_words_that_were_written_to_since_are_refused_by_both_digests(gpu, tmp_path, made, changes):
    model, words = start(tmp_path, made)
    staged = on_host.prepared(words, tmp_path / "1.xorz")
    old, new = made[0]["down.weight"], made[1]["down.weight"]
    row, column = ((old != new) if changes else (old == new)).nonzero()[7].tolist()
    model.down.words[row, column] += 1  # past torch
    before = [p.words.clone() for p in model.parameters()]
    found, wanted = update.digest_of(model.down.words), update.digest_of(old)
    with pytest.raises(
        ValueError, match=f"parameter `down`, rows 0 to 96: the words have digest {found}, .* for {wanted}"
    ):
        update.apply(words, staged)
    assert all(torch.equal(a, b.words) for a, b in zip(before, model.parameters(), strict=True))
    # Nothing of it is heard of later.
    model.down.words[row, column] = old[row, column]
    update.apply(words, staged)
    assert holds(model, made[1])


def early(plain, weight, delta):
    raise MemoryError("out of memory")


def late(plain, weight, delta):
    plain(weight, delta)
    raise RuntimeError("the driver has lost the stream")


def reported(plain, weight, delta):
    other = _ops.delta_encode(torch.ones(weight.shape).bfloat16(), torch.zeros(weight.shape).bfloat16())
    plain(weight, other.to(CUDA))


def interrupted(plain, weight, delta):
    plain(weight, delta)
    raise KeyboardInterrupt


def interrupted_and_reported(plain, weight, delta):
    reported(plain, weight, delta)
    raise KeyboardInterrupt


FAILURES = {
    "before it was done": (early, MemoryError, "out of memory"),
    "after it was done": (late, RuntimeError, "lost the stream"),
    "a report": (reported, RuntimeError, "parameter `.*`, rows .* reported"),
    "an interrupt": (interrupted, KeyboardInterrupt, "^$"),
    "an interrupt of what was refused": (interrupted_and_reported, KeyboardInterrupt, "^$"),
}


@pytest.mark.parametrize("fails", [0, 4, 8])
@pytest.mark.parametrize("failing, error, text", FAILURES.values(), ids=FAILURES)
def test_a_step_that_fails_is_taken_back_with_those_before_it(
    gpu, tmp_path, made, monkeypatch, failing, error, text, fails
):
    model, words = start(tmp_path, made)
    staged = on_host.prepared(words, tmp_path / "1.xorz")
    plain, calls = _ops.delta_apply_, []

    def apply(weight, delta):
        calls.append(1)
        if len(calls) == fails + 1:
            return failing(plain, weight, delta)
        return plain(weight, delta)

    monkeypatch.setattr(_ops, "delta_apply_", apply)
    with pytest.raises(error, match=text):
        update.apply(words, staged)
    assert holds(model, made[0]) and len(calls) >= 2 * fails + 1
    update.apply(words, staged)
    assert holds(model, made[1])


def test_an_interrupt_while_the_device_is_waited_for(gpu, tmp_path, made, monkeypatch):
    """The step was asked for, and is done by the time that it is looked at."""
    model, words = start(tmp_path, made)
    staged, plain, calls = on_host.prepared(words, tmp_path / "1.xorz"), torch.cuda.synchronize, []

    def synchronize(device=None):
        plain(device)
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(KeyboardInterrupt):
        update.apply(words, staged)
    assert holds(model, made[0])
    update.apply(words, staged)
    assert holds(model, made[1])


def torn(plain, weight, delta):
    weight.words[:1] += 1
    raise RuntimeError("the device was lost in the middle")


def dead(plain, weight, delta):
    def nothing(tensor):
        raise RuntimeError("the device is lost")

    on_device.digest_of = nothing
    raise RuntimeError("the device is lost")


@pytest.mark.parametrize("failing", [torn, dead])
def test_words_of_neither_version_are_said(gpu, tmp_path, made, monkeypatch, failing):
    _model, words = start(tmp_path, made)
    staged, plain, calls = on_host.prepared(words, tmp_path / "1.xorz"), _ops.delta_apply_, []
    monkeypatch.setattr(on_device, "digest_of", on_device.digest_of)

    def apply(weight, delta):
        calls.append(1)
        return (failing if len(calls) == 3 else lambda p, *args: p(*args))(plain, weight, delta)

    monkeypatch.setattr(_ops, "delta_apply_", apply)
    with pytest.raises(update.Broken, match="holds neither version; load it again"):
        update.apply(words, staged)


def test_what_cannot_be_taken_back_is_said(gpu, tmp_path, made, monkeypatch):
    _model, words = start(tmp_path, made)
    staged, plain, calls = on_host.prepared(words, tmp_path / "1.xorz"), _ops.delta_apply_, []

    def apply(weight, delta):
        calls.append(1)
        return early(plain, weight, delta) if len(calls) > 3 else plain(weight, delta)

    monkeypatch.setattr(_ops, "delta_apply_", apply)
    with pytest.raises(update.Broken, match="could not be taken back: the model holds neither version"):
        update.apply(words, staged)


def test_what_others_have_reported_before_is_told_and_changes_nothing(gpu, tmp_path, made):
    model, words = start(tmp_path, made)
    staged = on_host.prepared(words, tmp_path / "1.xorz")
    gpu.reported.append("the delta of slot 3 contradicts itself")
    with pytest.raises(RuntimeError, match="slot 3 contradicts itself"):
        update.apply(words, staged)
    assert holds(model, made[0])
    update.apply(words, staged)
    assert holds(model, made[1])


class Tied(nn.Module):
    """One checkpoint tensor in two parameters, and one of integers, of which no delta is multiplied."""

    def __init__(self):
        super().__init__()
        self.one, self.two = (nn.Parameter(torch.zeros(64, 32).bfloat16(), False) for _ in range(2))
        self.count = nn.Parameter(torch.zeros(8, 16, dtype=torch.int32), False)
        self.flags = nn.Parameter(torch.zeros(40, dtype=torch.bool), False)
        self.waves = nn.Parameter(torch.zeros(6, 5, dtype=torch.complex64), False)

    def load_weights(self, weights):
        for name, tensor in weights:
            for param in ("one", "two") if name == "table" else (name,):
                getattr(self, param).data.copy_(tensor)


def test_one_tensor_in_two_places_and_words_of_other_kinds(gpu, tmp_path):
    generator = torch.Generator().manual_seed(3)
    random = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    state = lambda: {  # noqa: E731
        "table": random(64, 32).bfloat16(),
        "count": random(8, 16).mul(100).int(),
        "flags": random(40) > 0,
        "waves": torch.complex(random(6, 5), random(6, 5)),
    }
    old, new = state(), state()
    with _disable_current_modes():
        (tmp_path / "v0").mkdir()
        on_host.save_file(old, tmp_path / "v0" / "model.safetensors")
        on_host.xorz.pack(old, new, tmp_path / "1.xorz")
        model = Tied()
        model.load_weights(old.items())
    words = on_gpu(model, tmp_path)
    staged = on_host.prepared(words, tmp_path / "1.xorz")
    way = update.apply(words, staged)

    def has(state):
        names = {"one": "table", "two": "table"} | {n: n for n in ("count", "flags", "waves")}
        return all(torch.equal(getattr(model, p).words, state[n]) for p, n in names.items())

    assert has(new)
    # What is tied counts once.
    assert staged.changed == sum(
        int((_bits(old[n]) != _bits(new[n])).sum()) for n in ("table", "count", "flags", "waves")
    )
    update.apply(words, update.backwards([way]))
    assert has(old)
    model.two.words[5, 5] += 1
    with pytest.raises(ValueError, match=r"`two` does not hold the words of `table`"):
        on_host.prepared(words, tmp_path / "1.xorz")


def _bits(tensor):
    return update.bits(torch.view_as_real(tensor) if tensor.is_complex() else tensor)


def test_a_parameter_that_was_reordered_is_refused_by_name_before_anything_changes(gpu, tmp_path, made):
    model, words = start(tmp_path, made)
    model.down = nn.Parameter(OnGpu(model.down.words.t().contiguous().t()), False)
    words.read()
    with pytest.raises(ValueError, match=r"`down` has strides \[1, 96\]: it was reordered"):
        on_host.prepared(words, tmp_path / "1.xorz")


CHILD = """
import os, sys
from pathlib import Path
import pytest, torch
sys.path.insert(0, sys.argv[1])
import gpu_double
import test_update_on_device as t
import test_vllm_update as on_host
from safetensors.torch import load_file
from xorz import _ops
from xorz.vllm import update
folder, rank = Path(sys.argv[2]), int(os.environ["RANK"])
torch.distributed.init_process_group("gloo")
group = update.Group(torch.distributed.group.WORLD, rank, 2)
made = [load_file(folder / f"v{i}" / "model.safetensors") for i in range(3)]
def holds(model, words):
    wanted = on_host.loaded(words, rank, 2)
    pairs = zip(model.parameters(), wanted.parameters())
    return all(torch.equal(a.words.view(torch.int16), b.view(torch.int16)) for a, b in pairs)
model = on_host.loaded(made[0], rank, 2)
with pytest.MonkeyPatch.context() as patch, gpu_double.machine(patch), torch.no_grad():
    words = t.on_gpu(model, folder, group)
    for name, word in made[0].items():
        assert update.digest_of(words.whole(name)) == update.digest_of(word), name
    way = update.apply(words, on_host.prepared(words, folder / "1.xorz"))
    assert holds(model, made[1])
    # One process fails: none has changed.
    staged = on_host.prepared(words, folder / "2.xorz")
    plain, calls = _ops.delta_apply_, []
    def failing(weight, delta):
        calls.append(1)
        if rank == 1 and len(calls) == 4:
            raise MemoryError("out of memory")
        return plain(weight, delta)
    _ops.delta_apply_ = failing
    try:
        update.apply(words, staged)
        raise SystemExit("it did not fail")
    except (MemoryError, ValueError) as error:
        assert "out of memory" in str(error) and (rank == 1 or "rank 1" in str(error))
    _ops.delta_apply_ = plain
    assert holds(model, made[1])
    later = update.apply(words, staged)
    assert holds(model, made[2])
    update.apply(words, update.backwards([later, way]))
    assert holds(model, made[0])
print("fine", rank)
"""


def test_two_processes_that_hold_parts_change_both_or_none(tmp_path, made):
    on_host.in_two_processes(CHILD, tmp_path)
