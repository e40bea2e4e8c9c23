"""Time `xorz.diff` and `xorz.apply_` on a state_dict of half a billion bf16 parameters: ``python benches/diff.py [SHARE]``.

The shapes are a 0.5 B model's; SHARE of the words (0.01) at random places move by one step. What `apply_` gives is compared.
"""

import sys
import time
from collections.abc import Iterator

import torch
import xorz

LAYER = {"q": (896, 896), "k": (128, 896), "v": (128, 896), "o": (896, 896)}
LAYER |= {"gate": (4864, 896), "up": (4864, 896), "down": (896, 4864), "norm1": (896,), "norm2": (896,)}


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes."""
    yield "embed", (151936, 896)
    for i in range(24):
        for name, shape in LAYER.items():
            yield f"layer.{i}.{name}", shape


def main() -> None:
    """Make, diff, apply, compare, print."""
    share = float(sys.argv[1]) if len(sys.argv) > 1 else 0.01
    torch.manual_seed(0)
    old, new = {}, {}
    for name, shape in shapes():
        old[name] = (torch.randn(shape) * 0.02).bfloat16()
        words, moved = old[name].view(torch.int16).clone(), torch.rand(shape) < share
        words[moved] += torch.randint(0, 2, (int(moved.sum()),), dtype=torch.int16) * 2 - 1
        new[name] = words.view(torch.bfloat16)
    count = sum(t.numel() for t in old.values())
    print(f"{count / 1e6:.0f} M parameters, {torch.get_num_threads()} threads, {share:.1%} changed")
    for prefer in ("memory", "speed"):
        start = time.perf_counter()
        delta = xorz.diff(old, new, prefer=prefer)
        diffed = time.perf_counter() - start
        target = {name: t.clone() for name, t in old.items()}
        start = time.perf_counter()
        xorz.apply_(target, delta)
        applied = time.perf_counter() - start
        same = all(torch.equal(target[n].view(torch.int16), new[n].view(torch.int16)) for n in new)
        if not same:
            raise SystemExit("apply_ did not give the new state_dict")
        print(f"{prefer}: diff {diffed:.2f} s, apply_ {applied:.2f} s, {delta.nbytes / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
