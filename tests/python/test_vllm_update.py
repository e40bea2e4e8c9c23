"""Promise: an update of a running model changes every word that it says and no other, in fused and cut parameters, in every
process or in none; what it cannot be applied to is refused before a word changes. Without vLLM; in vLLM: tests/vllm.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import xorz
from safetensors.torch import load_file, save_file
from torch import nn
from xorz import _core
from xorz.vllm import update
from xorz.vllm.packages import Checkpoint
from xorz.vllm.plan import plan

SHAPES = {
    "q.weight": (512, 96),
    "k.weight": (256, 96),
    "v.weight": (256, 96),
    "q.bias": (512,),
    "k.bias": (256,),
    "v.bias": (256,),
    "down.weight": (96, 640),
    "norm.weight": (96,),
    "embed.weight": (1000, 96),
}


class Model(nn.Module):
    """What process `rank` of `size` holds: q, k and v in one, rows of them and columns of down cut, a padded table."""

    def __init__(self, rank=0, size=1):
        super().__init__()
        make = lambda *shape: nn.Parameter(torch.zeros(shape).bfloat16(), requires_grad=False)  # noqa: E731
        self.rank, self.size = rank, size
        self.qkv, self.bias = make(1024 // size, 96), make(1024 // size)
        self.down, self.norm, self.embed = make(96, 640 // size), make(96), make(1024 // size, 96)

    def load_weights(self, weights):
        rows = {"q": (0, 512), "k": (512, 256), "v": (768, 256)}
        for name, tensor in weights:
            kind, _, what = name.partition(".")
            if kind in rows:
                at, n = (x // self.size for x in rows[kind])
                to = self.qkv if what == "weight" else self.bias
                to.data.narrow(0, at, n).copy_(tensor.narrow(0, self.rank * n, n))
            elif kind == "down":
                n = 640 // self.size
                self.down.data.copy_(tensor.narrow(1, self.rank * n, n))
            elif kind == "embed":
                n = self.embed.size(0)
                part = tensor[self.rank * n : (self.rank + 1) * n]
                self.embed.data[: part.size(0)].copy_(part)
            else:
                self.norm.data.copy_(tensor)


def versions(folder, count=3, share=0.03):
    """A base and versions after it, each with other words changed, as files, and packages of the steps."""
    generator = torch.Generator().manual_seed(1)
    words = {n: torch.randn(s, generator=generator).bfloat16() for n, s in SHAPES.items()}
    out = []
    for number in range(count + 1):
        (folder / f"v{number}").mkdir()
        save_file(words, folder / f"v{number}" / "model.safetensors")
        if number:
            xorz.pack(out[-1], words, folder / f"{number}.xorz")
        out.append({n: w.clone() for n, w in words.items()})
        for word in words.values():
            moved = torch.rand(word.shape, generator=generator) < share
            word.add_(moved * torch.randn(word.shape, generator=generator), alpha=0.02)
    return out


def loaded(words, rank=0, size=1):
    model = Model(rank, size)
    model.load_weights(words.items())
    return model


def same(model, other):
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in pairs)


def prepared(words, path):
    """Everything of a package, staged."""
    staged = update.Staged(seen=words.seen())
    with _core.Package(path) as opened:
        for name, entry in opened.entries.items():
            whole = words.whole(name)
            if entry["changed"]:
                update.stage(words, opened, name, whole, staged)
    return staged


def held_by(model, folder, group=None):
    base = Checkpoint(folder / "v0")
    return update.Words(model, base, plan(model, base.tensors), group or update.Group())


def test_updates_in_turn_and_all_the_way_back(tmp_path):
    made = versions(tmp_path)
    model = loaded(made[0])
    words = held_by(model, tmp_path)
    places = [p.data_ptr() for p in model.parameters()]
    ways = []
    for number in (1, 2, 3):
        staged = prepared(words, tmp_path / f"{number}.xorz")
        assert same(model, loaded(made[number - 1]))  # nothing has changed
        ways.append(update.apply(words, staged))
        assert same(model, loaded(made[number]))
    assert [p.data_ptr() for p in model.parameters()] == places
    assert update.Staged(ways[0]).bytes < 0.2 * sum(p.nbytes for p in model.parameters())
    again = update.apply(words, update.backwards([ways[2], ways[1]]))
    assert same(model, loaded(made[1]))
    update.apply(words, update.backwards([again]))
    assert same(model, loaded(made[3]))


@pytest.mark.parametrize("fails", range(8))
def test_a_failure_in_the_middle_is_taken_back(tmp_path, monkeypatch, fails):
    made = versions(tmp_path, 1)
    model = loaded(made[0])
    words = held_by(model, tmp_path)
    staged = prepared(words, tmp_path / "1.xorz")
    assert len(staged.steps) == len(SHAPES)
    plain, calls = _core.exchange_apply, []

    def failing(weight, content, back):
        calls.append(weight)
        if len(calls) == fails + 1:
            raise MemoryError("out of memory")
        return plain(weight, content, back)

    monkeypatch.setattr(_core, "exchange_apply", failing)
    with pytest.raises(MemoryError):
        update.apply(words, staged)
    assert same(model, loaded(made[0])) and len(calls) >= fails + 1
    monkeypatch.setattr(_core, "exchange_apply", plain)
    update.apply(words, staged)
    assert same(model, loaded(made[1]))


def test_what_cannot_even_be_taken_back_is_said(tmp_path, monkeypatch):
    made = versions(tmp_path, 1)
    words = held_by(loaded(made[0]), tmp_path)
    staged = prepared(words, tmp_path / "1.xorz")
    plain, calls = _core.exchange_apply, []

    def failing(weight, content, back):
        calls.append(weight)
        if len(calls) > 3:
            raise RuntimeError("the machine is on fire")
        return plain(weight, content, back)

    monkeypatch.setattr(_core, "exchange_apply", failing)
    with pytest.raises(update.Broken, match="holds neither version"):
        update.apply(words, staged)


def test_other_words_than_the_update_s_are_refused(tmp_path):
    made = versions(tmp_path, 2)
    model = loaded(made[0])
    words = held_by(model, tmp_path)
    with pytest.raises(ValueError, match="digest"):
        prepared(words, tmp_path / "2.xorz")
    staged = prepared(words, tmp_path / "1.xorz")
    changes = (made[0]["k.weight"] != made[1]["k.weight"]).nonzero()
    row, column = changes[len(changes) // 2].tolist()  # in the middle of k
    # Past torch: each word that changes is compared.
    model.qkv.data[512 + row, column] += 1
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="have digest"):
        update.apply(words, staged)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    model.qkv.data[512 + row, column] = made[0]["k.weight"][row, column]
    # By torch, and other words in a parameter's place: words that stay the same are seen to be others, too.
    stays = (made[0]["down.weight"] == made[1]["down.weight"]).nonzero()[0].tolist()
    plain = model.down
    model.down = nn.Parameter(plain.data.clone(), requires_grad=False)
    with pytest.raises(ValueError, match="`down` was replaced or written to since"):
        update.apply(words, staged)
    model.down = plain
    assert same(model, loaded(made[0]))
    with torch.no_grad():
        model.down[tuple(stays)] += 1
    with pytest.raises(ValueError, match="`down` was replaced or written to since"):
        update.apply(words, staged)
    model.down.data[tuple(stays)] = made[0]["down.weight"][tuple(stays)]
    assert same(model, loaded(made[0]))


@pytest.mark.parametrize("threads", [1, 3])
def test_a_large_parameter_changes_by_blocks(tmp_path, monkeypatch, threads):
    monkeypatch.setitem(SHAPES, "embed.weight", (90_000, 96))
    plain, threads_before = Model.__init__, torch.get_num_threads()

    def larger(self, rank=0, size=1):
        plain(self, rank, size)
        self.embed = nn.Parameter(torch.zeros(90_112, 96).bfloat16(), requires_grad=False)

    monkeypatch.setattr(Model, "__init__", larger)
    made = versions(tmp_path, 2)
    model = loaded(made[0])
    words = held_by(model, tmp_path)
    torch.set_num_threads(threads)
    try:
        ways = []
        for number in (1, 2):
            staged = prepared(words, tmp_path / f"{number}.xorz")
            assert sum(step.span[0] == "embed" for step in staged.steps) > 2
            ways.append(update.apply(words, staged))
            assert same(model, loaded(made[number]))
        update.apply(words, update.backwards([ways[1], ways[0]]))
    finally:
        torch.set_num_threads(threads_before)
    assert same(model, loaded(made[0]))


def test_without_room_on_the_disk_what_changes_is_kept_in_memory(tmp_path):
    """The kernel itself refuses to let the file grow, or there is no folder for one; half a file is there already."""
    code = FULL.replace("HERE", repr(str(Path(__file__).parent))).replace("FOLDER", repr(str(tmp_path)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


FULL = """
import errno, os, sys, tempfile
from pathlib import Path
sys.path.insert(0, HERE)
import test_vllm_update as t
from xorz.vllm import update
folder = Path(FOLDER)
made = t.versions(folder, 1)
model = t.loaded(made[0])
words = t.held_by(model, folder)
plain = os.pwrite
files = []
def full(fd, content, at):
    files.append(os.readlink(f"/proc/self/fd/{fd}"))
    if "memfd" in files[-1]:
        return plain(fd, content, at)
    if at > 12000:
        raise OSError(errno.ENOSPC, "No space left on device")
    return plain(fd, content[:1000], at)
