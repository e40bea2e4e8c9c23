"""Products of many tenants' rows on a GPU where a step holds long prompts: see `xorz.serve.runs`, whose rule this is.

One op, which compilers cannot see into: who has which row is known on the host when a step runs, and is not when it is traced.
While a CUDA graph is captured it launches the grouped kernel, which reads the rows from the device at each replay; vLLM
captures steps of up to `max_cudagraph_capture_size` tokens, and long prompts are run as they are.
"""

import weakref

import torch
from torch import Tensor

from ..serve.rows import capturing
from ..serve.runs import DTYPES, MANY, product
from .rows import Site

_PANEL = 64 << 20
"""Bytes of restored words that a product works in: PANEL_BYTES of src/cuda/plan.rs."""

_sites: "weakref.WeakValueDictionary[int, Site]" = weakref.WeakValueDictionary()
"""By the addresses of the tables that offsets are read from on the device: what a graph names survives in vLLM's cache."""


def register(site: Site) -> None:
    """Make the site of a matrix known to the op."""
    _sites[site.slots.data_ptr()] = site


@torch.library.custom_op("xorz_vllm::product", mutates_args=())
def grouped(
    x: Tensor, weight: Tensor, biases: Tensor | None, arena: Tensor, slots: Tensor, rows: Tensor
) -> Tensor:
    """`delta_linear_grouped` in mode fast.

    Args:
        x: [r, k], or [1, r, k]. weight: [n, k]. biases: [s + 1, n] or None.
        arena: of deltas. slots: int64 [s, 2], a site's. rows: int32 [r].
    """
    site = None if capturing(x.device) or weight.dtype not in DTYPES else _sites.get(slots.data_ptr())
    runs = None if site is None else site.rows.runs_of(rows)
    if runs is not None:
        return product(runs, x, weight, biases, arena, slots, rows, site.delta)
    room = [] if site is None or rows.numel() < MANY else _room(rows.numel(), weight)
    out = torch.ops.xorz.delta_linear_grouped(x, weight, biases, arena, slots, rows)
    del room
    return out


def _room(rows: int, weight: Tensor) -> list[Tensor]:
    """What these rows would take if they were some tenants' own: vLLM measures what a step takes with adapters whose rows take
    turns, and which change nothing; the rest it gives away.
    """
    panel = min(weight.nbytes, _PANEL) // weight.itemsize
    return [weight.new_empty(panel), weight.new_empty(rows * sum(weight.shape))]


@grouped.register_fake
def _(x, weight, biases, arena, slots, rows):
    return x.new_empty((*x.shape[:-1], weight.size(0)))
