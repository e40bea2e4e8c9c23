"""Fine-tunes of one matrix for benchmarks: random positions, AdamW-like statistics, and layers of real pairs."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import torch
from torch import Tensor

INTS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
PAIRS = pathlib.Path(__file__).parents[2] / "shared" / "pairs"


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
    """Move every weight by the same distance up or down, and round: what AdamW does in a few steps (research/data.md).

    So small weights change and large ones do not; the distance is searched for that changes `share` of the words. In fp32
    nearly any distance changes all of them.
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


def pairs(least: int = 1 << 18) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(pair and layer, base, fine-tuned): the largest matrix of each real pair, where there are any."""
    from safetensors import safe_open

    for tuned in sorted(PAIRS.glob("*.ft*.safetensors")):
        name = tuned.name.split(".ft")[0]
        with safe_open(PAIRS / f"{name}.base.safetensors", "pt") as a, safe_open(tuned, "pt") as b:
            shapes = {n: a.get_slice(n).get_shape() for n in a.keys() if n in b.keys()}
            linear = {
                n: s for n, s in shapes.items() if len(s) == 2 and s[0] * s[1] >= least and "embed" not in n
            }
            if linear:
                layer = max(linear, key=lambda n: linear[n][0] * linear[n][1])
                yield (
                    f"{tuned.name.removesuffix('.safetensors')} {layer}",
                    a.get_tensor(layer),
                    b.get_tensor(layer),
                )
