"""Tenants that nobody has loaded are found by vLLM's resolvers: in folders of packages, and in repositories of the Hub.

vLLM's own two (`lora_filesystem_resolver`, `lora_hf_hub_resolver`) know folders of LoRA adapters only. In an engine of xorz's
they take a folder that holds a package, too. A name comes from a client: it leads into the folder, or nowhere.
"""

import asyncio
import os
from pathlib import Path
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry
from vllm.plugins.lora_resolvers.filesystem_resolver import FilesystemResolver

from ..sources import SUFFIX, packages
from . import request

FOLDER = "XORZ_VLLM_PACKAGES"
"""Environment variable: a folder whose `alice.xorz`, or the package in whose folder `alice`, is loaded when a client first asks
for the model `alice`."""

_LONGEST_PART, _LONGEST = 255 - len(SUFFIX), 1024
"""Bytes, of a file's name and of a path below a folder: no file system knows longer ones."""


class PackageResolver(LoRAResolver):
    """Finds `NAME.xorz`, or the one package in the folder `NAME`, in a folder; `team/alice` in its folder `team`."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Of the packages in `folder`, which is looked into at each request, and may be missing until then."""
        self.folder = Path(folder)

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The tenant's request, or None if there is no such package or folder.

        Raises:
            OSError, ValueError: there is one, and it is damaged, or one of several in its folder.
        """
        if not leads_into_a_folder(lora_name):
            return None
        return await asyncio.to_thread(_request, lora_name, self.folder / lora_name)


class _TakesPackages:
    """What one of vLLM's resolvers of folders does before it looks for a LoRA adapter."""

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        if not leads_into_a_folder(lora_name):
            return None
        return await super().resolve_lora(base_model_name, lora_name)

    async def _get_lora_req_from_path(
        self, lora_name: str, lora_path: str, base_model_name: str
    ) -> LoRARequest | None:
        found = await asyncio.to_thread(_request, lora_name, Path(lora_path))
        # Which base a package fits is seen by its digests, not by what its folder calls the base.
        return found or await super()._get_lora_req_from_path(lora_name, lora_path, base_model_name)


def leads_into_a_folder(name: str) -> bool:
    """Whether a path of this name below a folder stays there, and is none that files hide behind."""
    # Surrogates, which no file's name has, are not printable.
    return (
        name.isprintable()
        and len(os.fsencode(name)) <= _LONGEST
        and all(
            part and not part.startswith(".") and len(os.fsencode(part)) <= _LONGEST_PART
            for part in name.split("/")
        )
    )


def _request(name: str, path: Path) -> LoRARequest | None:
    """Of the package beside `path`, `path.xorz`, or in it; None if there is neither."""
    file = path.with_name(path.name + SUFFIX)
    if file.is_file():
        return request(name, file)
    if path.is_dir() and packages(os.listdir(path)):
        return request(name, path)
    return None


def register() -> None:
    """Tell vLLM of the folder of packages, if the environment names one."""
    folder = os.environ.get(FOLDER)
    if folder:
        LoRAResolverRegistry.register_resolver("xorz", PackageResolver(folder))


def taking_packages(resolvers: list[LoRAResolver]) -> list[LoRAResolver]:
    """The same for an engine of xorz's, in their order; what others have written may give packages as it is."""
    return [_changed(r) if isinstance(r, FilesystemResolver) else r for r in resolvers]


def without_packages(resolvers: list[LoRAResolver]) -> list[LoRAResolver]:
    """Those for an engine that serves no packages."""
    return [r for r in resolvers if not isinstance(r, PackageResolver)]


def _changed(resolver: FilesystemResolver) -> Any:
    """A copy whose class looks for packages first; vLLM's registry keeps the original, for other engines."""
    kind = type(f"Xorz{type(resolver).__name__}", (_TakesPackages, type(resolver)), {})
    out = kind.__new__(kind)
    out.__dict__.update(resolver.__dict__)
    return out
