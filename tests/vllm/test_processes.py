"""Promise: tensor parallel and compiled engines give each tenant what its full fine-tune gives in the same kind of engine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import models
import pytest

HERE = Path(__file__).parent
FOLDER = Path(os.environ.get("XORZ_VLLM_MODELS") or HERE.parents[1] / "build" / "vllm" / "models")


def child(base, settings, packages=(), env=None):
    command = [sys.executable, HERE / "engine_child.py", base, json.dumps(settings), *packages]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | (env or {}), timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    [said] = [line for line in done.stdout.splitlines() if line.startswith('{"rounds"')]
    return json.loads(said)


def compare(kind, settings, env=None):
    """What one engine with tenants A and B gave, and what three engines of full models did; they say the same."""
    tenants = {name: models.tenant(kind, name, FOLDER) for name in "AB"}
    base = models.base(kind, FOLDER)
    got = child(base, settings, [f"{name}={package}" for name, (_, package) in tenants.items()], env)
    paths = [base, *(full for full, _ in tenants.values())]
    wanted = [child(path, settings, env=env) for path in paths]
    full = [each for engine in wanted for each in engine["rounds"][0]]
    for said in got["rounds"]:
        assert [tokens for tokens, _ in said] == [tokens for tokens, _ in full]
        assert max(abs(a - b) for (_, a), (_, b) in zip(said, full, strict=True)) == 0
    assert len({tuple(tokens) for tokens, _ in full}) == len(full)
    return got, wanted


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mixtral", "qwen3_moe"])
def test_tensor_parallel(kind):
    env = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if os.cpu_count() > 1 else {}
    got, _wanted = compare(kind, {"tensor_parallel_size": 2}, env)
    whole = 2 * sum(p.numel() for p in models.KINDS[kind]().parameters())
    first, second = got["memory"]
    assert first["base"] < 0.7 * whole and first["base"] == second["base"]
    assert 0 < first["deltas"] != second["deltas"] > 0


def test_torch_compile():
    """Two tenants and the base take turns in one slot; the graphs are those of an engine without tenants."""
    got, wanted = compare("llama", {"compile": True, "max_loras": 1})
    assert not got["breaks"] and {engine["graphs"]["unique_graphs"] for engine in (got, *wanted)} == {
        wanted[0]["graphs"]["unique_graphs"]
    }
