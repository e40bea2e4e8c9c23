"""Packages as vLLM's adapters: what they are called, and what each parameter of a model needs of them.

An adapter's name ends in a digest of its package, `alice@xorz-1f0e...`. vLLM tells adapters apart by name, in batches as in
its prefix cache: so a package that is published anew under the same path is another adapter, and no key or value that its
predecessor computed can be taken for its own. Clients say `alice`; `serving` translates.
"""

import hashlib
import json
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _core, _ops, checkpoint, sources
from ..serve.rows import staged
from ..versions import chain_of
from .plan import Piece, Plan

_NAMED = re.compile(r"(?P<name>.+)@xorz-(?P<digest>[0-9a-f]{32})")
# src/package/SPEC.md
_LONGEST_HEADER = 100_000_000
_TABLE = "xorz:table"


def is_package(path: Any) -> bool:
    """Whether a path is meant as a package: it ends in `.xorz`, is a folder with such a file, or a version of a chain."""
    path = os.fspath(path)
    if chain_of(path) is not None:
        return True
    return path.endswith(sources.SUFFIX) or (os.path.isdir(path) and any(sources.packages(os.listdir(path))))


def what_is(path: Any) -> str | None:
    """Why a path is no package, and what to do; None if it may be one."""
    folder = Path(path)
    if is_package(path) or (sources.is_elsewhere(path) and not folder.is_dir()):
        return None
    if (folder / "adapter_config.json").is_file():
        return "this engine serves xorz packages, and this is a LoRA adapter; serve it without --quantization xorz"
    if folder.is_dir():
        return (
            "this engine serves xorz packages, and this is a folder; make a package of the fine-tune in it, "
            f"`xorz pack BASE {folder} {folder.name or 'tenant'}.xorz`, and load that"
        )
    return "this engine serves xorz packages, and this path does not end in .xorz"


def digest(path: Any) -> str:
    """32 hexadecimal digits that stand for a package's content: of its header and its table, which hold the digests of all the
    rest.

    Raises:
        OSError: it cannot be read; ValueError: it is not a package, or it was cut.
    """
    checkpoint.inspect(path)
    cut = ValueError(f"{os.fspath(path)} is not a xorz package: its header is cut")
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else _LONGEST_HEADER + 1
        header = file.read(min(length, _LONGEST_HEADER + 1))
        if len(header) != length:
            raise cut
        found = hashlib.sha256(start + header)
        # Version 1 has none: its header says everything.
        table = json.loads(header).get(_TABLE)
        if table is not None:
            first, end = table["data_offsets"]
            file.seek(8 + length + first)
            while first < end:
                block = file.read(min(end - first, 1 << 20))
                if not block:
                    raise cut
                found.update(block)
                first += len(block)
    return found.hexdigest()[:32]


def check_trust(word: Any) -> None:
    """ValueError for a word that says nothing of what a base is trusted by."""
    if word not in ("digest", "sha256"):
        raise ValueError(f'xorz: trust must be "digest" or "sha256", but is {word!r}')


def named(name: str, content: str) -> str:
    """The adapter's name of a tenant and its package's digest."""
    return f"{name}@xorz-{content}"


def split_name(adapter: str) -> tuple[str, str | None]:
    """The tenant's name and the digest of its package; None for adapters that are not named so."""
    found = _NAMED.fullmatch(adapter)
    return (found["name"], found["digest"]) if found else (adapter, None)


class Checkpoint:
    """The base as it lies on disk: dtypes and shapes by name, and words, mapped and not read before they are used."""

    def __init__(self, folder: Any) -> None:
        """OSError or ValueError if `folder` holds no safetensors files."""
        from safetensors import safe_open

        self.folder = Path(folder)
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            found = (p.name for p in self.folder.glob("*.safetensors"))
            names = sorted(n for n in found if not n.startswith("consolidated"))
        if not names:
            raise ValueError(f"{self.folder} holds no safetensors files, which the base must be in")
        self._open: dict[str, Any] = {}
        self.tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for name in names:
            # As numpy would map it: torch's storages are mapped whole, and copied on write only.
            file = safe_open(self.folder / name, framework="pt", device="cpu")
            for key in file.keys():
                view = file.get_slice(key)
                dtype = _core.DTYPE_OF_NAME.get(view.get_dtype())
                if dtype is not None:
                    self.tensors[key] = (dtype, tuple(view.get_shape()))
                    self._open[key] = file

    def __getitem__(self, name: str) -> Tensor:
        """The words of the tensor `name`, mapped from its file."""
        return self._open[name].get_tensor(name)


