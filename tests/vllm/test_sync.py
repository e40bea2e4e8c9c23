"""Promise: after an update the engine says what a fresh engine over the new weights says, token for token, with a warm prefix
cache; an update that does not fit, is torn, comes twice or in another order, or fails half way changes nothing; every version
that was served can be gone back to; fine-tunes of another version than the one served are never answered.
"""

import resource
import shutil

import engines
import pytest
import runs
import torch
import xorz
import xorz.vllm
from engines import PROMPTS, ask
from safetensors.torch import load_file
from xorz import _core
from xorz.vllm import client

KINDS = ("qwen2", "llama", "qwen3")
"""Tied, with biases; a head of its own; norms of heads."""


@pytest.fixture(scope="module", params=KINDS)
def made(request):
    """The versions' folders, the chain, and what an engine over each says, which vLLM alone has loaded."""
    paths, chain = runs.run(request.param, engines.FOLDER)
    # The third is loaded by a fresh engine.
    order = [3, 0, 1, 2, 4]
    said = dict(zip(order, engines.references([paths[number] for number in order]), strict=True))
    assert len({tuple(s.tokens) for each in said.values() for s in each}) >= len(said) + 2
    return paths, chain, said


@pytest.fixture(scope="module")
def llm(made):
    out = engines.engine(made[0][0], weight_transfer_config={"backend": "xorz"})
    out.init_weight_transfer_engine({"init_info": {"keep": 2}})
    yield out
    engines.stop(out)


def worker(llm):
    return llm.llm_engine.model_executor.driver_worker.worker


def words(llm):
    return {n: p.data.clone() for n, p in worker(llm).get_model().named_parameters()}


def says(llm, said, number):
    for _ in range(2):  # the second time from the cache
        got = ask(llm, PROMPTS)
        assert [g.tokens for g in got] == [w.tokens for w in said[number]]
        assert all(abs(g.logprob - w.logprob) < 0.2 for g, w in zip(got, said[number], strict=True))


def to(llm, chain, number):
    if llm.get_weight_version() not in (str(number), "default" if number == 0 else ""):
        client.update(llm, chain, number)


def by_hand(llm, **info):
    """vLLM's own life cycle."""
    llm.start_weight_update()
    llm.update_weights({"update_info": info})
    llm.finish_weight_update()


def test_three_updates_in_turn_and_back(llm, made):
    paths, chain, said = made
    places = {n: p.data_ptr() for n, p in worker(llm).get_model().named_parameters()}
    to(llm, chain, 0)
    says(llm, said, 0)
    for number in (1, 2, 3):
        if number == 2:
            by_hand(llm, source=str(chain), version=2)
        else:
            [report] = client.update(llm, chain, number)
            size = xorz.Versions(load_file(paths[0] / "model.safetensors"), chain).path(number).stat().st_size
            assert (report["version"], report["since"], report["bytes"]) == (
                str(number),
                str(number - 1),
                size,
            )
            assert 0.01 < report["changed"] / report["words"] < 0.05
            assert min(report["fetch"], report["check"], report["apply"]) >= 0
        says(llm, said, number)
        assert llm.get_weight_version() == str(number)
    assert {n: p.data_ptr() for n, p in worker(llm).get_model().named_parameters()} == places
    client.rollback(llm)
    says(llm, said, 2)
    client.rollback(llm)
    says(llm, said, 1)
    with pytest.raises(
        client.UpdateError, match="not kept: version 1 is served, and of those before it none"
    ):
        client.rollback(llm)
    client.update(llm, chain)  # from 1 to 4, the newest
    says(llm, said, 4)
    client.update(llm, chain, 0)
    says(llm, said, 0)


