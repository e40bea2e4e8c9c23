"""Promise: on a GPU the plugin's engine computes each row with its own tenant's weights, in what vLLM captured as CUDA graphs
while nobody was loaded, too: tenants are loaded, unloaded and given other slots between two replays, nothing that a graph
reads moves, a step waits for nothing, and all memory is taken before vLLM measures what is left.

vLLM's own models, layers and adapters' manager, on the double of a GPU of tests/python; attention alone is left out, since
vLLM's is of its engine's. What is expected is computed by the plain fine-tuned model, on the CPU, by torch.
"""

import gpu_double
import on_gpu
import pytest
import torch
from gpu_double import CUDA, OnGpu, held
from on_gpu import KINDS, ROWS, Runner, plain, said
from torch import nn

alone, gpu = on_gpu.alone, on_gpu.gpu
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a double of a GPU, beside a real one")
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
