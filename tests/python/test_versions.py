"""Promise: the versions of a run are a chain of small packages: each comes back bit for bit, out of order is
refused, jumps and rolling back work, a killed run leaves a whole chain, and the last five are served side by
side in one batch."""

import copy
import json
import os
import signal
import subprocess
import sys
import threading
import weakref

import pytest
import torch
import xorz
from conftest import same_bits
from safetensors.torch import save_file
from test_diff import all_equal, random_words
from torch import nn
from xorz import _core

pytestmark = pytest.mark.usefixtures("one_thread")

F = nn.functional
KINDS = (torch.bfloat16, torch.float32, torch.float16, torch.float64, torch.int64, torch.bool, torch.uint8)


def step_of(state, seed, share=0.05):
    """The next version: some words of every tensor replaced by random bits; what was one tensor stays one."""
    g, out, made = torch.Generator().manual_seed(seed), {}, {}
    for i, (name, t) in enumerate(state.items()):
        if t.data_ptr() not in made:
            other = random_words(t.shape, t.dtype, 1000 * seed + i)
            made[t.data_ptr()] = torch.where(torch.rand(t.shape, generator=g) < share, other, t)
        out[name] = made[t.data_ptr()]
    return out


def make_run(count=6):
    """States of every kind of tensor: v0 to v`count`."""
    base = {str(d): random_words((33, 40), d, i) for i, d in enumerate(KINDS)}
    base |= {"stack": torch.randn(3, 20, 7), "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3)}
    base |= {"embed": torch.randn(50, 30).bfloat16(), "turned": torch.randn(9, 8).t()}
    base["head"] = base["embed"]
    states = [base]
    for seed in range(1, count + 1):
        states.append(step_of(states[-1], seed))
    return states


def published(folder, states, **options):
    run = xorz.Versions(states[0], folder, **options)
    for number, state in enumerate(states[1:], 1):
        assert run.publish(state) == number
    return run


@pytest.mark.parametrize("keyframe", [1, 3, 100])
def test_every_version_comes_back_bit_for_bit(tmp_path, keyframe):
    states = make_run()
    published(tmp_path, states, keyframe=keyframe)
    run = xorz.Versions(states[0], tmp_path)
    assert run.head == 6 and "versions 0 to 6" in repr(run)
    assert len({run.digest(k) for k in range(7)}) == 7
    for k, state in enumerate(states):
        got = run.state_dict(k)
        assert all_equal(got, state) and got["embed"].data_ptr() == got["head"].data_ptr()
        assert all(got[n].data_ptr() != t.data_ptr() or not t.numel() for n, t in states[0].items())


def test_from_any_version_to_any_other_in_place(tmp_path):
    states = make_run(4)
    run = published(tmp_path, states, keyframe=2)
    for since in range(5):
        for number in range(5):
            target = {n: t.clone() for n, t in states[since].items() if n != "head"}
            target["head"] = target["embed"]
            delta = run.delta(number, since)
            assert all_equal(xorz.apply_(target, delta), states[number]), (since, number)
            if since == number:
                assert not delta.deltas and delta.changed == 0
                continue
            like = xorz.diff(states[since], states[number])
            assert delta.ties == like.ties == {"head": "embed"}
            assert delta.unchanged == like.unchanged and "empty" in delta.unchanged
            assert (delta.changed, delta.words, delta.tensor_bytes) == (
                like.changed,
                like.words,
                like.tensor_bytes,
            )


def test_tensors_that_part_or_become_equal_on_the_way(tmp_path):
    base = make_run(0)[0]
    apart = step_of(base, 1)
    apart["head"] = step_of({"head": base["head"]}, 77)["head"]
    again = dict(apart, head=apart["embed"])
    run = published(tmp_path, [base, apart, again, base, apart])
    for k, state in enumerate([base, apart, again, base, apart]):
        assert all_equal(run.state_dict(k), state)
    assert run.digest(0) == run.digest(3) != run.digest(1) == run.digest(4)
    assert "head" in run.delta(1).deltas and run.delta(2).ties == {"head": "embed"}


def test_steps_in_order_make_the_same_chain_elsewhere(tmp_path):
    states = make_run(5)
    run = published(tmp_path / "trainer", states, keyframe=2)
    other = xorz.Versions(states[0], tmp_path / "server", keyframe=3)
    for k in range(1, 6):
        assert other.append(run.path(k)) == k and other.digest(k) == run.digest(k)
    assert all_equal(other.state_dict(5), states[5])
    # Small: a step holds what changed since the last version, not since the base.
    sizes = [run.path(k).stat().st_size for k in range(1, 6)]
    assert max(sizes) < 1.2 * min(sizes)


def test_out_of_order_is_refused_by_both_digests_and_the_version_wanted(tmp_path):
    states = make_run(4)
    run = published(tmp_path / "trainer", states)
    mine = xorz.Versions(states[0], tmp_path / "server")
    mine.append(run.path(1))

    def refused(package, *words):
        before = sorted(p.name for p in mine.folder.iterdir())
        with pytest.raises(ValueError) as error:
            mine.append(package)
        assert all(w in str(error.value) for w in words), (str(error.value), words)
        assert sorted(p.name for p in mine.folder.iterdir()) == before
        assert all_equal(mine.state_dict(mine.head), states[mine.head])

    head, wanted = f"head is version 1 with digest {run.digest(1)}", "wanted is version 2"
    refused(run.path(3), run.digest(2), "none of versions 0 to 1", head, wanted)  # one is missing
    refused(run.path(4), run.digest(3), head, wanted)
    refused(run.path(1), run.digest(0), "which is version 0", head, wanted)  # once more
    run.pack(2, tmp_path / "whole.xorz")
    refused(tmp_path / "whole.xorz", run.digest(0), "which is version 0", head, wanted)  # against the base
    mine.append(run.path(2))
    refused(run.path(4), "none of versions 0 to 2", run.digest(3), run.digest(2), "wanted is version 3")
    # One word of one tensor is another, in a tensor that the step does not even change.
    near = {n: t.clone() for n, t in states[2].items()}
    near["scalar"] += 1
    xorz.pack(near, dict(states[3], scalar=near["scalar"]), tmp_path / "near.xorz")
    refused(tmp_path / "near.xorz", "none of versions 0 to 2", run.digest(2))
    mine.append(run.path(3))
    assert all_equal(mine.state_dict(3), states[3])


def test_rolling_back_makes_an_earlier_version_the_head(tmp_path):
    states = make_run(5)
    run = published(tmp_path, states, keyframe=2)
    late = (tmp_path / "late.xorz").resolve()
    late.write_bytes(run.path(4).read_bytes())
    run.rollback(2)
    assert run.head == 2 and all_equal(run.state_dict(2), states[2])
    assert not list(tmp_path.glob("00000[345]-*"))
    with pytest.raises(KeyError, match="no version 3, only 0 to 2"):
        run.delta(3)
    with pytest.raises(ValueError, match="wanted is version 3"):
        run.append(late)
    other = step_of(states[2], 99)
    assert run.publish(other) == 3 and all_equal(run.state_dict(3), other)
    run.rollback(0)
    assert run.head == 0 and all_equal(run.state_dict(0), states[0])
    assert run.publish(states[5]) == 1 and all_equal(run.state_dict(1), states[5])


def test_a_jump_opens_few_packages_and_holds_few_tensors(tmp_path, monkeypatch):
    base = {f"w{i}": torch.randn(64, 64) for i in range(20)}
    states = [base]
    for k in range(1, 20):
        states.append(step_of(states[-1], k))
    run = published(tmp_path, states, keyframe=5)
    opened, live = [], {"now": 0, "most": 0}
    init, restore = _core.Package.__init__, _core.Package.restore

    def count(self, path, *more):
        opened.append(path)
        init(self, path, *more)

    def track(self, name, old):
        out = restore(self, name, old)
        live["now"] += out.nbytes
        live["most"] = max(live["most"], live["now"])
        weakref.finalize(out, lambda n=out.nbytes: live.__setitem__("now", live["now"] - n))
        return out

    monkeypatch.setattr(_core.Package, "__init__", count)
    monkeypatch.setattr(_core.Package, "restore", track)
    run.delta(18)
    assert [os.path.basename(p)[:6] for p in opened] == ["000015", "000016", "000017", "000018"]
    run.delta(19, 3)
    run.pack(18, tmp_path / "out.xorz")
    # Two or three at a time for each of two versions, of twenty.
    assert 0 < live["most"] <= 6 * base["w0"].nbytes, live


def test_a_file_with_one_name_of_a_tied_tensor_is_a_step(tmp_path):
    base, new = (dict(s) for s in make_run(1))
    for name, state in (("old", base), ("new", new)):
        save_file(
            {n: t.contiguous() for n, t in state.items() if n != "head"}, tmp_path / f"{name}.safetensors"
        )
    xorz.pack(tmp_path / "old.safetensors", tmp_path / "new.safetensors", tmp_path / "step.xorz")
    run = xorz.Versions(base, tmp_path / "run")
    run.append(tmp_path / "step.xorz")
    assert all_equal(run.state_dict(1), new) and run.delta(1).ties == {"head": "embed"}


def test_other_tensors_are_refused_by_name(tmp_path):
    states = make_run(1)
    run = published(tmp_path / "run", states)
    new = states[1]
    cases = [
        ({n: t for n, t in new.items() if n != "stack"}, KeyError, "lacks the tensor `stack`"),
        ({**new, "more": torch.zeros(2)}, ValueError, "`more`, which the base lacks"),
        (
            {**new, "stack": new["stack"].double()},
            ValueError,
            r"`stack` is F64 \[3, 20, 7\], but the base's is float32",
        ),
        ({**new, "stack": torch.zeros(4, 20, 7)}, ValueError, r"`stack` is F32 \[4, 20, 7\]"),
        (7, TypeError, "int"),
    ]
    for i, (state, error, match) in enumerate(cases):
        with pytest.raises(error, match=match):
            run.publish(state)
        if isinstance(state, dict):
            xorz.pack(new, state, tmp_path / f"{i}.xorz")
            with pytest.raises(ValueError, match=match):
                run.append(tmp_path / f"{i}.xorz")
    for bad, error in (
        (xorz.diff(states[0], new), TypeError),
        (tmp_path / "no.xorz", OSError),
        (tmp_path, OSError),
    ):
        with pytest.raises(error):
            run.append(bad)
    (tmp_path / "junk.xorz").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(ValueError):
        run.append(tmp_path / "junk.xorz")
    for number, error in ((2, KeyError), (-1, KeyError), (True, TypeError), ("1", TypeError)):
        for method in (run.delta, run.state_dict, run.digest, run.path, run.rollback):
            with pytest.raises(error):
                method(number)
    with pytest.raises(KeyError, match="base"):
        run.path(0)
    with pytest.raises(ValueError, match="prefer"):
        run.delta(1, prefer="both")
    for keyframe, error in ((0, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="keyframe"):
            xorz.Versions(states[0], tmp_path / "x", keyframe=keyframe)
    with pytest.raises(TypeError, match="complex"):
        xorz.Versions({"w": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "y")
    assert run.head == 1 and all_equal(run.state_dict(1), new)


def test_another_base_or_a_changed_one_is_refused(tmp_path):
    states = make_run(2)
    run = published(tmp_path, states)
    with pytest.raises(ValueError, match="another base") as error:
        xorz.Versions(states[1], tmp_path)
    assert run.digest(0) in str(error.value) and run.digest(1) in str(error.value)
    states[0]["stack"][0, 0, 0] += 1
    with pytest.raises(ValueError, match=r"`stack`.*digest"):
        run.delta(2)


def test_damaged_files_are_errors_and_nothing_is_swept_away(tmp_path):
    base = {"w": torch.randn(40, 50).bfloat16(), "b": torch.randn(50)}
    states = [base]
    for k in range(1, 4):
        states.append(step_of(states[-1], k))
    run = published(tmp_path, states, keyframe=2)
    listed, whole = tmp_path / "versions.json", (tmp_path / "versions.json").read_bytes()
    content = json.loads(whole)
    bad = [b"", whole[:-20], b"[]", b"{}", b"[" * 100_000, whole.replace(b'"xorz-versions"', b'"other"')]
    bad += [
        json.dumps({**content, k: v}).encode()
        for k, v in [("format_version", 2), ("base", "0"), ("versions", 3)]
    ]
    for change in ({"digest": "../../x"}, {"bytes": "1"}, {"key": 1}, {"more": 1}):
        bad.append(json.dumps({**content, "versions": [{**content["versions"][0], **change}]}).encode())
    before = sorted(p.name for p in tmp_path.iterdir())
    for text in bad:
        listed.write_bytes(text)
        for call in (lambda: run.head, lambda: run.publish(base), lambda: xorz.Versions(base, tmp_path)):
            with pytest.raises(ValueError, match=r"versions\.json is damaged"):
                call()
    listed.unlink()
    with pytest.raises(ValueError, match=r"no versions\.json"):
        xorz.Versions(base, tmp_path)
    listed.write_bytes(whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    # Two versions' files change places, or a digest in the list is another.
    a, b = run.path(1), run.path(3)
    a_bytes, b_bytes = a.read_bytes(), b.read_bytes()
    b.write_bytes(a_bytes)
    with pytest.raises(ValueError, match="digest"):
        run.delta(3)
    b.write_bytes(b_bytes)
    b.rename(run._step(3, "0" * 32))
    content["versions"][2]["digest"] = "0" * 32
    listed.write_text(json.dumps(content))
    for call in (lambda: run.delta(3), lambda: run.state_dict(3), lambda: run.pack(3, tmp_path / "x.xorz")):
        with pytest.raises(
            ValueError, match=r"version 3 .* is damaged: its digest is 0+, but its packages give"
        ):
            call()
    assert not (tmp_path / "x.xorz").exists()
    listed.write_bytes(whole)
    with pytest.raises(OSError, match="000003"):
        run.delta(3)
    assert all_equal(run.state_dict(2), states[2])


class Killed(BaseException):
    pass


def test_a_run_that_dies_at_any_step_leaves_the_chain_before_or_after(tmp_path, monkeypatch):
    states = make_run(3)
    names = ["replace", "fsync", "open"]
    seen = set()
    for at in range(40):
        folder = tmp_path / str(at)
        run = published(folder, states[:3], keyframe=1)
        left = {"calls": at}

        def dying(call, left=left):
            def wrapped(*args, **kwargs):
                if left["calls"] == 0:
                    raise Killed
                left["calls"] -= 1
                return call(*args, **kwargs)

            return wrapped

        with monkeypatch.context() as patch:
            for name in names:
                patch.setattr(os, name, dying(getattr(os, name)))
            # Who is killed sweeps nothing.
            patch.setattr(xorz.Versions, "_sweep", lambda self: None)
            try:
                run.publish(states[3])
                died = False
            except Killed:
                died = True
        again = xorz.Versions(states[0], folder, keyframe=1)
        seen.add((died, again.head))
        assert again.head == 3 or (again.head == 2 and died)
        for k in range(again.head + 1):
            assert all_equal(again.state_dict(k), states[k])
        assert again.publish(states[3]) == again.head
        wanted = {again._step(k, again.digest(k)).name for k in range(1, again.head + 1)}
        here = {p.name for p in folder.iterdir()}
        # What the killed run left is gone.
        assert wanted <= here and not [n for n in here if n.startswith(".")], here
        # A step each, a key but for the first, the list and its lock.
        assert len(here) == 2 * again.head - 1 + 2, here
        if not died:
            break
    assert seen >= {(True, 2), (True, 3), (False, 3)}, seen


PUBLISHER = """
import sys, torch, xorz
base = torch.load(sys.argv[1])
run = xorz.Versions(base, sys.argv[2], keyframe=2)
state = {n: t.clone() for n, t in base.items()}
print("ready", flush=True)
while True:
    for t in state.values():
        t.view(-1)[run.head % t.numel()] += 1
    run.publish(state)
"""


def test_a_killed_publisher_leaves_whole_versions_and_readers_see_no_halves(tmp_path):
    base = {"a": torch.randn(300, 200).bfloat16(), "b": torch.randn(500)}
    torch.save(base, tmp_path / "base.pt")
    command = [sys.executable, "-c", PUBLISHER, str(tmp_path / "base.pt"), str(tmp_path / "run")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        assert process.stdout.readline() == "ready\n"
        run = xorz.Versions(base, tmp_path / "run")
        while run.head < 5:
            assert process.poll() is None
            run.state_dict(run.head)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    state = {n: t.clone() for n, t in base.items()}
    head = run.head
    assert head >= 5
    for k in range(head + 1):
        assert all_equal(run.state_dict(k), state), k
        for t in state.values():
            t.view(-1)[k % t.numel()] += 1
    # The lock died with its holder.
    assert run.publish(state) == head + 1


def test_publishers_in_threads_take_turns(tmp_path):
    states = make_run(6)
    run = xorz.Versions(states[0], tmp_path, keyframe=2)
    numbers, lock = {}, threading.Lock()

    def work(k):
        number = xorz.Versions(states[0], tmp_path).publish(states[k])
        with lock:
            numbers[number] = k

    threads = [threading.Thread(target=work, args=(k,)) for k in range(1, 7)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(numbers) == [1, 2, 3, 4, 5, 6] and run.head == 6
    for number, k in numbers.items():
        assert all_equal(run.state_dict(number), states[k])


# A run as small as they come: REINFORCE on a task of one step.


def policy():
    torch.manual_seed(0)
    layers = [
        nn.Linear(16, 256),
        nn.LayerNorm(256),
        nn.Tanh(),
        nn.Linear(256, 256),
        nn.Tanh(),
        nn.Linear(256, 8),
    ]
    return nn.Sequential(*layers).bfloat16()


def reinforce(publish, syncs, master, steps=8, batch=128):
    """Policies at each sync; `publish` gets the trained model. The reward is 1 where the action is the one
    that the observation calls for, which the policy is never told. With `master`, AdamW works on an fp32
    copy, else on the bf16 words."""
    g = torch.Generator().manual_seed(1)
    model = policy()
    trained = copy.deepcopy(model).float() if master else model
    optimizer = torch.optim.AdamW(trained.parameters(), lr=2e-3 if master else 4e-3)
    task = torch.randn(16, 8, generator=g)
    rewards = []
    for _ in range(syncs):
        for _ in range(steps):
            seen = torch.randn(batch, 16, generator=g)
            logits = trained(seen.to(next(trained.parameters()).dtype)).float()
            with torch.no_grad():
                action = torch.multinomial(logits.softmax(-1), 1, generator=g)
                reward = (action[:, 0] == (seen @ task).argmax(-1)).float()
            loss = -((reward - reward.mean()) * logits.log_softmax(-1).gather(1, action)[:, 0]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rewards.append(reward.mean().item())
        with torch.no_grad():
            for p, q in zip(model.parameters(), trained.parameters(), strict=True):
                p.copy_(q)
        publish(model)
    return rewards


@pytest.mark.parametrize("master", [True, False], ids=["fp32-master", "bf16"])
def test_the_last_five_versions_of_a_run_are_served_side_by_side(tmp_path, master):
    base, kept = policy(), []
    run = xorz.Versions(base, tmp_path / "run", keyframe=4)

    def publish(model):
        run.publish(model)
        kept.append(copy.deepcopy(model))

    rewards = reinforce(publish, 9, master)
    assert sum(rewards[-8:]) / 8 > sum(rewards[:8]) / 8 + 0.15, rewards  # it has learnt something
    last = range(run.head - 4, run.head + 1)
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(2)).bfloat16()
    order = [8, None, 5, 9, 7, 6]
    for mode in ("exact", "deterministic"):
        tenants = xorz.attach(base, mode=mode)
        for k in last:
            tenants.load(f"v{k}", run.delta(k))
        names = [None if k is None else f"v{k}" for k in order for _ in range(4)]
        with torch.no_grad(), tenants.use(names):
            batch = base(x.repeat(len(order), 1)).split(4)
        for k, got in zip(order, batch, strict=True):
            with torch.no_grad(), tenants.use(None if k is None else f"v{k}"):
                alone = base(x)
            with torch.no_grad():
                plain = (policy() if k is None else kept[k - 1])(x)
            assert same_bits(got, alone), (mode, k)
            # PyTorch's own products on the trainer's own copy; only exact mode promises their bits.
            assert same_bits(got, plain) if mode == "exact" else torch.allclose(got, plain, atol=0.05), (
                mode,
                k,
            )
        assert all(not torch.equal(a, b) for i, a in enumerate(batch) for b in batch[:i])
        # A server goes one version back, and forward again.
        tenants.swap("v9", run.delta(4))
        with torch.no_grad(), tenants.use("v9"):
            back = base(x)
        tenants.detach()
        with torch.no_grad():
            assert same_bits(back, kept[3](x)) or mode != "exact"
    assert all_equal(run.state_dict(9), kept[8].state_dict())
