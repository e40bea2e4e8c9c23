"""Promise: in the modes that do not have the plain model's bits, each tenant gives the log-probabilities of
its full fine-tune, but for rounding; and a mode's own promise holds for prompts that are computed in chunks,
beside other tenants' rows.
"""

import engines
import models
import pytest
import xorz.vllm
from engines import PROMPTS, ask, score

KIND, NAMES = "llama", (None, "A", "B")
ROUNDING = 0.25
"""Nats: of one token, after two layers in bf16 whose weights are ten times as wide as a trained model's."""


@pytest.fixture(scope="module")
def said():
    """What each full model, served alone, says: prompt and answer as tokens, and their log-probabilities."""
    out = {}
    for name in NAMES:
        full = models.tenant(KIND, name, engines.FOLDER)[0] if name else models.base(KIND, engines.FOLDER)
        llm = engines.engine(full)
        try:
            ids = [llm.get_tokenizer().encode(prompt) for prompt in PROMPTS]
            texts = [p + s.tokens for p, s in zip(ids, ask(llm, PROMPTS), strict=True)]
            out[name] = list(zip(texts, score(llm, texts), strict=True))
        finally:
            engines.stop(llm)
    return out


def furthest(got, wanted):
    return max(abs(a - b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("mode", ["fast", "deterministic"])
def test_other_modes_give_the_same_probabilities_but_for_rounding(said, mode):
    llm = engines.engine(
        models.base(KIND, engines.FOLDER), mode=mode, max_num_batched_tokens=32, max_num_seqs=8, block_size=32
    )
    try:
        adapters = {n: n and xorz.vllm.load(llm, n, models.tenant(KIND, n, engines.FOLDER)[1]) for n in NAMES}
        asked = [(name, text, wanted) for name in NAMES for text, wanted in said[name]]
        assert all(len(text) > 32 for _, text, _ in asked[::2])  # more than one chunk
        own = [adapters[name] for name, _, _ in asked]
        got = score(llm, [text for _, text, _ in asked], own)
        assert all(furthest(g, wanted) < ROUNDING for g, (_, _, wanted) in zip(got, asked, strict=True))
        others = score(llm, [text for _, text, _ in asked], [*own[2:], *own[:2]])
        assert all(
            furthest(o, wanted) > 4 * ROUNDING for o, (_, _, wanted) in zip(others, asked, strict=True)
        )
        if mode == "deterministic":
            alone = [
                score(llm, [text], [adapter])[0] for (_, text, _), adapter in zip(asked, own, strict=True)
            ]
            assert alone == got
            together = [s.tokens for s in ask(llm, PROMPTS * len(NAMES), own)]
            llm.reset_prefix_cache()
            assert together == [
                ask(llm, [p], [a])[0].tokens for p, a in zip(PROMPTS * len(NAMES), own, strict=True)
            ]
    finally:
        engines.stop(llm)
