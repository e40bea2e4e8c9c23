"""`delta_linear` and `delta_linear_grouped` beside every other way: variants of one product, checked, then timed in turns."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import rivals
from .tunes import INTS, KINDS

Variants = dict[str, Callable[[int], object]]
FAST = ("xorz", "one", "each", "one32", "each32")
SLOW = ("csr", "scatter", "notebook")
MODES = {"determ": "deterministic", "exact": "exact"}
RATIOS = (*FAST[1:], *MODES, *SLOW)
ENCODINGS = ("unchanged", "sparse", "exponent", "raw")


def bandwidth() -> float:
    """Bytes per second of reading memory once, all threads."""
    data = torch.ones(1 << 27, dtype=torch.float32)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - start)
    return data.numel() * 4 / min(times)


def interleave(variants: Variants, matrices: int, rounds: int) -> dict[str, float]:
    """Median seconds of one call of each variant, matrix after matrix, variants in turn; slow ones every third round."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, call in variants.items():
            if name in SLOW and turn % 3 != 1:
                continue
            for i in range(matrices if name not in SLOW else 1):
                start = time.perf_counter()
                call(i)
                if turn:
                    times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


class Tenant:
    """One fine-tune of one matrix, in the form that each variant takes."""

    def __init__(self, base: Tensor, tuned: Tensor, prefer: str, others: bool) -> None:
        """Encode; the rivals' forms are made if asked for."""
        self.dense = tuned
        self.wide = tuned if tuned.dtype == torch.float32 else tuned.float()
        self.delta = torch.ops.xorz.delta_encode(base, tuned, prefer=prefer)
        if others:
            difference = self.wide - base.float()
            with warnings.catch_warnings():
                # That it is in beta is torch's to say elsewhere.
                warnings.filterwarnings("ignore", message="Sparse CSR")
                self.csr = difference.to_sparse_csr()
            ints = INTS[base.dtype]
            bits, old = tuned.view(ints), base.view(ints)
            self.at = (bits != old).reshape(-1).nonzero()[:, 0]
            self.new, self.old = bits.reshape(-1)[self.at], old.reshape(-1)[self.at]
            self.xor = None if rivals.zstandard is None else rivals.compress(bits ^ old)


