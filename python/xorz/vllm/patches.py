"""What xorz changes in vLLM: its adapters' manager, methods of workers, which rows prompts are scored by, and what is known
before anything is loaded.
"""

import functools
from contextlib import suppress
from typing import Any

import torch
from vllm.model_executor.layers.quantization import register_quantization_config

from . import layers, manager, pieces, replaced, resolvers, rpc, serving
from .packages import is_package

_PATIENCE_SECONDS = 300.0
"""For the answer of a worker beside one that has failed already."""


def install() -> None:
    """Take hold of everything that `hooks` lists."""
    register_quantization_config("xorz")(layers.XorzConfig)
    _worker()
    _start()
    _unquantized()
    serving.install()
    resolvers.register()
    replaced.install()
    rpc.install()


def _start() -> None:
    """What would be refused by a worker, in its log, is refused before there is one, to whoever starts the engine."""
    from vllm.engine.arg_utils import EngineArgs

    plain = EngineArgs.create_engine_config

    @functools.wraps(plain)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = plain(self, *args, **kwargs)
        if isinstance(out.quant_config, layers.XorzConfig):
            if torch.device(out.device_config.device).type == "cuda":
                pieces.leave_out(out)
            manager.check_config(out)
        return out

    EngineArgs.create_engine_config = create_engine_config


def _unquantized() -> None:
    """What models give no quantization to, as Mixtral does not its gates and embeddings: fine-tunes change that as all else.

    Other linear layers are left alone: a model may read their weights past them, as it does those of convolutions.
    """
    from vllm.model_executor.layers import linear, vocab_parallel_embedding
    from vllm.model_executor.layers.fused_moe import GateLinear, MoERunner

    MoERunner._select_forward = pieces.select(MoERunner._select_forward)

    def is_gate(layer: Any) -> bool:
        return isinstance(layer, GateLinear) or layer.prefix.endswith(".shared_expert_gate")

    for cls, plain, ours, fits in (
        (linear.ReplicatedLinear, linear.UnquantizedLinearMethod, layers.XorzLinearMethod, is_gate),
        (
            vocab_parallel_embedding.VocabParallelEmbedding,
            vocab_parallel_embedding.UnquantizedEmbeddingMethod,
            layers.XorzEmbeddingMethod,
            lambda _layer: True,
        ),
    ):
        cls.__init__ = _in_place_of(cls.__init__, plain, ours, fits)


def _in_place_of(init: Any, plain: type, ours: type, fits: Any) -> Any:
    from vllm.config.vllm import get_current_vllm_config_or_none

    @functools.wraps(init)
    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if type(self.quant_method) is plain and fits(self):
            config = get_current_vllm_config_or_none()
            if isinstance(getattr(config, "quant_config", None), layers.XorzConfig):
                # Its words lie as they would have, and are kept so.
                self.quant_method = ours()

    return made


class _Answers:
    """A worker's queue of answers, and whether the one that is waited for was taken."""

    def __init__(self, queue: Any) -> None:
        self._queue, self.taken = queue, False

    def dequeue(self, *args: Any, **kwargs: Any) -> Any:
        out = self._queue.dequeue(*args, **kwargs)
        self.taken = True
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)


def _in_step(plain: Any) -> Any:
    """Where several workers refuse something, vLLM reads the answer of the first one alone.

    The others' would be taken for those to what is asked next, and so on ever after.
    """

    @functools.wraps(plain)
    def collective_rpc(
        self: Any,
        method: Any,
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        non_block: bool = False,
        unique_reply_rank: int | None = None,
        **more: Any,
    ) -> Any:
        if non_block or unique_reply_rank is not None or not replaced.ours(self.vllm_config):
            return plain(self, method, timeout, args, kwargs, non_block, unique_reply_rank, **more)
        queues, answers = self.response_mqs, [_Answers(queue) for queue in self.response_mqs]
        self.response_mqs = answers
        try:
            return plain(self, method, timeout, args, kwargs, **more)
        except RuntimeError:
            if any(answer.taken for answer in answers):
                for answer in answers:
                    if not answer.taken:
                        with suppress(TimeoutError):
                            answer.dequeue(timeout=_PATIENCE_SECONDS if timeout is None else timeout)
            raise
        finally:
            self.response_mqs = queues

    return collective_rpc


