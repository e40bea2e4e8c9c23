"""Synthetic fine-tunes of one matrix: random positions, and AdamW-like statistics."""

from __future__ import annotations

import torch
from torch import Tensor

INTS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def at_random(base: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Move a share of the words by one to three steps at random positions; if 1, all by small noise."""
    if share >= 1:
        noise = torch.randn(base.shape, generator=generator) * 1e-3
        moved = (base.float() + noise).to(base.dtype)
        bits = moved.view(INTS[base.dtype])
        return torch.where(bits == base.view(INTS[base.dtype]), bits + 1, bits).view(base.dtype)
    steps = torch.randint(1, 4, base.shape, generator=generator, dtype=torch.int32)
    steps *= torch.randint(0, 2, base.shape, generator=generator, dtype=torch.int32) * 2 - 1
    # A step down from zero would be a NaN.
    steps *= (torch.rand(base.shape, generator=generator) < share) & (base != 0)
    return (base.view(INTS[base.dtype]) + steps.to(INTS[base.dtype])).view(base.dtype)


def like_adamw(base: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Move every weight by the same distance up or down, and round: what AdamW does in a few steps
    (research/data.md).

    So small weights change and large ones do not; the distance is searched for that changes `share` of the
    words. In fp32 nearly any distance changes all of them.
    """
    sign = torch.randint(0, 2, base.shape, generator=generator, dtype=torch.int8).float() * 2 - 1
    low, high = 1e-9, 1.0
    sample, signs = base[:64].float(), sign[:64]
    for _ in range(40):
        step = (low * high) ** 0.5
        moved = ((sample + signs * step).to(base.dtype) != base[:64]).float().mean().item()
        low, high = (step, high) if moved < share else (low, step)
    return (base.float() + sign * high).to(base.dtype)


KINDS = {"random": at_random, "adamw": like_adamw}