def test_what_does_not_fit_changes_nothing(llm, made, tmp_path):
    paths, chain, said = made
    to(llm, chain, 1)
    before = words(llm)
    versions = xorz.Versions(load_file(paths[0] / "model.safetensors"), chain)
    step = {number: versions.path(number) for number in (1, 2, 3)}
    good = step[2].read_bytes()
    torn, flipped, part = tmp_path / "torn.xorz", tmp_path / "flipped.xorz", tmp_path / "part.xorz"
    torn.write_bytes(good[: len(good) // 2])
    at = len(good) // 2
    flipped.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
    old, new = (load_file(paths[n] / "model.safetensors") for n in (1, 2))
    less = {n: w for n, w in new.items() if n != "model.norm.weight"}
    xorz.pack({n: old[n] for n in less}, less, part)
    with xorz.Publisher(paths[2], tmp_path / "other") as publisher:
        publisher.publish(load_file(paths[3] / "model.safetensors"))
    wrong = {
        "a version that is served": (dict(source=str(chain), version=1), "version 1 is served already"),
        "the same step again": (dict(source=str(step[1])), "tensor .* digest"),
        "a step from a later version": (dict(source=str(step[3])), r"must be a step from version 1"),
        "a chain from another base": (
            dict(source=str(tmp_path / "other")),
            "of another base: theirs has digest",
        ),
        "no such version": (dict(source=str(chain), version=9), "there is no version 9"),
        "a torn file": (dict(source=str(torn)), "torn.xorz|header"),
        "a flipped bit": (dict(source=str(flipped)), "tensor|flipped"),
        "not the whole model": (dict(source=str(part)), "lacks `model.norm.weight`"),
        "another digest": (
            dict(source=str(step[2]), digest="0" * 32),
            "but 00000000000000000000000000000000 is wanted",
        ),
        "no file": (dict(source=str(tmp_path / "none.xorz")), "No such file"),
        "no base64": (dict(package="%%%"), "not base64"),
        "nothing": ({}, "one of source, package and rollback, but none is given"),
        "two things": (dict(source="a", package="b"), "but source and package is given"),
        "another field": (dict(source="a", speed=1), "speed"),
        "another kind of version": (dict(source=str(chain), version="x"), "'x' is no number"),
    }
    for what, (info, text) in wrong.items():
        llm.start_weight_update()
        with pytest.raises(Exception, match=text):
            llm.update_weights({"update_info": info})
            pytest.fail(what)
        with pytest.raises(Exception, match="without a matching start"):
            llm.finish_weight_update()
    llm.start_weight_update()
    with pytest.raises(Exception, match="nothing was received"):
        llm.finish_weight_update()
    after = words(llm)
    assert all(torch.equal(before[n].view(torch.int16), after[n].view(torch.int16)) for n in before)
    assert llm.get_weight_version() == "1"
    says(llm, said, 1)
    by_hand(llm, source=step[2].as_uri(), version=2)
    says(llm, said, 2)
    client.update(llm, package=step[3].read_bytes(), digest=xorz.vllm.digest(step[3]))
    says(llm, said, 3)


def test_a_failure_half_way_leaves_the_version_before_and_its_tenants(llm, made, monkeypatch):
    paths, chain, said = made
    to(llm, chain, 0)
    package = engines.FOLDER / "alice.xorz"
    xorz.pack(paths[0], paths[2], package)
    alice = xorz.vllm.load(llm, "alice", package)
    before = words(llm)
    plain, calls = _core.exchange_apply, []

    def failing(weight, content, back):
        calls.append(1)
        if len(calls) == 6:
            raise MemoryError("out of memory")
        return plain(weight, content, back)

    monkeypatch.setattr(_core, "exchange_apply", failing)
    with pytest.raises(client.UpdateError, match="out of memory"):
        client.update(llm, chain, 1)
    monkeypatch.setattr(_core, "exchange_apply", plain)
    assert len(calls) > 6
    after = words(llm)
    assert all(torch.equal(before[n].view(torch.int16), after[n].view(torch.int16)) for n in before)
    says(llm, said, 0)
    assert alice.lora_int_id in worker(llm).list_loras()
    assert [a.tokens for a in ask(llm, PROMPTS, [alice] * 2)] == [w.tokens for w in said[2]]
    # It succeeds the next time; alice is no fine-tune of what is served then.
    client.update(llm, chain, 1)
    says(llm, said, 1)
    assert alice.lora_int_id not in worker(llm).list_loras()
    with pytest.raises(Exception, match="replaced after loading"):
        ask(llm, PROMPTS, [alice] * 2)
    says(llm, said, 1)
    client.rollback(llm)
    assert [a.tokens for a in ask(llm, PROMPTS, [alice] * 2)] == [w.tokens for w in said[2]]
    says(llm, said, 0)


def test_an_engine_whose_words_somebody_else_has_replaced(llm, made):
    paths, chain, said = made
    to(llm, chain, 1)
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(paths[0])})
    says(llm, said, 0)
    with pytest.raises(client.UpdateError, match="not kept"):
        client.rollback(llm)
    # It is known again by its words.
    client.update(llm, chain, 3)
    says(llm, said, 3)
    client.update(llm, chain, 0)


def test_what_was_prepared_for_other_words_is_not_applied(llm, made):
    paths, chain, said = made
    to(llm, chain, 0)
    info = {"source": str(chain), "version": 1}
    llm.collective_rpc("xorz_sync_prepare", kwargs={"update_info": info})
    while llm.collective_rpc("xorz_sync_prepared") == [None]:
        pass
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(paths[2])})
    says(llm, said, 2)
    by_hand(llm, **info)  # from version 2, read anew
    says(llm, said, 1)