@dataclass
class Prepared:
    """What one package changes, by parameter.

    Attributes:
        deltas: parameter -> resident delta of this process's part of it, in the host's memory, pinned for a GPU.
        values: parameter -> this process's part of the fine-tuned vector, there as well.
        generation: of the base that it was checked against, as in `Loader`.
    """

    deltas: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    generation: int = 0

    @property
    def bytes(self) -> int:
        """What it takes in memory."""
        return sum(-(-d.numel() // 64) * 64 for d in self.deltas.values()) + sum(
            v.nbytes for v in self.values.values()
        )


@dataclass
class Loader:
    """Turns packages into what this process's part of a model needs; no dense fine-tuned matrix is made.

    Attributes:
        base: the checkpoint that the model was loaded from.
        plan: how its tensors make up the parameters.
        params: parameter -> its words, as and where they are served.
        kinds: parameter -> "delta" or "value"; others cannot be served, `why` says so.
        prefer: what deltas are encoded for; None takes what packages hold.
        generation: how often the base has been replaced. What was prepared under another one must not be served.
        trust: what packages must say of the base's words, as in `load_deltas`.
    """

    base: Checkpoint
    plan: Plan
    params: Mapping[str, Tensor]
    kinds: Mapping[str, str]
    prefer: str | None
    generation: int = 0
    trust: str = "digest"
    _proved: set[str] = field(default_factory=set)
    _fetched: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def replaced(self, base: Checkpoint | None) -> None:
        """The parameters hold other words now; nothing is known of them any more.

        Args:
            base: the checkpoint as it lies on disk now; None, or one of other tensors, leaves the one that there was. Packages
                are refused then wherever the new words are not its.
        """
        # Others, not empty ones: whoever is proving in another thread must not write what was true before.
        self.generation, self._proved, self._fetched = self.generation + 1, set(), {}
        if base is not None and base.tensors == self.base.tensors:
            self.base = base

    def load(self, path: Any, wanted: str) -> Prepared:
        """Read the package at `path`, whose digest must be `wanted`.

        Raises:
            OSError; ValueError: damaged, republished, of another base (tensor and digests are named), or it changes what
                cannot be served (named); KeyError: the base lacks a tensor of it.
        """
        out, proved, fetched = Prepared(generation=self.generation), self._proved, self._fetched
        found = digest(path)
        if found != wanted:
            raise ValueError(
                f"the package was changed since it was named: its digest is {found}, but {wanted} is wanted"
            )
        description = checkpoint.inspect(path)
        changed = self.changed(description)
        loaded = checkpoint.load_deltas(self.base.folder, path, prefer=self.prefer, trust=self.trust)
        affected = dict.fromkeys(param for name in changed for param in self.plan.users[name])
        for param in affected:
            pieces = self.plan.pieces[param]
            self._prove(param, pieces, proved)
            device = self.params[param].device
            if self.kinds.get(param) == "value":
                out.values[param] = staged(self._value(param, pieces, loaded, fetched), device)
            else:
                delta = self._delta(param, pieces, loaded, changed, fetched)
                if device.type != "cpu" and _of_old_layout(delta):
                    raise ValueError(
                        f"tensor `{pieces[0].name}` is an `exponent` delta of a package of version 1, on which GPUs do not "
                        "compute; pack it again"
                    )
                out.deltas[param] = staged(delta, device)
        return out

    def changed(self, description: dict[str, Any]) -> set[str]:
        """Checkpoint tensors that differ; ValueError if one cannot be served."""
        entries = {entry["name"]: entry for entry in description["entries"]}
        for name in description["removed_names"]:
            if name in self.plan.users:
                raise ValueError(f"tensor `{name}` is not in the fine-tune, and the model needs it")
        changed = set()
        for name, entry in entries.items():
            if entry["same"]:
                # Tied to another tensor, which is all right if the model reads only that one.
                if name in self.plan.users:
                    raise ValueError(f"tensor `{name}` is tied to `{entry['same']}` in the fine-tune alone")
                continue
            if entry["base"] is None:
                raise ValueError(
                    f"tensor `{name}` is stored alone, as {entry['dtype']} {entry['shape']}; vLLM serves one shape"
                )
            if entry["base_parts"]:
                raise ValueError(
                    f"tensor `{name}` is {entry['dtype']} {entry['shape']}, but not in the base; vLLM serves one shape"
                )
            if entry["base_name"] not in (None, name):
                raise ValueError(
                    f"tensor `{name}` is a delta of `{entry['base_name']}`: the fine-tune has untied or renamed it"
                )
            if entry["changed"]:
                self._check_served(name)
                changed.add(name)
        return changed

    def _check_served(self, name: str) -> None:
        if name not in self.base.tensors:
            raise KeyError(f"the base has no tensor `{name}`, which the fine-tune changes")
        why = self.plan.refused.get(name)
        if why is not None:
            raise ValueError(f"tensor `{name}` is changed, and cannot be served: {why}")
        for param in self.plan.users[name]:
            if param not in self.kinds:
                raise ValueError(
                    f"tensor `{name}` is changed, and nothing serves the model's `{param}` by rows"
                )

    def _prove(self, param: str, pieces: list[Piece], proved: set[str]) -> None:
        """That the model computes with the checkpoint's very words, once: what is done to weights after loading is unseen."""
        if param in proved:
            return
        # A GPU's are read back here, once.
        served = _matrix(self.params[param]).cpu()
        for piece in pieces:
            stored = _cut(_matrix(self.base[piece.name]), piece.rows, piece.cols)
            if not torch.equal(_words(stored), _words(_cut(served, piece.to_rows, piece.to_cols))):
                raise ValueError(
                    f"parameter `{param}` is not made of the words of `{piece.name}` in {self.base.folder}: it was repacked "
                    "or replaced after loading (by reload_weights or a weight transfer), and packages do not fit it"
                )
        proved.add(param)

    def _rest(self, param: str, first: int, fetched: dict[tuple[str, int], Tensor]) -> Tensor:
        """The rows of a parameter from `first` on, in the host's memory; of a GPU's they are read back once."""
        served = self.params[param].data
        if served.device.type == "cpu":
            return served[first:]
        if (param, first) not in fetched:
            fetched[param, first] = served[first:].cpu()
        return fetched[param, first]

    def _base_of(self, param: str, piece: Piece) -> Tensor:
        """A piece of a parameter that was proved, in the host's memory: the checkpoint has the same words."""
        served = self.params[param].data
        if served.device.type == "cpu":
            return served[slice(*piece.to_rows)]
        return _cut(_matrix(self.base[piece.name]), piece.rows, piece.cols).contiguous()

    def _value(
        self,
        param: str,
        pieces: list[Piece],
        loaded: Mapping[str, Tensor],
        fetched: dict[tuple[str, int], Tensor],
    ) -> Tensor:
        out = self._rest(param, 0, fetched).clone()
        for piece in pieces:
            base = self.base[piece.name]
            tuned = _ops.delta_restore(base, loaded[piece.name]) if piece.name in loaded else base
            out[slice(*piece.to_rows)] = tuned[slice(*piece.rows)]
        return out

    def _delta(
        self,
        param: str,
        pieces: list[Piece],
        loaded: Mapping[str, Tensor],
        changed: set[str],
        fetched: dict[tuple[str, int], Tensor],
    ) -> Tensor:
        parts, bases = [], []
        for piece in pieces:
            base = self._base_of(param, piece)
            parts.append(self._part(piece, loaded[piece.name]) if piece.name in changed else _unchanged(base))
            bases.append(base)
        covered = pieces[-1].to_rows[1]
        if covered < self.params[param].size(0):
            bases.append(self._rest(param, covered, fetched))
            parts.append(_unchanged(bases[-1]))
        return parts[0] if len(parts) == 1 else _ops.delta_concat(parts, bases, 0)

    def _part(self, piece: Piece, delta: Tensor) -> Tensor:
        """The delta of the rows and columns that are this process's."""
        _dtype, (n, k) = self.base.tensors[piece.name]
        if piece.rows != (0, n):
            whole = self.base[piece.name]
            delta = _ops.delta_slice(delta, whole, 0, *piece.rows)
        if piece.cols != (0, k):
            rows = self.base[piece.name][slice(*piece.rows)]
            delta = _ops.delta_slice(delta, rows, 1, *piece.cols)
        return delta


def _of_old_layout(delta: Tensor) -> bool:
    """Whether it is an `exponent` delta (2) of layout 0, by its header: src/resident/SPEC.md."""
    return delta[8:11].tolist() == [0, 0, 2]


def _unchanged(base: Tensor) -> Tensor:
    return _ops.delta_encode(base, base)


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.data.reshape(-1, 1) if tensor.dim() < 2 else tensor.data


def _cut(tensor: Tensor, rows: tuple[int, int], cols: tuple[int, int]) -> Tensor:
    return tensor[slice(*rows), slice(*cols)]


def _words(tensor: Tensor) -> Tensor:
    """Bits, for comparing: NaN is equal to itself."""
    return tensor.contiguous().view(
        {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    )
