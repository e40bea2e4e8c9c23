"""vLLM serves packages: `--quantization xorz --enable-lora`, and a tenant is an adapter whose path is a
`.xorz` file.

vLLM finds `register` by itself, through its entry point `vllm.general_plugins`; see docs/vllm.md. `import
xorz` imports nothing of this.
"""

import hashlib
from typing import TYPE_CHECKING, Any

from ..sources import located
from . import policies
from .packages import digest, named

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

__all__ = ["digest", "load", "newest", "publish", "register", "request", "unload"]

_installed = False


def register() -> None:
    """Called by vLLM in each of its processes, more than once in some.

    Where this vLLM is not one that xorz knows, it is left alone, and says which hook has moved when it is
    started with `--quantization xorz`.
    """
    global _installed
    if _installed:
        return
    _installed = True
    from . import hooks

    try:
        hooks.check()
    except RuntimeError as error:
        hooks.refuse(error)
        return
    from . import patches

    patches.install()


def request(name: str, path: Any) -> "LoRARequest":
    """The `lora_request` of a package, for `LLM.generate` and `AsyncLLM.generate`.

    Args:
        name: of the tenant; its name for the engine ends in the package's digest.
        path: of the package, or what else `xorz.sources.located` takes (a folder with one, a repository of the Hub, an address
            of fsspec). What it holds now is what the request stands for, whatever is published there
            later.

    Raises:
        OSError: it cannot be read; ValueError: it is damaged. Whether it fits the base is seen by `load`.
    """
    from vllm.lora.request import LoRARequest

    path = located(path)
    adapter = named(name, digest(path))
    number = int.from_bytes(hashlib.sha256(adapter.encode()).digest()[:4], "big") % (2**31 - 1) + 1
    return LoRARequest(adapter, number, str(path))


def load(llm: Any, name: str, path: Any) -> "LoRARequest":
    """As `request`, and loads it into an engine (`vllm.LLM`), which stays as it was where that fails.

    Raises:
        OSError, ValueError: as `request`; RuntimeError or ValueError of vLLM's, which says why it does not
            fit the base, or what of it cannot be served.
    """
    from .layers import XorzConfig
    from .packages import what_is

    config = llm.llm_engine.vllm_config
    if not isinstance(config.quant_config, XorzConfig) or config.lora_config is None:
        raise ValueError(
            f"xorz: {name!r}: the engine was started without quantization='xorz' and enable_lora=True, which packages need"
        )
    why = what_is(path)
    if why is not None:
        raise ValueError(f"xorz: {name!r} ({path}): {why}")
    out = request(name, path)
    llm.llm_engine.add_lora(out)
    return out


def unload(llm: Any, lora_request: "LoRARequest") -> None:
    """Take a tenant out of an engine (`vllm.LLM`): its memory is free, and its package closed.

    Call it when no request of the tenant runs. The request can be loaded again with `load`, and means another package
    then if one was published under its path.
    """
    llm.collective_rpc("xorz_forget", args=(lora_request.lora_name,))


def publish(llm: Any, name: str, folder: Any, version: int | None = None) -> "LoRARequest":
    """Serve a version of a policy beside those before it: the tenant `NAME-vVERSION`, which `newest` gives from now on.

    Requests that run keep their version. Those that are older than the setting `max_staleness` allows leave when no request
    needs them any more: with the next call, if one does now.

    Args:
        llm: as in `load`.
        name: of the policy.
        folder: of `xorz.Versions` whose version was published with `as_tenant`; its base is the one that the engine has loaded.
        version: its number; None is the newest.

    Raises:
        As `load`; ValueError: `folder` is none, or the version has no package against the base. The policy is as before then.
    """
    from .manager import Settings

    found = policies.found(folder, version)
    if found is None:
        raise ValueError(f"{folder} is no folder of versions")
    number, path = found
    versions = _policies(llm).setdefault(name, {})
    out = load(llm, policies.named(name, number), path)
    gone = llm.__dict__.setdefault("xorz_leaving", {})
    names = {policies.named(name, n): n for n in versions}
    allowed = Settings.of(llm.llm_engine.vllm_config).max_staleness
    for old in policies.leaving(names, name, number, allowed):
        lora = versions.pop(names[old])
        gone[lora.lora_name] = lora
    replaced = versions.pop(number, None)
    if replaced is not None:
        gone[replaced.lora_name] = replaced
    versions[number] = out
    gone.pop(out.lora_name, None)
    running = {state.lora_name for state in llm.llm_engine.output_processor.request_states.values()}
    for adapter in [adapter for adapter in gone if adapter not in running]:
        unload(llm, gone.pop(adapter))
    return out


def newest(llm: Any, name: str) -> "LoRARequest":
    """The version of a policy that was published last; KeyError if none was."""
    versions = _policies(llm).get(name)
    if not versions:
        raise KeyError(f"no version of {name!r} was published to this engine")
    return versions[next(reversed(versions))]


def _policies(llm: Any) -> "dict[str, dict[int, LoRARequest]]":
    """By policy, the versions that may be asked for; the last one comes last."""
    return llm.__dict__.setdefault("xorz_policies", {})
