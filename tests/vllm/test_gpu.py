"""Promise: on a GPU the plugin's engine computes each row with its own tenant's weights, in what vLLM captured as CUDA graphs
while nobody was loaded, too: tenants are loaded, unloaded and given other slots between two replays, nothing that a graph
reads moves, a step waits for nothing, and all memory is taken before vLLM measures what is left.

vLLM's own models, layers and adapters' manager, on the double of a GPU of tests/python; attention alone is left out, since
vLLM's is of its engine's. What is expected is computed by the plain fine-tuned model, on the CPU, by torch.
"""

import functools
import sys
from pathlib import Path

import engines
import models
import pytest
import torch
import xorz.vllm
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))
import gpu_double
from gpu_double import CUDA, Graph, OnGpu, held, to_gpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a double of a GPU, beside a real one")
KINDS = ("qwen2", "qwen3")
ROWS = 12
IDS = torch.randint(0, models.VOCABULARY, (ROWS,), generator=torch.Generator().manual_seed(3))
PLACES = torch.arange(ROWS)


class Alone(nn.Module):
    """In place of attention: what each row has of its own."""

    def forward(self, q, k, v):
        heads = q.unflatten(-1, (-1, 32)), k.unflatten(-1, (-1, 32)), v.unflatten(-1, (-1, 32))
        q, k, v = (t.repeat_interleave(4 // t.size(-2), -2) for t in heads)
        return (torch.sigmoid((q * k).sum(-1, keepdim=True)) * v).flatten(-2)


def config_of(path, **settings):
    extra = {"xorz": {"mode": "fast", "memory": "4 MiB"}}
    return EngineArgs(
        str(path), additional_config=extra, **(engines.SETTINGS | settings)
    ).create_engine_config()


@pytest.fixture(scope="module")
def alone():
    """vLLM's groups of processes, of this one."""
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )

    xorz.vllm.register()
    with set_current_vllm_config(config_of(models.base("qwen3", engines.FOLDER))):
        init_distributed_environment(1, 0, "tcp://127.0.0.1:29581", 0, "gloo")
        initialize_model_parallel(1, 1)
        yield
    cleanup_dist_env_and_memory()


def model_of(path):
    from vllm.model_executor.layers import rotary_embedding
    from vllm.model_executor.model_loader import get_model

    # Models share what they turn by, and this one may be put on the device.
    rotary_embedding._ROPE_DICT.clear()
    config = config_of(path)
    with set_current_vllm_config(config):
        out = get_model(vllm_config=config)
    for layer in out.model.layers:
        layer.self_attn.attn = Alone()
    return out


@pytest.fixture
def gpu(monkeypatch, alone):
    with gpu_double.machine(monkeypatch) as ledger, torch.no_grad():
        yield ledger


class Runner:
    """What vLLM's model runners have of adapters: its own mixin, over a model on the device; `plain` has what to expect."""

    def __init__(self, monkeypatch, kind, **settings) -> None:
        from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin
        from xorz.vllm import manager

        base = models.base(kind, engines.FOLDER)
        self.config, model = config_of(base, **settings), model_of(base)
        self.kind, self.adapters = kind, {}
        twin, self.plain = plain(kind)
        followed = manager.plan

        # The double's parameters lack what vLLM's loaders look for; which of them hold what is no matter of the device.
        def planned(_model, tensors):
            with _disable_current_modes():
                return followed(twin, tensors)

        monkeypatch.setattr(manager, "plan", planned)
        self.model = to_gpu(model)
        self.mixin = type("Mixin", (LoRAModelRunnerMixin,), {"get_model": lambda _: self.model})()
        self.mixin.lora_config = self.config.lora_config
        self.mixin.load_lora_model(self.model, self.config, CUDA)
        self.worker = self.mixin.lora_manager
        self.manager = self.worker._adapter_manager
        self.ids, self.places = OnGpu(IDS.clone()), OnGpu(PLACES.clone())

    def adapter(self, name):
        if name not in self.adapters:
            self.adapters[name] = xorz.vllm.request(name, models.tenant(self.kind, name, engines.FOLDER)[1])
        return self.adapters[name]

    def load(self, name) -> None:
        self.mixin.add_lora(self.adapter(name))

    def unload(self, name) -> None:
        self.worker.forget(self.adapter(name).lora_name)

    def set(self, names) -> None:
        """What a step begins with."""
        numbers = tuple(self.adapter(name).lora_int_id if name else 0 for name in names)
        self.mixin._set_active_loras(numbers, numbers, {self.adapter(name) for name in names if name})

    def step(self):
        return said(self.model, self.ids, self.places)

    def captured(self):
        """A graph of a step, taken as vLLM takes it: with its adapters for warming up, which change nothing."""
        import numpy as np

        every = np.ones(ROWS, dtype=np.int32)
        with self.mixin.maybe_dummy_run_with_lora(
            self.mixin.lora_config, every, every, num_active_loras=self.mixin.lora_config.max_loras
        ):
            self.step()
            with Graph() as graph:
                out = self.step()
        return graph, out

    def wrong(self, out, names):
        """Rows that are not those of their tenant's own model; behind `names` rows are the base's."""
        names = [*names, *[None] * (ROWS - len(names))]
        return [(row, name) for row, name in enumerate(names) if not self.is_of(out, row, name)]

    def is_of(self, out, row, name):
        far = {n: (out.words[row].float() - p[row]).abs().max().item() for n, p in self.plain.items()}
        others = min(distance for other, distance in far.items() if other != name)
        return far[name] < 0.1 * others

    def places_in_memory(self):
        rows, tables = self.manager.row_map, [site.table for site in self.manager.vectors.values()]
        fixed = [
            self.manager.arena.tensor,
            self.manager.offsets,
            rows.tokens,
            rows.sampled,
            rows.places,
            *tables,
        ]
        return [t.data_ptr() for t in (*fixed, *self.model.parameters())]


@functools.cache
def plain(kind):
    """The base, on the CPU, and the logits of it and of each full fine-tune."""
    with _disable_current_modes(), torch.no_grad():
        out, twin = {}, model_of(models.base(kind, engines.FOLDER))
        for name in (*models.TENANTS, None):
            full = (
                models.tenant(kind, name, engines.FOLDER)
                if name
                else (models.base(kind, engines.FOLDER), None)
            )
            twin.load_weights(iter(load_file(full[0] / "model.safetensors").items()))
            out[name] = said(twin).float()
    return twin, out


def said(model, ids=IDS, places=PLACES):
    """Logits of every row."""
    return model.compute_logits(model(ids, places, None, None))


EXCHANGED = [
    ["A", None, "B", "A"] * 3,
    ["B", "A", "A", None, "B"],  # fewer rows than the graph has
    [None] * ROWS,
    ["C", "C", None, "B", "B", None] * 2,  # who has no slot takes one
    ["A"] * ROWS,
]


@pytest.mark.parametrize("kind", KINDS)
def test_graphs_follow_tenants_who_come_go_and_change_slots(gpu, monkeypatch, kind):
    made = Runner(monkeypatch, kind)
    graph, out = made.captured()
    for name in "AB":
        made.load(name)
    graph.replay()
    assert made.wrong(out, []) == []  # nobody has a row before a step has said so
    before = made.places_in_memory()
    for i, names in enumerate(EXCHANGED * 2):
        if i == 3:
            made.load("C")
        if i == 5:
            made.unload("A")
        made.set(names)
        graph.replay()
        assert made.wrong(out, names) == [], names
        assert made.wrong(made.step(), names) == [], names
    assert made.places_in_memory() == before
    assert gpu.synchronized == 0 and gpu.overwritten() == []


@pytest.fixture
def made(gpu, monkeypatch):
    out = Runner(monkeypatch, "qwen2")
    for name in "ABC":
        out.load(name)
    return out


def test_no_step_waits_for_the_device_whoever_it_gives_a_slot(gpu, made):
    made.set(["A"] * ROWS)
    gpu.waits.clear()
    for names in EXCHANGED:  # three tenants in two slots
        made.set(names)
        made.step()
    assert gpu.waits == []
    # Nor does a load, once the words that tenants change were compared with the checkpoint's.
    made.unload("B")
    made.load("B")
    assert made.worker.list_adapters() == {lora.lora_int_id for lora in made.adapters.values()}
    assert gpu.waits == [] and gpu.synchronized == 0 and gpu.overwritten() == []


def test_what_is_written_beside_steps_is_in_order_with_them(gpu, made):
    """vLLM gives its worker's thread a stream of its own; whoever loads may be on another one."""
    steps, others = gpu_double.Stream(), gpu_double.Stream()
    with torch.cuda.stream(steps):
        made.set(["A", "B"] * 6)
        made.step()
    # What was written before the first step on that stream.
    assert gpu.ordered == [(steps, gpu.stream)]
    gpu.streams.clear()
    with torch.cuda.stream(others):
        made.unload("A")
        made.unload("C")
        made.load("C")
        made.load("A")
        made.manager.remove_all_adapters()
    assert len(gpu.streams) > 20 and set(gpu.streams) == {steps}
    with torch.cuda.stream(steps):
        made.set(["A", "B"] * 6)
        assert made.wrong(made.step(), ["A", "B"] * 6) == []
    assert len(gpu.ordered) == 1


def test_all_memory_is_taken_before_vllm_measures_what_is_left(gpu, monkeypatch):
    from types import SimpleNamespace

    from vllm.utils import mem_utils

    total = 1 << 30
    stats = {
        "get_memory_info": lambda _=None: (total - held(), total),
        "memory_stats": lambda _=None: {
            "allocated_bytes.all.peak": held(),
            "allocated_bytes.all.current": held(),
        },
        "memory_reserved": lambda _=None: held(),
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda _=None: None,
    }
    for name, found in stats.items():
        monkeypatch.setattr(torch.accelerator, name, found)
    platform = SimpleNamespace(
        is_integrated_gpu=lambda _: False,
        get_current_memory_usage=lambda _=None: held(),
        device_name="double",
    )
    monkeypatch.setattr(mem_utils, "current_platform", platform)
    start = mem_utils.MemorySnapshot(device=CUDA)
    with mem_utils.DeviceMemoryProfiler(CUDA) as loading:
        made = Runner(monkeypatch, "qwen2")
    arena, rows = made.manager.arena, made.manager.row_map
    tables = [site.table for site in made.manager.vectors.values()]
    own = sum(t.nbytes for t in (made.manager.offsets, rows.tokens, rows.sampled, rows.places, *tables))
    weights = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in made.model.parameters()}
    assert arena.tensor.nbytes == arena.capacity == 4 << 20
    assert loading.consumed_memory >= arena.capacity + own + 0.9 * sum(weights.values())
    with mem_utils.memory_profiling(start, loading.consumed_memory) as profiled:
        made.captured()
    # What vLLM takes from the memory that it may use, before the cache of keys and values has the rest.
    assert profiled.non_kv_cache_memory >= arena.capacity + own
    after = held()
    for name in "ABC":
        made.load(name)
    made.set(["A", None, "C"] * 4)
    said(made.model, made.ids, made.places)
    made.unload("A")
    assert held() <= after


