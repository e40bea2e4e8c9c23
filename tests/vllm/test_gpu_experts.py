"""Promise: on a GPU the plugin's engine serves mixtures of experts, each token with its own tenant's, by one wait for each
layer of experts: without graphs, and between the pieces of piecewise ones, whoever has come and gone since they were captured.
Without graphs it serves `mode="exact"`, in which a row has the bits of its tenant's plain model.

On the double of a GPU, with vLLM's own layers and routers; what is expected is the plain fine-tuned model's, by torch.
"""

import functools

import engines
import models
import on_gpu
import pytest
import runs
import torch
from gpu_double import CUDA, OnGpu
from on_gpu import ROWS, Runner, model_of, said
from safetensors.torch import load_file
from test_gpu_sync import Engine
from torch.utils._python_dispatch import _disable_current_modes
from vllm.config import CUDAGraphMode
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.fused_moe.runner import moe_runner
from xorz.vllm import pieces
from xorz.vllm.sync import XorzWeightTransferEngine

gpu = on_gpu.gpu
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a double of a GPU, beside a real one")
MIXED = [["A", None, "B", "A"] * 3, ["B"] * ROWS, [None] * ROWS, [None, "C", "C", "A", "A", "A"] * 2]
LAYERS = {"mixtral": 2, "olmoe": 2, "qwen2_moe": 2}


@pytest.fixture(scope="module")
def alone():
    """As `on_gpu.alone`, with the group of processes that mixtures ask for."""
    with on_gpu.processes("mixtral") as config, set_forward_context(None, config):
        yield


@functools.cache
def plain(kind):
    """Logits of the base and of each full fine-tune as vLLM computes them without the plugin, on the CPU."""
    out = {}
    with _disable_current_modes(), torch.no_grad():
        for name in (*models.TENANTS, None):
            path = models.tenant(kind, name, engines.FOLDER)[0] if name else models.base(kind, engines.FOLDER)
            out[name] = said(model_of(path, quantization=None, enable_lora=False)).float()
    return out


@pytest.fixture
def by_name(monkeypatch):
    """An engine finds a layer's runner by its name, in the context of a step, of which there is none here."""
    runners = {}

    def name_of(layer):
        runners[str(id(layer))] = layer
        return moe_runner.LayerName(str(id(layer))) if moe_runner._USE_LAYERNAME else str(id(layer))

    monkeypatch.setattr(moe_runner, "get_layer_from_name", runners.__getitem__)
    monkeypatch.setattr(moe_runner.MoERunner, "_encode_layer_name", name_of)


def runner(monkeypatch, kind, graphs=False, **own):
    out = Runner(monkeypatch, kind, graphs, xorz={"memory": "64 MiB", **own})
    out.plain = plain(kind)
    for name in "AB":
        out.load(name)
    return out


def shares(made, out, names):
    """How far each row is from its tenant's own model, of how far it is from the nearest other one's; the largest last."""
    found = []
    for row, name in enumerate(names):
        far = {n: float((out.words[row].float() - p[row]).abs().max()) for n, p in made.plain.items()}
        found.append(far.pop(name) / min(far.values()))
    return sorted(found)


@pytest.mark.parametrize("kind", LAYERS)
def test_tokens_have_their_tenants_experts_and_a_layer_waits_once(gpu, by_name, monkeypatch, kind):
    made = runner(monkeypatch, kind)
    for names in MIXED:
        if "C" in names:
            made.load("C")
        made.set(names)
        gpu.waits.clear()
        found = shares(made, made.step(), names)
        # vLLM rounds between experts, so that a router may choose another one of two that are about as good: few rows.
        assert found[-3] < 0.1 and found[-1] < 0.6, found
        assert gpu.waits == ["a copy to the host"] * LAYERS[kind]


@pytest.mark.parametrize("kind", LAYERS)
def test_mixtures_run_between_the_pieces_of_graphs(gpu, by_name, monkeypatch, kind):
    """Captured while nobody was there, by what vLLM's configuration names by then."""
    made = runner(monkeypatch, kind, graphs=True)
    graph, out = made.captured(made.config.compilation_config.splitting_ops)
    assert graph.count == (LAYERS[kind] + 1, LAYERS[kind])
    before = made.places_in_memory()
    for i, names in enumerate(MIXED * 2):
        if "C" in names:
            made.load("C")
        if i == len(MIXED):
            made.unload("A")  # whose place another one has by the time that she is back
        made.set(names)
        gpu.waits.clear()
        graph.replay()
        assert gpu.waits == ["a copy to the host"] * LAYERS[kind]
        found = shares(made, out, names)
        assert found[-3] < 0.1 and found[-1] < 0.6, (names, found)
        assert torch.equal(out.words, made.step().words), names
    assert made.places_in_memory() == before
    assert gpu.synchronized == 0 and gpu.overwritten() == []


