"""Promise: what a trainer publishes is, bit for bit, what its model was at that moment, in the dtypes of the base, and the
chain is one that anybody can read; what cannot be published is refused by name, and nothing is there then.
"""

import hashlib
import os
import resource
import subprocess
import sys

import pytest
import torch
import xorz
from safetensors.torch import load_file, save_file
from torch import nn
from xorz import _core, sources, versions

SHAPES = {"a.weight": (48, 96), "b.weight": (96, 48), "b.bias": (96,), "table": (40, 48)}


@pytest.fixture
def base(tmp_path):
    """A checkpoint's folder, in bf16, two files of it."""
    torch.manual_seed(0)
    words = {name: torch.randn(shape).bfloat16() for name, shape in SHAPES.items()}
    folder = tmp_path / "base"
    folder.mkdir()
    for i, names in enumerate((["a.weight", "table"], ["b.weight", "b.bias"])):
        save_file({name: words[name] for name in names}, folder / f"model-{i}.safetensors")
    return folder


def words_of(folder):
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[n].view(torch.int16), b[n].view(torch.int16)) for n in a
    )


def test_fp32_masters_are_published_as_the_engine_stores_them(base, tmp_path):
    masters = {name: word.float() for name, word in words_of(base).items()}
    run = tmp_path / "run"
    with xorz.Publisher(base, run, keyframe=2) as publisher:
        wanted = []
        for step in range(5):
            for master in masters.values():
                master += 3e-3 * torch.randn_like(master)
            wanted.append({name: master.to(torch.bfloat16) for name, master in masters.items()})
            future = publisher.publish(masters)
            # Training goes on at once: the words were copied.
            for master in masters.values():
                master.mul_(1.01)
            assert future.result() == step + 1
    chain = xorz.Versions(words_of(base), run)
    assert chain.head == 5
    for number, words in enumerate(wanted, 1):
        assert same(chain.state_dict(number), words)


def test_steps_are_from_the_copy_that_is_held_and_the_same_as_from_the_chain(base, tmp_path):
    words = words_of(base)
    state = {name: word.clone() for name, word in words.items()}
    plain = xorz.Versions(words, tmp_path / "plain")
    with xorz.Publisher(base, tmp_path / "run") as publisher:
        for step in range(3):
            state["a.weight"][step] += 1
            plain.publish(state)
            publisher.publish(state).result()
            assert publisher.versions.path(step + 1).read_bytes() == plain.path(step + 1).read_bytes()
            assert publisher.versions.digest(step + 1) == plain.digest(step + 1)
        # Somebody else has gone back meanwhile: the copy is of another version than the head.
        publisher.versions.rollback(1)
        plain.rollback(1)
        state["b.bias"] += 1
        publisher.publish(state).result()
        plain.publish(state)
        assert same(publisher.versions.state_dict(2), plain.state_dict(2)) and same(
            plain.state_dict(2), state
        )


def test_a_run_that_goes_on_in_a_new_process(base, tmp_path):
    state = {name: word.clone() for name, word in words_of(base).items()}
    for number in (1, 2):
        with xorz.Publisher(base, tmp_path / "run") as publisher:
            state["table"] += 1
            assert publisher.publish(state).result() == number
    assert same(xorz.Versions(words_of(base), tmp_path / "run").state_dict(2), state)


