"""Checkpoints that name their tensors otherwise than the model: transformers keeps a mixture's experts as one stack and saves
them one by one, joins projections, and renames.

Which file's tensor holds which rows is asked of transformers itself: its own reversed conversion (`revert_weight_conversion`,
of version 5, looked up and never imported) is run once over the numbers of the rows in place of the weights, so no pattern
of names is repeated here. No dense weight is copied or made.
"""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import _core, _ops

Experts = list[Tensor | None]
"""One delta for each matrix of a stack [E, n, k]; None where nothing changes."""


class Stored:
    """How a model's tensors are called and cut in a checkpoint.

    Attributes:
        base: name in the checkpoint -> the base's words of it, contiguous views of the model's tensors, where these are.
    """

    def __init__(self, base: Mapping[str, Tensor], places: dict[str, tuple[str, int, int]]) -> None:
        """`places`: name in the checkpoint -> name in the model, its first row, and the row after its last."""
        self._model = base
        self._places = places
        self._parts: dict[str, list[str]] = {}
        self.base: dict[str, Tensor] = {}
        for stored, (name, start, end) in sorted(places.items(), key=lambda item: item[1][1]):
            self._parts.setdefault(name, []).append(stored)
            tensor = base[name]
            if (start, end) == (0, _rows(tensor)):
                self.base[stored] = tensor
            else:
                self.base[stored] = _by_rows(tensor)[start:end]

    def deltas(self, found: Mapping[str, Tensor]) -> dict[str, Tensor | Experts]:
        """Deltas by name in the model, from deltas by name in the checkpoint."""
        changed = dict.fromkeys(self._place(stored)[0] for stored in found)
        return {name: self._joined(name, found) for name in changed}

    def whole(self, stored: str) -> str:
        """The model's name of a tensor that is stored alone or missing; ValueError if it is a part of one."""
        name, start, end = self._place(stored)
        if (start, end) != (0, _rows(self._model[name])):
            raise ValueError(
                f"tensor `{stored}` is rows {start} to {end} of the model's `{name}`; in another shape or dtype than the "
                "base's it cannot be served"
            )
        return name

    def _place(self, stored: str) -> tuple[str, int, int]:
        try:
            return self._places[stored]
        except KeyError:
            raise KeyError(f"the model has no tensor `{stored}`, which the fine-tune has") from None

    def _joined(self, name: str, found: Mapping[str, Tensor]) -> Tensor | Experts:
        parts, tensor = self._parts[name], self._model[name]
        if len(parts) == 1 and self.base[parts[0]] is tensor:
            return found[parts[0]]
        if tensor.dim() != 3:
            return self._concat(name, parts, (0, _rows(tensor)), found)
        out: Experts = []
        for expert in range(tensor.size(0)):
            first = expert * tensor.size(1)
            inside = [p for p in parts if first <= self._places[p][1] < first + tensor.size(1)]
            changed = any(part in found for part in inside)
            last = first + tensor.size(1)
            out.append(self._concat(name, inside, (first, last), found) if changed else None)
        return out

    def _concat(
        self, name: str, parts: list[str], rows: tuple[int, int], found: Mapping[str, Tensor]
    ) -> Tensor:
        """One delta of the parts that make up these rows, those without one unchanged; ValueError if they do not."""
        at = rows[0]
        for part in parts:
            at = self._places[part][2] if self._places[part][1] == at else -1
        if at != rows[1]:
            raise ValueError(
                f"tensor `{parts[0]}` is a part of the model's `{name}`, of which the checkpoint does not hold every row of "
                f"{rows[0]} to {rows[1]} once; it cannot be served"
            )
        bases = [_core.on_host(part, self.base[part]) for part in parts]
        deltas = [
            found[part] if part in found else _ops.delta_encode(base, base)
            for part, base in zip(parts, bases, strict=True)
        ]
        if len(deltas) == 1:
            return deltas[0]
        if bases[0].dim() == 2:
            return _ops.delta_concat(deltas, bases, 0)
        base = torch.cat(bases)
        tuned = [_ops.delta_restore(b, d) for b, d in zip(bases, deltas, strict=True)]
        return _ops.delta_encode(base, torch.cat(tuned))


def stored(model: nn.Module, base: Mapping[str, Tensor]) -> Stored | None:
    """How transformers would save `model`; None for what is not one of its models, or of an older version of it.

    Tensors that it would save in any other way than as runs of whole rows are left out.
    """
    loading: Any = sys.modules.get("transformers.core_model_loading")
    revert = getattr(loading, "revert_weight_conversion", None)
    if revert is None or not hasattr(model, "config"):
        return None
    numbers, first, names, starts = {}, 0, list(base), []
    for name in names:
        rows = _rows(base[name])
        starts.append(first)
        shape = (*base[name].shape[:-1], 1) if base[name].dim() > 1 else (rows,)
        numbers[name] = torch.arange(first, first + rows).reshape(shape)
        first += rows
    starts_of = torch.tensor(starts)
    places = {}
    try:
        runs = revert(model, numbers)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        # The conversion looks at columns, which row numbers do not have. The name stays missing, and looking it up says so.
        return None
    for name, run in runs.items():
        flat = run.reshape(-1)
        if flat.numel() == 0 or (run.dim() > 1 and run.size(-1) != 1):
            continue
        which = int(torch.searchsorted(starts_of, flat[0], right=True)) - 1
        start = int(flat[0]) - starts[which]
        in_order = torch.equal(flat, torch.arange(int(flat[0]), int(flat[0]) + flat.numel()))
        if in_order and start + flat.numel() <= _rows(base[names[which]]):
            places[name] = (names[which], start, start + flat.numel())
    return Stored(base, places)


def _rows(tensor: Tensor) -> int:
    """Of a matrix, or of a stack of them one below the other; words of a vector."""
    return tensor.numel() if tensor.dim() < 2 else tensor.shape[:-1].numel()


def _by_rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1) if tensor.dim() < 2 else tensor.reshape(-1, tensor.size(-1))
