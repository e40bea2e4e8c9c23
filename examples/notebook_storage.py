"""Ways to store an XOR of float32 words that the notebook names: each is written for real, read back, and its bytes counted.

A model takes the words' XOR [n, k] as uint32, and gives arrays whose bytes are all that its inverse has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Stored = dict[str, Array]


def coo(index: type) -> tuple[Callable[[Array], Stored], Callable[[Stored, tuple[int, int]], Array]]:
    """Sparse COO of changed words: a row, a column and a 4-byte value each."""

    def write(xor: Array) -> Stored:
        rows, cols = np.nonzero(xor)
        return {"rows": rows.astype(index), "cols": cols.astype(index), "values": xor[rows, cols]}

    def read(stored: Stored, shape: tuple[int, int]) -> Array:
        out = np.zeros(shape, np.uint32)
        out[stored["rows"], stored["cols"]] = stored["values"]
        return out

    return write, read


def write_bytes(xor: Array) -> Stored:
    """The notebook's simple sparse storage: a 4-byte index and the byte, for each byte that is not zero."""
    flat = xor.reshape(-1).view(np.uint8)
    at = np.flatnonzero(flat)
    return {"at": at.astype(np.uint32), "values": flat[at]}


def read_bytes(stored: Stored, shape: tuple[int, int]) -> Array:
    """The way back."""
    flat = np.zeros(shape[0] * shape[1] * 4, np.uint8)
    flat[stored["at"]] = stored["values"]
    return flat.view(np.uint32).reshape(shape)


def blocks(size: int) -> tuple[Callable[[Array], Stored], Callable[[Stored, tuple[int, int]], Array]]:
    """Block index: a bit for each block of `size` bytes, and those that hold a change, whole."""

    def write(xor: Array) -> Stored:
        flat = xor.reshape(-1).view(np.uint8)
        grid = np.pad(flat, (0, -flat.size % size)).reshape(-1, size)
        touched = grid.any(1)
        return {"bits": np.packbits(touched), "blocks": grid[touched]}

    def read(stored: Stored, shape: tuple[int, int]) -> Array:
        bytes_ = shape[0] * shape[1] * 4
        count = -(-bytes_ // size)
        grid = np.zeros((count, size), np.uint8)
        grid[np.unpackbits(stored["bits"], count=count).astype(bool)] = stored["blocks"]
        return grid.reshape(-1)[:bytes_].view(np.uint32).reshape(shape)

    return write, read


def varints(values: Array) -> Array:
    """LEB128: seven bits a byte, low ones first, the high bit says that more follow."""
    if not values.size:
        return np.zeros(0, np.uint8)
    rest, parts = values.astype(np.uint64), []
    live = np.ones(rest.shape, bool)
    while live.any():
        more = rest >= 128
        parts.append((live, (rest & 127 | (more.astype(np.uint64) << 7)).astype(np.uint8)))
        live, rest = live & more, rest >> 7
    lengths = sum(p[0].astype(np.int64) for p in parts)
    starts = np.cumsum(lengths) - lengths
    out = np.zeros(int(lengths.sum()), np.uint8)
    for i, (there, byte) in enumerate(parts):
        out[starts[there] + i] = byte[there]
    return out


def from_varints(data: Array) -> Array:
    """The way back."""
    if not data.size:
        return np.zeros(0, np.uint64)
    ends = np.flatnonzero(data < 128)
    starts = np.concatenate([[0], ends[:-1] + 1])
    place = np.arange(data.size) - np.repeat(starts, ends - starts + 1)
    parts = (data & 127).astype(np.uint64) << (7 * place).astype(np.uint64)
    return np.add.reduceat(parts, starts)


def write_runs(xor: Array) -> Stored:
    """RLE of zero runs: lengths of zero runs and of the runs between them as LEB128, and the bytes that are not zero."""
    flat = xor.reshape(-1).view(np.uint8)
    there = np.concatenate([[False], flat != 0, [False]])
    edges = np.flatnonzero(there[1:] != there[:-1])
    starts, ends = edges[::2], edges[1::2]
    zeros = starts - np.concatenate([[0], ends[:-1]])
    return {"zeros": varints(zeros), "lengths": varints(ends - starts), "values": flat[flat != 0]}


def read_runs(stored: Stored, shape: tuple[int, int]) -> Array:
    """The way back."""
    zeros, lengths = (from_varints(stored[k]).astype(np.int64) for k in ("zeros", "lengths"))
    flat = np.zeros(shape[0] * shape[1] * 4, np.uint8)
    ends = np.cumsum(zeros + lengths)
    before = np.cumsum(lengths) - lengths
    at = np.repeat(ends - lengths - before, lengths) + np.arange(lengths.sum())
    flat[at] = stored["values"]
    return flat.view(np.uint32).reshape(shape)


GROUP = 32
"""Bytes of a plane that are left out together where they are zero: 256 words."""


def write_planes(xor: Array) -> Stored:
    """Bit planes: bit p of all words together, for each p; in groups of 256 words, those without a change left out."""
    flat, out = xor.reshape(-1), {}
    for plane in range(32):
        packed = np.packbits((flat >> np.uint32(plane)).astype(np.uint8) & 1)
        grid = np.pad(packed, (0, -packed.size % GROUP)).reshape(-1, GROUP)
        touched = grid.any(1)
        out |= {f"bits{plane}": np.packbits(touched), f"groups{plane}": grid[touched]}
    return out


def read_planes(stored: Stored, shape: tuple[int, int]) -> Array:
    """The way back."""
    words = shape[0] * shape[1]
    count = -(-words // (8 * GROUP))
    out = np.zeros(words, np.uint32)
    for plane in range(32):
        grid = np.zeros((count, GROUP), np.uint8)
        grid[np.unpackbits(stored[f"bits{plane}"], count=count).astype(bool)] = stored[f"groups{plane}"]
        out |= np.unpackbits(grid.reshape(-1), count=words).astype(np.uint32) << np.uint32(plane)
    return out.reshape(shape)


MODELS: dict[str, tuple[Callable[[Array], Stored], Callable[[Stored, tuple[int, int]], Array]]] = {
    "COO, 64-bit indices": coo(np.int64),
    "COO, 32-bit indices": coo(np.int32),
    "byte and 4-byte index": (write_bytes, read_bytes),
    "block index, 4 KiB": blocks(4096),
    "block index, 256 B": blocks(256),
    "bit planes": (write_planes, read_planes),
    "RLE of zero runs": (write_runs, read_runs),
}


def stored_bytes(name: str, xor: Array) -> int:
    """Bytes of one XOR in one model; AssertionError if it does not come back."""
    write, read = MODELS[name]
    stored = write(xor)
    assert np.array_equal(read(stored, (xor.shape[0], xor.shape[1])), xor), name
    return sum(part.nbytes for part in stored.values())
