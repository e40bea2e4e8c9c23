"""Digests of tensors where they lie: for that of words in a GPU's memory none of them comes to the host."""

from collections.abc import Mapping

import torch
from torch import Tensor

from . import _core, _library

_library.load()


def digest_of(tensor: Tensor) -> bytes:
    """A tensor's digest, 16 bytes, as packages and deltas have that of their base; errors as `digests_of`."""
    return digests_of({"tensor": tensor})["tensor"]


def digests_of(tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    """Those of several tensors by name, of the dtypes in `_core.DTYPES`. Each device is waited for once.

    Raises:
        TypeError: one of them is no dense tensor with data (named); RuntimeError: it has another dtype, or its device says why
            it cannot compute.
    """
    found: dict[torch.device, dict[str, Tensor]] = {}
    with torch.no_grad():
        for name, tensor in tensors.items():
            words = _core.dense(name, tensor).contiguous()
            words = words if words.device.type == "cpu" or computes(words.device) else words.cpu()
            found.setdefault(words.device, {})[name] = torch.ops.xorz.delta_digest(words)
        rows = {device: torch.stack(list(each.values())).cpu().tolist() for device, each in found.items()}
    return {
        name: bytes(row)
        for device, each in found.items()
        for name, row in zip(each, rows[device], strict=True)
    }


def computes(device: torch.device) -> bool:
    """Whether a device can be asked for digests; words of others are copied."""
    return device.type == "cuda" and _core.cuda_serves(device.index)


def elsewhere(tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    """The digests of those that are on devices which compute them, so that they need not be copied to be compared."""
    there = {
        name: tensor
        for name, tensor in tensors.items()
        if isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.dtype in _core.DTYPES
    }
    able = {device: computes(device) for device in {tensor.device for tensor in there.values()}}
    return digests_of({name: tensor for name, tensor in there.items() if able[tensor.device]})
