"""The OpenAI server: clients say `alice`, and load her package by its path; the engine knows her as
`alice@xorz-DIGEST`.

A package is looked at here, then read and checked against the base by the workers, in a thread beside the
engine's loop, which goes on serving; only what has turned out to be whole and to fit is handed to the engine.
"""

import asyncio
import functools
from http import HTTPStatus
from typing import Any

from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest

from . import layers, manager, policies, request, resolvers
from .packages import is_package, split_name, what_is

logger = init_logger("vllm.xorz")

_POLL_SECONDS = 0.02

_MOST_AT_ONCE = 16
"""Packages that are read, or wait to be taken by the engine; other clients wait until one has been."""

GRACE_SECONDS = 10.0
"""A request that was let in before its tenant was unloaded may not have reached the engine yet."""


def install() -> None:
    """Take hold of the routes that load adapters and that show their names."""
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels as Models

    Models.__init__ = _known_to_its_engine(Models.__init__)
    Models.load_lora_adapter = _loading(Models.load_lora_adapter)
    Models.unload_lora_adapter = _unloading(Models.unload_lora_adapter)
    Models.model_name = _plain_name(Models.model_name)
    Models.show_available_models = _plain_names(Models.show_available_models)
    Models.resolve_lora = _resolving(Models.resolve_lora)


async def prefetch(engine: Any, adapter: str, path: str) -> None:
    """Have every worker read a package, beside its loop; ValueError with what is wrong with it."""
    await engine.collective_rpc("xorz_prefetch", args=(adapter, path))
    while True:
        answers = await engine.collective_rpc("xorz_prefetched", args=(adapter,))
        wrong = [answer for answer in answers if answer]
        if wrong:
            raise ValueError(wrong[0])
        if all(answer == "" for answer in answers):
            return
        await asyncio.sleep(_POLL_SECONDS)


def _ours(self: Any) -> bool:
    config = getattr(self.engine_client, "vllm_config", None)
    return isinstance(getattr(config, "quant_config", None), layers.XorzConfig)


def _known_to_its_engine(plain: Any) -> Any:
    """What clients may ask for changes where the engine's base does; see `replaced`."""

    @functools.wraps(plain)
    def init(self: Any, engine_client: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, engine_client, *args, **kwargs)
        fitting = resolvers.taking_packages if _ours(self) else resolvers.without_packages
        self.lora_resolvers = fitting(self.lora_resolvers)
        engine_client.xorz_models = self
        self.xorz_loading = asyncio.Semaphore(_MOST_AT_ONCE)
        self.xorz_leaving = set()
        self.xorz_arriving = []

    return init


def _loading(plain: Any) -> Any:
    @functools.wraps(plain)
    async def load_lora_adapter(self: Any, request: Any, base_model_name: str | None = None) -> Any:
        name = request.lora_name
        why = _misplaced(self, request.lora_path)
        if why is not None:
            return _error(f"xorz: {name!r}: {why}", "BadRequestError", HTTPStatus.BAD_REQUEST)
        if not _ours(self):
            return await plain(self, request, base_model_name)
        try:
            found = await asyncio.to_thread(policies.found, request.lora_path)
        except (OSError, ValueError) as error:
            return _refused(name, error)
        if found is not None and not name.endswith(policies.named("", found[0])):
            return await _serve_policy(self, request, *found, base_model_name)
        async with self.lora_resolver_lock[name]:
            refused = await self._check_load_lora_adapter_request(request)
            try:
                if refused is not None:
                    again = await _is_served(self, name, request.lora_path)
                    return f"Success: LoRA adapter '{name}' is that already." if again else refused
                lora = await _load(self, name, request.lora_path)
            except Exception as error:
                return _refused(name, error)
            if base_model_name is not None and self.is_base_model(base_model_name):
                lora.base_model_name = base_model_name
            # With load_inplace: a new adapter takes the name; requests that run keep the old one.
            previous = self.lora_requests.get(name)
            self.lora_requests[name] = lora
            _let_go(self, previous)
            logger.info("xorz: loaded %r from %s as %s", name, request.lora_path, lora.lora_name)
            return f"Success: LoRA adapter '{name}' added successfully."

    return load_lora_adapter


async def _serve_policy(self: Any, request: Any, number: int, path: str, base_model_name: str | None) -> Any:
    """Load a version of a policy under its own name, have the policy's name mean it, and let go of those that are too old."""
    name = request.lora_name
    async with self.lora_resolver_lock[name]:
        refused = await self._check_load_lora_adapter_request(request)
        if refused is not None:
            return refused
        version = policies.named(name, number)
        wanted = request.model_copy(update={"lora_name": version, "lora_path": path, "load_inplace": True})
        answer = await self.load_lora_adapter(wanted, base_model_name)
        lora = self.lora_requests.get(version)
        if not isinstance(answer, str) or lora is None:
            return answer
        gone = [self.lora_requests.get(name)]
        self.lora_requests[name] = lora
        allowed = manager.Settings.of(self.engine_client.vllm_config).max_staleness
        for old in policies.leaving(self.lora_requests, name, number, allowed):
            gone.append(self.lora_requests.pop(old))
        for lora in {lora.lora_name: lora for lora in gone if lora is not None}.values():
            _let_go(self, lora)
        logger.info("xorz: %r is %r from now on", name, version)
        return f"Success: {name!r} is {version!r} from now on."


