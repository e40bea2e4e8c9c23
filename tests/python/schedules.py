"""Threads that run one at a time, in an order that a seed decides: what a real machine does once in a million runs is done
again whenever it is asked for. No promise is tested here.

A thread may lose its turn before each line of the files that are watched, and before each taking and after each giving back
of a lock. Locks are doubles that the scheduler knows, so that it never lets a thread run that waits for one, and sees where
all do.
"""

import random
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

_MOST_STEPS = 400_000
_MOST_SECONDS = 60


class Stopped(BaseException):
    """The schedule has failed elsewhere; the thread that meets this ends."""


class _Turn:
    """One thread of a schedule."""

    def __init__(self, name: str) -> None:
        self.name, self.gate = name, threading.Semaphore(0)
        self.ended = False
        self.waiting: Lock | None = None

    def can_run(self) -> bool:
        return not self.ended and (self.waiting is None or self.waiting.is_free_for(self))


class Schedule:
    """Runs threads by the seed.

    Attributes:
        likely: how probable it is that another thread runs next, before a line.
        often: called before each line, with its code.
        story: which thread lost its turn, and before which line.
        failures: what threads raised, and deadlocks.
    """

    now: "Schedule | None" = None

    def __init__(self, seed: int, likely: float, files: Iterable[str], often: Callable[[Any], None]) -> None:
        self.pick, self.likely, self.often = random.Random(seed), likely, often
        self.files = frozenset(files)
        self.turns: list[_Turn] = []
        self.running: _Turn | None = None
        self.failures: list[str] = []
        self.steps = self.changes = 0
        self.story: list[tuple[str, int]] = []
        self._done = threading.Event()

    def run(self, works: list[Callable[[], None]]) -> None:
        """Each in a thread of its own, until all have ended; what they raise, and a deadlock, are in `failures`."""
        self.turns = [_Turn(f"thread {i}") for i in range(len(works))]
        threads = [
            threading.Thread(target=self._thread, args=pair, daemon=True)
            for pair in zip(self.turns, works, strict=True)
        ]
        Schedule.now = self
        try:
            for thread in threads:
                thread.start()
            self._go(self.pick.choice(self.turns))
            if not self._done.wait(_MOST_SECONDS):
                self.failures.append(f"nothing has ended after {_MOST_SECONDS} s")
                self._stop()
            for thread in threads:
                thread.join(_MOST_SECONDS)
        finally:
            Schedule.now = None

    def _thread(self, me: _Turn, work: Callable[[], None]) -> None:
        me.gate.acquire()
        sys.settrace(self._trace)
        try:
            work()
        except Stopped:
            pass
        except BaseException as error:
            self.failures.append(f"{me.name}: {error!r}")
        finally:
            sys.settrace(None)
            me.ended = True
            self._leave(me)

    def _trace(self, frame: Any, event: str, arg: Any) -> Any:
        return self._line if frame.f_code.co_filename in self.files else None

    def _line(self, frame: Any, event: str, arg: Any) -> Any:
        if event == "line":
            self.steps += 1
            if self.steps > _MOST_STEPS:
                self.failures.append("it does not end")
                self._stop()
                raise Stopped
            self.often(frame.f_code)
            if self.pick.random() < self.likely:
                self.story.append((self.running.name, frame.f_lineno))
                self.change()
        return self._line

    def change(self) -> None:
        """Whoever runs may lose its turn, and does if it waits for a lock."""
        me = self.running
        ready = [t for t in self.turns if t.can_run()]
        if not ready:
            held = ", ".join(f"{t.name} waits for {t.waiting.owner.name}" for t in self.turns if t.waiting)
            self.failures.append(f"deadlock: {held}")
            self._stop()
            raise Stopped
        to = self.pick.choice(ready)
        if to is me:
            return
        self.changes += 1
        self._go(to)
        me.gate.acquire()
        if self.failures and self._done.is_set():
            raise Stopped

    def _leave(self, me: _Turn) -> None:
        left = [t for t in self.turns if not t.ended]
        ready = [t for t in left if t.can_run()]
        if self._done.is_set() or not left:
            self._done.set()
        elif ready:
            self._go(self.pick.choice(ready))
        else:
            self.failures.append(f"deadlock: {[t.name for t in left]} wait for locks that nobody gives back")
            self._stop()

    def _go(self, to: _Turn) -> None:
        self.running = to
        to.gate.release()

    def _stop(self) -> None:
        self._done.set()
        for turn in self.turns:
            turn.gate.release()


class Lock:
    """`threading.Lock` of a schedule; without one, of a process with one thread."""

    again = False

    def __init__(self) -> None:
        self.owner: Any = None
        self.count = 0

    def is_free_for(self, who: Any) -> bool:
        return self.owner is None or (self.again and self.owner is who)

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        schedule = Schedule.now
        me: Any = "nobody" if schedule is None else schedule.running
        if schedule is not None:
            schedule.change()
        while not self.is_free_for(me):
            if not blocking:
                return False
            assert schedule is not None, "a lock was left taken"
            me.waiting = self
            try:
                schedule.change()
            finally:
                me.waiting = None
        self.owner, self.count = me, self.count + 1
        return True

    def release(self) -> None:
        assert self.count > 0, "a lock is given back that nobody has"
        self.count -= 1
        if self.count == 0:
            self.owner = None
            if Schedule.now is not None:
                Schedule.now.change()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *error: Any) -> None:
        self.release()

    def _is_owned(self) -> bool:
        return self.owner is (Schedule.now.running if Schedule.now else "nobody")


class RLock(Lock):
    """`threading.RLock` likewise."""

    again = True


class Threading:
    """`threading` with these locks, for a module under test."""

    Lock, RLock = Lock, RLock

    def __getattr__(self, name: str) -> Any:
        return getattr(threading, name)