def test_words_that_somebody_writes_between_the_check_and_the_change_are_noticed(llm, made):
    """A parameter that another one took the place of, or that torch has written to; and, however it was written, a word that
    the update changes.
    """
    paths, chain, said = made
    to(llm, chain, 0)
    old, new = (load_file(path / "model.safetensors")["model.norm.weight"] for path in paths[:2])
    norm = worker(llm).get_model().model.norm
    at, stays = int((old != new).nonzero()[0]), int((old == new).nonzero()[0])
    plain = norm.weight

    def torch_writes():
        with torch.no_grad():
            norm.weight[stays] += 1

    def another():
        norm.weight = torch.nn.Parameter(plain.data.clone(), requires_grad=False)

    def past_torch():
        norm.weight.data[at] += 1

    writes = {
        torch_writes: "was replaced or written to",
        another: "was replaced or written to",
        past_torch: "have digest",
    }
    for write, match in writes.items():
        llm.start_weight_update()
        llm.update_weights({"update_info": {"source": str(chain), "version": 1}})
        write()
        before = words(llm)
        with pytest.raises(Exception, match=match):
            llm.finish_weight_update()
        after = words(llm)
        assert all(torch.equal(before[n].view(torch.int16), after[n].view(torch.int16)) for n in before)
        norm.weight = plain
        norm.weight.data.copy_(old)
        assert llm.get_weight_version() == "0"
    says(llm, said, 0)
    client.update(llm, chain, 1)
    says(llm, said, 1)


def test_a_chain_whose_first_package_lacks_a_tied_name_or_is_gone(llm, made, tmp_path):
    """The trainer's state has both names of what is tied, an appended package has one."""
    paths, chain, said = made
    # Each of the two chains lacks a name that the other one has, so that no version of it is the one that is served.
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(paths[0])})
    words = [load_file(path / "model.safetensors") for path in paths[:3]]
    tied = "lm_head.weight" not in words[0]
    states = [w | {"lm_head.weight": w["model.embed_tokens.weight"]} if tied else w for w in words]
    run = xorz.Versions(states[0], tmp_path / "run", keyframe=2)
    xorz.pack(words[0], words[1], tmp_path / "1.xorz")
    run.append(tmp_path / "1.xorz")
    run.publish(states[2])
    with _core.Package(run.path(1)) as first:
        assert first.entries.keys() == words[0].keys()
    for number in (1, 2):
        client.update(llm, run.folder, number)
        says(llm, said, number)
    late = shutil.copytree(run.folder, tmp_path / "late")
    (late / run.path(1).name).unlink()
    for number in (0, 2):
        client.update(llm, late, number)
        says(llm, said, number)
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(paths[0])})
    client.update(llm, chain, 1)
    client.update(llm, chain, 0)


def test_many_updates_leave_memory_as_it_was(llm, made):
    _paths, chain, said = made

    def resident():
        with open("/proc/self/status") as file:
            [line] = [line for line in file if line.startswith("VmRSS")]
        return int(line.split()[1]) << 10

    to(llm, chain, 0)
    for number in (1, 2, 1, 2, 1, 2):
        client.update(llm, chain, number)
    before = resident()
    for _ in range(100):
        for number in (1, 2):
            client.update(llm, chain, number)
    assert resident() - before < 20 << 20
    says(llm, said, 2)


def test_a_trainer_that_was_killed_does_not_lock_out_the_next(llm, made):
    """In the middle of an update, and while one is prepared."""
    _paths, chain, said = made
    to(llm, chain, 0)
    for number in (1, 2):
        llm.start_weight_update()
        llm.update_weights({"update_info": {"source": str(chain), "version": 3}})
        says(llm, said, number - 1)
        if number == 1:
            client.update(llm, chain, number)
        else:
            by_hand(llm, source=str(chain), version=number)
        says(llm, said, number)
    llm.collective_rpc("xorz_sync_prepare", kwargs={"update_info": {"source": str(chain), "version": 4}})
    while llm.collective_rpc("xorz_sync_prepared") == [None]:
        pass
    client.update(llm, chain, 3)
    says(llm, said, 3)


def test_a_full_disk_changes_nothing(llm, made):
    """What is sent along is written to a file; the kernel itself refuses to let it grow."""
    paths, chain, said = made
    to(llm, chain, 0)
    step = xorz.Versions(load_file(paths[0] / "model.safetensors"), chain).path(1).read_bytes()
    _soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(step) // 2, hard))
    try:
        with pytest.raises(client.UpdateError, match="File too large"):
            client.update(llm, package=step)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    says(llm, said, 0)
    client.update(llm, package=step)
    says(llm, said, 1)
