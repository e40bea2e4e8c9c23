"""Promise: an engine on a GPU that would capture CUDA graphs, as vLLM does by default, leaves mixtures of experts out of them:
vLLM's own configuration ends with piecewise graphs that are cut there, or the engine is refused by name; and vLLM's own
compilation cuts a model so, and gives each tenant what its full fine-tune gives in the same pieces.

The configuration is what vLLM resolves on CUDA, the compilation what it does on the CPU. Graphs that are replayed: see
`test_gpu_experts.py`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import models
import pytest
from test_processes import FOLDER, child

HERE = Path(__file__).parent
SERVED = {
    "quantization": "xorz",
    "enable_lora": True,
    "max_lora_rank": 1,
    "dtype": "bfloat16",
    "max_model_len": 256,
    "additional_config": {"xorz": {"memory": "1 GiB"}},
}
OP = "xorz_vllm::mixture"


def resolved(kind, *settings, **env):
    """What vLLM makes of each of these settings on CUDA."""
    given = [json.dumps(SERVED | each) for each in settings]
    command = [sys.executable, HERE / "cuda_config.py", models.base(kind, FOLDER), *given]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | env, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def of_compilation(**settings):
    return {"compilation_config": settings}


def test_by_default_graphs_are_piecewise_and_cut_at_mixtures():
    plain, default, asked, settled, eager, without = resolved(
        "mixtral",
        {"quantization": None, "enable_lora": False},
        {},
        of_compilation(cudagraph_mode="PIECEWISE"),
        of_compilation(cudagraph_mode="FULL_AND_PIECEWISE"),
        {"enforce_eager": True},
        of_compilation(cudagraph_mode="NONE"),
    )
    # As vLLM has it, but for the mixture.
    assert (
        plain["graphs"] == "FULL_AND_PIECEWISE"
        and "vllm::unified_attention_with_output" in plain["splitting"]
    )
    for found in (default, asked, settled):
        assert (found["mode"], found["graphs"]) == ("VLLM_COMPILE", "PIECEWISE")
        assert found["splitting"] == [*plain["splitting"], OP] and found["sizes"] > 10
        assert found["op"] == "run"
        [line] = found["said"]
        assert (
            f"cudagraph_mode is PIECEWISE (it was {'PIECEWISE' if found is asked else 'FULL_AND_PIECEWISE'})"
            in line
        )
        assert OP in line
    for found in (eager, without):
        assert found["graphs"] == "NONE" and OP not in found["splitting"] and found["said"] == []
        assert found["op"] == "vllm::moe_forward"


def test_models_without_mixtures_keep_the_graphs_that_they_have():
    default, full = resolved("qwen3", {}, of_compilation(cudagraph_mode="FULL"))
    assert (default["graphs"], full["graphs"]) == ("FULL_AND_PIECEWISE", "FULL")
    assert not any(OP in found["splitting"] or found["said"] for found in (default, full))


REFUSED = {
    "full graphs": (of_compilation(cudagraph_mode="FULL"), "cudagraph_mode FULL captures whole steps alone"),
    "full graphs for decoding": (
        of_compilation(cudagraph_mode="FULL_DECODE_ONLY"),
        "cudagraph_mode FULL_DECODE_ONLY captures whole steps alone",
    ),
    "no compilation": (of_compilation(mode=0), "no pieces without vLLM's compilation (mode 0)"),
    "torch's compilation": (of_compilation(mode=1), "no pieces without vLLM's compilation (mode 1)"),
    "no splitting": (of_compilation(splitting_ops=[]), "splitting_ops have not vLLM's attention"),
    "other splitting": (
        of_compilation(splitting_ops=["vllm::short_conv"]),
        "splitting_ops have not vLLM's attention",
    ),
    "fused attention": (
        of_compilation(pass_config={"fuse_attn_quant": True}),
        "splitting_ops have not vLLM's attention",
    ),
    "Inductor's pieces": (
        of_compilation(use_inductor_graph_partition=True),
        "pieces that Inductor makes (use_inductor_graph_partition) were never tried",
    ),
    "transformers' model": (
        {"model_impl": "transformers"},
        "Transformers backend calls them by an op of its own",
    ),
    "exact": (
        {"additional_config": {"xorz": {"memory": "1 GiB", "mode": "exact"}}},
        "start the engine with --enforce-eager",
    ),
}


def test_what_has_no_pieces_is_refused_by_name():
    found = resolved("qwen3_moe", *(settings for settings, _ in REFUSED.values()))
    for (what, (_, words)), said in zip(REFUSED.items(), found, strict=True):
        assert words in said.get("refused", ""), (what, said)
    [breakable] = resolved("qwen3_moe", {}, VLLM_USE_BREAKABLE_CUDAGRAPH="1")
    assert "breakable graphs capture them (VLLM_USE_BREAKABLE_CUDAGRAPH=1" in breakable["refused"]
    # Without graphs all of them are served, but for what vLLM itself does not take.
    eager = resolved("qwen3_moe", *({**settings, "enforce_eager": True} for settings, _ in REFUSED.values()))
    assert not any("xorz" in said.get("refused", "") for said in eager), eager


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_vllm_cuts_a_model_at_its_mixtures_and_each_tenant_is_answered(kind):
    tenants = {name: models.tenant(kind, name, FOLDER) for name in "AB"}
    base, settings = models.base(kind, FOLDER), {"compile": "pieces"}
    anew = {"VLLM_DISABLE_COMPILE_CACHE": "1"}
    got = child(base, settings, [f"{name}={package}" for name, (_, package) in tenants.items()], anew)
    wanted = child(tenants["B"][0], settings, env=anew)["rounds"][0]
    for said in got["rounds"]:
        assert said[4:] == wanted != said[2:4]
    layers = 2
    alone = [called for is_left_out, called in got["pieces"] if is_left_out]
    assert [called for called in alone if "xorz_vllm.mixture" in called] == [["xorz_vllm.mixture"]] * layers
    compiled = [called for is_left_out, called in got["pieces"] if not is_left_out]
    assert len(alone) == 2 * layers and len(compiled) == len(alone) + 1
    # What a mixture writes to is made in the piece before it, which is captured.
    for before in compiled[1::2]:
        made = [op for op in before if "empty_like" in op]
        assert len(made) == (2 if kind == "qwen2_moe" else 1) and not any(
            "routed" in op or "moe" in op for op in before
        )