def _worker() -> None:
    from vllm.v1.executor import multiproc_executor
    from vllm.v1.worker import gpu_model_runner, lora_model_runner_mixin, worker_base
    from vllm.v1.worker.gpu.sample import prompt_logprob

    plain = lora_model_runner_mixin.LRUCacheWorkerLoRAManager

    @functools.wraps(plain, updated=())
    def chosen(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        # Engines that were not started with `--quantization xorz` keep vLLM's own adapters.
        ours = isinstance(vllm_config.quant_config, layers.XorzConfig)
        return (manager.XorzWorkerManager if ours else plain)(vllm_config, *args, **kwargs)

    lora_model_runner_mixin.LRUCacheWorkerLoRAManager = chosen
    plain._load_adapter = _no_packages(plain._load_adapter)
    worker_base.WorkerBase.xorz_forget = _forget
    worker_base.WorkerBase.xorz_prefetch = _prefetch
    worker_base.WorkerBase.xorz_prefetched = _prefetched
    worker_base.WorkerBase.xorz_memory = _memory
    multiproc_executor.MultiprocExecutor.collective_rpc = _in_step(
        multiproc_executor.MultiprocExecutor.collective_rpc
    )
    runner = gpu_model_runner.GPUModelRunner
    runner._get_prompt_logprobs_dict = _scoring_prompts(runner._get_prompt_logprobs_dict)
    second = prompt_logprob.PromptLogprobsWorker
    second.compute_prompt_logprobs = _scoring_prompts_by(second.compute_prompt_logprobs)
    second.compute_prompt_token_id_logprobs = _scoring_prompts_by(second.compute_prompt_token_id_logprobs)


def _scoring_prompts(plain: Any) -> Any:
    """vLLM scores prompts after the step, from rows that were not sampled: they are looked up by where they lie."""

    @functools.wraps(plain)
    def score(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = getattr(self, "lora_manager", None)
        if not isinstance(found, manager.XorzWorkerManager):
            return plain(self, hidden_states, *args, **kwargs)
        with found._adapter_manager.row_map.scoring(hidden_states):
            return plain(self, hidden_states, *args, **kwargs)

    return score


def _scoring_prompts_by(plain: Any) -> Any:
    """The same of vLLM's second model runner, which says how logits are computed: by a method of the model."""

    @functools.wraps(plain)
    def score(self: Any, logits_fn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = getattr(getattr(logits_fn, "__self__", None), "lora_manager", None)
        if not isinstance(found, manager.XorzManager):
            return plain(self, logits_fn, hidden_states, *args, **kwargs)
        with found.row_map.scoring(hidden_states):
            return plain(self, logits_fn, hidden_states, *args, **kwargs)

    return score


def _manager(worker: Any) -> manager.XorzWorkerManager:
    found = getattr(worker.model_runner, "lora_manager", None)
    if not isinstance(found, manager.XorzWorkerManager):
        raise RuntimeError("xorz: this engine was not started with --quantization xorz --enable-lora")
    return found


def _no_packages(plain: Any) -> Any:
    """vLLM's own adapters are folders; of a package it would only say that it is none."""

    @functools.wraps(plain)
    def load(self: Any, lora_request: Any) -> Any:
        if is_package(lora_request.lora_path):
            raise ValueError(
                f"xorz: {lora_request.lora_path} is a xorz package, and the engine was started without --quantization xorz"
            )
        return plain(self, lora_request)

    return load


def _forget(self: Any, adapter: str) -> None:
    """Of every worker: see `XorzWorkerManager.forget`."""
    _manager(self).forget(adapter)


def _prefetch(self: Any, adapter: str, path: str) -> None:
    """Of every worker: begin to read a package, beside what the engine does."""
    _manager(self).prefetch(adapter, path)


def _prefetched(self: Any, adapter: str) -> str | None:
    """Of every worker: see `XorzWorkerManager.prefetched`."""
    return _manager(self).prefetched(adapter)


def _memory(self: Any) -> dict[str, int]:
    """Of every worker: see `XorzManager.memory`."""
    return _manager(self)._adapter_manager.memory()