@pytest.mark.parametrize("rows", [5, 1024])
def test_the_second_runner_scores_prompts_by_their_tenants(made, monkeypatch, rows):
    from types import SimpleNamespace

    import numpy as np
    from vllm.v1.worker.gpu.sample import prompt_logprob

    found = {}

    def topk(logits, count, ids, logits_mode):
        found["logits"] = [*found.get("logits", []), logits.words.float()]
        return SimpleNamespace(
            logprob_token_ids=logits[:, :1], logprobs=logits[:, :1], selected_token_ranks=ids
        )

    # Triton's kernels need a GPU of the real kind.
    monkeypatch.setattr(prompt_logprob, "get_prompt_logprobs_token_ids", lambda count, *_: made.ids[:count])
    monkeypatch.setattr(prompt_logprob, "compute_topk_scores", topk)
    monkeypatch.setattr(prompt_logprob, "CHUNK_SIZE", rows)
    worker = prompt_logprob.PromptLogprobsWorker(4, CUDA)
    lengths, names = [5, 4, 3], ["B", None, "A"]
    for i in range(3):
        worker.uses_prompt_logprobs[i] = True
        worker.in_progress_prompt_logprobs[f"r{i}"] = []
    starts = np.cumsum([0, *lengths])
    batch = SimpleNamespace(
        req_ids=["r0", "r1", "r2"],
        idx_mapping_np=np.arange(3),
        idx_mapping=None,
        query_start_loc=None,
        query_start_loc_np=starts,
        num_tokens=ROWS,
        num_scheduled_tokens=np.array(lengths),
        num_computed_prefill_tokens_np=np.zeros(3, dtype=int),
        prefill_len_np=np.array(lengths),
    )
    of_rows = [name for name, length in zip(names, lengths, strict=True) for _ in range(length)]
    number = {name: made.adapter(name).lora_int_id if name else 0 for name in names}
    made.mixin._set_active_loras(
        tuple(number[n] for n in names), tuple(number[n] for n in of_rows), {made.adapter(n) for n in "AB"}
    )
    hidden = made.model(made.ids, made.places, None, None)
    scored = worker.compute_prompt_logprobs(
        made.model.compute_logits, hidden, batch, None, None, np.array(lengths)
    )
    assert set(scored) == {"r0", "r1", "r2"}
    assert made.wrong(OnGpu(torch.cat(found["logits"])), of_rows) == []
    # After it the rows that are sampled from are looked up as ever.
    last = hidden[torch.tensor(starts[1:] - 1)]
    logits = made.model.compute_logits(last).words.float()
    for i, name in enumerate(names):
        assert (logits[i] - made.plain[name][starts[i + 1] - 1]).abs().max() < 0.5


