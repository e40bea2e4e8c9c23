"""Data that the checks are made on."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import delta_encode
from .report import bits

ENCODINGS = ("unchanged", "sparse", "exponent", "raw")


def random_words(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Weights as models have them."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)


def integers(shape: tuple[int, ...], most: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Whole numbers: every partial sum of their products is exact in f32."""
    return torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def fine_tune(base: Tensor, encoding: str, share: float = 0.05, seed: int = 1) -> tuple[Tensor, Tensor]:
    """A fine-tune, and its delta of that encoding."""
    g = torch.Generator().manual_seed(seed)
    words, some = bits(base).clone(), torch.rand(base.shape, generator=g) < share
    if encoding == "sparse":
        steps = torch.randint(1, 4, base.shape, generator=g, dtype=words.dtype)
        words = torch.where(some, words + steps, words)
    elif encoding == "exponent":
        words = words + torch.randint(-3, 4, base.shape, generator=g, dtype=words.dtype)
    elif encoding == "raw":
        words = bits(torch.randn(base.shape, generator=g).to(base.dtype).roll(1, -1) * base.flip(-1) * 97)
    tuned = words.view(base.dtype)
    delta = delta_encode(base, tuned, prefer="memory" if encoding == "exponent" else "speed")
    found = ENCODINGS[int(delta[10])]
    if found != encoding and base.numel() > 1000:
        raise AssertionError(f"made {found} where {encoding} was wanted")
    return tuned, delta


def name_of(dtype: torch.dtype) -> str:
    """The name of a dtype without its module, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def arena_of(deltas: list[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Deltas side by side, and their slots."""
    parts, slots, at = [torch.zeros(64, dtype=torch.uint8)], [], 64
    for delta in deltas:
        slots.append([at, 0 if delta is None else delta.numel()])
        if delta is not None:
            parts.append(torch.nn.functional.pad(delta, (0, -delta.numel() % 64)))
            at += parts[-1].numel()
    return torch.cat(parts), torch.tensor(slots)


def row_maps(m: int, tenants: int) -> Iterator[tuple[str, Tensor]]:
    """Whose rows a batch may hold."""
    yield "distinct", torch.arange(m) % (tenants + 1) - 1
    yield "one tenant", torch.full((m,), 1)
    yield "base", torch.full((m,), -1)
    yield "skewed", torch.where(torch.arange(m) % 5 < 4, 2, torch.arange(m) % tenants)


def change(base: Tensor, share: float | str) -> Tensor:
    """A delta of `base` with that share of words changed by a step or two; "exponent": nearly all, as long training does."""
    words, g = bits(base), torch.Generator().manual_seed(5)
    if share == "exponent":
        steps = torch.randint(-3, 4, base.shape, generator=g, dtype=words.dtype)
        return delta_encode(base, (words + steps).view(base.dtype), prefer="memory")
    some = torch.rand(base.shape, generator=g) < share
    steps = torch.randint(1, 3, base.shape, generator=g, dtype=words.dtype)
    return delta_encode(base, torch.where(some, words + steps, words).view(base.dtype), prefer="speed")
