"""Promise: what cannot be served is refused by name: engines when they start, and loaders that do more with a
tensor than to cut and copy it when a package changes that tensor.
"""

import pickle
import re
from types import SimpleNamespace

import engines
import models
import pytest
import torch
import xorz.vllm
from torch import nn
from vllm.config import CompilationMode, CUDAGraphMode
from xorz.vllm import in_place, pieces
from xorz.vllm.layers import XorzConfig
from xorz.vllm.manager import Settings, Unfit, _check_engine, check_config
from xorz.vllm.packages import what_is
from xorz.vllm.plan import plan
from xorz.vllm.rows import Rows


def config(**changed):
    """What an engine that is served looks like, and what is not."""
    out = SimpleNamespace(
        quant_config=XorzConfig(),
        speculative_config=None,
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1,
            prefill_context_parallel_size=1,
            decode_context_parallel_size=1,
            enable_expert_parallel=False,
            enable_dbo=False,
            data_parallel_size=2,
            enable_batch_sharded_sampling=False,
        ),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
        compilation_config=SimpleNamespace(
            pass_config=SimpleNamespace(enable_sp=False),
            cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE,
            mode=CompilationMode.VLLM_COMPILE,
            splitting_ops=["vllm::unified_attention_with_output"],
            splitting_ops_contain_attention=lambda: True,
            use_inductor_graph_partition=False,
        ),
        offload_config=SimpleNamespace(
            uva=SimpleNamespace(cpu_offload_gb=0.0), prefetch=SimpleNamespace(offload_group_size=0)
        ),
        additional_config={"xorz": {"memory": "1 GiB"}},
        weight_transfer_config=None,
        model_config=SimpleNamespace(
            dtype=torch.bfloat16,
            head_dtype=torch.bfloat16,
            is_hybrid=False,
            is_attention_free=False,
            enable_sleep_mode=False,
            runner_type="generate",
            use_mla=False,
            is_multimodal_model=False,
            is_encoder_decoder=False,
            is_moe=False,
            using_transformers_backend=lambda: False,
        ),
    )
    for path, value in changed.items():
        owner, *parts = out, *path.split("__")
        for part in parts[:-1]:
            owner = getattr(owner, part)
        assert hasattr(owner, parts[-1])
        setattr(owner, parts[-1], value)
    return out


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"quant_config": None}, "quantization must be xorz"),
        ({"speculative_config": object()}, "speculative"),
        ({"parallel_config__pipeline_parallel_size": 2}, "pipeline"),
        ({"parallel_config__decode_context_parallel_size": 2}, "context"),
        ({"parallel_config__enable_expert_parallel": True}, "expert"),
        ({"parallel_config__enable_dbo": True}, "dual batch"),
        ({"cache_config__kv_sharing_fast_prefill": True}, "fast prefill"),
        ({"model_config__runner_type": "pooling"}, "pooling"),
        ({"model_config__use_mla": True}, "MLA"),
        ({"model_config__is_multimodal_model": True}, "multimodal"),
        ({"model_config__is_encoder_decoder": True}, "encoder"),
        ({"model_config__is_moe": True}, "data parallelism of mixtures"),
        ({"model_config__head_dtype": torch.float32}, "head_dtype"),
    ],
)
def test_engines(changed, words):
    _check_engine(config(), "cpu")
    for device in ("cpu", "cuda"):
        with pytest.raises(ValueError, match=words):
            _check_engine(config(**changed), device)


ON_A_GPU = {
    "no memory": ({"additional_config": {}}, "on a GPU say how much of its memory tenants may take"),
    "exact": (
        {"additional_config": {"xorz": {"memory": "1 GiB", "mode": "exact"}}},
        'mode="exact" is served on a GPU without CUDA graphs alone.*--enforce-eager.*"deterministic"',
    ),
    "experts": (
        {"model_config__is_moe": True, "parallel_config__data_parallel_size": 1},
        "mixtures of experts are served on a GPU between the pieces of piecewise CUDA graphs, or without graphs",
    ),
    "a hybrid": ({"model_config__is_hybrid": True}, "Mamba, hybrids"),
    "Mamba": ({"model_config__is_attention_free": True}, "Mamba, hybrids"),
    "sleep": ({"model_config__enable_sleep_mode": True}, "sleep mode"),
    "offloading": (
        {"offload_config__uva__cpu_offload_gb": 2.0},
        "kept on the host .* are not served on a GPU",
    ),
    "offloading by groups": (
        {"offload_config__prefetch__offload_group_size": 4},
        "kept on the host .* are not served on a GPU",
    ),
    "sharded sampling": ({"parallel_config__enable_batch_sharded_sampling": True}, "batch-sharded sampling"),
    "sequence parallelism": (
        {"compilation_config__pass_config__enable_sp": True},
        r"sequence parallelism \(pass_config\.enable_sp\) is not served",
    ),
}