def _refused(name: str, error: Exception) -> Any:
    # vLLM shows no paths to clients; the name tells them which tenant is meant.
    if isinstance(error, OSError):
        return _error(f"xorz: {name!r}: {error}", "NotFoundError", HTTPStatus.NOT_FOUND)
    return _error(f"xorz: {name!r}: {error}", "BadRequestError", HTTPStatus.BAD_REQUEST)


def _misplaced(self: Any, path: Any) -> str | None:
    """Why this engine can do nothing with what lies there; None for what it may know."""
    if _ours(self):
        return what_is(path) if path else None
    if path and is_package(path):
        return "this is a xorz package, and the engine was started without --quantization xorz --enable-lora"
    return None


async def _is_served(self: Any, name: str, path: str) -> bool:
    """Whether a name means this very package. Two clients may have found nobody of that name at the same time, as Ray Serve LLM
    does for requests that come together: the second one has what it asked for.
    """
    served = self.lora_requests.get(name)
    if served is None or not path:
        return False
    return _is_same(served, await asyncio.to_thread(request, name, path))


def _is_same(one: LoRARequest, other: LoRARequest) -> bool:
    return (one.lora_name, one.lora_path) == (other.lora_name, other.lora_path)


async def _load(self: Any, name: str, path: str) -> LoRARequest:
    lora = await asyncio.to_thread(request, name, path)
    served = self.lora_requests.get(name)
    if served is not None and _is_same(served, lora):
        return served
    # Who forgets an adapter that had left before must not take what is read for this one.
    self.xorz_arriving.append(lora.lora_name)
    try:
        async with self.xorz_loading:
            await prefetch(self.engine_client, lora.lora_name, lora.lora_path)
            await self.engine_client.add_lora(lora)
    except BaseException:
        self.xorz_arriving.remove(lora.lora_name)
        _let_go(self, lora)
        raise
    self.xorz_arriving.remove(lora.lora_name)
    return lora


def _unloading(plain: Any) -> Any:
    @functools.wraps(plain)
    async def unload_lora_adapter(self: Any, request: Any) -> Any:
        lora = self.lora_requests.get(request.lora_name)
        answer = await plain(self, request)
        if lora is not None and _ours(self) and self.lora_requests.get(request.lora_name) is not lora:
            _let_go(self, lora)
        return answer

    return unload_lora_adapter


def _let_go(self: Any, lora: LoRARequest | None) -> None:
    """A name is nobody's or another's; its memory and its file follow when no name and no request needs them any more."""
    if lora is None or _is_wanted(self, lora):
        return
    task = asyncio.get_running_loop().create_task(_forget(self, lora))
    self.xorz_leaving.add(task)
    task.add_done_callback(self.xorz_leaving.discard)


def _is_wanted(self: Any, lora: LoRARequest) -> bool:
    """Whether a name means this adapter, or is about to."""
    served = any(other.lora_name == lora.lora_name for other in self.lora_requests.values())
    return served or lora.lora_name in self.xorz_arriving


async def _forget(self: Any, lora: LoRARequest) -> None:
    engine, quiet = self.engine_client, 0.0
    while quiet < GRACE_SECONDS:
        await asyncio.sleep(GRACE_SECONDS / 10)
        states = engine.output_processor.request_states.values()
        quiet = (
            0.0 if any(state.lora_name == lora.lora_name for state in states) else quiet + GRACE_SECONDS / 10
        )
        if _is_wanted(self, lora):
            return  # it was loaded again, or is being
    await engine.collective_rpc("xorz_forget", args=(lora.lora_name,))
    logger.info("xorz: %s is closed, and its memory is free", lora.lora_name)


def _resolving(plain: Any) -> Any:
    """A tenant that nobody has loaded is looked for by vLLM's resolvers, whose answer may be a package."""

    @functools.wraps(plain)
    async def resolve_lora(self: Any, lora_name: str) -> Any:
        if not _ours(self) or lora_name in self.lora_requests:
            return await plain(self, lora_name)
        refused = None
        for resolver in self.lora_resolvers:
            try:
                found = await resolver.resolve_lora(self.model_config.model, lora_name)
            except (OSError, ValueError) as error:
                refused = _error(f"xorz: {lora_name!r}: {error}", "BadRequestError", HTTPStatus.BAD_REQUEST)
                continue
            if found is None:
                continue
            wanted = LoadLoRAAdapterRequest(lora_name=lora_name, lora_path=found.lora_path)
            refused = await self.load_lora_adapter(wanted)
            # Another client's request may have loaded it first.
            if lora_name in self.lora_requests:
                return self.lora_requests[lora_name]
        return refused or _error(
            f"LoRA adapter {lora_name} does not exist", "NotFoundError", HTTPStatus.NOT_FOUND
        )

    return resolve_lora


def _error(message: str, kind: str, status: HTTPStatus) -> Any:
    from vllm.entrypoints.serve import create_error_response

    return create_error_response(message=message, err_type=kind, status_code=status)


def _plain_name(plain: Any) -> Any:
    @functools.wraps(plain)
    def model_name(self: Any, *args: Any, **kwargs: Any) -> str:
        return split_name(plain(self, *args, **kwargs))[0]

    return model_name


def _plain_names(plain: Any) -> Any:
    @functools.wraps(plain)
    async def show_available_models(self: Any) -> Any:
        out = await plain(self)
        if not _ours(self):
            return out
        names = list(self.lora_requests)
        # The same tenant may have two names, a policy's and that of its version.
        for name, card in zip(names, out.data[len(out.data) - len(names) :], strict=True):
            served, card.id = split_name(card.id)[0], name
            card.parent = card.parent if name == served else served
        return out

    return show_available_models
