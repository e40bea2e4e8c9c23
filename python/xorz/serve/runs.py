"""Many rows of one tenant side by side in a mixed batch on a GPU, prompts above all: multiplied for that tenant alone.

A product of many rows is torch's own on restored panels of W (`delta_linear`, whose rule for one tenant this is), or of the
base's W as it is. The grouped kernel patches W again for each 128 rows of a tenant, and keeps the matrix units busy for 22 % of
its time (cuda/PREDICTED.md). It serves what is left, stretch by stretch. Who has which row must be known on the host: of rows
of a graph it is not, and they are served by the grouped kernel whole.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

F = torch.nn.functional

MANY = 128
"""Rows of a tenant, in runs of at least `LEAST`, from which its words are restored: below, that and three launches more are not
earned back. By the predicted times; no GPU has been asked."""

LEAST = 32
"""Rows of a run that is worth a copy of its own."""

DTYPES = (torch.bfloat16, torch.float16)
"""Of products that the rule of `delta_linear` is for."""

Span = tuple[int, int]
"""Rows first to end, the end not among them."""


@dataclass(frozen=True)
class Runs:
    """What becomes of a batch's rows.

    Attributes:
        count: of rows.
        alone: slot -> spans of rows that are multiplied for it alone.
        rest: spans of rows that the grouped kernel takes.
    """

    count: int
    alone: dict[int, list[Span]] = field(default_factory=dict)
    rest: list[Span] = field(default_factory=list)

    def until(self, count: int) -> "Runs | None":
        """Those of the first `count` rows, and of rows behind the last one, which are the grouped kernel's; None for nothing
        to do alone.
        """
        if count == self.count:
            return self
        alone = {slot: _cut(spans, count) for slot, spans in self.alone.items()}
        rest = _cut(self.rest, count)
        if count > self.count:
            rest.append((self.count, count))
        alone = {slot: spans for slot, spans in alone.items() if spans}
        return Runs(count, alone, rest) if alone else None


def _cut(spans: Sequence[Span], count: int) -> list[Span]:
    return [(first, min(end, count)) for first, end in spans if first < count]


def known_of(tenant_of_row: Tensor) -> Runs | None:
    """What `note` has said of the slots of a batch's rows on a device."""
    return getattr(tenant_of_row, "xorz_runs", None)


def note(tenant_of_row: Tensor, slots: Sequence[int], each: int) -> None:
    """Say of a tensor on a device what its numbers are: these, each so many times one after another."""
    if tenant_of_row.device.type == "cuda":
        tenant_of_row.xorz_runs = runs_of(torch.tensor(slots, dtype=torch.int32), each)


def runs_of(slots: Tensor, each: int = 1) -> Runs | None:
    """Of the slots of a batch, int32 on the host, each of so many rows one after another; None if no tenant has many."""
    if slots.numel() * each < MANY:
        return None
    values, counts = torch.unique_consecutive(slots, return_counts=True)
    runs, at = [], 0
    for slot, count in zip(values.tolist(), counts.tolist(), strict=True):
        runs.append((slot, at, at + count * each))
        at += count * each
    rows: dict[int, int] = {}
    for slot, first, end in runs:
        rows[slot] = rows.get(slot, 0) + (end - first if end - first >= LEAST else 0)
    out = Runs(at)
    for slot, first, end in runs:
        if rows[slot] >= MANY and end - first >= LEAST:
            out.alone.setdefault(slot, []).append((first, end))
        elif out.rest and out.rest[-1][1] == first:
            out.rest[-1] = (out.rest[-1][0], end)
        else:
            out.rest.append((first, end))
    return out if out.alone else None


def product(
    runs: Runs,
    input: Tensor,
    weight: Tensor,
    biases: Tensor | None,
    arena: Tensor,
    slots: Tensor,
    tenant_of_row: Tensor,
    delta_of: Callable[[int], Tensor | None],
) -> Tensor:
    """`delta_linear_grouped` in mode fast, without gradients.

    Args:
        runs: of the rows that `tenant_of_row` says.
        input, weight, biases, arena, slots, tenant_of_row: as of the op.
        delta_of: a slot's delta in the arena; None where it has the base's words, as -1 does, which is the base.
    """
    flat = input.reshape(-1, input.size(-1))
    if flat.size(0) != runs.count:
        # Which the op refuses, in its own words.
        return torch.ops.xorz.delta_linear_grouped(input, weight, biases, arena, slots, tenant_of_row)

    def alone(slot: int, mine: Tensor) -> Tensor:
        bias, delta = None if biases is None else biases[slot], delta_of(slot)
        if delta is None:
            return F.linear(mine, weight, bias)
        return torch.ops.xorz.delta_linear(mine, weight, bias, delta)

    if not runs.rest and len(runs.alone) == 1:
        return alone(next(iter(runs.alone)), flat).view(*input.shape[:-1], -1)
    out = flat.new_empty(flat.size(0), weight.size(0))
    for slot, spans in runs.alone.items():
        parts = [flat[first:end] for first, end in spans]
        made = alone(slot, parts[0] if len(parts) == 1 else torch.cat(parts))
        for (first, end), part in zip(spans, made.split([end - first for first, end in spans]), strict=True):
            out[first:end] = part
    for first, end in runs.rest:
        out[first:end] = torch.ops.xorz.delta_linear_grouped(
            flat[first:end], weight, biases, arena, slots, tenant_of_row[first:end]
        )
    return out.view(*input.shape[:-1], -1)
