"""Exact fine-tunes of one base model: one base in memory, a small lossless delta per fine-tune, computed on
directly.

`XorDeltaLinear` stands in for `nn.Linear`; `pack`, `unpack` and `restore` are for checkpoints; `diff` and
`apply_` for state_dicts in memory; the `delta_*` functions are the ops of `torch.ops.xorz`.
"""

import importlib
from typing import Any

from . import _torch as _torch  # first: it says in words that torch is missing

# isort: split
from . import _core
from ._core import DeltaInfo, delta_info
from ._grouped import delta_embedding, delta_linear_grouped, delta_linear_grouped_grad_input
from ._library import include_path, library_path
from ._ops import (
    cuda_status,
    delta_apply_,
    delta_check,
    delta_concat,
    delta_digest,
    delta_encode,
    delta_linear,
    delta_linear_grad_input,
    delta_restore,
    delta_slice,
)
from .attach import attach
from .checkpoint import inspect, load_deltas, pack, pack_fleet, restore, unpack, verify
from .diff import StateDelta, apply_, diff
from .linear import XorDeltaLinear
from .publisher import Publisher
from .tenants import Tenants
from .versions import Versions

__version__ = _core.version()

# What needs other libraries (transformers, huggingface_hub, torch.distributed) is imported when it is asked for.
_LATER = {
    "PublishVersions": "pretrained",
    "XorzColwiseParallel": "parallel",
    "XorzConfig": "pretrained",
    "XorzRowwiseParallel": "parallel",
    "from_pretrained": "pretrained",
    "push": "hub",
    "save_folder": "hub",
}


def __getattr__(name: str) -> Any:
    """What needs other libraries, from its module; AttributeError where there is none of that name."""
    if name not in _LATER:
        raise AttributeError(f"module 'xorz' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LATER[name]}", __name__), name)


__all__ = [
    "DeltaInfo",
    "PublishVersions",
    "Publisher",
    "StateDelta",
    "Tenants",
    "Versions",
    "XorDeltaLinear",
    "XorzColwiseParallel",
    "XorzConfig",
    "XorzRowwiseParallel",
    "apply_",
    "attach",
    "cuda_status",
    "delta_apply_",
    "delta_check",
    "delta_concat",
    "delta_digest",
    "delta_embedding",
    "delta_encode",
    "delta_info",
    "delta_linear",
    "delta_linear_grad_input",
    "delta_linear_grouped",
    "delta_linear_grouped_grad_input",
    "delta_restore",
    "delta_slice",
    "diff",
    "from_pretrained",
    "include_path",
    "inspect",
    "library_path",
    "load_deltas",
    "pack",
    "pack_fleet",
    "push",
    "restore",
    "save_folder",
    "unpack",
    "verify",
]
