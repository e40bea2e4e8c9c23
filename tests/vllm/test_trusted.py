"""Promise: an engine that trusts words by their sha256 takes no package, as an update or as a tenant, that is a difference from
other words, though the digests fit, and none that cannot tell; nothing has changed then. Nobody talks it out of that.
"""

import base64
import shutil

import engines
import pytest
import runs
import torch
import xorz
import xorz.vllm
from engines import PROMPTS, ask
from safetensors.torch import load_file
from xorz.vllm import client
from xorz.vllm.sync import XorzInitInfo

CHANGED, UNCHANGED = "model.layers.1.mlp.down_proj.weight", "model.norm.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The versions' folders, a chain that keeps sha256, in which one tensor never changes, and what engines over it say."""
    paths, _ = runs.run("llama", engines.FOLDER)
    chain = tmp_path_factory.mktemp("trusted") / "run"
    words = [load_file(path / "model.safetensors") for path in paths]
    with xorz.Publisher(paths[0], chain, keyframe=2, trust="sha256") as publisher:
        for new in words[1:]:
            publisher.publish(new | {UNCHANGED: words[0][UNCHANGED]})
    versions = xorz.Versions(words[0], chain, trust="sha256")
    folders = [paths[0]]
    for number in range(1, 4):
        folder = chain.parent / f"v{number}"
        shutil.copytree(paths[number], folder)
        state = versions.state_dict(number)
        own = {name: state[name].clone() for name in words[number]}
        runs.save_file(own, folder / "model.safetensors", metadata={"format": "pt"})
        assert all(torch.equal(t, words[number][n]) for n, t in own.items() if n != UNCHANGED)
        folders.append(folder)
    return folders, versions, dict(enumerate(engines.references(folders)))


@pytest.fixture
def llm(made):
    """An engine that was started without a word of trust."""
    out = engines.engine(made[0][0], weight_transfer_config={"backend": "xorz"})
    yield out
    engines.stop(out)


@pytest.fixture
def wary(made):
    """One that was started with it."""
    out = engines.engine(made[0][0], xorz={"trust": "sha256"}, weight_transfer_config={"backend": "xorz"})
    yield out
    engines.stop(out)


def init(llm, **info):
    llm.init_weight_transfer_engine({"init_info": info})


def words(llm):
    model = llm.llm_engine.model_executor.driver_worker.worker.get_model()
    return {n: p.data.clone() for n, p in model.named_parameters()}


def receive(llm, **info):
    llm.start_weight_update()
    llm.update_weights({"update_info": info})


def refused(llm, match, **info):
    """By vLLM's own life cycle, and by the client, before a word is written."""
    before = words(llm), llm.get_weight_version()
    with pytest.raises(Exception, match=match):
        receive(llm, **info)
    with pytest.raises(Exception, match="without a matching start"):
        llm.finish_weight_update()
    with pytest.raises(client.UpdateError, match=match):
        client.update(
            llm, **(info | {"package": base64.b64decode(info["package"])} if "package" in info else info)
        )
    after = words(llm)
    assert all(torch.equal(before[0][n].view(torch.int16), after[n].view(torch.int16)) for n in after)
    assert llm.get_weight_version() == before[1]


def says(llm, said, lora=None):
    assert [s.tokens for s in ask(llm, PROMPTS, lora and [lora] * 2)] == [s.tokens for s in said]


def test_updates(made, llm, tmp_path):
    folders, versions, said = made
    steps = {
        name: runs.forged(versions.path(1), name, tmp_path / f"{name}.xorz") for name in (CHANGED, UNCHANGED)
    }
    plain = tmp_path / "plain.xorz"
    xorz.pack(*(load_file(folder / "model.safetensors") for folder in folders[:2]), plain)
    told = tmp_path / "told"
    with xorz.Publisher(folders[0], told) as publisher:
        for folder in folders[1:]:
            publisher.publish(load_file(folder / "model.safetensors"))
    jump = tmp_path / "jump"
    shutil.copytree(versions.folder, jump)
    [key] = jump.glob("000002-*.key.xorz")
    runs.forged(key, CHANGED, key)
    for step in (*steps.values(), plain):  # the digests alone let it pass
        receive(llm, source=str(step))
        says(llm, said[0])
    client.update(llm, jump, 2)
    says(llm, said[2])
    client.update(llm, told, 0)
    init(llm, trust="sha256")
    for name, step in steps.items():
        refused(llm, rf"`{name}`.*sha256", source=str(step))
        refused(llm, rf"`{name}`.*sha256", package=base64.b64encode(step.read_bytes()).decode())
    refused(llm, "no sha256 of the base's .*--trust sha256", source=str(plain))
    refused(llm, "no sha256 of the base's", source=str(told), version=1)
    refused(llm, "no sha256 of the base's", source=str(told), version=2)
    refused(llm, rf"`{CHANGED}`.*sha256", source=str(jump), version=2)
    says(llm, said[0])
    # Steps, the second of which knows of the first what has not changed; and a jump.
    for number in (1, 2, 0, 3):
        client.update(llm, versions.folder, number)
        says(llm, said[number])
    client.rollback(llm)
    says(llm, said[0])


def test_what_was_checked_by_its_digest_is_not_applied_when_more_is_asked_for(made, llm, tmp_path):
    _folders, versions, said = made
    step = runs.forged(versions.path(1), CHANGED, tmp_path / "step.xorz")
    init(llm)
    receive(llm, source=str(step))
    init(llm, trust="sha256")
    with pytest.raises(Exception, match="nothing was received"):
        llm.finish_weight_update()
    init(llm, trust="digest")
    llm.collective_rpc("xorz_sync_prepare", kwargs={"update_info": {"source": str(step)}})
    while llm.collective_rpc("xorz_sync_prepared") == [None]:
        pass
    assert llm.collective_rpc("xorz_sync_prepared") == [""]
    init(llm, trust="sha256")
    with pytest.raises(Exception, match=rf"`{CHANGED}`.*sha256"):
        receive(llm, source=str(step))
    says(llm, said[0])


def test_an_engine_that_was_started_with_it(made, wary, tmp_path):
    folders, versions, said = made
    step = runs.forged(versions.path(1), CHANGED, tmp_path / "step.xorz")
    refused(wary, rf"`{CHANGED}`.*sha256", source=str(step))
    with pytest.raises(Exception, match=r"trust is 'digest' .* started with xorz\.trust 'sha256'"):
        init(wary, trust="digest")
    init(wary, keep=2)
    refused(wary, rf"`{CHANGED}`.*sha256", source=str(step))
    # Tenants as well.
    plain = tmp_path / "plain.xorz"
    xorz.pack(folders[0], folders[1], plain)
    for package, match in ((step, rf"{CHANGED}.*sha256"), (plain, "no sha256 of the base's")):
        with pytest.raises(Exception, match=match):
            xorz.vllm.load(wary, "alice", package)
    alice = xorz.vllm.load(wary, "alice", versions.path(1))
    says(wary, said[1], alice)
    client.update(wary, versions.folder, 3)
    says(wary, said[3])


@pytest.mark.parametrize("word", ["md5", "", "SHA256", 1, ["sha256"]])
def test_other_words(word):
    with pytest.raises(ValueError, match="trust must be"):
        XorzInitInfo(trust=word)
