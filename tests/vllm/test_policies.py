"""Promise: versions of a policy are served beside each other. A request that began before a version was published ends as an
engine over the version before would end it, token for token, and one that comes after is answered by the new one, with a warm
prefix cache; no request waits or fails; versions that are too old leave, and nothing is left of them; `policy` is the newest.
"""

import os

import engines
import pytest
import runs
import xorz
import xorz.vllm
from engines import NEW, PROMPTS, ask
from safetensors.torch import load_file
from vllm import SamplingParams

KINDS = ("llama", "qwen3")
"""A head of its own; and norms of heads."""


def published(paths, folder, as_tenant=True):
    with xorz.Publisher(paths[0], folder) as publisher:
        for path in paths[1:]:
            publisher.publish(load_file(path / "model.safetensors"), as_tenant=as_tenant)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory):
    """The versions' folders, the chain, and what an engine over each says, which vLLM alone has loaded."""
    paths, _chain = runs.run(request.param, engines.FOLDER)
    said = dict(enumerate(engines.references(paths)))
    assert len({tuple(s.tokens) for each in said.values() for s in each}) >= len(said) + 2
    return paths, published(paths, tmp_path_factory.mktemp("run")), said


@pytest.fixture(scope="module")
def llm(made):
    out = engines.engine(made[0][0], max_loras=4, max_cpu_loras=6)
    yield out
    engines.stop(out)


def names(llm):
    """Of the tenants that are resident, in order."""
    found = engines.manager(llm)._registered_adapters.cache.values()
    return sorted(lora.name.partition("@")[0] for lora in found if lora.id < 2**31 and "@" in lora.name)


def says(llm, lora, said):
    for _ in range(2):  # the second time from the cache
        got = ask(llm, PROMPTS, [lora] * len(PROMPTS))
        assert [g.tokens for g in got] == [w.tokens for w in said]
        assert all(abs(g.logprob - w.logprob) < 0.2 for g, w in zip(got, said, strict=True))


def test_a_request_keeps_the_version_that_it_began_with(llm, made):
    _paths, chain, said = made
    engine, params = llm.llm_engine, SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    got, at = {}, {}
    for step in range(200):
        if step in (0, 3, 6):
            number = 1 + step // 3
            lora = xorz.vllm.publish(llm, "policy", chain, number)
            assert lora is xorz.vllm.newest(llm, "policy") and lora.lora_name.startswith(
                f"policy-v{number}@xorz-"
            )
            engine.add_request(f"policy {number}", PROMPTS[0], params, lora_request=lora)
            if step == 0:
                engine.add_request("base 0", PROMPTS[0], params)
        for out in engine.step():
            if out.finished:
                got[out.request_id], at[out.request_id] = list(out.outputs[0].token_ids), step
        if step == 6:
            # One before the newest may be asked for; the first is older, and is there for the request that runs.
            assert names(llm) == ["policy-v1", "policy-v2", "policy-v3"] and "policy 1" not in got
        if not engine.has_unfinished_requests():
            break
    assert got == {f"policy {n}": said[n][0].tokens for n in (1, 2, 3)} | {"base 0": said[0][0].tokens}
    assert at["policy 1"] > 6
    xorz.vllm.publish(llm, "policy", chain)
    assert names(llm) == ["policy-v3", "policy-v4"]
    says(llm, xorz.vllm.newest(llm, "policy"), said[4])


def test_each_version_s_cache_is_its_own_and_one_can_go_back(llm, made):
    _paths, chain, said = made
    for number in (1, 2, 1, 3, 4, 3):
        says(llm, xorz.vllm.publish(llm, "policy", chain, number), said[number])
        says(llm, None, said[0])
    # A version after the one that is served was undone, and is not there.
    assert names(llm) == ["policy-v3"]


def held(folder):
    """Files of the folder that this process has open."""
    links = (os.path.realpath(link) for link in os.scandir("/proc/self/fd"))
    return sorted(link for link in links if link.startswith(str(folder)))


def resident():
    with open("/proc/self/status") as file:
        [line] = [line for line in file if line.startswith("RssAnon")]
    return int(line.split()[1]) << 10


def test_many_versions_leave_nothing(llm, made):
    _paths, chain, said = made
    used = []
    for turn in range(50):
        for number in (1, 2, 3, 4):
            xorz.vllm.publish(llm, "policy", chain, number)
        ask(llm, PROMPTS, [xorz.vllm.newest(llm, "policy")] * 2, new=2)
        used.append((engines.manager(llm).arena.used, held(chain)))
        if turn == 5:
            before = resident()
    assert len({str(u) for u in used}) == 1 and len(used[0][1]) == 2
    assert resident() - before < 20 << 20
    says(llm, xorz.vllm.newest(llm, "policy"), said[4])


def test_what_cannot_be_served_changes_nothing(llm, made, tmp_path):
    paths, chain, said = made
    served = xorz.vllm.publish(llm, "policy", chain, 4)
    plain = published(paths, tmp_path / "plain", as_tenant=False)
    other = published([paths[1], *paths[1:]], tmp_path / "other")
    torn = published(paths, tmp_path / "torn")
    [file] = torn.glob("000003-*.key.xorz")
    file.write_bytes(file.read_bytes()[:-1000])
    for folder, number, why in (
        (plain, 3, "version 3 in .* has no package against the base"),
        (other, 2, "tensor .*|base"),
        (torn, 3, "follow the header|cut"),
        (chain, 9, "there is no version 9 in .*, only 0 to 4"),
        (chain, 0, "version 0 in .* is the base itself"),
        (paths[0], None, "is no folder of versions"),
    ):
        with pytest.raises((OSError, ValueError), match=why):
            xorz.vllm.publish(llm, "policy", folder, number)
        assert xorz.vllm.newest(llm, "policy") is served
    says(llm, served, said[4])
    with pytest.raises(KeyError, match="no version of 'other'"):
        xorz.vllm.newest(llm, "other")
