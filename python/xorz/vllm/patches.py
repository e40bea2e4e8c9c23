"""What xorz changes in vLLM's worker: its adapters' manager, three methods more, and which rows prompts are scored by."""

import functools
from typing import Any

import torch
from vllm.model_executor.layers.quantization import register_quantization_config

from . import layers, manager, serving


def install() -> None:
    """Take hold of everything that `hooks` lists."""
    register_quantization_config("xorz")(layers.XorzConfig)
    _worker()
    serving.install()


def _worker() -> None:
    from vllm.v1.worker import gpu_model_runner, lora_model_runner_mixin, worker_base

    plain = lora_model_runner_mixin.LRUCacheWorkerLoRAManager

    @functools.wraps(plain, updated=())
    def chosen(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        # Engines that were not started with `--quantization xorz` keep vLLM's own adapters.
        ours = isinstance(vllm_config.quant_config, layers.XorzConfig)
        return (manager.XorzWorkerManager if ours else plain)(vllm_config, *args, **kwargs)

    lora_model_runner_mixin.LRUCacheWorkerLoRAManager = chosen
    worker_base.WorkerBase.xorz_prefetch = _prefetch
    worker_base.WorkerBase.xorz_prefetched = _prefetched
    worker_base.WorkerBase.xorz_memory = _memory
    runner = gpu_model_runner.GPUModelRunner
    runner._get_prompt_logprobs_dict = _scoring_prompts(runner._get_prompt_logprobs_dict)


def _scoring_prompts(plain: Any) -> Any:
    """vLLM scores prompts after the step, from rows that were not sampled: they are looked up by where they lie."""

    @functools.wraps(plain)
    def score(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = getattr(self, "lora_manager", None)
        if not isinstance(found, manager.XorzWorkerManager):
            return plain(self, hidden_states, *args, **kwargs)
        rows = found._adapter_manager.row_map
        rows.of_prompt = hidden_states
        try:
            return plain(self, hidden_states, *args, **kwargs)
        finally:
            rows.of_prompt = None

    return score


def _manager(worker: Any) -> manager.XorzWorkerManager:
    found = getattr(worker.model_runner, "lora_manager", None)
    if not isinstance(found, manager.XorzWorkerManager):
        raise RuntimeError("xorz: this engine was not started with --quantization xorz --enable-lora")
    return found


def _prefetch(self: Any, adapter: str, path: str) -> None:
    """Of every worker: begin to read a package, beside what the engine does."""
    _manager(self).prefetch(adapter, path)


def _prefetched(self: Any, adapter: str) -> str | None:
    """Of every worker: see `XorzWorkerManager.prefetched`."""
    return _manager(self).prefetched(adapter)


def _memory(self: Any) -> dict[str, int]:
    """Of every worker: see `XorzManager.memory`."""
    return _manager(self)._adapter_manager.memory()