@pytest.mark.parametrize("changed, words", ON_A_GPU.values(), ids=ON_A_GPU)
def test_engines_on_a_gpu(changed, words):
    for device in ("cuda", torch.device("cuda:1")):
        _check_engine(config(), device)
        with pytest.raises(ValueError, match=words):
            _check_engine(config(**changed), device)
    _check_engine(config(**changed), "cpu")


@pytest.mark.parametrize("what", ["exact", "experts"])
def test_what_reads_the_device_back_is_served_on_a_gpu_that_captures_no_graphs(what):
    changed, words = ON_A_GPU[what]
    _check_engine(config(**changed, compilation_config__cudagraph_mode=CUDAGraphMode.NONE), "cuda")
    for mode in (CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL, CUDAGraphMode.FULL_DECODE_ONLY, None):
        with pytest.raises(ValueError, match=words):
            _check_engine(config(**changed, compilation_config__cudagraph_mode=mode), "cuda")


def test_a_worker_takes_mixtures_that_its_graphs_leave_out_and_no_others():
    """Whoever makes a configuration past vLLM's entry points."""
    changed, words = ON_A_GPU["experts"]
    made = config(**changed)
    pieces.leave_out(made)
    own = made.compilation_config
    assert own.cudagraph_mode == CUDAGraphMode.PIECEWISE
    assert own.splitting_ops == ["vllm::unified_attention_with_output", pieces.OP]
    _check_engine(made, "cuda")
    pieces.leave_out(made)
    assert own.splitting_ops == ["vllm::unified_attention_with_output", pieces.OP]
    own.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    with pytest.raises(
        ValueError, match=f"{words}.*cudagraph_mode is .*FULL_AND_PIECEWISE.* not been settled"
    ):
        _check_engine(made, "cuda")
    own.cudagraph_mode, own.splitting_ops = CUDAGraphMode.PIECEWISE, own.splitting_ops[:1]
    with pytest.raises(ValueError, match=f"{words}.*not been settled"):
        _check_engine(made, "cuda")


UPDATED = {
    "a sleep": ({"model_config__enable_sleep_mode": True}, "sleep mode .* tenants or weights lie in"),
    "offloading": ({"offload_config__uva__cpu_offload_gb": 2.0}, "kept on the host .* are not served"),
    "offloading by groups": ({"offload_config__prefetch__offload_group_size": 4}, "kept on the host"),
    "experts in graphs": (
        {"model_config__is_moe": True},
        "mixtures of experts are served on a GPU between the pieces of piecewise CUDA graphs, or without graphs",
    ),
    "latent attention": ({"model_config__use_mla": True}, "updates in place of a model with MLA"),
    "pictures": ({"model_config__is_multimodal_model": True}, "updates in place of multimodal models"),
}


@pytest.mark.parametrize("tenants", [True, False])
@pytest.mark.parametrize("changed, words", UPDATED.values(), ids=UPDATED)
def test_updates_on_a_gpu(changed, words, tenants, monkeypatch):
    """What may be asked of an engine that is updated in place, alone and with tenants."""
    updated = {"weight_transfer_config": SimpleNamespace(backend="xorz")}

    def start(device, **more):
        made = config(**updated, **more)
        made.parallel_config.data_parallel_size = 1
        made.lora_config, made.device_config = object() if tenants else None, SimpleNamespace(device=device)
        check_config(made)

    for device in ("cuda", torch.device("cuda:1")):
        start(device)
        with pytest.raises(
            ValueError, match=words if not tenants else "MLA|experts|sleep|on the host|multimodal"
        ):
            start(device, **changed)
    if not tenants and not {"model_config__use_mla", "model_config__is_multimodal_model"} & set(changed):
        start("cpu", **changed)
    with pytest.raises(ValueError, match="device xpu is not served"):
        start("xpu")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with pytest.raises(ValueError, match="AMD's GPUs are not served"):
        start("cuda")


