"""The user's own model: matrices of a base and of its fine-tunes, read from safetensors files or Hugging Face
folders.

Matrices of one shape and dtype make one case: as many of them as exceed the caches, and as memory allows.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .products import Case
from .tunes import INTS

BEYOND_CACHES = 96 << 20
"""Bytes of matrices that no cache of a common machine holds."""
SKIPPED = ("embed", "wte", "wpe")
"""What is looked up and not multiplied; a head of its own (`lm_head`) counts."""


class BenchError(Exception):
    """What the user can put right, in one sentence."""


class Group(NamedTuple):
    """All matrices of one shape and dtype, by name."""

    shape: tuple[int, int]
    dtype: torch.dtype
    names: list[str]


class Checkpoint:
    """A safetensors file, or a folder of them."""

    def __init__(self, path: str) -> None:
        """BenchError if there is nothing to read."""
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError:
            raise BenchError("reading checkpoints takes safetensors: pip install safetensors") from None
        self.path, place = path, pathlib.Path(path)
        files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
        if not files or not files[0].exists():
            raise BenchError(
                f"{path}: {'no *.safetensors in this folder' if files == [] else 'no such file'}"
            )
        self._files: dict[str, Any] = {}
        for file in files:
            try:
                opened = safe_open(file, "pt")
            except (SafetensorError, OSError) as error:
                raise BenchError(f"{file}: not a safetensors file ({error})") from None
            self._files |= dict.fromkeys(opened.keys(), opened)

    def names(self) -> list[str]:
        """The names of all tensors, in the order of the files."""
        return list(self._files)

    def kind(self, name: str) -> tuple[tuple[int, ...], str] | None:
        """Shape and dtype of a tensor, None where it is missing; only the header is read."""
        if name not in self._files:
            return None
        part = self._files[name].get_slice(name)
        return tuple(part.get_shape()), part.get_dtype()

    def tensor(self, name: str) -> Tensor:
        """A copy in memory of its own: a mapped file is at other alignments, and may be on a slow disk."""
        return self._files[name].get_tensor(name).clone()


_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def groups(base: Checkpoint, tuned: Sequence[Checkpoint]) -> tuple[list[Group], int]:
    """Matrices that linear layers multiply by, by shape and dtype, most words first; and how many a fine-tune has otherwise."""
    found: dict[tuple[tuple[int, int], torch.dtype], list[str]] = {}
    apart = 0
    for name in base.names():
        kind = base.kind(name)
        if kind is None or len(kind[0]) != 2 or kind[1] not in _DTYPES or any(s in name for s in SKIPPED):
            continue
        if any(other.kind(name) != kind for other in tuned):
            apart += 1
            continue
        (n, k), dtype = kind[0], _DTYPES[kind[1]]
        if n and k:
            found.setdefault(((n, k), dtype), []).append(name)
    out = [Group(shape, dtype, names) for (shape, dtype), names in found.items()]
    return sorted(out, key=lambda g: -g.shape[0] * g.shape[1] * len(g.names)), apart


def available() -> int:
    """Bytes of memory that may be taken; all there is where the system does not say."""
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    except (OSError, StopIteration):
        return 1 << 62


def affordable(group: Group, tenants: int, memory: int) -> tuple[int, int]:
    """How many matrices of a group and how many tenants of each fit in half of `memory`: fewer matrices
    first, then tenants.

    A tenant of a matrix costs its words and their fp32 copy, and for the first matrix the rivals' forms:
    twice as much again.
    """
    n, k = group.shape
    size = n * k * group.dtype.itemsize
    wanted = max(1, min(len(group.names), BEYOND_CACHES // size + 1))
    for count in sorted({tenants, *(1 << i for i in range(10) if 1 << i < tenants)}, reverse=True):
        for matrices in range(wanted, 0, -1):
            wide = 0 if group.dtype == torch.float32 else 4 * n * k
            if (matrices + 2) * count * (2 * size + wide) < memory // 2:
                return matrices, count
    return 0, 0


def case(
    group: Group,
    base: Checkpoint,
    tuned: Sequence[Checkpoint],
    matrices: int,
    tenants: int,
    prefer: str,
    others: bool,
) -> Case:
    """Matrices evenly spread over the layers; where there are fewer fine-tunes than tenants they come again, as copies."""
    every = [group.names[i * len(group.names) // matrices] for i in range(matrices)]
    bases = [base.tensor(name) for name in every]
    fine = [[tuned[t % len(tuned)].tensor(name) for t in range(tenants)] for name in every]
    return Case(bases, fine, prefer, others)


def changed(case: Case) -> float:
    """Share of the words of a case that its fine-tunes change, to the bit."""
    ints = INTS[case.bases[0].dtype]
    shares = [
        (tenant.dense.view(ints) != base.view(ints)).float().mean().item()
        for base, tenants in zip(case.bases, case.tenants, strict=True)
        for tenant in tenants
    ]
    return sum(shares) / len(shares)


def whole(rows: list[dict[str, Any]], counts: dict[str, int]) -> Iterator[dict[str, Any]]:
    """All linear layers together, for each number of tenants that every shape was measured with: sums of
    medians.

    `counts`: matrices in the model, by "shape dtype".
    """
    by_tenants: dict[int, dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row["T"] == row["m"]:
            by_tenants.setdefault(row["T"], {})[f"{row['shape']} {row['dtype']}"] = row
    for count, found in sorted(by_tenants.items()):
        if set(found) != set(counts):
            continue
        names = set.intersection(*(set(row["ms"]) for row in found.values()))
        ms = {name: sum(counts[key] * row["ms"][name] for key, row in found.items()) for name in names}
        yield {"T": count, "ms": ms} | {n: t / ms["xorz"] for n, t in ms.items() if n != "xorz"}
