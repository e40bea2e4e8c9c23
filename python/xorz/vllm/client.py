"""The trainer's side of `xorz.vllm.sync`: one call brings every engine to a version, or none. It imports nothing of vLLM."""

import base64
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

_POLL_SECONDS = 0.02
_WAIT_SECONDS = 0.5


class UpdateError(RuntimeError):
    """An engine has not taken an update; the message says which engine, and why."""


class _Served:
    """An engine behind vLLM's OpenAI server, which was started with VLLM_SERVER_DEV_MODE=1."""

    def __init__(self, address: str, timeout: float) -> None:
        self.name, self._address, self._timeout = address, address.rstrip("/"), timeout

    def post(self, path: str, **body: Any) -> Any:
        request = urllib.request.Request(
            f"{self._address}/{path}", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                return _content(answer.read())
        except urllib.error.HTTPError as error:
            text = error.read().decode("utf-8", "replace")
            raise UpdateError(f"{self.name}: {path}: {error.code} {_message(text)}") from None
        except OSError as error:
            raise UpdateError(f"{self.name}: {path}: {error}") from None

    def workers(self, method: str, **kwargs: Any) -> list[Any]:
        answer = self.post("collective_rpc", method=f"xorz_{method}", kwargs=kwargs)
        # The route turns what is neither a dict nor None into text.
        return answer["results"] if answer is not None else []

    def init(self, info: dict[str, Any], timeout: float) -> None:
        self._wait_until_it_answers(timeout)
        self.post("init_weight_transfer_engine", init_info=info)

    def _wait_until_it_answers(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while True:
            try:
                with urllib.request.urlopen(f"{self._address}/health", timeout=self._timeout):
                    return
            except OSError as error:
                if time.monotonic() > deadline:
                    raise UpdateError(
                        f"{self.name}: the engine has not answered within {timeout:g} s: {error}"
                    ) from None
            time.sleep(_WAIT_SECONDS)

    def start(self) -> None:
        self.post("start_weight_update")

    def receive(self, info: dict[str, Any]) -> None:
        self.post("update_weights", update_info=info)

    def finish(self) -> None:
        self.post("finish_weight_update")

    def tenants(self) -> set[str]:
        try:
            with urllib.request.urlopen(f"{self._address}/v1/models", timeout=self._timeout) as answer:
                return {card["id"] for card in json.load(answer)["data"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UpdateError(f"{self.name}: v1/models: {error}") from None

    def load(self, name: str, path: str) -> None:
        self.post("v1/load_lora_adapter", lora_name=name, lora_path=path, load_inplace=True)

    def unload(self, name: str) -> None:
        self.post("v1/unload_lora_adapter", lora_name=name)


class _Here:
    """An engine in this process: `vllm.LLM`."""

    def __init__(self, llm: Any) -> None:
        self.name, self._llm = "the engine", llm

    def _call(self, method: str, **kwargs: Any) -> list[Any]:
        try:
            return self._llm.collective_rpc(method, kwargs=kwargs)
        except Exception as error:
            raise UpdateError(f"{self.name}: {method}: {error}") from error

    def workers(self, method: str, **kwargs: Any) -> list[Any]:
        return self._call(f"xorz_{method}", **kwargs)

    def init(self, info: dict[str, Any], _timeout: float) -> None:
        self._call("init_weight_transfer_engine", init_info=info)

    def start(self) -> None:
        self._call("start_weight_update")

    def receive(self, info: dict[str, Any]) -> None:
        self._call("update_weights", update_info=info)

    def finish(self) -> None:
        self._call("finish_weight_update")


def _content(answer: bytes) -> Any:
    """Of some routes it is JSON, of some a sentence."""
    try:
        return json.loads(answer or b"null")
    except ValueError:
        return answer.decode("utf-8", "replace")


def _message(text: str) -> str:
    """What an error page says, where it is vLLM's."""
    try:
        return json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return text[:2000]


def _each(engines: Any, timeout: float) -> list[Any]:
    given = engines if isinstance(engines, Sequence) and not isinstance(engines, str) else [engines]
    return [_Served(e, timeout) if isinstance(e, str) else _Here(e) for e in given]


def init(
    engines: Any, *, keep: int = 1, trust: str | None = None, start: float = 600.0, timeout: float = 600.0
) -> None:
    """Make engines ready to be updated, once they answer; nothing but their words' names and ways back is forgotten by it.

    Args:
        engines: as in `update`.
        keep: so many versions before the newest they keep the way back to.
        trust: "sha256" has them take no package that does not keep the sha256 of what it is a step from; None leaves that to
            how they were started.
        start: seconds that a server is waited for, until it answers.
        timeout: seconds, of each request.

    Raises:
        UpdateError: an engine does not answer, was not started for updates of xorz, or refuses (it is named).
    """
    asked = {"keep": keep} | ({"trust": trust} if trust is not None else {})
    for engine in _each(engines, timeout):
        engine.init(asked, start)


def pause(engines: str | Sequence[str], mode: str = "wait", *, timeout: float = 600.0) -> None:
    """Have servers begin no step until `resume`; requests that come meanwhile wait there.

    Args:
        engines: addresses, as in `update`.
        mode: what becomes of requests that run, by vLLM's words: "wait" lets them end, "keep" lets them go on after `resume`,
            "abort" ends them.
        timeout: seconds, of each request.

    Raises:
        UpdateError: an engine has refused or is lost; those before it are resumed.
    """
    done: list[str] = []
    for address in [engines] if isinstance(engines, str) else engines:
        try:
            _Served(address, timeout).post(f"pause?mode={mode}")
        except UpdateError:
            with suppress(UpdateError):
                resume(done, timeout=timeout)
            raise
        done.append(address)


def resume(engines: str | Sequence[str], *, timeout: float = 600.0) -> None:
    """Have servers go on that were paused. UpdateError: one could not; the others were told all the same."""
    wrong: list[UpdateError] = []
    for address in [engines] if isinstance(engines, str) else engines:
        try:
            _Served(address, timeout).post("resume")
        except UpdateError as error:
            wrong.append(error)
    if wrong:
        raise wrong[0]


def update(
    engines: Any,
    source: Any = None,
    version: str | int | None = None,
    *,
    package: bytes | None = None,
    digest: str | None = None,
    timeout: float = 600.0,
) -> list[dict[str, Any]]:
    """Bring engines to a version, all of them or none.

    Each reads and checks the update beside the requests that it serves; when all have, each changes its words between two
    steps. If one fails then, those before it are rolled back.

    Args:
        engines: one or several: `vllm.LLM`, or addresses of servers (`http://host:8000`) with VLLM_SERVER_DEV_MODE=1, started
            with `--weight-transfer-config '{"backend": "xorz"}'`.
        source: a package's path or address, or a folder of `xorz.Versions`, as the engines see it.
        version: of a folder, which; None is the newest. Of a package, what to call it.
        package: instead of `source`, the package itself, which is sent along.
        digest: what `xorz.vllm.digest(package)` gave, to be sure of the file.
        timeout: seconds, of each request, and of reading.

    Returns:
        For each engine the report of its first worker: version, bytes, changed, words, and the seconds of fetch, check, apply.

    Raises:
        UpdateError: an engine has refused or failed; all serve what they served before. If that is not so the message says it.
    """
    info: dict[str, Any] = {"version": version, "digest": digest}
    if package is not None:
        info["package"] = base64.b64encode(package).decode()
    if source is not None:
        info["source"] = str(Path(source).absolute()) if "://" not in str(source) else str(source)
    return _bring(engines, info, timeout)


def rollback(
    engines: Any, version: str | int | None = None, *, timeout: float = 600.0
) -> list[dict[str, Any]]:
    """Bring engines back to a version that they served lately, the one before if None; the rest as `update`."""
    return _bring(engines, {"rollback": True, "version": version}, timeout)


def _bring(engines: Any, info: dict[str, Any], timeout: float) -> list[dict[str, Any]]:
    each = _each(engines, timeout)
    info = {key: value for key, value in info.items() if value is not None}
    for engine in each:
        engine.workers("sync_prepare", update_info=info)
    for engine in each:
        _prepared(engine, timeout)
    open_: list[Any] = []
    try:
        for engine in each:
            engine.start()
            open_.append(engine)
            engine.receive(info)
    except UpdateError:
        for engine in open_:
            engine.workers("sync_abort")
        raise
    done: list[Any] = []
    for engine in each:
        try:
            engine.finish()
        except UpdateError as error:
            for other in each[len(done) + 1 :]:
                other.workers("sync_abort")
            _undo(done, error)
            raise
        done.append(engine)
    return [engine.workers("sync_report")[0] for engine in each]


def publish(engines: Any, name: str, source: Any, version: int, *, timeout: float = 600.0) -> str:
    """Serve a version beside those before it: the tenant `NAME-vVERSION`, which `name` means from now on. No request waits.

    Each engine first loads the version; where one cannot, no engine's `name` means another version than before, and it is
    unloaded from the others. Answers say in `model` which version they are of.

    Args:
        engines: addresses of servers that were started with `--enable-lora` and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1.
        name: of the policy. How many versions before the newest can be asked for is each engine's setting `max_staleness`.
        source: the folder of `xorz.Versions`, as the engines see it, whose version was published with `as_tenant`.
        version: its number.
        timeout: seconds, of each request.

    Returns:
        The name of the version's tenant.

    Raises:
        UpdateError: an engine has refused, or was lost when all had the version; those before it serve it as `name` then.
    """
    given = [engines] if isinstance(engines, str) else list(engines)
    each = [_Served(address, timeout) for address in given]
    path, tenant = f"{Path(source).absolute()}@{version}", f"{name}-v{version}"
    fresh: list[Any] = []
    moved: list[Any] = []
    try:
        for engine in each:
            known = tenant in engine.tenants()
            engine.load(tenant, path)
            if not known:
                fresh.append(engine)
        for engine in each:
            engine.load(name, path)
            moved.append(engine)
    except UpdateError:
        for engine in fresh if not moved else ():
            with suppress(UpdateError):
                engine.unload(tenant)
        raise
    return tenant


def _prepared(engine: Any, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while True:
        answers = [None if a in (None, "None") else a for a in engine.workers("sync_prepared")]
        # With tensor parallelism nothing is: the processes do it when they receive the update.
        wrong = [a for a in answers if a and a != "nothing is being prepared"]
        if wrong:
            raise UpdateError(f"{engine.name}: {wrong[0]}")
        if None not in answers:
            return
        if time.monotonic() > deadline:
            raise UpdateError(f"{engine.name}: the update was not read within {timeout:g} s")
        time.sleep(_POLL_SECONDS)


def _undo(done: list[Any], cause: UpdateError) -> None:
    for engine in done:
        try:
            engine.start()
            engine.receive({"rollback": True})
            engine.finish()
        except UpdateError as error:
            raise UpdateError(
                f"{cause}; {engine.name} has taken the update before, and could not be rolled back: {error}"
            ) from error
