"""Promise: xorz takes hold of vLLM where it says it does, once, and a release that moved one of these places is told so."""

import subprocess
import sys

import pytest
import xorz.vllm
from xorz.vllm import hooks


def test_register_may_be_called_again():
    xorz.vllm.register()
    from vllm.v1.worker import lora_model_runner_mixin

    first = lora_model_runner_mixin.LRUCacheWorkerLoRAManager
    xorz.vllm.register()
    assert lora_model_runner_mixin.LRUCacheWorkerLoRAManager is first


def test_import_xorz_imports_nothing_of_vllm():
    code = "import sys, xorz; print([m for m in sys.modules if m.split('.')[0] == 'vllm' or m.startswith('xorz.vllm')])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )


def test_this_vllm_is_known():
    hooks.check()


@pytest.mark.parametrize("module, name, wanted", hooks.HOOKS, ids=lambda v: v if isinstance(v, str) else "")
def test_a_hook_that_moved_is_named(module, name, wanted, monkeypatch):
    import importlib

    parts = name.split(".")
    owner = importlib.import_module(module)
    for part in parts[:-1]:
        owner = owner[part] if isinstance(owner, dict) else getattr(owner, part)
    if parts[-2:-1] == ["native"] or isinstance(owner, dict):
        pytest.skip("not an attribute that can be taken away")
    monkeypatch.setattr(hooks, "HOOKS", [(module, f"{name}_moved", wanted)])
    with pytest.raises(RuntimeError, match=rf"{module} has no {name}_moved"):
        hooks.check()
    if wanted:
        monkeypatch.setattr(hooks, "HOOKS", [(module, name, (*wanted[:-1], "other"))])
        with pytest.raises(RuntimeError, match=rf"{name} takes \(.*\), not \(.*other\)"):
            hooks.check()


def test_a_prefix_cache_that_ignores_names_is_refused(monkeypatch):
    from vllm.v1.core import kv_cache_utils

    monkeypatch.setattr(
        kv_cache_utils, "_gen_lora_extra_hash_keys", lambda request: [request.lora_request.lora_path]
    )
    with pytest.raises(RuntimeError, match="does not tell adapters apart by their names"):
        hooks.check()


def test_an_unknown_vllm_is_left_alone_and_says_why():
    code = (
        "import xorz.vllm; from xorz.vllm import hooks\n"
        "hooks.HOOKS = [('vllm.v1.worker.worker_base', 'Gone', ())]\n"
        "xorz.vllm.register()\n"
        "import sys; print('xorz.vllm.patches' in sys.modules)\n"
        "from vllm.model_executor.layers.quantization import get_quantization_config\n"
        "try: get_quantization_config('xorz').from_config({})\n"
        "except RuntimeError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()[-2:]
    assert first == "False" and "worker_base has no Gone" in second


def test_answers_of_several_workers_stay_in_step():
    """All refuse the first call; what the second one gives are its own answers."""
    from collections import deque
    from types import SimpleNamespace

    xorz.vllm.register()
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor, WorkerProc
    from xorz.vllm.layers import XorzConfig

    good, bad = WorkerProc.ResponseStatus.SUCCESS, WorkerProc.ResponseStatus.FAILURE

    class Queue(deque):
        def dequeue(self, timeout=None):
            return self.popleft()

        def enqueue(self, message):
            self.append(message)

    executor = SimpleNamespace(
        is_failed=False,
        rpc_broadcast_mq=Queue(),
        response_mqs=[Queue([(bad, f"no, says {rank}"), (good, rank)]) for rank in range(3)],
        futures_queue=deque(),
        vllm_config=SimpleNamespace(quant_config=XorzConfig(), weight_transfer_config=None),
    )
    queues = executor.response_mqs
    with pytest.raises(RuntimeError, match="no, says 0"):
        MultiprocExecutor.collective_rpc(executor, "first")
    assert executor.response_mqs is queues
    assert MultiprocExecutor.collective_rpc(executor, "second") == [0, 1, 2]
