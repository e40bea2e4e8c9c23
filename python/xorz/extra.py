"""Extra state in state_dicts: what `get_extra_state` of a module gives, bytes or nothing. Kept as 1-D uint8 tensors."""

import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_NAME = "_extra_state"


def _is(name: Any) -> bool:
    return isinstance(name, str) and name.rpartition(".")[2] == _NAME


def _content(value: Any) -> bytes | None:
    """The bytes of an extra state that is bytes of some kind."""
    if isinstance(value, io.BytesIO):
        return value.getvalue()
    return bytes(value) if isinstance(value, (bytes, bytearray)) else None


def plain(what: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The state_dict with bytes as uint8 tensors of their own, and without extra states that are None.

    Raises:
        TypeError: an extra state of another kind (named).
    """
    out = {}
    for name, value in values.items():
        if not _is(name) or isinstance(value, Tensor):
            out[name] = value
        elif value is not None:
            content = _content(value)
            if content is None:
                raise TypeError(
                    f"{what}: `{name}` is extra state, a {type(value).__name__}, which is neither tensor nor bytes; leave it "
                    "out of the state_dict, or let get_extra_state give bytes"
                )
            out[name] = torch.tensor(list(content), dtype=torch.uint8)
    return out


def states(values: Mapping[str, Any]) -> dict[str, Any]:
    """The extra states that are bytes, which nobody can change in place."""
    return {n: v for n, v in values.items() if _is(n) and _content(v) is not None}


def give(target: nn.Module | Any, name: str, old: Any, new: Tensor) -> None:
    """Put a new extra state in the place of `old`, of its kind."""
    content = bytes(new.contiguous().cpu().numpy().tobytes())
    value = io.BytesIO(content) if isinstance(old, io.BytesIO) else type(old)(content)
    if isinstance(target, nn.Module):
        target.get_submodule(name.rpartition(".")[0]).set_extra_state(value)
    else:
        target[name] = value
