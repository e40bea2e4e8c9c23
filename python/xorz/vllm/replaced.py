"""When the base is replaced while an engine runs: `reload_weights`, and any weight transfer.

What was computed from the old words must not be taken for the new ones': keys and values in the prefix cache and of requests
that run, vectors that were copied, proofs that the model holds the checkpoint's words, and tenants, which are differences
from them. So in the engine's process requests of tenants end (they are aborted, which their clients are told), others are
computed anew from their first token, and the cache is empty; in the workers nothing is resident or proved any more; in the
API server the tenants' names are free, and are named in the log. Whoever still asks for one gets an error: a package
that does not fit the new base ends its own request, not the engine.
"""

import asyncio
import functools
from typing import Any

from vllm.logger import init_logger

from . import layers
from .packages import split_name

logger = init_logger("vllm.xorz")

_REPLACING = ("reload_weights", "finish_weight_update", "reset_weights")
"""What vLLM has its workers do, that replaces the base."""

_LOOK_SECONDS = 0.25
"""So soon it is noticed that an engine has died."""


def install() -> None:
    """Take hold of the places where vLLM's processes replace a base, and learn that it was."""
    from vllm.v1.engine import async_llm, core, llm_engine
    from vllm.v1.worker import lora_model_runner_mixin, worker_base

    runner = lora_model_runner_mixin.LoRAModelRunnerMixin
    runner.reset_lora_state = _in_worker(runner.reset_lora_state)
    worker_base.WorkerBase.xorz_base_replaced = _base_replaced
    worker_base.WorkerBase.xorz_changed = _changed
    core.EngineCore.collective_rpc = _in_engine(core.EngineCore.collective_rpc)
    core.EngineCore.add_request = _admitting(core.EngineCore.add_request)
    llm_engine.LLMEngine.add_request = _taking_back(llm_engine.LLMEngine.add_request)
    llm_engine.LLMEngine.collective_rpc = _in_one_process(llm_engine.LLMEngine.collective_rpc)
    async_llm.AsyncLLM.collective_rpc = _in_server(async_llm.AsyncLLM.collective_rpc)


def ours(vllm_config: Any) -> bool:
    """Whether an engine serves packages, or has its base updated by them."""
    transfer = getattr(vllm_config, "weight_transfer_config", None)
    return isinstance(vllm_config.quant_config, layers.XorzConfig) or (
        transfer is not None and transfer.backend == "xorz"
    )


def _forget(runner: Any) -> None:
    from .manager import XorzWorkerManager

    found = getattr(runner, "lora_manager", None)
    if isinstance(found, XorzWorkerManager):
        found.base_replaced()
    sync = getattr(runner.get_model(), "xorz_sync", None)
    if sync is not None:
        sync.base_replaced()


def _in_worker(plain: Any) -> Any:
    """vLLM calls this after both kinds of replacement, whether it serves adapters or not."""

    @functools.wraps(plain)
    def reset_lora_state(self: Any) -> None:
        plain(self)
        _forget(self)

    return reset_lora_state


def _base_replaced(self: Any, by: str) -> bool:
    """Of every worker, after a replacement that failed or told nobody: whether words may have changed all the same."""
    if _changed(self, by):
        _forget(self.model_runner)
        return True
    # As it was. vLLM leaves the session open that failed at its end.
    self._weight_update_active = False
    self.weight_transfer_engine.reset_weight_update_target()
    return False


