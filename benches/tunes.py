"""Layers of real pairs for benchmarks; the synthetic fine-tunes are `xorz.bench.tunes`."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

from torch import Tensor

PAIRS = pathlib.Path(__file__).parents[2] / "shared" / "pairs"


def pairs(least: int = 1 << 18) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(pair and layer, base, fine-tuned): the largest matrix of each real pair, where there are any."""
    from safetensors import safe_open

    for tuned in sorted(PAIRS.glob("*.ft*.safetensors")):
        name = tuned.name.split(".ft")[0]
        with safe_open(PAIRS / f"{name}.base.safetensors", "pt") as a, safe_open(tuned, "pt") as b:
            shapes = {n: a.get_slice(n).get_shape() for n in a.keys() if n in b.keys()}
            linear = {
                n: s for n, s in shapes.items() if len(s) == 2 and s[0] * s[1] >= least and "embed" not in n
            }
            if linear:
                layer = max(linear, key=lambda n: linear[n][0] * linear[n][1])
                yield (
                    f"{tuned.name.removesuffix('.safetensors')} {layer}",
                    a.get_tensor(layer),
                    b.get_tensor(layer),
                )