@pytest.mark.parametrize("what", ["latent attention", "pictures"])
def test_updates_of_what_is_kept_beside_the_words_are_refused_on_the_cpu_too(what):
    changed, words = UPDATED[what]
    updated = config(weight_transfer_config=SimpleNamespace(backend="xorz"), **changed)
    updated.lora_config, updated.device_config = None, SimpleNamespace(device="cpu")
    with pytest.raises(ValueError, match=f"{words}.* not served"):
        check_config(updated)
    updated.weight_transfer_config = SimpleNamespace(backend="nccl")
    with pytest.raises(ValueError, match="serves nothing"):
        check_config(updated)


def test_experts_may_be_updated_on_a_gpu():
    own = config(weight_transfer_config=SimpleNamespace(backend="xorz"), model_config__is_moe=True)
    own.quant_config, own.lora_config = None, None
    assert not any(in_place.unserved(own, "cuda").values())
    # And xorz's own, where its graphs leave them out.
    ours = config(weight_transfer_config=SimpleNamespace(backend="xorz"), model_config__is_moe=True)
    assert any(in_place.unserved(ours, "cuda").values())
    pieces.leave_out(ours)
    assert not any(in_place.unserved(ours, "cuda").values())
    assert in_place.unserved(config(), "cuda") == {}


def test_other_devices(monkeypatch):
    with pytest.raises(ValueError, match="device xpu is not served; the CPU and CUDA are"):
        _check_engine(config(), "xpu")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with pytest.raises(ValueError, match="AMD's GPUs are not served"):
        _check_engine(config(), "cuda")


@pytest.mark.parametrize(
    "given, words",
    [
        ({"speed": 1}, r"xorz\.speed"),
        ({"mode": "slow"}, "'slow'"),
        ({"prefer": "x"}, "'x'"),
        ({"memory": "much"}, "'much'"),
        ({"max_staleness": -1}, "max_staleness must be .* but is -1"),
        ({"max_staleness": True}, "max_staleness must be .* but is True"),
        ({"trust": "md5"}, 'trust must be "digest" or "sha256", but is \'md5\''),
        ({"trust": None}, "trust must be .* but is None"),
    ],
)
def test_settings(given, words):
    assert Settings.of(SimpleNamespace(additional_config={})) == Settings("fast", "auto", None)
    with pytest.raises(ValueError, match=words):
        Settings.of(SimpleNamespace(additional_config={"xorz": given}))


STARTS = {
    "a mode": (
        {"additional_config": {"xorz": {"mode": "slow"}}},
        "mode must be one of fast, .* but is 'slow'",
    ),
    "a setting": ({"additional_config": {"xorz": {"speed": 1}}}, r"xorz\.speed"),
    "no adapters": ({"enable_lora": False}, "serves nothing without --enable-lora"),
    "another kind of engine": ({"pipeline_parallel_size": 2}, "pipeline parallelism is not served"),
}


@pytest.mark.parametrize("changed, words", STARTS.values(), ids=STARTS)
def test_before_anything_is_loaded(changed, words, monkeypatch):
    """Whoever starts the engine is told, not the log of a worker."""
    from vllm.engine.arg_utils import EngineArgs

    base = models.base("llama", engines.FOLDER)
    with pytest.raises(Exception, match=words):
        EngineArgs(str(base), **(engines.SETTINGS | changed)).create_engine_config()


def test_an_engine_that_is_only_updated_may_start():
    from vllm.engine.arg_utils import EngineArgs

    args = engines.SETTINGS | {"enable_lora": False, "weight_transfer_config": {"backend": "xorz"}}
    config = EngineArgs(str(models.base("llama", engines.FOLDER)), **args).create_engine_config()
    assert config.lora_config is None and isinstance(config.quant_config, XorzConfig)


def test_what_is_no_package_is_said_and_what_to_do(tmp_path):
    from vllm.lora.request import LoRARequest
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

    full, package = models.tenant("llama", "A", engines.FOLDER)
    assert what_is(package) is None
    assert re.search(rf"xorz pack BASE {full} A\.xorz", what_is(full))
    assert "does not end in .xorz" in what_is(full / "config.json")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "LoRA adapter" in what_is(tmp_path)
    # A folder with a package is one, whatever lies beside it; addresses and names of the Hub are looked for.
    (tmp_path / "A.xorz").write_bytes(b"")
    assert [what_is(p) for p in (tmp_path, "org/alice", "hf://org/alice", "s3://bucket/alice")] == [None] * 4
    (tmp_path / "A.xorz").unlink()
    # An engine without --quantization xorz.
    with pytest.raises(
        ValueError, match="xorz package, and the engine was started without --quantization xorz"
    ):
        LRUCacheWorkerLoRAManager._load_adapter(None, LoRARequest("A", 1, str(package)))
    plain = SimpleNamespace(
        llm_engine=SimpleNamespace(vllm_config=SimpleNamespace(quant_config=None, lora_config=None))
    )
    with pytest.raises(ValueError, match="without quantization='xorz'"):
        xorz.vllm.load(plain, "A", package)
    error = pickle.loads(pickle.dumps(Unfit("A", "a.xorz", "it is bad")))
    assert str(error) == "xorz: 'A' (a.xorz): it is bad" and error.why == "it is bad"


