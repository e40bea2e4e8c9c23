"""A tile of a fine-tuned matrix: `delta_restore(rows=, columns=)`, beside a zstd frame of its XOR and cutting the delta."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import rivals
from .products import ENCODINGS, Case, interleave
from .tunes import INTS

SIZE = 64
PLACES = 64
_SHOWN = ("frame", "patched", "slice")


class Place:
    """One tile of one matrix, in the form that each variant takes."""

    def __init__(self, case: Case, of: int, at: random.Random) -> None:
        """Anywhere in matrix `of`, on multiples of the size."""
        self.base, self.tenant = case.bases[of], case.tenants[of][0]
        n, k = self.base.shape
        r, c = (SIZE * at.randrange(max(1, size // SIZE)) for size in (n, k))
        self.rows, self.columns = (r, min(r + SIZE, n)), (c, min(c + SIZE, k))
        self.part, self.want = self._cut(self.base), self._cut(self.tenant.dense)
        self.ints = INTS[self.base.dtype]
        xor = self.part.view(self.ints) ^ self.want.view(self.ints)
        self.frame = rivals.zstandard and rivals.compress(xor)

    def _cut(self, whole: Tensor) -> Tensor:
        return whole[slice(*self.rows), slice(*self.columns)].contiguous()

    def patched(self, decompress: Callable[[bytes], bytes]) -> Tensor:
        """The notebook's way with a frame for each tile: the XOR decompressed, and applied to the tile of the base."""
        xor = torch.frombuffer(bytearray(decompress(self.frame)), dtype=self.ints).view(self.want.shape)
        base = self.base.view(self.ints)[slice(*self.rows), slice(*self.columns)]
        return (base ^ xor).view(self.base.dtype)

    def sliced(self) -> Tensor:
        """The delta of the tile, cut out of the whole one, and applied."""
        part = torch.ops.xorz.delta_slice(self.tenant.delta, self.base, 0, *self.rows)
        part = torch.ops.xorz.delta_slice(part, self.base[slice(*self.rows)], 1, *self.columns)
        return torch.ops.xorz.delta_restore(self.part, part)


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """One row: microseconds a tile, and the others' time over that of xorz; checked to the bit first.

    `frame` is the decompression alone, by a decompressor that is kept; `patched` decompresses and applies the
    XOR.
    """
    at, restore = random.Random(0), torch.ops.xorz.delta_restore
    places = [Place(case, i % len(case.bases), at) for i in range(PLACES)]
    variants: dict[str, Callable[[int], Any]] = {
        "xorz": lambda i: restore(
            places[i].base, places[i].tenant.delta, rows=places[i].rows, columns=places[i].columns
        ),
        "slice": lambda i: places[i].sliced(),
    }
    if case.others and rivals.zstandard is not None:
        decompress = rivals.zstandard.ZstdDecompressor().decompress
        variants["patched"] = lambda i: places[i].patched(decompress)
    for name, call in variants.items():
        for i, place in enumerate(places):
            same = torch.equal(call(i).view(torch.uint8), place.want.view(torch.uint8))
            assert same, f"{name} gives back other bits than the fine-tune's tile"
    if "patched" in variants:
        variants["frame"] = lambda i: decompress(places[i].frame)
    seconds = interleave(variants, PLACES, rounds)
    dtype = case.bases[0].dtype
    row: dict[str, Any] = {
        "shape": "x".join(map(str, case.bases[0].shape)),
        "tile": "x".join(map(str, places[0].part.shape)),
        "dtype": str(dtype).removeprefix("torch."),
        "encoding": ENCODINGS[int(case.tenants[0][0].delta[10])],
        "us": {name: 1e6 * s for name, s in seconds.items()},
    }
    return row | {name: s / seconds["xorz"] for name, s in seconds.items() if name != "xorz"}


HEADER = f"{'a tile':>11} {'of':>11} {'dtype':>8} {'changed':>14} {'encoding':>9} {'xorz us':>8} " + " ".join(
    f"{name:>8}" for name in _SHOWN
)


def line(row: dict[str, Any]) -> str:
    """One row as text."""
    ratios = " ".join(f"{row[name]:>8.2f}" if name in row else f"{'-':>8}" for name in _SHOWN)
    return (
        f"{row['tile']:>11} {row['shape']:>11} {row['dtype']:>8} {row['what']:>14} {row['encoding']:>9} "
        f"{row['us']['xorz']:>8.1f} {ratios}"
    )