def test_a_module_with_tied_names(base, tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            for name, word in words_of(base).items():
                self.register_parameter(name.replace(".", "_"), nn.Parameter(word.float()))
            self.head = self.table

    model = Tied()
    state = {
        k.replace("_weight", ".weight").replace("_bias", ".bias"): v for k, v in model.state_dict().items()
    }
    assert "head" in state
    with xorz.Publisher(base, tmp_path / "run") as publisher:
        publisher.publish(state)
        assert publisher.wait() == 1
        state["head"] = state["head"].clone()
        with pytest.raises(ValueError, match="`head`, which the base lacks"):
            publisher.publish(state)


def test_what_cannot_be_published_is_named_and_nothing_is_there(base, tmp_path):
    good = words_of(base)
    with xorz.Publisher(base, tmp_path / "run") as publisher:
        for name, change, error, match in (
            ("b.bias", lambda t: None, KeyError, "`b.bias`"),
            (
                "table",
                lambda t: t[:, :-1],
                ValueError,
                r"`table` is \[40, 47\], but the base's is \[40, 48\]",
            ),
            ("a.weight", lambda t: t.long(), ValueError, "`a.weight` is I64, but the base's is BF16"),
            ("a.weight", lambda t: t.to_sparse(), TypeError, "`a.weight`"),
        ):
            state = dict(good)
            if change(good[name]) is None:
                del state[name]
            else:
                state[name] = change(good[name])
            with pytest.raises(error, match=match):
                publisher.publish(state)
        with pytest.raises(ValueError, match="`more`, which the base lacks"):
            publisher.publish(good | {"more": torch.zeros(2)})
        assert publisher.versions.head == 0 and publisher.wait() is None
    with pytest.raises(RuntimeError, match="closed"):
        publisher.publish(good)


def test_steps_keep_the_sha256_of_what_they_are_from_where_that_is_asked_for(base, tmp_path):
    state, wanted = words_of(base), []
    with xorz.Publisher(base, tmp_path / "run", keyframe=2, trust="sha256") as publisher:
        for _ in range(3):
            wanted.append(
                {n: hashlib.sha256(t.view(torch.int16).numpy().tobytes()) for n, t in state.items()}
            )
            state = state | {"table": state["table"] + 1}
            publisher.publish(state, as_tenant=True).result()
        versions = publisher.versions
    for number, sums in enumerate(wanted, 1):
        for path, of in ((versions.path(number), sums), (versions.tenant(number), wanted[0])):
            entries = {e["name"]: e["base_sha256"] for e in xorz.inspect(path)["entries"]}
            assert entries == {name: found.hexdigest() for name, found in of.items()}
    assert same(xorz.Versions(words_of(base), tmp_path / "run", trust="sha256").state_dict(3), state)
    # Who goes on with it takes no chain that cannot tell.
    with xorz.Publisher(base, tmp_path / "plain") as publisher:
        publisher.publish(state).result()
    with xorz.Publisher(base, tmp_path / "plain", trust="sha256") as publisher:
        with pytest.raises(ValueError, match="--trust sha256"):
            publisher.publish(state).result()
        with pytest.raises(ValueError, match="--trust sha256"):
            publisher.wait()
    with pytest.raises(ValueError, match="'md5'"):
        xorz.Publisher(base, tmp_path / "other", trust="md5")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("fails", ["add", "digest", "finish"])
def test_a_version_that_failed_half_way_leaves_the_copy_that_is_held_as_it_was(
    base, tmp_path, monkeypatch, fails
):
    words = words_of(base)
    state = {name: word.clone() for name, word in words.items()}
    plain = xorz.Versions(words, tmp_path / "plain")
    with xorz.Publisher(base, tmp_path / "run") as publisher:
        for name in state:
            state[name].view(-1)[::7] += 1
        publisher.publish(state).result()
        plain.publish(state)
        first = {name: word.clone() for name, word in state.items()}
        for last in range(1, 5):
            state = {name: word.clone() for name, word in first.items()}
            for name in state:
                state[name].view(-1)[last::9] *= 2
            calls = []
            owner, attribute = {
                "add": (_core.Writer, "add"),
                "digest": (versions, "digest_of"),
                "finish": (_core.Writer, "finish"),
            }[fails]
            real = getattr(owner, attribute)

            def failing(*args, real=real, calls=calls, last=last):
                calls.append(1)
                if len(calls) == last or fails == "finish":
                    raise OSError("No space left on device")
                return real(*args)

            with monkeypatch.context() as patch:
                patch.setattr(owner, attribute, failing)
                with pytest.raises(OSError, match="No space"):
                    publisher.publish(state).result()
                with pytest.raises(OSError, match="No space"):
                    publisher.wait()
        publisher.publish(state).result()
        plain.publish(state)
        assert publisher.versions.path(2).read_bytes() == plain.path(2).read_bytes()


def test_names_that_are_tied_in_one_version_and_not_in_the_next(tmp_path):
    table = torch.randn(40, 48).bfloat16()
    words = {"in": table, "out": table, "more": torch.randn(9).bfloat16()}
    plain = xorz.Versions(words, tmp_path / "plain")

    def moved(tensor, seed):
        torch.manual_seed(seed)
        return tensor + (torch.rand(tensor.shape) < 0.02) * torch.randn(tensor.shape).bfloat16()

    one, two = moved(table, 1), moved(table, 2)
    states = [
        {"in": one, "out": one},
        {"in": (three := moved(one, 3)), "out": three},
        {"in": three, "out": two},
        {"in": moved(three, 4), "out": moved(two, 5)},
        {"in": two, "out": two},
        {"in": two, "out": two.clone()},
    ]
    with xorz.Publisher(words, tmp_path / "run") as publisher:
        for number, state in enumerate(states, 1):
            state = state | {"more": moved(words["more"], number)}
            assert publisher.publish(state).result() == plain.publish(state) == number
            assert same(publisher.versions.state_dict(number), state)
            assert publisher.versions.digest(number) == plain.digest(number)


def test_tensors_of_any_kind_are_published_as_they_are(tmp_path):
    torch.manual_seed(3)
    make = {
        "float8": lambda: torch.randn(20, 9).to(torch.float8_e4m3fn),
        "double": lambda: torch.randn(20, 9, dtype=torch.float64),
        "turned": lambda: torch.randn(20, 9).T,
        "integers": lambda: torch.randint(0, 100, (300,)),
        "flags": lambda: torch.rand(77) < 0.5,
        "one": lambda: torch.tensor(3.5),
        "none": lambda: torch.empty(0, 4),
        "experts": lambda: torch.randn(3, 8, 5).half(),
    }
    words = {name: made() for name, made in make.items()}
    plain = xorz.Versions(words, tmp_path / "plain")
    with xorz.Publisher(words, tmp_path / "run") as publisher:
        state = dict(words)
        for number in range(1, 5):
            fresh = {name: made() for name, made in make.items()}
            state = {
                # Some of the words, or (in every fourth version) all of them.
                n: torch.where(
                    torch.rand(t.shape) < (0.1 if number % 4 else 1), fresh[n].float(), t.float()
                ).to(t.dtype)
                if n == "float8"
                else torch.where(torch.rand(t.shape) < (0.1 if number % 4 else 1), fresh[n], t)
                for n, t in state.items()
            }
            assert publisher.publish(state).result() == plain.publish(state) == number
            assert publisher.versions.path(number).read_bytes() == plain.path(number).read_bytes()


MEMORY = """
import ctypes, sys, threading
from pathlib import Path
import torch, xorz
from safetensors.torch import save_file
folder = Path(sys.argv[1])
shapes = {f"{i}.weight": (1024, 1024) for i in range(64)}
torch.manual_seed(0)
save_file({n: torch.randn(s).bfloat16() for n, s in shapes.items()}, folder / "base.safetensors")
from safetensors.torch import load_file
state = {n: t.clone() for n, t in load_file(folder / "base.safetensors").items()}
def resident():
    with open("/proc/self/status") as file:
        return sum(int(line.split()[1]) << 10 for line in file if line.startswith("RssAnon"))
peak, over = 0, threading.Event()
def look():
    global peak
    while not over.wait(0.001):
        peak = max(peak, resident())
with xorz.Publisher(folder / "base.safetensors", folder / "run") as publisher:
    publisher.publish(state).result()
    for word in state.values():
        word.view(-1)[:: 33] *= 2
    publisher.publish(state).result()
    for word in state.values():
        word.view(-1)[1 :: 33] *= 2
    # What an allocator keeps of the versions before would hide a second copy.
    ctypes.CDLL(None).malloc_trim(0)
    before = resident()
    thread = threading.Thread(target=look)
    thread.start()
    publisher.publish(state).result()
    over.set()
    thread.join()
    print(sum(w.nbytes for w in state.values()), peak - before)
"""


def test_one_copy_of_the_words_is_enough_while_a_version_is_written(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    size, more = map(int, done.stdout.split())
    # What differs, and a few tensors.
    assert more < 0.35 * size, (size, more)


def test_an_error_while_writing_is_raised_by_the_next_call(base, tmp_path, monkeypatch):
    state = {name: word.clone() for name, word in words_of(base).items()}
    with xorz.Publisher(base, tmp_path / "run") as publisher:
        publisher.publish(state).result()

        def full(*args, **kwargs):
            raise OSError("No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(xorz.Versions, "publish_from", full)
            state["table"] += 1
            future = publisher.publish(state)
            with pytest.raises(OSError, match="No space"):
                publisher.wait()
            assert isinstance(future.exception(), OSError)
        assert publisher.versions.head == 1
        assert publisher.publish(state).result() == 2
        assert same(publisher.versions.state_dict(2), state)


def test_a_full_disk_leaves_the_chain_as_it_was(base, tmp_path):
    """The kernel itself refuses to let a file grow; no part of it stays."""
    state = {name: word.clone() for name, word in words_of(base).items()}
    with xorz.Publisher(base, tmp_path / "run") as publisher:
        publisher.publish(state).result()
        files = sorted(os.listdir(tmp_path / "run"))
        # Nothing of the words is left, so that the step is long.
        state = {name: torch.randn_like(word) for name, word in state.items()}
        _soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            with pytest.raises(OSError, match="File too large"):
                publisher.publish(state).result()
            with pytest.raises(OSError, match="File too large"):
                publisher.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert sorted(os.listdir(tmp_path / "run")) == files and publisher.versions.head == 1
        assert publisher.publish(state).result() == 2
        assert same(publisher.versions.state_dict(2), state)


def test_versions_that_are_tenants_lie_against_the_base(base, tmp_path):
    words = words_of(base)
    run, state, wanted = tmp_path / "run", dict(words), []
    with xorz.Publisher(base, run, keyframe=4) as publisher:
        for step in range(6):
            state["table"] = state["table"] + 1
            publisher.publish(state, as_tenant=step in (1, 2, 4)).result()
            wanted.append(dict(state))
        versions = publisher.versions
    # The first step is against the base as it is, the fourth is a keyframe.
    for number in (1, 2, 3, 4, 5):
        path = versions.tenant(number)
        assert sources.located(f"{run}@{number}") == path and path.parent == run
        for name, word in words.items():
            delta = xorz.load_deltas(words, path).get(name)
            got = word if delta is None else xorz.delta_restore(word, delta)
            assert torch.equal(got.view(torch.int16), wanted[number - 1][name].view(torch.int16))
    for call in (
        lambda: versions.tenant(6),
        lambda: sources.located(run),
        lambda: sources.located(f"{run}@6"),
    ):
        with pytest.raises(
            ValueError, match=r"version 6 in .* has no package against the base.*as_tenant=True"
        ):
            call()
    with pytest.raises(ValueError, match=r"version 0 in .* is the base itself"):
        versions.tenant(0)
    with pytest.raises(FileNotFoundError, match=r"there is no version 7 in .*, only 0 to 6"):
        sources.located(f"{run}@7")
    versions.rollback(5)
    assert sources.located(run) == versions.tenant(5)
    # What is no folder of versions is what it was: a file of that name, or nothing.
    odd = tmp_path / "alice@3"
    odd.write_bytes(b"")
    assert sources.located(odd) == odd and not sources.is_elsewhere(f"{run}@3")
    (run / "versions.json").write_text("{}")
    with pytest.raises(ValueError, match=r"versions\.json is damaged"):
        sources.located(f"{run}@3")
