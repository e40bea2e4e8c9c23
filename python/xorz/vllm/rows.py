"""Which tenant each row of a step is of, and what a parameter's tenants are read from."""

import torch
from torch import Tensor


class Rows:
    """Which tenant's slot each row is of, at fixed addresses; -1 is the base.

    Attributes:
        tokens: int32, of the rows that the model's layers see.
        sampled: int32, of the rows that logits are computed from.
        places: int64, as `tokens`, for tables whose last row is the base's.
        batched: whether the model's layers see the step's rows as a batch of one, `[1, rows, ...]`, as those of vLLM's
            Transformers backend do.
    """

    def __init__(self, count: int, slots: int, device: torch.device) -> None:
        """For at most `count` rows, all the base's."""
        self.slots = slots
        self.batched = False
        self.tokens = torch.full((count,), -1, dtype=torch.int32, device=device)
        self.sampled = torch.full((count,), -1, dtype=torch.int32, device=device)
        self.places = torch.full((count,), slots, dtype=torch.int64, device=device)
        self.of_prompt: Tensor | None = None

    def write(self, tokens: Tensor, sampled: Tensor) -> None:
        """The rows of the next step; rows behind them, which a graph may compute for nothing, are the base's."""
        for buffer, given in ((self.tokens, tokens), (self.sampled, sampled)):
            buffer[: given.numel()].copy_(given)
            buffer[given.numel() :].fill_(-1)
        self.places[: tokens.numel()].copy_(torch.where(tokens < 0, self.slots, tokens))
        self.places[tokens.numel() :].fill_(self.slots)

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
        table: [s + 1, n], the tenants' own vectors and, last, the base's, of a bias or a norm.
    """

    def __init__(self, arena: Tensor, rows: Rows, mode: str) -> None:
        """A parameter that no tenant has changed yet."""
        self.arena, self.rows, self.mode = arena, rows, mode
        self.slots: Tensor | None = None
        self.table: Tensor | None = None
