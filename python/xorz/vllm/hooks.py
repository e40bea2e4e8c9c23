"""Where xorz takes hold of vLLM. What is not a public interface is listed here, and looked at before anything
is changed: where a release has moved one of these, `--quantization xorz` does not start, and says which.
"""

import importlib
import inspect
from typing import Any

from vllm.version import __version__

# module, name in it, and the parameters that it must take, in their order.
HOOKS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "vllm.v1.worker.lora_model_runner_mixin",
        "LRUCacheWorkerLoRAManager",
        ("vllm_config", "device", "embedding_modules"),
    ),
    ("vllm.lora.worker_manager", "LRUCacheWorkerLoRAManager._manager_cls", ()),
    ("vllm.lora.worker_manager", "LRUCacheWorkerLoRAManager._load_adapter", ("self", "lora_request")),
    ("vllm.lora.worker_manager", "LRUCacheWorkerLoRAManager.add_adapter", ("self", "lora_request")),
    ("vllm.lora.model_manager", "LRUCacheLoRAModelManager._create_lora_modules", ("self",)),
    ("vllm.lora.model_manager", "LRUCacheLoRAModelManager._add_adapter", ("self", "lora")),
    ("vllm.lora.model_manager", "LRUCacheLoRAModelManager.activate_adapter", ("self", "lora_id")),
    ("vllm.lora.model_manager", "LRUCacheLoRAModelManager._deactivate_adapter", ("self", "lora_id")),
    ("vllm.lora.model_manager", "LRUCacheLoRAModelManager.set_adapter_mapping", ("self", "mapping")),
    ("vllm.lora.model_manager", "LRUCacheLoRAModelManager._set_adapter_mapping", ("self", "mapping")),
    ("vllm.lora.model_manager", "LRUCacheLoRAModelManager.remove_all_adapters", ("self",)),
    ("vllm.lora.model_manager", "LRUCacheLoRAModelManager.create_dummy_lora", ("self", "lora_id", "rank")),
    ("vllm.lora.model_manager", "AdapterLRUCache._on_remove", ("self", "key", "value")),
    ("vllm.model_executor.layers.linear", "UnquantizedLinearMethod.apply", ("self", "layer", "x", "bias")),
    (
        "vllm.model_executor.layers.vocab_parallel_embedding",
        "UnquantizedEmbeddingMethod.embedding",
        ("self", "layer", "input_"),
    ),
    (
        "vllm.model_executor.layers.vocab_parallel_embedding",
        "UnquantizedEmbeddingMethod.apply",
        ("self", "layer", "x", "bias"),
    ),
    ("vllm.model_executor.layers.layernorm", "RMSNorm.forward_native", ("self", "x", "residual")),
    ("vllm.model_executor.layers.linear", "ReplicatedLinear.__init__", ("self", "input_size", "output_size")),
    (
        "vllm.model_executor.layers.vocab_parallel_embedding",
        "VocabParallelEmbedding.__init__",
        ("self", "num_embeddings", "embedding_dim"),
    ),
    ("vllm.model_executor.layers.fused_moe", "GateLinear", ("input_size", "output_size")),
    (
        "vllm.model_executor.layers.fused_moe",
        "MoERunner.__init__",
        (
            *("self", "layer_name", "moe_config", "router", "routed_experts", "enable_dbo", "gate"),
            *("shared_experts", "shared_expert_gate"),
        ),
    ),
    # What mixtures are left out of CUDA graphs by.
    ("vllm.model_executor.layers.fused_moe", "MoERunner._select_forward", ("self",)),
    (
        "vllm.model_executor.layers.fused_moe.runner.moe_runner",
        "_moe_forward",
        (
            *("hidden_states", "router_logits", "shared_experts_input", "input_ids", "layer_name"),
            "hidden_dim_unpadded",
        ),
    ),
    ("vllm.model_executor.layers.fused_moe.runner.moe_runner", "_layer_name_type", ()),
    ("vllm.config.compilation", "CompilationConfig.splitting_ops_contain_attention", ("self",)),
    ("vllm.config.compilation", "CUDAGraphMode.has_piecewise_cudagraphs", ("self",)),
    ("vllm.config.model", "ModelConfig.using_transformers_backend", ("self",)),
    ("vllm.compilation.partition_rules", "should_split", ("node", "splitting_ops")),
    (
        "vllm.model_executor.layers.fused_moe",
        "RoutedExperts.forward_modular",
        ("self", "x", "topk_weights", "topk_ids"),
    ),
    (
        "vllm.model_executor.layers.fused_moe.fused_moe_method_base",
        "FusedMoEMethodBase.apply",
        ("self", "layer", "x", "topk_weights", "topk_ids"),
    ),
    (
        "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method",
        "UnquantizedFusedMoEMethod.create_weights",
        ("self", "layer", "num_experts", "hidden_size", "intermediate_size_per_partition", "params_dtype"),
    ),
    (
        "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method",
        "UnquantizedFusedMoEMethod.get_fused_moe_quant_config",
        ("self", "layer"),
    ),
    (
        "vllm.model_executor.layers.fused_moe.activation",
        "apply_moe_activation",
        ("activation", "output", "input"),
    ),
    ("vllm.config.vllm", "get_current_vllm_config_or_none", ()),
    ("vllm.ir.ops", "rms_norm.impls.native.impl_fn", ()),
    ("vllm.ir.ops", "fused_add_rms_norm.impls.native.impl_fn", ()),
    (
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner._get_prompt_logprobs_dict",
        ("self", "hidden_states"),
    ),
    (
        "vllm.v1.worker.gpu.sample.prompt_logprob",
        "PromptLogprobsWorker.compute_prompt_logprobs",
        ("self", "logits_fn", "hidden_states"),
    ),
    (
        "vllm.v1.worker.gpu.sample.prompt_logprob",
        "PromptLogprobsWorker.compute_prompt_token_id_logprobs",
        ("self", "logits_fn", "hidden_states"),
    ),
    ("vllm.v1.worker.worker_base", "WorkerBase", ()),
    ("vllm.v1.worker.lora_model_runner_mixin", "LoRAModelRunnerMixin.reset_lora_state", ("self",)),
    (
        "vllm.v1.executor.multiproc_executor",
        "MultiprocExecutor.collective_rpc",
        ("self", "method", "timeout", "args", "kwargs", "non_block", "unique_reply_rank"),
    ),
    ("vllm.v1.engine.core", "EngineCore.collective_rpc", ("self", "method", "timeout", "args", "kwargs")),
    ("vllm.v1.engine.core", "EngineCore.add_request", ("self", "request", "request_wave")),
    (
        "vllm.v1.engine.core",
        "EngineCore.reset_prefix_cache",
        ("self", "reset_running_requests", "reset_connector"),
    ),
    ("vllm.v1.engine.llm_engine", "LLMEngine.add_request", ("self", "request_id", "prompt", "params")),
    (
        "vllm.v1.engine.output_processor",
        "OutputProcessor.abort_requests",
        ("self", "request_ids", "internal"),
    ),
    ("vllm.v1.core.sched.scheduler", "Scheduler.finish_requests", ("self", "request_ids", "finished_status")),
    ("vllm.v1.engine.async_llm", "AsyncLLM.collective_rpc", ("self", "method")),
    ("vllm.v1.engine.async_llm", "AsyncLLM.errored", ()),
    ("vllm.v1.engine.async_llm", "AsyncLLM.dead_error", ()),
    (
        "vllm.distributed.weight_transfer.factory",
        "WeightTransferEngineFactory.register_engine",
        ("name", "module_path_or_cls", "class_name"),
    ),
    ("vllm.distributed.weight_transfer.factory", "WeightTransferEngineFactory._registry", ()),
    ("vllm.distributed.weight_transfer.factory", "WeightTransferTrainerFactory._registry", ()),
    (
        "vllm.distributed.weight_transfer.base",
        "WeightTransferEngine",
        ("config", "vllm_config", "device", "model"),
    ),
    ("vllm.v1.worker.gpu_worker", "Worker.start_weight_update", ("self",)),
    ("vllm.v1.worker.gpu_worker", "Worker.finish_weight_update", ("self",)),
    ("vllm.engine.arg_utils", "EngineArgs.create_engine_config", ("self",)),
    ("vllm.v1.core.kv_cache_utils", "_gen_lora_extra_hash_keys", ("request",)),
    (
        "vllm.entrypoints.openai.models.serving",
        "OpenAIServingModels.load_lora_adapter",
        ("self", "request", "base_model_name"),
    ),
    (
        "vllm.entrypoints.openai.models.serving",
        "OpenAIServingModels.unload_lora_adapter",
        ("self", "request"),
    ),
    ("vllm.entrypoints.openai.models.serving", "OpenAIServingModels.__init__", ("self", "engine_client")),
    (
        "vllm.entrypoints.openai.models.serving",
        "OpenAIServingModels._check_load_lora_adapter_request",
        ("self", "request"),
    ),
    ("vllm.entrypoints.openai.models.serving", "OpenAIServingModels.resolve_lora", ("self", "lora_name")),
    ("vllm.lora.resolver", "LoRAResolver.resolve_lora", ("self", "base_model_name", "lora_name")),
    (
        "vllm.lora.resolver",
        "LoRAResolverRegistry.register_resolver",
        ("resolver_name", "resolver"),
    ),
    (
        "vllm.plugins.lora_resolvers.filesystem_resolver",
        "FilesystemResolver.resolve_lora",
        ("self", "base_model_name", "lora_name"),
    ),
    (
        "vllm.plugins.lora_resolvers.filesystem_resolver",
        "FilesystemResolver._get_lora_req_from_path",
        ("self", "lora_name", "lora_path", "base_model_name"),
    ),
    ("vllm.entrypoints.openai.models.serving", "OpenAIServingModels.show_available_models", ("self",)),
    ("vllm.entrypoints.openai.models.serving", "OpenAIServingModels.model_name", ("self", "lora_request")),
)


