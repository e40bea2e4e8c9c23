"""Promise: a base that is replaced while the engine runs (`reload_weights`) is served as a new engine over it serves it,
warm or not; nobody is answered by a fine-tune of the base before: whoever asks for one gets an error, and the engine goes on.
"""

import engines
import models
import pytest
import torch
import xorz.vllm
from engines import PROMPTS, ask
from vllm import SamplingParams

# Biases and tied tables; norms of their own in every fine-tune.
KIND = "qwen2"


@pytest.fixture(scope="module")
def said():
    """What an engine over each full model says, by name."""
    paths = {None: models.base(KIND, engines.FOLDER)}
    paths |= {name: models.tenant(KIND, name, engines.FOLDER)[0] for name in "AB"}
    return dict(zip(paths, engines.references(list(paths.values())), strict=True))


@pytest.fixture(scope="module")
def llm(said):
    """After the references: an engine that stops takes the process's groups with it."""
    del said
    out = engines.engine(models.base(KIND, engines.FOLDER))
    yield out
    engines.stop(out)


def replace(llm, name):
    path = models.tenant(KIND, name, engines.FOLDER)[0] if name else models.base(KIND, engines.FOLDER)
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})


def tokens(answers):
    return [a.tokens for a in answers]


def same(got, wanted):
    """Token by token; the engine without adapters has norms of its own, whose last bits differ."""
    near = all(abs(g.logprob - w.logprob) < 0.2 for g, w in zip(got, wanted, strict=True))
    return tokens(got) == tokens(wanted) and near


def test_a_replaced_base_and_back(llm, said):
    package = models.tenant(KIND, "A", engines.FOLDER)[1]
    alice = xorz.vllm.load(llm, "A", package)
    assert same(ask(llm, PROMPTS), said[None]) and same(ask(llm, PROMPTS, [alice] * 2), said["A"])
    found = engines.manager(llm)
    assert found.memory()["deltas"] > 0
    replace(llm, "B")
    # Warm: the prompts' keys and values were those of the old base. Norms, biases and the table are the new one's, too.
    assert same(ask(llm, PROMPTS), said["B"])
    assert found.memory()["deltas"] == 0 and not found._registered_adapters.cache
    for ask_for in (
        lambda: xorz.vllm.load(llm, "A", package),
        lambda: ask(llm, PROMPTS, [None, alice]),
        lambda: ask(llm, PROMPTS, [alice, None]),
    ):
        with pytest.raises(Exception, match=r"tensor|parameter"):
            ask_for()
        assert same(ask(llm, PROMPTS), said["B"])
    replace(llm, None)
    assert same(ask(llm, PROMPTS), said[None])
    assert same(ask(llm, PROMPTS, [xorz.vllm.load(llm, "A", package)] * 2), said["A"])


def test_requests_that_run_meanwhile(llm, said):
    """A tenant's ends; one of the base is computed anew, and goes on with the new base's keys and values."""
    replace(llm, None)
    alice = xorz.vllm.load(llm, "A", models.tenant(KIND, "A", engines.FOLDER)[1])
    engine, params = llm.llm_engine, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    engine.add_request("hers", PROMPTS[0], params, lora_request=alice)
    engine.add_request("plain", PROMPTS[1], params)
    said_of = {}
    for step in range(60):
        if step == 3:
            so_far = {
                r: list(s.detokenizer.output_token_ids)
                for r, s in engine.output_processor.request_states.items()
            }
            replace(llm, "B")
        for out in engine.step():
            if out.finished:
                said_of[out.request_id] = list(out.outputs[0].token_ids)
        if not engine.has_unfinished_requests():
            break
    assert set(said_of) == {"plain"}
    [before] = [t for r, t in so_far.items() if r.startswith("plain")]
    assert 0 < len(before) < 8 and said_of["plain"][: len(before)] == before
    # What followed is what the new base says after those tokens.
    ids = llm.get_tokenizer().encode(PROMPTS[1]) + before
    rest = llm.generate(
        [{"prompt_token_ids": ids}],
        SamplingParams(temperature=0, max_tokens=8 - len(before), ignore_eos=True),
        use_tqdm=False,
    )
    assert said_of["plain"][len(before) :] == list(rest[0].outputs[0].token_ids)
    replace(llm, None)
    assert same(ask(llm, PROMPTS), said[None])


def test_a_replacement_that_fails_half_way(llm, said, tmp_path):
    """vLLM has changed some words, and tells nobody: no fine-tune of the old base is served from then on."""
    replace(llm, None)
    package = models.tenant(KIND, "A", engines.FOLDER)[1]
    alice = xorz.vllm.load(llm, "A", package)

    def torn():
        yield "model.norm.weight", torch.zeros(128, dtype=torch.bfloat16)
        raise OSError("the connection is lost")

    with pytest.raises(Exception, match="connection is lost"), torch.no_grad():
        llm.collective_rpc(
            "reload_weights", kwargs={"weights_iterator": torn(), "is_checkpoint_format": False}
        )
    assert not engines.manager(llm)._registered_adapters.cache
    wanted = ask(llm, PROMPTS)
    assert tokens(wanted) != tokens(said[None])
    with pytest.raises(Exception, match=r"`model\.norm\.weight`"):
        ask(llm, PROMPTS, [alice] * 2)
    assert same(ask(llm, PROMPTS), wanted)
    replace(llm, None)
    assert same(ask(llm, PROMPTS, [alice] * 2), said["A"])


def test_words_that_are_written_in_place_are_the_base_s(llm, said):
    """Whoever writes into the model's parameters past vLLM changes what norms and biases are served, as with any layer."""
    replace(llm, None)
    model = llm.llm_engine.model_executor.driver_worker.worker.get_model()
    norm = dict(model.named_parameters())["model.norm.weight"]
    before = norm.data.clone()
    norm.data.mul_(-1)
    llm.reset_prefix_cache()
    assert tokens(ask(llm, PROMPTS)) != tokens(said[None])
    norm.data.copy_(before)
    llm.reset_prefix_cache()
    assert same(ask(llm, PROMPTS), said[None])


def test_what_was_read_ahead_under_another_base_is_read_again(llm, said):
    replace(llm, None)
    worker = llm.llm_engine.model_executor.driver_worker.worker
    lora = xorz.vllm.request("A", models.tenant(KIND, "A", engines.FOLDER)[1])
    worker.xorz_prefetch(lora.lora_name, lora.lora_path)
    worker.model_runner.lora_manager._ahead[lora.lora_name].reading.result()
    replace(llm, "B")
    assert worker.xorz_prefetched(lora.lora_name) is None
    with pytest.raises(Exception, match=r"tensor|parameter"):
        llm.llm_engine.add_lora(lora)
    replace(llm, None)
    assert same(ask(llm, PROMPTS, [lora] * 2), said["A"])


def test_unload_closes_the_package(llm):
    import os

    replace(llm, None)
    package = models.tenant(KIND, "B", engines.FOLDER)[1]
    held = lambda: [  # noqa: E731
        fd
        for fd in os.listdir("/proc/self/fd")
        if os.path.realpath(f"/proc/self/fd/{fd}") == str(package.resolve())
    ]
    lora = xorz.vllm.load(llm, "B", package)
    assert len(held()) == 1
    before = engines.manager(llm).memory()["deltas"]
    xorz.vllm.unload(llm, lora)
    assert held() == [] and engines.manager(llm).memory()["deltas"] < before
