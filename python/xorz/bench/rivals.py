"""What else computes with a fine-tune of a resident base: each function gives all rows, tenant after tenant."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .tunes import INTS

if TYPE_CHECKING:
    from .products import Tenant

try:
    import zstandard
except ImportError:  # the notebook's way is left out then
    zstandard = None


def compress(xor: Tensor) -> bytes:
    """The seed notebook's package of one matrix: zstd level 10 of the raw XOR."""
    return zstandard.ZstdCompressor(level=10).compress(xor.numpy().tobytes())


def rebuild(base: Tensor, compressed: bytes) -> Tensor:
    """The fine-tuned matrix as the notebook restores it."""
    ints = INTS[base.dtype]
    xor = torch.frombuffer(bytearray(zstandard.ZstdDecompressor().decompress(compressed)), dtype=ints)
    return (base.view(ints) ^ xor.view(base.shape)).view(base.dtype)


def csr(x: Tensor, parts: tuple[Tensor, ...], base: Tensor, tenants: list[Tenant]) -> Tensor:
    """The dense product with the base, plus a CSR product with each tenant's differences."""
    extra = [
        torch.mv(t.csr, p[0].float())[None] if len(p) == 1 else (t.csr @ p.float().T).T
        for p, t in zip(parts, tenants, strict=True)
    ]
    return F.linear(x, base) + torch.cat(extra).to(x.dtype)


def scatter(x: Tensor, parts: tuple[Tensor, ...], base: Tensor, tenants: list[Tenant]) -> Tensor:
    """Write a tenant's words into the base, multiply, and write the base's words back."""
    flat, out = base.view(INTS[base.dtype]).view(-1), []
    for part, tenant in zip(parts, tenants, strict=True):
        flat[tenant.at] = tenant.new
        out.append(F.linear(part, base))
        flat[tenant.at] = tenant.old
    return torch.cat(out)


def notebook(x: Tensor, parts: tuple[Tensor, ...], base: Tensor, tenants: list[Tenant]) -> Tensor:
    """The seed notebook's way, for each call."""
    wholes = (rebuild(base, tenant.xor) for tenant in tenants)
    return torch.cat([F.linear(part, whole) for part, whole in zip(parts, wholes, strict=True)])


RIVALS = {"csr": csr, "scatter": scatter, "notebook": notebook}