def test_vllm_s_own_lookup_for_several_gpus_is_left_out(gpu, monkeypatch):
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    init = VocabParallelEmbedding.__init__

    def on_several(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.use_fused_embedding = True

    monkeypatch.setattr(VocabParallelEmbedding, "__init__", on_several)
    made = Runner(monkeypatch, "qwen2")
    assert made.model.model.embed_tokens.use_fused_embedding is False


def test_an_installation_without_kernels_is_refused_when_it_starts(gpu, monkeypatch):
    for op in ("delta_linear_grouped", "delta_embedding"):
        with monkeypatch.context() as less:
            less.setattr(gpu_double, "KERNELS", gpu_double.KERNELS - {op})
            with pytest.raises(RuntimeError, match=f"{op}: this op has no CUDA kernel"):
                Runner(less, "qwen2")


def test_what_gpus_cannot_compute_on_is_refused_when_it_is_loaded(made, monkeypatch):
    from xorz import checkpoint

    loaded = checkpoint.load_deltas

    def of_version_1(*args, **kwargs):
        out = dict(loaded(*args, **kwargs))
        old = out["model.layers.1.self_attn.o_proj.weight"] = out[
            "model.layers.1.self_attn.o_proj.weight"
        ].clone()
        old[8], old[10] = 0, 2
        return out

    made.unload("A")
    with monkeypatch.context() as version_1:
        version_1.setattr(checkpoint, "load_deltas", of_version_1)
        with pytest.raises(
            ValueError,
            match=r"layers\.1\.self_attn\.o_proj\.weight` is an `exponent` delta of a package of version 1",
        ):
            made.load("A")
    made.load("A")
    made.set(["A"] * ROWS)
    assert made.wrong(made.step(), ["A"] * ROWS) == []


class Reads(nn.Module):
    """Reads what it holds in ways of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.near, self.asked, self.called, self.biased = (nn.Linear(2, 2) for _ in range(4))
        self.near.weight.data.zero_()
        self.called.weight.data.zero_()

    def load_weights(self, weights):
        self.called.weight.data.copy_(weights)

    def forward(self, x):
        x = x.to(self.asked.weight.dtype).to(self.asked.weight.device)
        return self.called(self.asked(x)) @ self.near.weight + self._own()

    def _own(self):
        return self.biased.bias


def test_layers_whose_weights_others_read_are_not_served():
    from xorz.vllm import gpu

    class Inherits(Reads):
        pass

    model = nn.Sequential(Inherits(), nn.Linear(2, 2))
    assert gpu.read_past(model) == {id(model[0].near), id(model[0].biased)}
    gpu.check_model(model)
    special = type("ForOneMake", (nn.Module,), {"__module__": "vllm.models.some.nvidia.model"})()
    with pytest.raises(
        ValueError, match=r"ForOneMake is not served on a GPU: .*\(vllm.models.some.nvidia.model\)"
    ):
        gpu.check_model(special)


def test_models_that_are_served_read_no_weight_past_their_layers(alone):
    from xorz.vllm import gpu

    for kind in KINDS:
        assert gpu.read_past(plain(kind)[0]) == set()
