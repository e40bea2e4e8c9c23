"""vLLM serves packages: `--quantization xorz --enable-lora`, and a tenant is an adapter whose path is a
`.xorz` file.

vLLM finds `register` by itself, through its entry point `vllm.general_plugins`; see docs/vllm.md. `import
xorz` imports nothing of this.
"""

import hashlib
from typing import TYPE_CHECKING, Any

from ..sources import located
from .packages import digest, named

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

__all__ = ["digest", "load", "register", "request", "unload"]

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
