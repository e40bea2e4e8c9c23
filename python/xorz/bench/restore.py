"""`delta_restore`: how fast a fine-tuned matrix is given back, beside a plain copy of it and the notebook's way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import rivals
from .products import ENCODINGS, Case, interleave

_SHOWN = ("copy", "notebook")


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """One row: milliseconds, GB/s of fine-tuned weights, and the others' time over that of xorz; checked to the bit first."""
    bases, firsts = case.bases, [tenants[0] for tenants in case.tenants]
    variants: dict[str, Callable[[int], Any]] = {
        "xorz": lambda i: torch.ops.xorz.delta_restore(bases[i], firsts[i].delta),
        "copy": lambda i: firsts[i].dense.clone(),
    }
    if case.others and rivals.zstandard is not None:
        variants["notebook"] = lambda i: rivals.rebuild(bases[i], firsts[i].xor)
    for name, call in variants.items():
        for i in range(1 if name == "notebook" else len(bases)):
            same = torch.equal(call(i).view(torch.uint8), firsts[i].dense.view(torch.uint8))
            assert same, f"{name} gives back other bits than the fine-tune's"
    seconds = interleave(variants, len(bases), rounds)
    (n, k), dtype = bases[0].shape, bases[0].dtype
    row: dict[str, Any] = {
        "shape": f"{n}x{k}",
        "dtype": str(dtype).removeprefix("torch."),
        "encoding": ENCODINGS[int(firsts[0].delta[10])],
        "ms": {name: 1e3 * s for name, s in seconds.items()},
        "gbps": bases[0].nbytes / seconds["xorz"] / 1e9,
    }
    return row | {name: s / seconds["xorz"] for name, s in seconds.items() if name != "xorz"}


HEADER = f"{'restore':>11} {'dtype':>8} {'changed':>14} {'encoding':>9} {'xorz ms':>8} {'GB/s':>6} {'copy':>8} {'notebook':>8}"


def line(row: dict[str, Any]) -> str:
    """The line of one measured restore."""
    ratios = " ".join(f"{row[name]:>8.2f}" if name in row else f"{'-':>8}" for name in _SHOWN)
    return (
        f"{row['shape']:>11} {row['dtype']:>8} {row['what']:>14} {row['encoding']:>9} {row['ms']['xorz']:>8.2f} "
        f"{row['gbps']:>6.2f} {ratios}"
    )
