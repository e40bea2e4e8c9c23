"""What tenants take in memory: one arena for all deltas, a limit, and room that whoever is not needed makes. For `Tenants` and
for vLLM's adapters, which decide themselves who that is.
"""

import os
import re
import resource
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .arena import ALIGN, Arena
from .rows import HOST

Piece = tuple[int, int]
"""Offset and length in the arena."""

_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def size_of(given: int | str | None, what: str = "budget") -> int | None:
    """Bytes, from a number or such as "8 GiB"; ValueError, in which `what` is named, for anything else but None."""
    if given is None:
        return None
    if isinstance(given, str):
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmg]i?b|b)?\s*", given.lower())
        if match is None:
            raise ValueError(f'{what} must be bytes, or such as "8 GiB", but is {given!r}')
        return int(float(match[1]) * _UNITS[match[2] or ""])
    if isinstance(given, bool) or not isinstance(given, int) or given <= 0:
        raise ValueError(f"{what} must be a positive number of bytes, but is {given!r}")
    return given


def machine() -> int:
    """Bytes of memory that the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def padded(length: int) -> int:
    """Bytes that a piece of this length takes."""
    return -(-length // ALIGN) * ALIGN


_ADDRESSES = (16, 8, 4, 2, 1)
"""How many times the bytes that may be used are reserved as addresses, the most that is to be had.

What is lent cannot be moved, since forwards read it. With as many addresses as bytes, a few small pieces that are in use
would split them so that no gap takes a large one, however much is free. Pages that hold nothing take no memory, and first fit
needs at most log2(largest piece / smallest) times the bytes in use (Robson): sixteen are enough for pieces of 64 bytes to
4 MiB in the worst order there is, and for every size in orders that are met."""

_SCARCE = (2, 1)
"""The same where addresses are counted (ulimit -v, ulimit -d): what one model takes, the next one and everybody else lack."""

_MOST_ADDRESSES = 1 << 44
"""An eighth of what a process has, for one model."""


def _addresses(size: int, budgeted: bool) -> Iterable[int]:
    """How many times `size` to try. Whoever gave no budget has the machine's memory, which is never filled to the last byte."""
    limits = (resource.RLIMIT_AS, resource.RLIMIT_DATA)
    counted = any(resource.getrlimit(limit)[0] != resource.RLIM_INFINITY for limit in limits)
    times = _ADDRESSES if budgeted and not counted else _SCARCE
    return [t for t in times if t == 1 or t * size <= _MOST_ADDRESSES]


def _reserved(size: int, budgeted: bool, device: torch.device, ordered: bool) -> Arena:
    if device.type != "cpu":
        # Of a GPU's memory nothing can be reserved that is not taken.
        return Arena(size, device, ordered)
    for times in _addresses(size, budgeted):
        try:
            return Arena(times * size)
        except (OSError, OverflowError, ValueError) as error:
            refused = error
    raise MemoryError(
        f"the addresses of {size:,} bytes cannot be reserved for tenants ({refused}): the process may not have so many "
        '(ulimit -v); give attach a budget, such as budget="1 GiB"'
    ) from refused


class Residency:
    """Not thread-safe: its owner locks.

    Attributes:
        arena: where deltas lie; it has more addresses than bytes may be used.
        limit: most bytes of deltas and copies together, None if only the machine's memory is one.
        capacity: the limit, or the machine's memory.
        copies: bytes of dense tensors beside the arena, which the owner counts.
    """

    def __init__(self, limit: int | None, device: torch.device = HOST, ordered: bool = False) -> None:
        """Reserves addresses, no memory; MemoryError if there are not so many. On a GPU takes `limit` bytes of it.

        `ordered`: as in `Arena`.
        """
        self.limit, self.copies = limit, 0
        self.capacity = limit or machine()
        self.arena = _reserved(self.capacity, limit is not None, device, ordered)

    @property
    def used(self) -> int:
        """Bytes of all deltas and copies."""
        return self.arena.used + self.copies

    @property
    def free(self) -> int:
        """Bytes below the limit."""
        return max(0, self.capacity - self.used)

    def make_room(self, need: int, evict: Callable[[], bool]) -> bool:
        """Whether `need` bytes are free, or have become so: `evict` drops whoever is needed least, or says that it cannot."""
        while self.limit is not None and self.used + need > self.limit:
            if not evict():
                return False
        return True

    def place(self, deltas: Iterable[Tensor], evict: Callable[[], bool]) -> list[Piece]:
        """Copy deltas into the arena, all or none; MemoryError if one does not fit and nobody can be dropped."""
        pieces: list[Piece] = []
        try:
            for delta in deltas:
                offset = self._allocate(delta.numel(), evict)
                pieces.append((offset, delta.numel()))
                self.arena.write(offset, delta)
        except BaseException:
            self.release(pieces)
            raise
        return pieces

    def _allocate(self, length: int, evict: Callable[[], bool]) -> int:
        while True:
            try:
                if padded(length) > self.free:
                    raise MemoryError(
                        f"xorz: {padded(length):,} bytes are needed, but only {self.free:,} are free"
                    )
                return self.arena.allocate(length)
            except MemoryError:
                if not evict():
                    raise

    def release(self, pieces: Iterable[Piece]) -> None:
        """Give the pieces of a tenant back to the arena."""
        for offset, length in pieces:
            self.arena.free(offset, length)

    def memory(self, base: Iterable[Tensor], copies: int = 0) -> dict[str, int]:
        """Bytes: "base" (these tensors' memory, once), "deltas", "copies" (`copies` more than are counted here), "total"."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in base}
        out = {"base": sum(storages.values()), "deltas": self.arena.used, "copies": self.copies + copies}
        return {**out, "total": sum(out.values())}