os.pwrite = full
staged = t.prepared(words, folder / "1.xorz")
assert "memfd" in files[-1] and "memfd" not in files[0], files
way = update.apply(words, staged)
assert t.same(model, t.loaded(made[1]))
update.apply(words, update.backwards([way]))
assert t.same(model, t.loaded(made[0]))
def none(*args, **kwargs):
    raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")
tempfile.TemporaryFile = none
staged = t.prepared(words, folder / "1.xorz")
assert "memfd" in files[-1]
update.apply(words, staged)
assert t.same(model, t.loaded(made[1]))
"""


def test_a_jump_between_versions_is_compared_word_by_word(tmp_path):
    made = versions(tmp_path)
    model = loaded(made[0])
    words, staged = held_by(model, tmp_path), update.Staged()
    for name in SHAPES:
        update.between(words, name, made[0][name], made[3][name], staged)
    update.apply(words, staged)
    assert same(model, loaded(made[3]))
    with pytest.raises(ValueError, match=r"`qkv` does not hold the words of `q\.weight`"):
        update.between(words, "q.weight", made[0]["q.weight"], made[1]["q.weight"], update.Staged())


CHILD = """
import os, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
import test_vllm_update as t
from safetensors.torch import load_file
from xorz import _core
from xorz.vllm import update
folder, rank = Path(sys.argv[2]), int(os.environ["RANK"])
torch.distributed.init_process_group("gloo")
group = update.Group(torch.distributed.group.WORLD, rank, 2)
made = [load_file(folder / f"v{i}" / "model.safetensors") for i in range(4)]
model = t.loaded(made[0], rank, 2)
words = t.held_by(model, folder, group)
for name, word in made[0].items():
    assert torch.equal(words.whole(name).view(torch.int16), word.view(torch.int16)), name
