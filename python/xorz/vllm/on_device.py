"""Words on a GPU: read by copies to the host, changed in place by deltas, each of which is known to be done before the next.

An exchange (`update`) has no kernel; a delta has: `delta_apply_` compares the digest of the words with that of the delta's
base, on the device, and decodes every tile before it changes one. So of each block of rows that changes two resident deltas are
made on the host, there and back, while requests are served, and lie on the shelf. When they are applied one block's delta is on
the device at a time, and the host waits for each: kernels report late, and who must take back has to know what was done.
Addresses stay, which captured graphs read. Where something fails the words are looked at, not guessed: by their digest they are
the old ones, the new ones, or neither, which is `update.Broken`.

No GPU has run this. It was run on a double of one (tests/vllm/test_gpu_sync.py), whose `delta_apply_` reports late, too.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from .. import _core, _ops
from ..serve.rows import staged as pinned
from .update import REPORTS, Broken, Key, OnHost, Staged, Step, Words, between, digest_of, known_words

_BLOCK_BYTES = 64 << 20
"""Of the words that a delta is for: so many bytes of the device it may take at most, for a moment, and a little more."""


class OnDevice(OnHost):
    """Words on one CUDA device."""

    def __init__(self, device: Any) -> None:
        """Of the model's process."""
        self._device = torch.device(device)

    def read(self, at: Tensor) -> Tensor:
        """A copy in the host's memory; it waits for what the current stream was asked."""
        return _core.on_host("words", at)

    def stage(self, words: Words, opened: _core.Package, name: str, whole: Tensor, staged: Staged) -> None:
        """As `update.stage`, by way of the host: the words as they are and as they will be, of one tensor at a time."""
        old = self.read(whole)
        between(words, name, old, opened.restore(name, old), staged, whole)

    def add(
        self, words: Words, key: Key, now: Tensor, then: Tensor, staged: Staged, is_counted: bool
    ) -> None:
        """Prepare the change of these rows from `now` to `then`, both in the host's memory, as deltas there and back."""
        param, first, _ = key
        if not words.at(key).is_contiguous():
            strides = list(words.params[param].stride())
            raise ValueError(
                f"parameter `{param}` has strides {strides}: it was reordered after loading, and cannot be changed in place"
            )
        rows = max(1, _BLOCK_BYTES // now[:1].nbytes)
        for a in range(0, now.size(0), rows):
            old, new = (known_words(t[a : a + rows]) for t in (now, then))
            there = _ops.delta_encode(old, new, prefer="speed")
            changed = _core.delta_info(there).changed
            if changed:
                back = _ops.delta_encode(new, old, prefer="speed")
                place = param, first + a, first + a + old.size(0)
                staged.add([place], _bytes(there), changed if is_counted else 0, _bytes(back))

    def turn(self, words: Words, steps: list[Step], done: Callable[[Step], None]) -> None:
        """Do steps one after another, and note each when the device has done it.

        Raises:
            ValueError: the words of a block are others than those that it was prepared for: parameter, rows and both digests
                are named; RuntimeError, MemoryError: it could not be done. Those that were not noted have changed nothing;
                Broken if that is not so.
        """
        if not steps:
            return
        with REPORTS:
            # Steps of the engine that were asked before are over; what else was reported is nobody's of this update.
            self._heard()
            room = pinned(torch.empty(max(step.at[1] for step in steps), dtype=torch.uint8), self._device)
            for step in steps:
                self._do(words, step, room, done)

    def _do(self, words: Words, step: Step, room: Tensor, done: Callable[[Step], None]) -> None:
        length = step.at[1]
        step.shelf.read(step.at[0], _bytes(room[:length]))
        delta = room[:length].to(self._device, non_blocking=True)
        is_over = False
        try:
            _ops.delta_apply_(known_words(words.at(step.span)), delta)
            torch.cuda.synchronize(self._device)
            is_over = True
            _ops.cuda_status(self._device)
        except BaseException as error:
            found, was, becomes = self._look(words, step, error)
            if found == becomes:
                done(step)
            elif found != was and not is_over:
                raise _broken(step, error) from error
            elif is_over and isinstance(error, RuntimeError):
                raise _refused(step, error, found, was) from error
            raise
        done(step)

    def _heard(self) -> None:
        """The device has done all that it was asked; RuntimeError for what it has reported meanwhile."""
        torch.cuda.synchronize(self._device)
        _ops.cuda_status(self._device)

    def _look(self, words: Words, step: Step, error: BaseException) -> tuple[str, str, str]:
        """Of a step that failed: the digest of the words, of those before it, and of those after it. Broken if they cannot be
        read.
        """
        try:
            # What it has reported is not to be taken for a later step's.
            with suppress(RuntimeError):
                self._heard()
            found = digest_of(words.at(step.span))
            was, becomes = (_base_of(step, place) for place in (step.at, step.other))
        except Exception as worse:
            raise _broken(step, worse) from error
        return found, was, becomes


def _bytes(delta: Tensor) -> memoryview:
    return memoryview(delta.numpy())


def _base_of(step: Step, place: tuple[int, int] | None) -> str:
    """The digest of the words that a delta of a step is for."""
    if place is None:
        raise ValueError("a step on a device has no way back")
    delta = torch.empty(place[1], dtype=torch.uint8)
    step.shelf.read(place[0], _bytes(delta))
    return _core.delta_info(delta).base_digest


def _place(step: Step) -> str:
    param, first, end = step.span
    return f"parameter `{param}`, rows {first} to {end}"


def _refused(step: Step, report: RuntimeError, found: str, was: str) -> Exception:
    """What a kernel has reported of a step, by name."""
    if found == was:
        return RuntimeError(f"xorz: {_place(step)}: {report}")
    return ValueError(
        f"xorz: {_place(step)}: the words have digest {found}, but the update was prepared for {was}"
    )


def _broken(step: Step, error: BaseException) -> Broken:
    return Broken(
        f"the update failed at {_place(step)}, whose words are those of neither version or cannot be read: the model holds "
        f"neither version; load it again ({error})"
    )
