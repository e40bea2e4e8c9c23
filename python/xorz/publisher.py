"""A training run's half of weight sync: each new policy becomes a version of `xorz.Versions`, written beside the training."""

import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import _core
from .checkpoint import PathLike
from .diff import StateDict, place, tensors_of
from .versions import Versions

# Words that are cast and compared at once, for one of which no second copy of a tensor is made.
_BLOCK_WORDS = 4 << 20


@dataclass(eq=False)
class _Change:
    """What becomes of one tensor: its words as they were published last, turned into the next ones in place and back.

    Attributes:
        words: the published ones, or the next ones.
        parts: first and last word of a part that differs, and its exchange.
        turned: which of both `words` are.
    """

    words: Tensor
    parts: list[tuple[int, int, bytes]] = field(default_factory=list)
    turned: bool = False

    def turn(self) -> None:
        """Make the next words of the published ones, or those again."""
        _turn(self.words, self.parts, self.turned)
        self.turned = not self.turned

    def before(self) -> Tensor:
        """The published words while `words` are the next ones, for as long as they are needed."""
        if not self.parts:
            return self.words
        out = self.words.clone()
        _turn(out, self.parts, back=True)
        return out


def _turn(words: Tensor, parts: list[tuple[int, int, bytes]], back: bool) -> None:
    flat = _bits(words)
    for a, b, exchange in parts:
        _core.exchange_apply(flat[a:b], exchange, back)


def _bits(tensor: Tensor) -> Tensor:
    """The words of a contiguous tensor in a row, whatever they mean."""
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.reshape(-1).view(sizes[tensor.element_size()])


def _cast(tensor: Tensor, dtype: torch.dtype, copy: bool = False) -> Tensor:
    """The tensor's words as the base would have them, on the CPU."""
    return tensor.to("cpu", dtype, copy=copy).contiguous()


def _differences(held: Tensor, tensor: Tensor) -> list[tuple[int, int, bytes]] | None:
    """What turns `held` into `tensor`; None where that would take more than half of a copy."""
    new, old, parts, size = tensor.reshape(-1), _bits(held), [], 0
    for a in range(0, new.numel(), _BLOCK_WORDS):
        becomes = _bits(_cast(new[a : a + _BLOCK_WORDS], held.dtype))
        b = a + becomes.numel()
        exchange, changed = _core.exchange(old[a:b], becomes)
        if changed:
            parts.append((a, b, exchange))
            size += len(exchange)
        if size > held.nbytes // 2:
            return None
    return parts