@pytest.mark.parametrize("how", ["tenants", "no tenants"])
def test_mixtures_are_updated_in_place(gpu, by_name, monkeypatch, how):
    """Experts and routers: a step, a jump and the ways back, bit for bit, where graphs that were captured read them."""
    paths, chain = runs.run("mixtral", engines.FOLDER)
    twin, _ = on_gpu.plain("mixtral")
    logits = []
    with _disable_current_modes():
        for path in paths:
            twin.load_weights(iter(load_file(path / "model.safetensors").items()))
            logits.append(said(twin).float())
    own = {"graphs": True, "xorz": {"memory": "64 MiB"}} if how == "tenants" else {}
    made = Engine(monkeypatch, ("mixtral", paths, chain, twin, logits), how, **own)
    names = ["A", None] * (ROWS // 2)
    if how == "tenants":
        graph, out = made.runner.captured(made.config.compilation_config.splitting_ops)
        made.runner.plain = plain("mixtral")
    places = {name: p.data_ptr() for name, p in made.model.named_parameters()}

    def is_at(number):
        if how == "tenants":
            made.runner.set([None] * ROWS)
            graph.replay()
            assert made.says(out, number)
        assert made.has(number)
        assert made.says(said(made.model, OnGpu(on_gpu.IDS.clone()), OnGpu(on_gpu.PLACES.clone())), number)
        assert {name: p.data_ptr() for name, p in made.model.named_parameters()} == places

    is_at(0)
    for number, back in ((1, False), (4, False), (1, True), (0, False)):
        made.to(number, **({"rollback": True, "version": number} if back else {}))
        is_at(number)
    if how == "no tenants":
        # Graphs that have the mixture in them, whatever the configuration says.
        with pytest.raises(ValueError, match="routed_experts` would be captured"):
            XorzWeightTransferEngine(None, on_gpu.with_graphs(made.config), CUDA, made.model)
    else:
        made.runner.load("A")
        made.runner.set(names)
        graph.replay()
        found = shares(made.runner, out, names)
        assert found[-3] < 0.1 and found[-1] < 0.6, found


def test_what_all_tokens_share_comes_first(gpu, by_name, monkeypatch):
    """vLLM scales the other one."""
    made = runner(monkeypatch, "qwen2_moe", graphs=True)
    one, two = (OnGpu(torch.full((3, 4), value)) for value in (1.0, 2.0))
    monkeypatch.setattr(moe_runner, "_moe_forward", lambda *args: (one, two))
    name = made.model.model.layers[0].mlp.experts._encode_layer_name()
    found = pieces.run_beside_shared(one, one, None, None, name, 0)
    assert [part.words.unique().tolist() for part in found] == [[1.0], [2.0]]


def test_what_would_capture_experts_is_refused_by_name(gpu, by_name, monkeypatch):
    made = runner(monkeypatch, "mixtral", graphs=True)
    # Whole steps, and pieces that have the mixture in them.
    for left_out in (None, ["vllm::unified_attention_with_output"]):
        with pytest.raises(
            RuntimeError, match=r"experts cannot be captured in a CUDA graph.*--enforce-eager"
        ):
            made.captured(left_out)
        gpu.capturing = None
    pieces.check_model(made.model, made.config)
    layer = made.model.model.layers[1].block_sparse_moe.experts
    layer._forward_entry = torch.ops.vllm.moe_forward
    with pytest.raises(
        ValueError, match=r"`model\.layers\.1\.block_sparse_moe\.experts.*` would be captured, by MoERunner"
    ):
        pieces.check_model(made.model, made.config)
    made.config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
    pieces.check_model(made.model, made.config)


def test_rows_have_the_bits_of_their_tenants_plain_model(gpu, by_name, monkeypatch):
    made = runner(monkeypatch, "qwen2", mode="exact")
    for names in (["A"] * ROWS, ["B"] * ROWS):
        made.set(names)
        assert torch.equal(made.step().words.float(), made.plain[names[0]])
    for names in MIXED:
        if "C" in names:
            made.load("C")
        made.set(names)
        gpu.waits.clear()
        assert made.wrong(made.step(), names) == [], names
        assert gpu.waits and set(gpu.waits) == {"delta_linear_grouped in mode exact"}