@pytest.mark.parametrize("batched", [False, True])
def test_rows_whose_tenant_nobody_knows(batched):
    rows = Rows(8, 2, torch.device("cpu"))
    rows.batched = batched
    assert rows.count(torch.Size([5])) == 5
    for shape in ([2, 5], [5, 4, 2], [1, 5, 4]):
        with pytest.raises(RuntimeError, match="not the step's tokens"):
            rows.count(torch.Size(shape))
    if batched:
        assert rows.count(torch.Size([1, 5])) == 5
    else:
        with pytest.raises(RuntimeError, match="not the step's tokens"):
            rows.count(torch.Size([1, 5]))


class Model(nn.Module):
    """Its parameters, and a loader given as a function of them and each tensor."""

    def __init__(self, load, **shapes):
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape), requires_grad=False))
        self.load = load

    def load_weights(self, weights):
        for name, tensor in weights:
            self.load(dict(self.named_parameters()), name, tensor)


def follow(load, checkpoint, **shapes):
    model = Model(load, **shapes)
    before = {name: param.data.clone() for name, param in model.named_parameters()}
    found = plan(model, {name: (torch.float32, shape) for name, shape in checkpoint.items()})
    for name, param in model.named_parameters():
        assert param.device.type == "cpu" and torch.equal(param.data, before[name])
    return found


def test_rows_and_columns_are_followed():
    def load(params, name, tensor):
        at = {"a": 0, "b": 4}[name]
        params["w"].data.narrow(0, at, 4).copy_(tensor.narrow(1, 3, 5)[2:6])

    found = follow(load, {"a": (8, 10), "b": (8, 10)}, w=(10, 5))
    assert not found.refused and found.users == {"a": ["w"], "b": ["w"]}
    a, b = found.pieces["w"]
    assert (a.name, a.rows, a.cols, a.to_rows, a.to_cols) == ("a", (2, 6), (3, 8), (0, 4), (0, 5))
    assert (b.name, b.rows, b.cols, b.to_rows) == ("b", (2, 6), (3, 8), (4, 8))  # and two rows of padding


def copied(change):
    return lambda params, name, tensor: params["w"].data.copy_(change(tensor))


@pytest.mark.parametrize(
    "load, shape, words",
    [
        (copied(lambda t: t + 1), (4, 6), "computes with it"),
        (copied(lambda t: t.flip(0)), (4, 6), "computes with it"),
        (copied(lambda t: t.to(torch.float64).float()), (4, 6), "computes with it"),
        (copied(lambda t: t.t()), (6, 4), "reorders"),
        (copied(lambda t: t[::2]), (8, 6), "reorders"),
        (
            copied(lambda t: t.view(2, 3, 8).transpose(0, 1).reshape(6, 8)[:4, :6]),
            (6, 8),
            "computes with it|reorders",
        ),
        (lambda params, name, t: params["w"].data[:, :3].copy_(t), (4, 3), "columns"),
        (lambda params, name, t: params["w"].data[2:].copy_(t), (2, 6), "gaps or overlaps"),
        (lambda params, name, t: None, (4, 6), "makes no parameter of it"),
    ],
)
def test_loaders_that_do_more_than_copy(load, shape, words):
    found = follow(load, {"a": shape}, w=(4, 6))
    assert set(found.refused) == {"a"} and re.search(words, found.refused["a"])


def test_a_copy_on_the_way_is_followed_if_it_moves_nothing():
    same = follow(copied(lambda t: t.clone()), {"a": (4, 4)}, w=(4, 4))
    assert not same.refused and same.pieces["w"][0].rows == (0, 4)
    for change in (lambda t: t.t().contiguous(), lambda t: t.t().clone(), lambda t: t[:, [0, 1, 3, 2]]):
        assert set(follow(copied(change), {"a": (4, 4)}, w=(4, 4)).refused) == {"a"}


def test_another_dtype():
    model = Model(copied(lambda t: t), w=(4, 6))
    found = plan(model, {"a": (torch.bfloat16, (4, 6))})
    assert "holds torch.bfloat16, but the model computes in torch.float32" in found.refused["a"]
