"""Promise: of SmolLM2-135M, each real fine-tune served as a package says what the full fine-tune says, to the
bit.

`make test-smollm` makes the fine-tunes (they are trained, minutes) and keeps them; without them this is
skipped.
"""

from pathlib import Path

import engines
import pytest
import xorz
import xorz.vllm
from engines import score
from safetensors.torch import load_file, save_file

KEPT = Path(__file__).resolve().parents[2] / "build" / "smollm2-135m-2"
NAMES = ("kitchen-0", "law-1", "sea-2")
SETTINGS = {"skip_tokenizer_init": True, "max_num_seqs": 8, "enable_prefix_caching": False}
TEXTS = [list(range(start, start + n)) for start, n in ((100, 40), (5000, 7))]


def answers(llm, adapters):
    """Twelve greedy tokens after each text, by each adapter, with the log-probability of all."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=1, detokenize=False)
    given = [{"prompt_token_ids": text} for _ in adapters for text in TEXTS]
    who = [adapter for adapter in adapters for _ in TEXTS]
    out = llm.generate(given, sampling, lora_request=who, use_tqdm=False)
    return [(list(o.outputs[0].token_ids), o.outputs[0].cumulative_logprob) for o in out]


def full(name, folder):
    """The whole fine-tune of a package, as a model's folder."""
    base = KEPT / "base"
    words = load_file(base / "model.safetensors")
    tied = {"lm_head.weight": words["model.embed_tokens.weight"]} | words
    restored = xorz.restore(tied, KEPT / f"{name}.xorz")
    save_file({n: restored[n] for n in words}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    return folder


@pytest.mark.skipif(
    not (KEPT / "base").is_dir(), reason="no fine-tunes are kept; `make test-smollm` makes them"
)
def test_real_fine_tunes_say_what_they_say_alone(tmp_path):
    wanted, scores = [], []
    for name in (None, *NAMES):
        (tmp_path / "full").mkdir(exist_ok=True)
        llm = engines.engine(KEPT / "base" if name is None else full(name, tmp_path / "full"), **SETTINGS)
        try:
            wanted += answers(llm, [None])
            scores += score(llm, TEXTS)
        finally:
            engines.stop(llm)
    llm = engines.engine(KEPT / "base", **SETTINGS)
    try:
        adapters = [None, *(xorz.vllm.load(llm, name, KEPT / f"{name}.xorz") for name in NAMES)]
        assert answers(llm, adapters) == wanted
        who = [adapter for adapter in adapters for _ in TEXTS]
        assert score(llm, TEXTS * len(adapters), who) == scores
    finally:
        engines.stop(llm)
    assert len({str(s) for s in scores}) == len(scores)
