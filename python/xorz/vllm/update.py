"""One change of a running model's words, in place: checked whole before, applied at once, and taken back if that fails.

What changes is kept as exchanges (src/vector/exchange.rs): where words differ, and their XOR. One exchange makes the new words
and takes them back, touches no other word, and compares each word that it changes. They lie in a file that has no
name. Nothing here knows vLLM's life cycle or where packages come from; `sync` does. No dense copy of the model is made: what is
held is a few MiB, with tensor parallelism one tensor. Words on a GPU are changed by `on_device`, in the place of `OnHost`.
"""

import ctypes
import hashlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import _core, digests
from .packages import Checkpoint
from .plan import Piece, Plan, parameters
from .shelf import Shelf

# Of the words that an exchange is for: of smaller ones there would be so many that to call for each takes its time.
_BLOCK_BYTES = 4 << 20


REPORTS = threading.RLock()
"""What a kernel reports is heard by whichever op of xorz is called next on that device. So whoever calls one on the model's
device beside the thread that applies holds this, or it would hear of a step that was refused in that one's place."""


class Broken(RuntimeError):
    """The model holds neither version."""


Key = tuple[str, int, int]
"""Rows of a parameter: its name, the first row, the one after the last. A vector is one column."""

Span = tuple[str, int, int]
"""Words of a parameter, row after row: its name, the first one, the one after the last."""


@dataclass(frozen=True)
class Step:
    """What changes some words of one parameter.

    Attributes:
        span: where.
        shelf: what the exchange lies on.
        at: where it lies there, and its length.
        back: whether it makes the old words of the new.
        other: the same as `at` of what goes the other way, where one content does not go both.
    """

    span: Span | Key
    shelf: Shelf
    at: tuple[int, int]
    back: bool = False
    other: tuple[int, int] | None = None

    def turned(self) -> "Step":
        """The same step the other way."""
        if self.other is None:
            return replace(self, back=not self.back)
        return replace(self, back=not self.back, at=self.other, other=self.at)


Way = list[list[Step]]
"""What is done one after another; steps of one list are of other words each, and may be done at once."""


def trim() -> None:
    """Give the kernel back what the allocator keeps of blocks that are free; glibc keeps up to 64 MiB at its end."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@dataclass
class Staged:
    """An update that was checked against the words that are there, and can be applied to them alone.

    Attributes:
        way: what is to be done.
        changed: words that differ; over several versions those of each step.
        seen: what the parameters were like when it was begun, as `Words.seen` says.
    """

    way: Way = field(default_factory=lambda: [[]])
    changed: int = 0
    seen: dict[str, tuple[int, int]] | None = None
    _shelf: Shelf = field(default_factory=Shelf)

    def add(self, spans: Sequence[Span | Key], there: Any, changed: int, back: Any = None) -> None:
        """One more step, in each of these places: bytes that lead there, those that lead back if they are others, and how many
        words it changes.
        """
        at = self._shelf.put(there)
        other = None if back is None else self._shelf.put(back)
        self.way[-1] += [Step(span, self._shelf, at, other=other) for span in spans]
        self.changed += changed

    @property
    def steps(self) -> list[Step]:
        """All steps, in order."""
        return [step for steps in self.way for step in steps]

    @property
    def bytes(self) -> int:
        """What it takes on its shelves, the way back included."""
        places = {(step.shelf, at) for step in self.steps for at in (step.at, step.other) if at is not None}
        return sum(length for _, (_, length) in places)


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

    def __init__(
        self, model: nn.Module, base: Checkpoint, followed: Plan, group: Group, hand: "OnHost | None" = None
    ) -> None:
        """Collective: every process of `group` makes one at the same time. `hand`: what reads and changes words where they lie;
        those of the host by default.
        """
        self.model, self.base, self.plan, self.group = model, base, followed, group
        self.hand = hand or OnHost()
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

    def seen(self) -> dict[str, tuple[int, int]]:
        """Where each parameter's words lie, and how often torch has written to it (not through `.data`)."""
        return {
            name: (param.data_ptr(), 0 if param.is_inference() else param._version)
            for name, param in self.model.named_parameters()
        }

    def _shape(self, name: str) -> tuple[int, int]:
        return (*self.base.tensors[name][1], 1, 1)[:2] if self.base.tensors[name][1] else (1, 1)

    def _of(self, name: str, param: str) -> list[Piece]:
        return [piece for piece in self.plan.pieces[param] if piece.name == name]

    def places(self, name: str) -> list[tuple[Key, Piece]]:
        """Where this process holds words of a checkpoint tensor."""
        return [
            ((param, *piece.to_rows), piece)
            for param in dict.fromkeys(self.plan.users.get(name, ()))
            for piece in self._of(name, param)
        ]

    def at(self, key: Key) -> Tensor:
        """The words there, in place."""
        param, first, end = key
        return self.params[param][first:end]

    def start(self, key: Key) -> tuple[str, int]:
        """The parameter, and which of its words is the first there."""
        param, first, _ = key
        return param, first * self.params[param][:1].numel()

    def span(self, span: Span) -> Tensor:
        """So many words of a parameter, in place."""
        param, first, end = span
        return self.params[param].view(-1)[first:end]

    def whole(self, name: str) -> Tensor:
        """A checkpoint tensor as the model holds it now: in place, wherever that is, or put together in the host's memory from
        all processes' parts (collective).
        """
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