class Publisher:
    """Turns a model under training into versions, each a small package that is a step from the one before.

        publisher = xorz.Publisher("base/", "run/")     # base/: the checkpoint that the engines have loaded
        for step in range(steps):
            train(model)
            publisher.publish(model)                    # copies the words, and returns; packing goes on beside the training
        publisher.close()

    One copy of the last published words is held in host memory, in the dtypes of the base; while a version is written also
    what differs, and one tensor. A tensor of which more than about a sixth of the words differ is held twice meanwhile. One
    process at a time may publish into a folder; any number may read it.

    Attributes:
        versions: the `xorz.Versions` that is written.
    """

    def __init__(
        self,
        base: StateDict | nn.Module | PathLike,
        folder: PathLike,
        *,
        keyframe: int = 8,
        trust: str = "digest",
    ) -> None:
        """Begin or continue the chain in `folder`.

        Args:
            base: version 0, the words that engines load: the folder of a checkpoint in safetensors files (it is mapped, not
                read into memory), such a file, a state_dict or a module, which must not change then.
            folder: of the chain; made if it is missing. Engines read it.
            keyframe: every so many versions a package against the base is written as well, so that a late engine catches up in
                few steps.
            trust: "sha256" keeps the sha256 of each tensor that a version is a step from, for engines that trust nothing else
                (docs/rl.md); as in `xorz.Versions`.

        Raises:
            As `xorz.Versions`; ValueError: `base` is a folder without safetensors files.
        """
        words = _mapped(base) if isinstance(base, (str, os.PathLike)) else base
        self.versions = Versions(words, folder, keyframe=keyframe, trust=trust)
        self._kinds = {name: (t.dtype, tuple(t.shape)) for name, t in tensors_of("base", words).items()}
        self._last: tuple[str, StateDict] | None = None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="xorz-publisher")
        self._running: Future[int] | None = None
        self._closed = False

    def publish(self, new: StateDict | nn.Module, *, as_tenant: bool = False) -> "Future[int]":
        """Make `new` the next version. What differs is noted before this returns, so that training may go on.

        A version that is still being written is waited for. Floating-point tensors are cast to the base's dtypes, as an engine
        that loads a checkpoint would cast them; names of what is tied to a tensor that the base has are left out.

        Args:
            new: the model or its state_dict, on whatever device, with the tensors that the base has.
            as_tenant: write a package against the base, too, so that engines can serve the version beside others, as the tenant
                whose path is `FOLDER@NUMBER`. It takes as long again.

        Returns:
            A future of the version's number. An error in it is raised by the next call of `publish`, `wait` or `close`, too,
            and the version does not exist then.

        Raises:
            KeyError, ValueError: a tensor is missing, unknown or of another shape (named); TypeError: not a state_dict, or a
            tensor is in pieces on several processes, as FSDP's are (named): gather it first; RuntimeError: it is closed.
        """
        if self._closed:
            raise RuntimeError("this Publisher is closed")
        self.wait()
        copied = self._copy(tensors_of("new", new))
        self._running = self._worker.submit(self._write, copied, as_tenant)
        return self._running

    def _copy(self, tensors: dict[str, Tensor]) -> dict[str, _Change]:
        kept = {name: t for name, t in tensors.items() if name in self._kinds}
        places = {place(t) for t in kept.values()}
        for name, tensor in tensors.items():
            if name not in kept and place(tensor) not in places:
                raise ValueError(f"new has a tensor `{name}`, which the base lacks")
        wanted: dict[str, tuple[Any, Tensor]] = {}
        for name, (dtype, shape) in self._kinds.items():
            if name not in kept:
                raise KeyError(f"new lacks the tensor `{name}`, which the base has")
            tensor = kept[name].detach()
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"new: tensor `{name}` is {list(tensor.shape)}, but the base's is {list(shape)}"
                )
            if tensor.dtype != dtype and not (tensor.is_floating_point() and dtype.is_floating_point):
                raise ValueError(
                    f"new: tensor `{name}` is {_core.dtype_name(tensor.dtype)}, but the base's is "
                    f"{_core.dtype_name(dtype)}"
                )
            wanted[name] = (place(tensor), dtype), tensor
        with torch.no_grad():
            return self._changes(wanted)

    def _changes(self, wanted: dict[str, tuple[Any, Tensor]]) -> dict[str, _Change]:
        """One for each tensor, which names that share memory have together."""
        held = self._last[1] if self._last is not None else {}
        alone = _tied_alike(
            {name: id(tensor) for name, tensor in held.items()}, {n: k for n, (k, _) in wanted.items()}
        )
        out: dict[str, _Change] = {}
        made: dict[Any, _Change] = {}
        for name, (key, tensor) in wanted.items():
            if key not in made:
                parts = _differences(held[name], tensor) if name in alone else None
                new = _cast(tensor, key[1], copy=True) if parts is None else None
                made[key] = _Change(held[name], parts) if new is None else _Change(new, turned=True)
            out[name] = made[key]
        return out

    def _write(self, changes: dict[str, _Change], as_tenant: bool) -> int:
        last, self._last = self._last, None
        digest, held = last or (None, {})
        turned: list[_Change] = []

        def each() -> Iterator[tuple[str, Tensor, Tensor | None]]:
            for name, change in changes.items():
                if not change.turned:
                    turned.append(change)
                    change.turn()
                yield name, change.words, held.get(name) if change not in turned else change.before()

        try:
            number, digest = self.versions.publish_from(digest, each(), as_tenant=as_tenant)
        except BaseException:
            # The version does not exist: what is held is the one before again, or is not held any more.
            for change in turned:
                change.turn()
            self._last = last
            raise
        self._last = digest, {name: change.words for name, change in changes.items()}
        return number

    def wait(self) -> int | None:
        """Until the last version is written: its number, or None if nothing was published. Raises what went wrong with it."""
        running = self._running
        if running is None:
            return None
        if running.exception() is not None:
            self._running = None
        return running.result()

    def close(self) -> None:
        """Wait for the last version, and drop the copy of its words."""
        try:
            self.wait()
        finally:
            self._closed, self._last = True, None
            self._worker.shutdown()

    def __enter__(self) -> "Publisher":
        """Use as a context, which closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it, and wait for what is being written."""
        self.close()


def _tied_alike(before: dict[str, int], now: dict[str, Any]) -> set[str]:
    """Names of tensors that share their memory with the same others as before."""
    groups: list[dict[Any, set[str]]] = []
    for keys in (before, now):
        groups.append({})
        for name, key in keys.items():
            groups[-1].setdefault(key, set()).add(name)
    return {name for name in before if groups[0][before[name]] == groups[1].get(now.get(name))}


def _mapped(path: PathLike) -> Mapping[str, Tensor]:
    """The tensors of a safetensors file, or of a folder of them, mapped."""
    from safetensors import safe_open

    folder = Path(path)
    if folder.is_dir():
        index = folder / "model.safetensors.index.json"
        names = (
            sorted(set(json.loads(index.read_text())["weight_map"].values()))
            if index.is_file()
            else sorted(p.name for p in folder.glob("*.safetensors") if not p.name.startswith("consolidated"))
        )
        files = [folder / name for name in names]
    else:
        files = [folder]
    if not files:
        raise ValueError(f"{os.fspath(path)} holds no safetensors files, which the base must be in")
    out: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt", device="cpu") as opened:
            out.update({key: opened.get_tensor(key) for key in opened.keys()})
    return out
