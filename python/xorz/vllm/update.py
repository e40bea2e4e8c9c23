"""One change of a running model's words, in place: checked whole before, applied at once, and taken back if that fails.

Nothing here knows vLLM's life cycle or where packages come from; `sync` does. No dense copy of the model is made: what is held
besides the deltas is a few MiB, with tensor parallelism one tensor.
"""

import ctypes
import hashlib
import mmap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import _core, _ops
from .packages import Checkpoint
from .plan import Piece, Plan, parameters

_BLOCK_BYTES = 1 << 20
_BLOCK_ROWS = 256  # whole tiles of any encoding, so that none is decoded for two blocks
_SHEET_BYTES = 1 << 20
_ALIGNMENT = 64


class Broken(RuntimeError):
    """The model holds neither version."""


Key = tuple[str, int, int]
"""Rows of a parameter: its name, the first row, the one after the last. A vector is one column."""


@dataclass
class Step:
    """What changes one tensor's place in one parameter.

    Attributes:
        key: where.
        delta: resident, of the words there.
        back: what turns the new words into the old ones, by blocks of rows.
    """

    key: Key
    delta: Tensor
    back: dict[Key, Tensor]


class Shelf:
    """Where deltas lie that stay, while blocks of words that are many times as large come and go beside them.

    In the allocator's memory each delta would lie in the hole that a block has left, and the next block would not fit in
    there any more: at the end the process would hold about as much as the model. A sheet is free when nothing on it is used.
    """

    def __init__(self) -> None:
        """Nothing lies on it yet, and no memory is taken."""
        self._sheet: Tensor | None = None
        self._used = 0

    def put(self, delta: Tensor) -> Tensor:
        """A copy that stays."""
        count = delta.numel()
        if count >= _SHEET_BYTES // 4:
            return _mapped(count).copy_(delta)
        if self._sheet is None or self._used + count > self._sheet.numel():
            self._sheet, self._used = _mapped(_SHEET_BYTES), 0
        out = self._sheet[self._used : self._used + count].copy_(delta)
        self._used += -(-count // _ALIGNMENT) * _ALIGNMENT
        return out


def trim() -> None:
    """Give the kernel back what the allocator keeps of blocks that are free; glibc keeps up to 64 MiB at its end."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _mapped(count: int) -> Tensor:
    """So many bytes that the kernel itself gives, and takes back when the tensor is gone."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return torch.frombuffer(mmap.mmap(-1, max(count, 1), flags), dtype=torch.uint8)[:count]


@dataclass
class Staged:
    """An update that was checked against the words that are there, and can be applied to them alone."""

    steps: list[Step] = field(default_factory=list)
    changed: int = 0
    words: int = 0
    # Apart: the ways back are kept when the rest is gone.
    _ahead: Shelf = field(default_factory=Shelf)
    _behind: Shelf = field(default_factory=Shelf)

    def add(self, key: Key, delta: Tensor, back: Iterable[tuple[Key, Tensor]]) -> None:
        """One more step; the deltas are copied to where they stay."""
        delta = self._ahead.put(delta)
        self.steps.append(Step(key, delta, {rows: self._behind.put(way) for rows, way in back}))

    @property
    def bytes(self) -> int:
        """What it holds in memory, the way back included."""
        return sum(s.delta.nbytes + sum(b.nbytes for b in s.back.values()) for s in self.steps)


class Group:
    """The processes that hold parts of one model: all of them change, or none."""

    def __init__(self, group: Any = None, rank: int = 0, size: int = 1) -> None:
        """Of torch.distributed's group, for CPU tensors; alone by default."""
        self.group, self.rank, self.size = group, rank, size

    def everyones(self, value: Any) -> list[Any]:
        """What each process has given, by rank."""
        if self.size == 1:
            return [value]
        out: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(out, value, group=self.group)
        return out

    def agree(self, error: BaseException | None) -> None:
        """ValueError in every process if one of them has met an error; its own where it has."""
        said = self.everyones(None if error is None else str(error) or type(error).__name__)
        if error is not None:
            raise error
        for rank, text in enumerate(said):
            if text is not None:
                raise ValueError(f"rank {rank}: {text}")

    def sum(self, words: Tensor) -> None:
        """Add up bytes, of which only one process has any in each place."""
        if self.size > 1:
            torch.distributed.all_reduce(words, group=self.group)


class Words:
    """A model's parameters as this process holds them, by the checkpoint tensors that they are made of."""

    def __init__(self, model: nn.Module, base: Checkpoint, followed: Plan, group: Group) -> None:
        """Collective: every process of `group` makes one at the same time."""
        self.model, self.base, self.plan, self.group = model, base, followed, group
        self.read()
        mine = {
            name: sorted({(p.rows, p.cols) for p in self._of(name, self.plan.users[name][0])})
            for name in self.plan.users
        }
        everyones = group.everyones(mine)
        # Of what several hold, the first one speaks.
        earlier = everyones[: group.rank]
        self._own = {
            name: [r for r in rectangles if not any(r in other.get(name, ()) for other in earlier)]
            for name, rectangles in mine.items()
        }
        self._apart = {
            name
            for name in mine
            for other in everyones
            if other.get(name) != [((0, self._shape(name)[0]), (0, self._shape(name)[1]))]
        }
        self._covered(everyones)

    def _covered(self, everyones: list[dict[str, Any]]) -> None:
        """What all processes together lack cannot be checked, and is refused like what the loader computes with."""
        for name in self._apart:
            n, k = self._shape(name)
            held = {rectangle for other in everyones for rectangle in other.get(name, ())}
            if sum((a[1] - a[0]) * (b[1] - b[0]) for a, b in held) != n * k:
                self.plan.refused.setdefault(
                    name, "the processes hold parts of it that overlap, or not all of it"
                )

    def read(self) -> None:
        """Look at the parameters anew: vLLM may have put others in their place."""
        self.params = parameters(self.model)

    def _shape(self, name: str) -> tuple[int, int]:
        return (*self.base.tensors[name][1], 1, 1)[:2] if self.base.tensors[name][1] else (1, 1)

    def _of(self, name: str, param: str) -> list[Piece]:
        return [piece for piece in self.plan.pieces[param] if piece.name == name]

    def places(self, name: str) -> list[tuple[Key, Piece]]:
        """Where this process holds words of a checkpoint tensor."""
        return [
            ((param, *piece.to_rows), piece)
            for param in self.plan.users.get(name, ())
            for piece in self._of(name, param)
        ]

    def at(self, key: Key) -> Tensor:
        """The words there, in place."""
        param, first, end = key
        return self.params[param][first:end]

    def whole(self, name: str) -> Tensor:
        """A checkpoint tensor as the model holds it now: in place, or put together from all processes' parts (collective)."""
        dtype, shape = self.base.tensors[name]
        if name not in self._apart:
            [(key, _)] = self.places(name)[:1]
            return self.at(key)
        n, k = self._shape(name)
        out = torch.zeros(n, k, dtype=dtype)
        for key, piece in self.places(name):
            if key[0] == self.plan.users[name][0] and (piece.rows, piece.cols) in self._own[name]:
                out[slice(*piece.rows), slice(*piece.cols)] = self.at(key).reshape(piece.shape)
        self.group.sum(out.view(torch.uint8))
        return out.reshape(shape)

    def is_apart(self, name: str) -> bool:
        """Whether some process does not hold the whole of it."""
        return name in self._apart


def stage(words: Words, name: str, whole: Tensor, delta: Tensor, staged: Staged) -> None:
    """Prepare the change of one checkpoint tensor from `whole`, its words now, by `delta`, which was made for them.

    RuntimeError where the model holds other words in another place of the tensor.
    """
    if not words.is_apart(name):
        for key, _ in words.places(name):
            at = words.at(key)
            if at.data_ptr() != whole.data_ptr():
                _ops.delta_check(delta, at)
            staged.add(key, delta, _way_back(key, at, delta))
    else:
        between(words, name, whole, _ops.delta_restore(whole, delta), staged)


def between(words: Words, name: str, old: Tensor, new: Tensor, staged: Staged) -> None:
    """The same, from a checkpoint tensor's words in both versions; this process's parts must be the old ones."""
    for key, piece in words.places(name):
        at = words.at(key)
        was, becomes = (_cut(t, piece).reshape(at.shape) for t in (old, new))
        if not torch.equal(bits(at), bits(was)):
            raise ValueError(
                f"parameter `{key[0]}` does not hold the words of `{name}` of the version before"
            )
        if not torch.equal(bits(was), bits(becomes)):
            delta = _ops.delta_encode(at, becomes, prefer="speed")
            staged.add(key, delta, _way_back(key, at, delta))


def _cut(tensor: Tensor, piece: Piece) -> Tensor:
    matrix = tensor.reshape(-1, 1) if tensor.dim() < 2 else tensor
    return matrix[slice(*piece.rows), slice(*piece.cols)].contiguous()


def bits(tensor: Tensor) -> Tensor:
    """For comparing: a NaN is equal to itself."""
    return tensor.contiguous().view(
        {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    )


def blocks(key: Key, at: Tensor) -> Iterable[tuple[Key, tuple[int, int]]]:
    """Rows of the parameter, and the same from the start of `at`, a few MiB at a time."""
    param, first, end = key
    row = max(1, at[:1].nbytes)
    step = max(_BLOCK_ROWS, _BLOCK_BYTES // row // _BLOCK_ROWS * _BLOCK_ROWS)
    for a in range(0, end - first, step):
        b = min(end - first, a + step)
        yield (param, first + a, first + b), (a, b)


def _way_back(key: Key, at: Tensor, delta: Tensor) -> Iterator[tuple[Key, Tensor]]:
    """Deltas of the new words that give the old ones; blocks that stay the same are left out."""
    for rows, (a, b) in blocks(key, at):
        old = at[a:b]
        if at.dim() < 2:
            new = _ops.delta_restore(at, delta, columns=(a, b))
        else:
            new = _ops.delta_restore(at, delta, rows=(a, b))
        if not torch.equal(bits(old), bits(new)):
            yield rows, _ops.delta_encode(new, old, prefer="memory")


def backwards(words: Words, ways: list[dict[Key, Tensor]]) -> Staged:
    """The update that takes back several ones, of which the last one comes first."""
    out = Staged()
    for key in dict.fromkeys(key for way in ways for key in way):
        old = new = words.at(key)
        for way in ways:
            new = _ops.delta_restore(new, way[key]) if key in way else new
        if torch.equal(bits(old), bits(new)):
            continue
        delta = _ops.delta_encode(old, new, prefer="speed")
        out.add(key, delta, [(key, _ops.delta_encode(new, old, prefer="memory"))])
        out.changed += _core.delta_info(delta).changed
    return out


def apply(words: Words, staged: Staged) -> dict[Key, Tensor]:
    """Change the words, in every process or in none, and give the way back. Collective.

    Raises:
        ValueError, RuntimeError: what has failed. The words are as before; Broken if not even that could be done.
    """
    done: list[Step] = []
    error = None
    try:
        for step in staged.steps:
            # Its digest is compared before the first word is written.
            _ops.delta_apply_(words.at(step.key), step.delta)
            done.append(step)
    except BaseException as caught:
        error = caught
    try:
        words.group.agree(error)
    except BaseException:
        _take_back(words, done)
        raise
    return {key: delta for step in staged.steps for key, delta in step.back.items()}


def _take_back(words: Words, done: list[Step]) -> None:
    for step in reversed(done):
        for key, delta in step.back.items():
            try:
                _ops.delta_apply_(words.at(key), delta)
            except BaseException as error:
                raise Broken(
                    f"the update failed, and parameter `{key[0]}` could not be taken back: the model holds neither version; "
                    f"load it again ({error})"
                ) from error


def digest_of(tensor: Tensor) -> str:
    """A tensor's digest, as packages have it."""
    return _core.delta_info(_ops.delta_encode(tensor, tensor)).base_digest


def sha256_of(tensor: Tensor) -> str:
    """The sha256 of a tensor's words, as packages have it."""
    return hashlib.sha256(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


def missing(plan: Plan, names: Mapping[str, Any]) -> list[str]:
    """Checkpoint tensors that the model needs and an update does not know."""
    return [name for name in plan.users if name not in names]
