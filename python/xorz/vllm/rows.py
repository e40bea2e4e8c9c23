"""Which tenant each row of a step is of, and what a parameter's tenants are read from."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..serve.rows import copy_to
from ..serve.runs import Runs, runs_of

_APART = 64
"""Rows that maps are multiples of, so that each begins as aligned as memory of its own."""


class Rows:
    """Which tenant's slot each row is of, at fixed addresses, which captured CUDA graphs read at each replay; -1 is the base.

    Attributes:
        tokens: int32, of the rows that the model's layers see.
        sampled: int32, of the rows that logits are computed from.
        places: int32, as `tokens`, for tables whose last row is the base's.
        batched: whether the model's layers see the step's rows as a batch of one, `[1, rows, ...]`, as those of vLLM's
            Transformers backend do.
    """

    def __init__(self, count: int, slots: int, device: torch.device) -> None:
        """For at most `count` rows, all the base's."""
        self.slots = slots
        self.batched = False
        count = -(-count // _APART) * _APART
        self._all = self._of_base(count).to(device)
        self.tokens, self.sampled, self.places = self._all.unbind()
        self.of_prompt: Tensor | None = None
        self._runs: Runs | None = None

    def _of_base(self, count: int) -> Tensor:
        out = torch.full((3, count), -1, dtype=torch.int32)
        out[2] = self.slots
        return out

    def write(self, tokens: Tensor, sampled: Tensor) -> None:
        """The rows of the next step; rows behind them, which a graph may compute for nothing, are the base's.

        One copy, which nothing waits for: on a GPU steps that were asked before see the rows of before.
        """
        new = self._of_base(self._all.size(1))
        new[0, : tokens.numel()] = tokens
        new[1, : sampled.numel()] = sampled
        new[2, : tokens.numel()] = torch.where(tokens < 0, self.slots, tokens)
        copy_to(self._all, new)
        self._runs = None if self._all.device.type == "cpu" else runs_of(tokens)

    def runs_of(self, rows: Tensor) -> Runs | None:
        """What becomes of these rows of a step on a GPU, if they are the first of `tokens` and some tenant has many."""
        if self._runs is None or rows.data_ptr() != self.tokens.data_ptr():
            return None
        return self._runs.until(rows.numel())

    def count(self, shape: torch.Size) -> int:
        """Rows of the step in a layer's input, of which these are all dimensions but the features'.

        RuntimeError where they are laid out otherwise than by token, so that nobody could say whose they are.
        """
        if len(shape) == 1:
            return shape[0]
        if self.batched and len(shape) == 2 and shape[0] == 1:
            return shape[1]
        raise RuntimeError(
            f"xorz: a layer is given rows as {list(shape)}, which are not the step's tokens one after another; their tenants "
            "are unknown"
        )

    @contextmanager
    def scoring(self, states: Tensor) -> Iterator[None]:
        """Inside, logits are computed from views of `states`, a row for each token of the step."""
        self.of_prompt = states
        try:
            yield
        finally:
            self.of_prompt = None

    def for_logits(self, x: Tensor) -> Tensor:
        """Of the rows of `x`: the sampled ones, or, while prompts are scored, those tokens that `x` is a view of."""
        states = self.of_prompt
        if states is None:
            return self.sampled[: x.shape[0]]
        if (
            x.untyped_storage().data_ptr() != states.untyped_storage().data_ptr()
            or x.stride() != states.stride()
        ):
            raise RuntimeError(
                "xorz: logits of a prompt are computed from other rows than the model's own; their tenant is unknown"
            )
        start = (x.storage_offset() - states.storage_offset()) // states.stride(0)
        return self.tokens[start : start + x.shape[0]]


class Site:
    """What one parameter's tenants are read from.

    Attributes:
        slots: int64 [s, 2], offset and length in the arena, of a matrix.
        places: the same on the host, as the host knows them by now.
        table: [s + 1, n], the tenants' own vectors and, last, the base's, of a bias or a norm.
    """

    def __init__(self, arena: Tensor, rows: Rows, mode: str) -> None:
        """A parameter that no tenant has changed yet."""
        self.arena, self.rows, self.mode = arena, rows, mode
        self.slots: Tensor | None = None
        self.places: Tensor | None = None
        self.table: Tensor | None = None

    def delta(self, slot: int) -> Tensor | None:
        """The delta in a slot; None if it has the base's words, as -1 does."""
        offset, length = self.places[slot].tolist() if slot >= 0 else (0, 0)
        return self.arena[offset : offset + length] if length else None
