"""Memory for the resident deltas of one attached model: one tensor at a fixed address, from which pieces are lent.

On the host address space is reserved, not memory: pages become real when a delta is written and are given back when it is
freed. On a GPU the memory is taken at once, for as long as the model is attached.
"""

import bisect
import mmap
import warnings

import torch
from torch import Tensor

from .rows import HOST, copy_to, lasting

ALIGN = 64
_PAGE = mmap.PAGESIZE
_NORESERVE = 0x4000  # MAP_NORESERVE of Linux; Python's mmap does not name it


class Arena:
    """A 1-D uint8 tensor of `capacity` bytes, and which of them are free. Not thread-safe: its owner locks."""

    def __init__(self, capacity: int, device: torch.device = HOST, ordered: bool = False) -> None:
        """Reserves address space, OSError where not even that is to be had; memory on a GPU, torch's own error where there is
        none. `ordered`: on a GPU everything that reads it is asked of the stream that it is written on, so that no write has to
        wait for what was asked before.
        """
        self.capacity = -(-capacity // _PAGE) * _PAGE
        self.tensor: Tensor
        if device.type == "cpu":
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
            self._map: mmap.mmap | None = mmap.mmap(-1, self.capacity, flags=flags)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.tensor = torch.frombuffer(self._map, dtype=torch.uint8)
        else:
            self._map = None
            with lasting():
                self.tensor = torch.empty(self.capacity, dtype=torch.uint8, device=device)
        self._ordered = ordered
        self._lent_before = False
        self.used = 0
        self._free: list[tuple[int, int]] = [(0, self.capacity)]  # offset, length; sorted, never touching

    def allocate(self, length: int) -> int:
        """The offset of `length` free bytes, a multiple of 64; MemoryError if no gap is that large."""
        need = -(-length // ALIGN) * ALIGN
        for i, (offset, free) in enumerate(self._free):
            if free >= need:
                rest = (offset + need, free - need)
                self._free[i : i + 1] = [rest] if rest[1] else []
                self.used += need
                return offset
        raise MemoryError(
            f"xorz: no {need} free bytes in a row among the {self.capacity - self.used} of the arena"
        )

    def write(self, offset: int, data: Tensor) -> None:
        """Copy a delta to where it was allocated. On a GPU it is there, for every stream, when this returns; of an `ordered`
        arena it is there for whatever is asked of this stream from now on.
        """
        if self._ordered and self._map is None:
            copy_to(self.tensor[offset : offset + data.numel()], data)
            return
        if self._map is None and self._lent_before:
            self.settle()
        self.tensor[offset : offset + data.numel()].copy_(data)

    def settle(self) -> None:
        """Wait until a GPU has done all that it was asked, so that what was lent before may be written to.

        A forward has ended for the host when its kernels are on their way: they may still read what is free by now. Who loads
        waits for them, not they for it.
        """
        torch.cuda.synchronize(self.tensor.device)
        self._lent_before = False

    def free(self, offset: int, length: int) -> None:
        """Take a piece back, and its whole pages from the process."""
        start, end = offset, offset + -(-length // ALIGN) * ALIGN
        self.used -= end - start
        i = bisect.bisect(self._free, (start, 0))
        if i < len(self._free) and self._free[i][0] == end:
            end = sum(self._free.pop(i))
        if i > 0 and sum(self._free[i - 1]) == start:
            i -= 1
            start = self._free.pop(i)[0]
        self._free.insert(i, (start, end - start))
        if self._map is None:
            self._lent_before = True
            return
        first, last = -(-start // _PAGE) * _PAGE, end // _PAGE * _PAGE
        if last > first and hasattr(mmap, "MADV_DONTNEED"):
            self._drop(first, last, offset, length)

    def _drop(self, first: int, last: int, offset: int, length: int) -> None:
        # Only pages around the freed piece can be real: the rest of the gap was dropped before.
        first = max(first, offset // _PAGE * _PAGE)
        last = min(last, -(-(offset + length) // _PAGE) * _PAGE)
        if last > first:
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)
