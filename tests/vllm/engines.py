"""Engines for the tests, all in this process, and what each says to the same prompts."""

import gc
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
    "HF_HUB_OFFLINE": "1",
    "XORZ_CACHE_DIR": "",
}

from vllm import LLM, SamplingParams

FOLDER = Path(
    os.environ.get("XORZ_VLLM_MODELS") or Path(__file__).resolve().parents[2] / "build" / "vllm" / "models"
)

PROMPTS = (
    "xorz keeps one copy of the base and, per fine-tune, a small lossless delta, and computes linear layers directly",
    "Whole models, another tenant in each row",
)
NEW = 12
SETTINGS: dict[str, Any] = {
    "quantization": "xorz",
    "enable_lora": True,
    "max_loras": 2,
    "max_cpu_loras": 4,
    "max_lora_rank": 1,
    "dtype": "bfloat16",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 512,
    "enable_prefix_caching": True,
    "block_size": 32,
}


@dataclass
class Said:
    """One answer."""

    tokens: list[int]
    logprob: float
    cached: int


def engine(path: Path, mode: str = "exact", xorz: dict[str, Any] | None = None, **settings: Any) -> LLM:
    """An engine over `path`; "exact" is the mode whose products have the bits of the plain fine-tuned model's. `xorz`: more of
    its settings.
    """
    extra = {"xorz": {"mode": mode, "memory": "256 MiB"} | (xorz or {})}
    return LLM(str(path), additional_config=extra, **(SETTINGS | settings))


def plain(path: Path, **settings: Any) -> LLM:
    """vLLM's own engine, with its own products."""
    return LLM(str(path), **(SETTINGS | {"quantization": None, "enable_lora": False} | settings))


def stop(llm: LLM) -> None:
    """Give its memory back."""
    llm.llm_engine.engine_core.shutdown()
    gc.collect()


def ask(
    llm: LLM, prompts: Sequence[str], adapters: Sequence[Any] | None = None, new: int = NEW, **params: Any
) -> list[Said]:
    """Greedy answers, in the prompts' order."""
    sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, logprobs=1, **params)
    lora = None if adapters is None else list(adapters)
    out = llm.generate(list(prompts), sampling, lora_request=lora, use_tqdm=False)
    return [
        Said(list(o.outputs[0].token_ids), o.outputs[0].cumulative_logprob, o.num_cached_tokens or 0)
        for o in out
    ]


def score(llm: LLM, prompts: Sequence[list[int]], adapters: Sequence[Any] | None = None) -> list[list[float]]:
    """The log-probability of each token of `prompts` but the first, given those before it."""
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    lora = None if adapters is None else list(adapters)
    given = [{"prompt_token_ids": tokens} for tokens in prompts]
    out = llm.generate(given, sampling, lora_request=lora, use_tqdm=False)
    return [
        [step[token].logprob for step, token in zip(o.prompt_logprobs[1:], tokens[1:], strict=True)]
        for o, tokens in zip(out, prompts, strict=True)
    ]


def reference(path: Path, **settings: Any) -> list[Said]:
    """What a full model, served alone under the same settings, says to `PROMPTS`."""
    llm = engine(path, **settings)
    try:
        return ask(llm, PROMPTS)
    finally:
        stop(llm)


def references(paths: Sequence[Path], prompts: Sequence[str] = PROMPTS) -> list[list[Said]]:
    """The same of several models of one shape: vLLM itself loads them, one after another, into an engine without adapters."""
    llm = engine(paths[0], enable_lora=False, weight_transfer_config={"backend": "xorz"})
    out = []
    try:
        for i, path in enumerate(paths):
            if i:
                llm.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})
                llm.reset_prefix_cache()
            out.append(ask(llm, prompts))
    finally:
        stop(llm)
    return out


def manager(llm: LLM) -> Any:
    """The engine's XorzManager."""
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.lora_manager._adapter_manager
