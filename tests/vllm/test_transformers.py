"""Promise: a model that vLLM runs as transformers wrote it, a batch of one with all rows in it, is served like any other."""

import engines
import models
import pytest
import xorz.vllm
from engines import PROMPTS, ask

SETTINGS = {"model_impl": "transformers"}


@pytest.mark.parametrize("kind", ["olmo2", "qwen3"])
def test_base_and_tenant_in_one_batch(kind):
    base = models.base(kind, engines.FOLDER)
    full, package = models.tenant(kind, "A", engines.FOLDER)
    said = {name: engines.reference(path, **SETTINGS) for name, path in ((None, base), ("A", full))}
    llm = engines.engine(base, **SETTINGS)
    try:
        assert engines.manager(llm).row_map.batched
        if kind == "qwen3":
            # Norms of heads are given in an order of the author's; a package that changes them is refused, by name.
            with pytest.raises(Exception, match=r"q_norm.* by rows|k_norm.* by rows"):
                xorz.vllm.load(llm, "A", package)
            assert [g.tokens for g in ask(llm, PROMPTS)] == [w.tokens for w in said[None]]
            return
        alice = xorz.vllm.load(llm, "A", package)
        got = ask(llm, [*PROMPTS, *PROMPTS], [None, None, alice, alice])
        wanted = [*said[None], *said["A"]]
        assert [g.tokens for g in got] == [w.tokens for w in wanted]
        assert max(abs(g.logprob - w.logprob) for g, w in zip(got, wanted, strict=True)) == 0
        assert len({tuple(w.tokens) for w in wanted}) == len(wanted)
    finally:
        engines.stop(llm)
