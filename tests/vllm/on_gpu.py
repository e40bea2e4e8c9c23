"""Models of vLLM's on the double of a GPU of tests/python, without their attention, which is of an engine's; and what the plain
model of a checkpoint says, on the CPU, by torch.
"""

import functools
import os
from contextlib import contextmanager

import engines
import gpu_double
import models
import pytest
import torch
import xorz.vllm
from gpu_double import CUDA, Graph, OnGpu, Pieces, to_gpu
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs

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
    extra = {"xorz": {"mode": "fast", "memory": "4 MiB"} | settings.pop("xorz", {})}
    return EngineArgs(
        str(path), additional_config=extra, **(engines.SETTINGS | settings)
    ).create_engine_config()


def with_graphs(config):
    """The config as vLLM resolves it on a GPU by default (`cuda_config.py` asks it), and as the plugin settles it then."""
    from vllm.config import CompilationMode, CUDAGraphMode
    from xorz.vllm import pieces

    own = config.compilation_config
    own.mode, own.cudagraph_mode, own.splitting_ops = (
        CompilationMode.VLLM_COMPILE,
        CUDAGraphMode.FULL_AND_PIECEWISE,
        None,
    )
    own.use_inductor_graph_partition = False
    own.set_splitting_ops_for_v1("")
    pieces.leave_out(config)
    return config


@contextmanager
def processes(kind):
    """vLLM's groups of processes, of this one, as a model of this kind wants them; gives its config."""
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )

    xorz.vllm.register()
    config = config_of(models.base(kind, engines.FOLDER))
    with set_current_vllm_config(config):
        address = f"tcp://127.0.0.1:{20000 + os.getpid() % 20000}"
        init_distributed_environment(1, 0, address, 0, "gloo")
        initialize_model_parallel(1, 1)
        yield config
    cleanup_dist_env_and_memory()


@pytest.fixture(scope="module")
def alone():
    with processes("qwen3"):
        yield


def model_of(path, attends=False, **settings):
    from vllm.model_executor.layers import rotary_embedding
    from vllm.model_executor.model_loader import get_model

    # Models share what they turn by, and this one may be put on the device.
    rotary_embedding._ROPE_DICT.clear()
    config = config_of(path, **settings)
    with set_current_vllm_config(config):
        out = get_model(vllm_config=config)
    for layer in () if attends else out.model.layers:
        layer.self_attn.attn = Alone()
    return out


@pytest.fixture
def gpu(monkeypatch, alone):
    with gpu_double.machine(monkeypatch) as ledger, torch.no_grad():
        yield ledger


class Runner:
    """What vLLM's model runners have of adapters: its own mixin, over a model on the device; `plain` has what to expect.

    `graphs`: of an engine that captures graphs, by vLLM's default.
    """

    def __init__(self, monkeypatch, kind, graphs=False, **settings) -> None:
        from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin
        from xorz.vllm import manager

        base = models.base(kind, engines.FOLDER)
        self.config = config_of(base, **settings)
        if graphs:
            with_graphs(self.config)
        # Compiled it is nowhere here.
        model = model_of(
            base, compilation_config={"splitting_ops": self.config.compilation_config.splitting_ops}
        )
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

    def captured(self, left_out=None):
        """A graph of a step, taken as vLLM takes it: with its adapters for warming up, which change nothing.

        `left_out`: in pieces, without ops of these names.
        """
        import numpy as np

        every = np.ones(ROWS, dtype=np.int32)
        with self.mixin.maybe_dummy_run_with_lora(
            self.mixin.lora_config, every, every, num_active_loras=self.mixin.lora_config.max_loras
        ):
            self.step()
            with Graph() if left_out is None else Pieces(left_out) as graph:
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
