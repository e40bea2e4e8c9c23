"""Promise: on a GPU the plugin's engine multiplies a prompt's many rows for their tenant alone, others together, each with its
own tenant's weights, whoever has which slot by then; what is captured as a CUDA graph reads the rows from the device, as it
did; and vLLM's profiling sees what that takes.

On the double of a GPU, with vLLM's own layers; what is expected is the plain fine-tuned model's, on the CPU, by torch.
"""

import engines
import gpu_double
import models
import numpy as np
import on_gpu
import pytest
import torch
from gpu_double import Graph, OnGpu, held
from on_gpu import Runner, said
from safetensors.torch import load_file
from torch.utils._python_dispatch import _disable_current_modes

alone, gpu = on_gpu.alone, on_gpu.gpu
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a double of a GPU, beside a real one")
ROWS = 400
IDS = torch.randint(0, models.VOCABULARY, (ROWS,), generator=torch.Generator().manual_seed(8))
PLACES = torch.arange(ROWS) % 100
LONG = ["A"] * 150 + ["B", None] * 5 + ["B"] * 40 + [None] * 160 + ["A"] * 40
OTHER = [None, "B"] * 10 + ["C"] * 200 + ["B"] * 180


@pytest.fixture
def made(gpu, monkeypatch):
    out = Runner(monkeypatch, "qwen2")
    twin, _ = on_gpu.plain("qwen2")
    out.plain = {}
    with _disable_current_modes():
        for name in (*models.TENANTS, None):
            path = (
                models.tenant("qwen2", name, engines.FOLDER)[0]
                if name
                else models.base("qwen2", engines.FOLDER)
            )
            twin.load_weights(iter(load_file(path / "model.safetensors").items()))
            out.plain[name] = said(twin, IDS, PLACES).float()
    out.ids, out.places = OnGpu(IDS.clone()), OnGpu(PLACES.clone())
    for name in "AB":
        out.load(name)
    return out


def wrong(made, out, names):
    return [(row, name) for row, name in enumerate(names) if not made.is_of(out, row, name)]


def test_each_row_has_its_tenants_weights_and_nothing_waits(gpu, made):
    matrices = sum(site.places is not None for site in sites(made))
    for names, alone_rows in ((LONG, 1), (OTHER, 2)):
        for name in dict.fromkeys(n for n in names if n):
            made.load(name)
        made.set(names)
        gpu.ops.clear()
        gpu.waits.clear()
        out = made.step()
        assert wrong(made, out, names) == []
        # Of each matrix but the table, which is looked up, and the head, whose rows are those that are sampled.
        assert gpu.ops.count("delta_linear") == alone_rows * (matrices - 1)
        assert gpu.waits == []
    made.set(["A", "B"] * 200)
    gpu.ops.clear()
    assert wrong(made, made.step(), ["A", "B"] * 200) == []
    assert "delta_linear" not in gpu.ops


def sites(made):
    found = [getattr(module, "xorz_weight", None) for module in made.model.modules()]
    return {id(site): site for site in found if site is not None}.values()


def test_logits_take_no_more_than_they_are(gpu, made):
    made.set(["A"] * ROWS)
    states = made.model(made.ids, made.places, None, None)
    gpu.ops.clear()
    with made.manager.row_map.scoring(states):
        made.model.compute_logits(states)
        made.model.compute_logits(states[5:])
    assert gpu.ops.count("delta_linear_grouped") == 2
    assert not {"delta_linear", "new_empty", "empty"} & set(gpu.ops), gpu.ops


def test_what_is_captured_reads_rows_from_the_device(gpu, made):
    every = np.ones(ROWS, dtype=np.int32)
    with made.mixin.maybe_dummy_run_with_lora(
        made.mixin.lora_config, every, every, num_active_loras=made.mixin.lora_config.max_loras
    ):
        made.step()
        # Whatever the host knows of the rows then.
        made.set(LONG)
        with Graph() as graph:
            gpu.ops.clear()
            out = made.step()
    assert "delta_linear" not in gpu.ops and "delta_linear_grouped" in gpu.ops
    for names in (LONG, OTHER, ["B"] * ROWS):
        for name in dict.fromkeys(n for n in names if n):
            made.load(name)
        made.set(names)
        graph.replay()
        assert wrong(made, out, names) == []


def test_a_tenant_who_comes_to_a_slot_is_the_one_who_is_multiplied(gpu, made):
    made.set(["A"] * ROWS)
    assert wrong(made, made.step(), ["A"] * ROWS) == []
    made.unload("A")
    made.load("C")
    made.set(["C"] * ROWS)
    assert wrong(made, made.step(), ["C"] * ROWS) == []
    made.manager.remove_all_adapters()
    assert wrong(made, made.step(), [None] * ROWS) == []


def test_rows_behind_those_of_the_step_are_the_bases(gpu, made):
    made.set(LONG[:250])
    gpu.ops.clear()
    assert wrong(made, made.step(), LONG[:250] + [None] * 150) == []
    assert "delta_linear" in gpu.ops
    made.ids, made.places = OnGpu(IDS[:200].clone()), OnGpu(PLACES[:200].clone())
    gpu.ops.clear()
    assert wrong(made, made.step(), LONG[:200]) == []
    assert "delta_linear" in gpu.ops


def test_profiling_sees_what_a_step_takes(gpu, made, monkeypatch):
    taken = []

    def noted(func, args, kwargs, out):
        # The panel of the op is asked of torch's own allocator, which this double does not see.
        panel = args[1].nbytes if func._schema.name == "xorz::delta_linear" else 0
        taken.append(held() + panel)
        return real(func, args, kwargs, out)

    def most(step):
        taken.clear()
        step()
        return max(taken)

    real = gpu_double._noted
    monkeypatch.setattr(gpu_double, "_noted", noted)
    every = np.ones(ROWS, dtype=np.int32)
    with made.mixin.maybe_dummy_run_with_lora(
        made.mixin.lora_config, every, every, num_active_loras=made.mixin.lora_config.max_loras
    ):
        gpu.ops.clear()
        profiled = most(lambda: made.model(made.ids, made.places, None, None))
    assert "delta_linear" not in gpu.ops
    for names in (LONG, OTHER, ["A"] * ROWS):
        for name in dict.fromkeys(n for n in names if n):
            made.load(name)
        made.set(names)
        assert most(lambda: made.model(made.ids, made.places, None, None)) <= profiled
    assert "delta_linear" in gpu.ops