class OnHost:
    """Words in the host's memory: read in place, changed by exchanges, by as many threads as torch has here."""

    def read(self, at: Tensor) -> Tensor:
        """Words of a parameter in the host's memory, contiguous."""
        return at

    def stage(self, words: Words, opened: _core.Package, name: str, whole: Tensor, staged: Staged) -> None:
        """As `stage`, of a tensor that this process holds whole."""
        starts = []
        for key, _ in words.places(name):
            at = words.at(key)
            if at.data_ptr() != whole.data_ptr() and not torch.equal(bits(at), bits(whole)):
                raise ValueError(
                    f"parameter `{key[0]}` does not hold the words of `{name}`, which others hold"
                )
            starts.append(words.start(key))

        def give(first: int, count: int, exchange: bytes, changed: int) -> None:
            staged.add([(param, at + first, at + first + count) for param, at in starts], exchange, changed)

        opened.exchanges(name, whole, give)

    def add(
        self, words: Words, key: Key, now: Tensor, then: Tensor, staged: Staged, is_counted: bool
    ) -> None:
        """Prepare the change of these rows from `now` to `then`, both in the host's memory; what is tied is counted once."""
        param, start = words.start(key)
        step = max(1, _BLOCK_BYTES // now.element_size())
        for a in range(0, now.numel(), step):
            old, new = (t.reshape(-1)[a : a + step] for t in (now, then))
            exchange, changed = _core.exchange(old, new)
            if changed:
                span = param, start + a, start + a + old.numel()
                staged.add([span], exchange, changed if is_counted else 0)

    def turn(self, words: Words, steps: list[Step], done: Callable[[Step], None]) -> None:
        """Do steps that are of other words each, and note each."""
        rooms = threading.local()

        def work(step: Step) -> None:
            at, length = step.at
            if len(room := getattr(rooms, "bytes", b"")) < length:
                rooms.bytes = room = bytearray(length)
            exchange = memoryview(room)[:length]
            step.shelf.read(at, exchange)
            # Compares each word that changes with what it was; where one is not, all are what they were again.
            _core.exchange_apply(words.span(step.span), exchange, step.back)
            done(step)

        threads = min(torch.get_num_threads(), len(steps))
        if threads < 2:
            for step in steps:
                work(step)
            return
        with ThreadPoolExecutor(threads, thread_name_prefix="xorz-update") as pool:
            for _ in pool.map(work, steps):
                pass


def stage(words: Words, opened: _core.Package, name: str, whole: Tensor, staged: Staged) -> None:
    """Prepare the change of one checkpoint tensor from `whole`, its words now, to those that a package makes of them.

    ValueError where they are not those that it is a step from, or the model holds others in another place of the tensor.
    """
    if words.is_apart(name):
        between(words, name, whole, opened.restore(name, whole), staged)
    else:
        words.hand.stage(words, opened, name, whole, staged)


def between(
    words: Words, name: str, old: Tensor, new: Tensor, staged: Staged, of: Tensor | None = None
) -> None:
    """The same, from a checkpoint tensor's words in both versions, in the host's memory; this process's parts must be the old
    ones. `of`: what `old` was just read from, if it was, which is not read again.
    """
    for number, (key, piece) in enumerate(words.places(name)):
        place = words.at(key)
        was, becomes = (_cut(t, piece).reshape(place.shape) for t in (old, new))
        is_read = of is not None and place.data_ptr() == of.data_ptr() and place.shape == of.shape
        at = was if is_read else words.hand.read(place)
        if not torch.equal(bits(at), bits(was)):
            raise ValueError(
                f"parameter `{key[0]}` does not hold the words of `{name}` of the version before"
            )
        words.hand.add(words, key, at, becomes, staged, number == 0)


def _cut(tensor: Tensor, piece: Piece) -> Tensor:
    matrix = tensor.reshape(-1, 1) if tensor.dim() < 2 else tensor
    return matrix[slice(*piece.rows), slice(*piece.cols)].contiguous()


def bits(tensor: Tensor) -> Tensor:
    """For comparing: a NaN is equal to itself."""
    return tensor.contiguous().view(
        {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    )


def backwards(ways: Iterable[Way]) -> Staged:
    """The update that takes back several ones, of which the last one comes first."""
    return Staged([steps for way in ways for steps in way])


def apply(words: Words, staged: Staged) -> Way:
    """Change the words, in every process or in none, and give the way back. Collective.

    Raises:
        ValueError, RuntimeError, OSError: what has failed, or that the words are others than those that the update was made
            for. The words are as before; Broken if not even that could be done.
    """
    done: list[Step] = []
    error = None
    try:
        _check_seen(words, staged)
        for steps in staged.way:
            words.hand.turn(words, steps, done.append)
    except BaseException as caught:
        error = caught
    try:
        words.group.agree(error)
    except BaseException:
        _take_back(words, done)
        raise
    return _reversed(staged.way)


def _check_seen(words: Words, staged: Staged) -> None:
    """What was prepared for a parameter is for no other one, and for no other words in it."""
    found = words.seen()
    for name, seen in (staged.seen or found).items():
        if found.get(name) != seen:
            raise ValueError(
                f"xorz: parameter `{name}` was replaced or written to since the update was prepared; prepare it anew"
            )


def _reversed(way: Way) -> Way:
    return [[step.turned() for step in reversed(steps)] for steps in reversed(way)]


def _take_back(words: Words, done: list[Step]) -> None:
    for [step] in _reversed([[step] for step in done]):
        try:
            words.hand.turn(words, [step], lambda _: None)
        except BaseException as error:
            raise Broken(
                f"the update failed, and parameter `{step.span[0]}` could not be taken back: the model holds neither version; "
                f"load it again ({error})"
            ) from error


def known_words(tensor: Tensor) -> Tensor:
    """The tensor, contiguous, in place; one of a dtype that has no code of its own as the words that it is made of."""
    kind = _core.OTHERS.get(tensor.dtype)
    if kind is None:
        return tensor
    return (tensor if tensor.dim() else tensor.view(1)).view(kind[1])


def digest_of(tensor: Tensor) -> str:
    """A tensor's digest, as packages have it, wherever its words lie."""
    return digests.digest_of(known_words(_core.on_host("tensor", tensor))).hex()


def sha256_of(tensor: Tensor) -> str:
    """The sha256 of a tensor's words, as packages have it, wherever they lie."""
    words = _core.on_host("tensor", tensor)
    return hashlib.sha256(words.view(-1).view(torch.uint8).numpy().data).hexdigest()


def missing(plan: Plan, names: Mapping[str, Any]) -> list[str]:
    """Checkpoint tensors that the model needs and an update does not know."""
    return [name for name in plan.users if name not in names]
