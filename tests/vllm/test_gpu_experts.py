"""Promise: on a GPU that captures no graphs the plugin's engine serves mixtures of experts, each token with its own tenant's,
by one wait for each layer of experts; and `mode="exact"`, in which a row has the bits of its tenant's plain model.

On the double of a GPU, with vLLM's own layers and routers; what is expected is the plain fine-tuned model's, by torch.
"""

import functools

import engines
import models
import on_gpu
import pytest
import torch
from on_gpu import ROWS, Runner, model_of, said
from torch.utils._python_dispatch import _disable_current_modes
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.fused_moe.runner import moe_runner

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


def runner(monkeypatch, kind, **own):
    # An engine finds a layer's runner by its name, in the context of a step, of which there is none here.
    monkeypatch.setattr(moe_runner, "get_layer_from_name", lambda found: found)
    monkeypatch.setattr(moe_runner.MoERunner, "_encode_layer_name", lambda self: self)
    out = Runner(monkeypatch, kind, xorz={"memory": "64 MiB", **own})
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
def test_tokens_have_their_tenants_experts_and_a_layer_waits_once(gpu, monkeypatch, kind):
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


def test_rows_have_the_bits_of_their_tenants_plain_model(gpu, monkeypatch):
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