def check() -> None:
    """RuntimeError that names the first hook that is not where this version of xorz looks for it."""
    for module, name, wanted in HOOKS:
        try:
            found: Any = importlib.import_module(module)
        except ImportError as error:
            raise RuntimeError(
                f"xorz does not know this vLLM ({__version__}): no {module} ({error})"
            ) from error
        for part in name.split("."):
            found = found.get(part) if isinstance(found, dict) else getattr(found, part, None)
        if found is None:
            raise RuntimeError(f"xorz does not know this vLLM ({__version__}): {module} has no {name}")
        if wanted:
            has = tuple(inspect.signature(found).parameters)
            if has[: len(wanted)] != wanted:
                takes = f"takes ({', '.join(has)}), not ({', '.join(wanted)})"
                raise RuntimeError(f"xorz does not know this vLLM ({__version__}): {module}.{name} {takes}")
    _check_cache_keys()


def _check_cache_keys() -> None:
    """That vLLM's prefix cache tells adapters apart by their names, which hold the digests of packages."""
    from vllm.lora.request import LoRARequest
    from vllm.v1.core import kv_cache_utils

    class Request:
        def __init__(self, name: str) -> None:
            self.lora_request = LoRARequest(name, 1, "/a.xorz")

    first, second = (
        kv_cache_utils._gen_lora_extra_hash_keys(Request(name)) for name in ("a@xorz-1", "a@xorz-2")
    )
    if first == second:
        raise RuntimeError(
            f"xorz does not know this vLLM ({__version__}): its prefix cache does not tell adapters apart by their names "
            "(vllm.v1.core.kv_cache_utils._gen_lora_extra_hash_keys)"
        )


def refuse(why: RuntimeError) -> None:
    """Make `--quantization xorz` say why it is not there; everybody else's engine is not touched."""
    import logging

    try:
        from vllm.model_executor.layers.quantization import register_quantization_config
        from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
    except ImportError:
        logging.getLogger("vllm.xorz").warning("%s", why)
        return

    class Unknown(QuantizationConfig):
        def __init__(self) -> None:
            raise why

        get_name = get_supported_act_dtypes = get_quant_method = lambda self, *args: None
        get_min_capability = classmethod(lambda cls: 0)
        get_config_filenames = staticmethod(lambda: [])
        from_config = classmethod(lambda cls, config: cls())

    register_quantization_config("xorz")(Unknown)