class Case:
    """Some matrices of one kind with the fine-tunes of up to `tenants` tenants each."""

    def __init__(self, bases: list[Tensor], tuned: list[list[Tensor]], prefer: str, others: bool) -> None:
        """`tuned[i]` holds the fine-tunes of `bases[i]`; the rivals take the first matrix alone."""
        self.bases, self.others = bases, others
        pairs = zip(bases, tuned, strict=True)
        self.tenants = [
            [Tenant(b, f, prefer, others and i == 0) for f in fs] for i, (b, fs) in enumerate(pairs)
        ]
        self.arenas, self.slots = [], []
        for tenants in self.tenants:
            padded = [F.pad(t.delta, (0, -t.delta.numel() % 64)) for t in tenants]
            starts = torch.tensor([0] + [d.numel() for d in padded]).cumsum(0)[:-1]
            self.arenas.append(torch.cat(padded))
            self.slots.append(torch.stack([starts, torch.tensor([t.delta.numel() for t in tenants])], 1))

    def variants(self, x: Tensor, count: int) -> Variants:
        """Rows of x are dealt to `count` tenants in runs."""
        wide, each = x.float(), range(count)
        parts, wide_parts = x.chunk(count), wide.chunk(count)
        rows = torch.repeat_interleave(torch.arange(count, dtype=torch.int32), x.size(0) // count)
        single, grouped = torch.ops.xorz.delta_linear, torch.ops.xorz.delta_linear_grouped
        bases, tenants = self.bases, self.tenants

        def ours(i: int) -> Tensor:
            if count == 1:
                return single(x, bases[i], None, tenants[i][0].delta)
            return grouped(x, bases[i], None, self.arenas[i], self.slots[i], rows)

        out: Variants = {
            "xorz": ours,
            "one": lambda i: F.linear(x, tenants[i][0].dense),
            "each": lambda i: [F.linear(parts[t], tenants[i][t].dense) for t in each],
        }
        if x.dtype != torch.float32:
            out["one32"] = lambda i: F.linear(wide, tenants[i][0].wide)
            out["each32"] = lambda i: [F.linear(wide_parts[t], tenants[i][t].wide) for t in each]
        if count == 1:
            for name in ("each", "each32"):
                out.pop(name, None)
            out |= {
                name: lambda i, mode=mode: single(x, bases[i], None, tenants[i][0].delta, mode=mode)
                for name, mode in MODES.items()
            }
        if self.others:
            out |= {
                name: lambda i, call=call: call(x, parts, bases[i], tenants[i][:count])
                for name, call in rivals.RIVALS.items()
                if name != "notebook" or rivals.zstandard is not None
            }
        return out

    def check(self, x: Tensor, count: int) -> None:
        """A wrong product's speed means nothing: AssertionError that names the variant.

        Beside the rows that are timed, rows with a single 1 give columns of the weights: a change that is
        left out shows there, however small it is. CSR rounds once more than the weights do, hence the quarter
        of a change.
        """
        hot = torch.zeros_like(x)
        for rows, tenant in zip(hot.chunk(count), self.tenants[0], strict=False):
            moved = (tenant.dense != self.bases[0]).sum(0)
            rows[:, int(moved.argmax())] = 1
        for rows in (x, hot):
            for name, call in self.variants(rows, count).items():
                for i in range(1 if name in SLOW else len(self.bases)):
                    tenants = self.tenants[i][:1] if name.startswith("one") else self.tenants[i][:count]
                    parts = rows.float().chunk(len(tenants))
                    got = call(i)
                    got = torch.cat(got) if isinstance(got, list) else got
                    want = torch.cat([F.linear(p, t.wide) for p, t in zip(parts, tenants, strict=True)])
                    apart = (got.float() - want).abs()
                    bound = 2e-2 * want.abs() + 2e-2 * want.abs().mean()
                    if rows is hot:
                        old = F.linear(rows.float(), self.bases[i].float())
                        bound = (want - old).abs() / 4 + 2**-20 * want.abs()
                    assert bool((apart <= bound).all()), f"{name} gives another product than the fine-tune"

    def measure(self, m: int, count: int, rounds: int, bytes_per_second: float) -> dict[str, Any]:
        """One row of the table: `m` rows of x, dealt to `count` tenants."""
        n, k = self.bases[0].shape
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(1)).to(self.bases[0].dtype)
        self.check(x, count)
        variants = self.variants(x, count)
        seconds = interleave(variants, len(self.bases), rounds)
        deltas = statistics.mean(sum(t.delta.numel() for t in ts[:count]) for ts in self.tenants)
        floor = (n * k * x.element_size() + deltas) / bytes_per_second
        row: dict[str, Any] = {
            "shape": f"{n}x{k}",
            "dtype": str(x.dtype).removeprefix("torch."),
            "encoding": ENCODINGS[int(self.tenants[0][0].delta[10])],
            "bits": 8 * deltas / (n * k * count),
            "T": count,
            "m": m,
            "roof": floor / seconds["xorz"],
            "ms": {name: 1e3 * s for name, s in seconds.items()},
        }
        return row | {name: s / seconds["xorz"] for name, s in seconds.items() if name != "xorz"}


def synthetic(
    n: int, k: int, dtype: torch.dtype, share: float, kind: str, tenants: int, prefer: str, others: bool
) -> Case:
    """Matrices that together exceed the caches, and fine-tunes of each."""
    generator = torch.Generator().manual_seed(0)
    size = n * k * dtype.itemsize
    matrices = max(2 if tenants > 4 else 4, min(64, (96 << 20) // size))
    bases = [(torch.randn(n, k, generator=generator) * 0.02).to(dtype) for _ in range(matrices)]
    tuned = [[KINDS[kind](b, share, generator) for _ in range(tenants)] for b in bases]
    return Case(bases, tuned, prefer, others)


def overhead() -> dict[str, Any]:
    """Microseconds of a call beyond that of ``F.linear`` where the product itself is nothing, and right after a torch op."""
    base = torch.randn(64, 64).bfloat16()
    delta = torch.ops.xorz.delta_encode(base, (base * 1.01).bfloat16())
    x, big = torch.randn(1, 64).bfloat16(), torch.randn(1024, 1024)
    calls = {
        "F.linear": lambda: F.linear(x, base),
        "xorz": lambda: torch.ops.xorz.delta_linear(x, base, None, delta),
    }
    out: dict[str, Any] = {}
    for where, before in (("64x64", None), ("after a torch op", lambda: big @ big)):
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(50 if before else 3000):
            for name, call in calls.items():
                if before:
                    before()
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
        out[where] = {name: 1e6 * statistics.median(t) for name, t in times.items()}
    return out