def _in_engine(plain: Any) -> Any:
    @functools.wraps(plain)
    def collective_rpc(
        self: Any,
        method: Any,
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if method == "xorz_forget":
            # Whoever asks for it again has it loaded before the request is let in, as at first.
            self.__dict__.setdefault("xorz_known", set()).difference_update(args)
        if method not in _REPLACING or not ours(self.vllm_config):
            return plain(self, method, timeout, args, kwargs)
        try:
            out = plain(self, method, timeout, args, kwargs)
        except BaseException:
            if any(plain(self, "xorz_base_replaced", None, (method,))):
                _start_anew(self)
            raise
        if method == "reset_weights":  # vLLM's own checker; it tells nobody
            plain(self, "xorz_base_replaced", None, (method,))
        _start_anew(self)
        if method == "finish_weight_update" and self.vllm_config.weight_transfer_config.backend == "xorz":
            self.set_weight_version(plain(self, "xorz_version")[0])
        return out

    return collective_rpc


def _start_anew(core: Any) -> None:
    """Nothing that the old base computed is used again, and nobody is answered by half of each."""
    from vllm.v1.request import RequestStatus

    core.xorz_known = set()
    scheduler = core.scheduler
    tenants = [r.request_id for r in scheduler.requests.values() if _tenant(r) is not None]
    if tenants:
        names = sorted({split_name(scheduler.requests[r].lora_request.lora_name)[0] for r in tenants})
        logger.warning(
            "xorz: the base was replaced; %d requests of the tenants %s end here",
            len(tenants),
            ", ".join(names),
        )
        ended = scheduler.finish_requests(tenants, RequestStatus.FINISHED_ABORTED)
        if hasattr(core, "_send_abort_outputs"):
            core._send_abort_outputs(ended)
    core.reset_prefix_cache(reset_running_requests=True, reset_connector=True)


def _tenant(request: Any) -> str | None:
    """The adapter's name of a request to a tenant."""
    lora = request.lora_request
    return lora.lora_name if lora is not None and split_name(lora.lora_name)[1] is not None else None


def _admitting(plain: Any) -> Any:
    """An adapter that this engine has not met is loaded before its request is let in, not in the middle of a step."""

    @functools.wraps(plain)
    def add_request(self: Any, request: Any, request_wave: int = 0) -> None:
        adapter = _tenant(request)
        if adapter is not None and isinstance(self.vllm_config.quant_config, layers.XorzConfig):
            known = self.__dict__.setdefault("xorz_known", set())
            if adapter not in known:
                try:
                    self.model_executor.add_lora(request.lora_request)
                except Exception as error:
                    if not hasattr(self, "_send_error_outputs_to_client"):
                        raise
                    logger.error("xorz: request %s is refused: %s", request.request_id, error)
                    self._send_error_outputs_to_client([request.request_id], request.client_index)
                    return
                known.add(adapter)
        plain(self, request, request_wave)

    return add_request


def _taking_back(plain: Any) -> Any:
    """An engine in this process raises where it does not let a request in; nobody may wait for that one's answer."""

    @functools.wraps(plain)
    def add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        states = self.output_processor.request_states
        before = set(states)
        try:
            return plain(self, *args, **kwargs)
        except BaseException:
            self.output_processor.abort_requests([r for r in states if r not in before], internal=True)
            raise

    return add_request


def _in_one_process(plain: Any) -> Any:
    """Where the engine is in this process nothing is sent when it ends requests; nobody may wait for their answers."""

    @functools.wraps(plain)
    def collective_rpc(self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return plain(self, method, *args, **kwargs)
        finally:
            core = getattr(self.engine_core, "engine_core", None)
            if method in _REPLACING and core is not None and ours(self.vllm_config):
                states = self.output_processor.request_states
                ended = [r for r, s in states.items() if s.lora_name and r not in core.scheduler.requests]
                self.output_processor.abort_requests(ended, internal=True)

    return collective_rpc


def _in_server(plain: Any) -> Any:
    """Names of tenants that are no more: clients get 404 for them, as after an unload."""

    @functools.wraps(plain)
    async def collective_rpc(self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        if not ours(self.vllm_config):
            return await plain(self, method, *args, **kwargs)
        if method not in _REPLACING:
            return await _answer(self, plain(self, method, *args, **kwargs))
        try:
            out = await _answer(self, plain(self, method, *args, **kwargs))
        except Exception:
            if not self.errored and any(await _answer(self, plain(self, "xorz_changed", None, (method,)))):
                _unload_all(self)
            raise
        _unload_all(self)
        return out

    return collective_rpc


async def _answer(client: Any, call: Any) -> Any:
    """What the engine says, or that it has died: nobody answers a call that it was given before, and the other engines of a
    trainer that waits for that would serve another version meanwhile.
    """
    task = asyncio.ensure_future(call)
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=_LOOK_SECONDS)
            if client.errored and not task.done():
                raise client.dead_error
        return task.result()
    finally:
        task.cancel()


def _changed(self: Any, by: str) -> bool:
    """Of every worker: whether a replacement that failed may have changed words."""
    took_back = getattr(getattr(self, "weight_transfer_engine", None), "took_back", False)
    return by != "finish_weight_update" or not took_back


def _unload_all(client: Any) -> None:
    models = getattr(client, "xorz_models", None)
    served = models.lora_requests if models is not None else {}
    gone = [name for name, lora in served.items() if split_name(lora.lora_name)[1] is not None]
    for name in gone:
        del served[name]
    if gone:
        logger.warning(
            "xorz: the base was replaced; %s are no fine-tunes of the new one, and are unloaded",
            ", ".join(gone),
        )
