"""Where what an update changes lies until it is applied, and after that as the way back."""

import os
import tempfile
from typing import Any


class Shelf:
    """Exchanges and deltas, in a file without a name.

    It is the kernel's to keep it in memory or on the disk, and gone when nobody has it open. Where no such file can be made or
    written (a full disk, a machine without one) it is in memory.
    """

    def __init__(self) -> None:
        """It is empty, and takes nothing."""
        self._file: Any = None
        self._used = 0

    def put(self, content: bytes | memoryview) -> tuple[int, int]:
        """Where it lies, and its length. OSError where there is no room in memory, either."""
        at, self._used = self._used, self._used + len(content)
        try:
            self._write(at, content)
        except OSError:
            self._into_memory(at)
            self._write(at, content)
        return at, len(content)

    def _write(self, at: int, content: bytes | memoryview) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="xorz-update-", buffering=0)
        rest = memoryview(content)
        while rest:
            count = os.pwrite(self._file.fileno(), rest, at)
            at, rest = at + count, rest[count:]

    def _into_memory(self, count: int) -> None:
        """The same file, its first `count` bytes, in memory."""
        old, self._file = self._file, open(os.memfd_create("xorz-update"), "r+b", buffering=0)
        sent = 0
        while old is not None and sent < count:
            sent += os.sendfile(self._file.fileno(), old.fileno(), sent, count - sent)
        if old is not None:
            old.close()

    def __del__(self) -> None:
        """The file is gone with the last step that needs it."""
        if self._file is not None:
            self._file.close()

    def read(self, at: int, into: memoryview) -> None:
        """OSError where it cannot be read."""
        while into:
            count = os.preadv(self._file.fileno(), [into], at)
            if count == 0:
                raise OSError("xorz: the file of what an update changes was cut")
            at, into = at + count, into[count:]
