"""Promise: in one engine each request is answered as its full fine-tune, served alone under the same
settings, answers it.

Token by token and with the very same log-probabilities, in `mode="exact"` and wherever both engines compute
the same rows together; in the other modes with the same tokens and log-probabilities close by.
"""

import engines
import models
import pytest
import xorz.vllm
from engines import PROMPTS, ask

KINDS = {"llama": "ABC", "qwen2": "AB", "qwen3": "AB"}


@pytest.fixture(scope="module", params=KINDS)
def served(request):
    """An engine, its tenants' adapters by name, and what each full model says."""
    kind, names = request.param, KINDS[request.param]
    base = models.base(kind, engines.FOLDER)
    said = {None: engines.reference(base)}
    packages = {}
    for name in names:
        full, packages[name] = models.tenant(kind, name, engines.FOLDER)
        said[name] = engines.reference(full)
    llm = engines.engine(base)
    adapters = {None: None} | {name: xorz.vllm.load(llm, name, package) for name, package in packages.items()}
    yield llm, adapters, said
    engines.stop(llm)


def mixed(llm, adapters, said, names):
    """What was said and what should have been, by row, of a batch with every prompt for every name."""
    got = ask(llm, [p for _ in names for p in PROMPTS], [adapters[n] for n in names for _ in PROMPTS])
    return got, [each for n in names for each in said[n]]


def same_tokens(got, wanted):
    return [g.tokens == w.tokens for g, w in zip(got, wanted, strict=True)]


def apart(got, wanted):
    return max(abs(g.logprob - w.logprob) for g, w in zip(got, wanted, strict=True))


def test_fine_tunes_say_different_things(served):
    _llm, _adapters, said = served
    assert len({tuple(s.tokens) for each in said.values() for s in each}) == len(said) * len(PROMPTS)


def test_a_batch_of_base_and_tenants(served):
    llm, adapters, said = served
    llm.reset_prefix_cache()
    got, wanted = mixed(llm, adapters, said, [None, "A", "B"])
    assert all(same_tokens(got, wanted)) and apart(got, wanted) == 0


def test_the_prefix_cache_keeps_tenants_apart(served):
    llm, adapters, said = served
    llm.reset_prefix_cache()
    mixed(llm, adapters, said, [None, "A", "B"])
    got, wanted = mixed(llm, adapters, said, ["B", None, "A"])
    assert sum(g.cached > 0 for g in got) >= 3  # the first prompt, of more than one block, for each
    assert all(same_tokens(got, wanted)) and apart(got, wanted) < 0.2


def test_more_tenants_than_slots(served):
    llm, adapters, said = served
    names = [*adapters, *reversed(adapters)]
    got, wanted = mixed(llm, adapters, said, names)
    assert all(same_tokens(got, wanted))


def test_a_dropped_tenant_is_read_again(served):
    llm, adapters, said = served
    before = engines.manager(llm).memory()
    assert llm.llm_engine.remove_lora(adapters["A"].lora_int_id)
    assert engines.manager(llm).memory()["deltas"] < before["deltas"]
    llm.reset_prefix_cache()
    got, wanted = mixed(llm, adapters, said, ["A"])
    assert all(same_tokens(got, wanted)) and apart(got, wanted) == 0


def test_prompts_are_scored_by_their_tenant(served):
    llm, adapters, said = served
    del said
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)

    def scores(names):
        out = llm.generate(
            [PROMPTS[1]] * len(names), sampling, lora_request=[adapters[n] for n in names], use_tqdm=False
        )
        return [[next(iter(t.values())).logprob for t in o.prompt_logprobs[1:]] for o in out]

    together = scores(["A", None, "B"])
    alone = [scores([name])[0] for name in ("A", None, "B")]
    assert together == alone
    assert len({tuple(s) for s in alone}) == 3


def test_memory_is_the_base_and_the_deltas(served):
    llm, _adapters, _said = served
    memory = engines.manager(llm).memory()
    params = {
        p.data_ptr(): p.nbytes
        for p in llm.llm_engine.model_executor.driver_worker.worker.get_model().parameters()
    }
    assert memory["base"] == sum(params.values())
    resident = engines.manager(llm)._registered_adapters.cache.values()
    assert (
        memory["deltas"] == sum(-(-length // 64) * 64 for lora in resident for _, length in lora.pieces) > 0
    )
    assert memory["copies"] < 0.02 * memory["base"]
    assert memory["total"] == memory["base"] + memory["deltas"] + memory["copies"]