for number in (1, 2):
    update.apply(words, t.prepared(words, folder / f"{number}.xorz"))
    assert t.same(model, t.loaded(made[number], rank, 2))
# One process fails: none has changed.
staged = t.prepared(words, folder / "3.xorz")
plain, calls = _core.exchange_apply, []
def failing(weight, content, back):
    calls.append(1)
    if rank == 1 and len(calls) == 4:
        raise MemoryError("out of memory")
    return plain(weight, content, back)
_core.exchange_apply = failing
try:
    update.apply(words, staged)
    raise SystemExit("it did not fail")
except (MemoryError, ValueError) as error:
    assert "out of memory" in str(error) and (rank == 1 or "rank 1" in str(error))
_core.exchange_apply = plain
assert t.same(model, t.loaded(made[2], rank, 2))
way = update.apply(words, staged)
assert t.same(model, t.loaded(made[3], rank, 2))
update.apply(words, update.backwards([way]))
assert t.same(model, t.loaded(made[2], rank, 2))
print("fine", rank)
"""


def in_two_processes(program, folder):
    """Run it as ranks 0 and 1 of a gloo group, given the tests' folder and another one; each must say that it is fine."""
    env = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(20000 + os.getpid() % 20000),
        "WORLD_SIZE": "2",
    }
    here = str(Path(__file__).parent)
    children = [
        subprocess.Popen(
            [sys.executable, "-c", program, here, str(folder)],
            env=env | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank, child in enumerate(children):
        out, err = child.communicate(timeout=600)
        assert child.returncode == 0 and f"fine {rank}" in out, err[-3000:]


def test_two_processes_that_hold_parts(tmp_path):
    versions(tmp_path)
    in_two_processes(CHILD, tmp_path)
    assert load_file(tmp_path / "v3" / "model.safetensors").keys() == SHAPES.keys()


ALONE = """
import sys, threading
from pathlib import Path
import torch, xorz
from safetensors.torch import save_file
from torch import nn
from xorz import _core
from xorz.vllm import update
from xorz.vllm.packages import Checkpoint
from xorz.vllm.plan import plan
sys.path.insert(0, sys.argv[1])
import test_vllm_update as t
folder = Path(sys.argv[2])
t.SHAPES = {"embed.weight": (30000, 896)} | {f"{i}.weight": (4864, 896) for i in range(8)}
class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.ParameterDict(
            {n.replace(".", "_"): nn.Parameter(torch.zeros(s).bfloat16(), False) for n, s in t.SHAPES.items()}
        )
    def load_weights(self, weights):
        for name, tensor in weights:
            self.words[name.replace(".", "_")].data.copy_(tensor)
made = t.versions(folder, 1)
model = Plain()
model.load_weights(made[0].items())
size = sum(p.nbytes for p in model.parameters())
words = t.held_by(model, folder)
del made
def resident():
    with open("/proc/self/status") as file:
        return sum(int(line.split()[1]) << 10 for line in file if line.startswith("RssAnon"))
def work():
    for _ in range(2):
        before = resident()
        staged = t.prepared(words, folder / "1.xorz")
        print(size, staged.bytes, resident() - before)
        ways = update.apply(words, staged)
        del staged
        staged = update.backwards([ways])
        print(size, staged.bytes, resident() - before)
        update.apply(words, staged)
        del staged, ways
        print(size, 0, resident() - before)
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


def test_an_update_leaves_no_more_memory_behind_than_its_deltas(tmp_path):
    """As in an engine, where a thread prepares it: blocks of words and small deltas are made by turns."""
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", ALONE, here, str(tmp_path)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [tuple(int(word) for word in line.split()) for line in done.stdout.splitlines()]
    assert len(lines) == 6
    for size, held, grown in lines:
        # What is held lies in a file.
        assert 0 <= held < 0.2 * size and grown < 0.2 * size, lines
