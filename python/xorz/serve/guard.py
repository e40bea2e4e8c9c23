"""A lock for books that are also changed by those who cannot wait for it."""

import threading
from collections import deque
from collections.abc import Callable
from typing import Any


class Guard:
    """A lock that its holder may take again, and a list of what is to be done under it when nobody is in the midst of anything.

    Python's collector runs wherever memory is asked for: also under the lock, in the thread that holds it, in the midst of a
    change of what the lock guards. What it ends (graphs, generators) must then wait, and nobody but the holder can wait for it.
    """

    def __init__(self, do: Callable[[Any], None]) -> None:
        """`do(what)` does under the lock what was left for `later`."""
        self._lock, self._depth, self._do = threading.RLock(), 0, do
        self._left: deque[Any] = deque()

    def __enter__(self) -> None:
        """Take the lock; whatever was left is done before the first line under it."""
        self._lock.acquire()
        self._depth += 1
        if self._depth == 1:
            try:
                self._catch_up()
            except BaseException:
                self._give_back()
                raise

    def __exit__(self, *error: Any) -> None:
        """Give the lock back; whatever was left meanwhile is done first."""
        try:
            if self._depth == 1:
                self._catch_up()
        finally:
            self._give_back()
        # Another thread may have left something since, and have seen the lock taken.
        self._try()

    def later(self, what: Any) -> None:
        """`do(what)`: at once where the lock is free, else by whoever has it, before giving it back."""
        self._left.append(what)
        self._try()

    def _try(self) -> None:
        while self._left and self._lock.acquire(blocking=False):
            inside = self._depth > 0
            self._depth += 1
            try:
                if not inside:
                    self._catch_up()
            finally:
                self._give_back()
            if inside:
                return

    def _give_back(self) -> None:
        self._depth -= 1
        self._lock.release()

    def _catch_up(self) -> None:
        while self._left:
            self._do(self._left.popleft())
