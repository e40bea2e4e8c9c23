"""``delta_linear`` beside PyTorch in one run: ``make bench``, or ``python benches/bench.py --help``.

Floor: a small-m product must read the base (n * k words) and the delta once; "roof" is those bytes over the
read bandwidth measured in the same run. Opponents: ``F.linear`` on the fine-tune's own dense weights in the
same dtype, and, since PyTorch has no fast bf16 product on CPUs without AVX-512, also on an fp32 copy of
them, at twice the memory. Every variant takes a turn in every round over matrices that together exceed the
caches; medians are reported. The machine is noisy: believe the ratios.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import platform
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
import xorz  # noqa: F401  (registers the ops)
from torch import Tensor

INTS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def fine_tune(base: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Move a share of the words by one to three steps at random positions; if 1, all by small noise."""
    if share >= 1:
        noise = torch.randn(base.shape, generator=generator) * 1e-3
        moved = (base.float() + noise).to(base.dtype)
        bits = moved.view(INTS[base.dtype])
        return torch.where(bits == base.view(INTS[base.dtype]), bits + 1, bits).view(base.dtype)
    steps = torch.randint(1, 4, base.shape, generator=generator, dtype=torch.int32)
    steps *= torch.randint(0, 2, base.shape, generator=generator, dtype=torch.int32) * 2 - 1
    # A step down from zero would be a NaN.
    steps *= (torch.rand(base.shape, generator=generator) < share) & (base != 0)
    return (base.view(INTS[base.dtype]) + steps.to(INTS[base.dtype])).view(base.dtype)


def bandwidth() -> float:
    """Bytes per second of reading memory once, all threads."""
    data = torch.ones(1 << 27, dtype=torch.float32)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - start)
    return data.numel() * 4 / min(times)


def interleave(variants: dict[str, Callable[[int], object]], matrices: int, rounds: int) -> dict[str, float]:
    """Median seconds of one call of each variant, matrix after matrix, variants in turn."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, call in variants.items():
            for i in range(matrices):
                start = time.perf_counter()
                call(i)
                if turn:
                    times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


class Case:
    """One shape, dtype and share of changed words: several matrices with their deltas."""

    def __init__(self, n: int, k: int, dtype: torch.dtype, share: float, prefer: str, matrices: int):
        """Make the matrices and encode."""
        generator = torch.Generator().manual_seed(0)
        self.n, self.k, self.dtype, self.share, self.prefer = n, k, dtype, share, prefer
        self.bases = [(torch.randn(n, k, generator=generator) * 0.02).to(dtype) for _ in range(matrices)]
        self.dense = [fine_tune(b, share, generator) for b in self.bases]
        encode = torch.ops.xorz.delta_encode
        self.deltas = [encode(b, f, prefer=prefer) for b, f in zip(self.bases, self.dense, strict=True)]
        self.wide = [] if dtype == torch.float32 else [f.float() for f in self.dense]

    def measure(self, m: int, rounds: int, bytes_per_second: float) -> dict[str, object]:
        """One row of the table."""
        x = torch.randn(m, self.k).to(self.dtype)
        wide = x.float()
        op = torch.ops.xorz.delta_linear
        variants: dict[str, Callable[[int], object]] = {
            "xorz": lambda i: op(x, self.bases[i], None, self.deltas[i]),
            "dense": lambda i: F.linear(x, self.dense[i]),
        }
        if self.wide:
            variants["dense fp32"] = lambda i: F.linear(wide, self.wide[i])
        for i in range(len(self.bases)):
            got, want = (
                op(x, self.bases[i], None, self.deltas[i]).float(),
                F.linear(wide, self.dense[i].float()),
            )
            assert torch.allclose(got, want, rtol=2e-2, atol=2e-2), (
                "the product is wrong, so its speed means nothing"
            )
        seconds = interleave(variants, len(self.bases), rounds)
        delta_bytes = statistics.mean(d.numel() for d in self.deltas)
        floor = (self.n * self.k * self.bases[0].element_size() + delta_bytes) / bytes_per_second
        row: dict[str, object] = {
            "shape": f"{self.n}x{self.k}",
            "dtype": str(self.dtype).removeprefix("torch."),
            "changed": self.share,
            "prefer": self.prefer,
            "encoding": ("unchanged", "sparse", "exponent", "raw")[int(self.deltas[0][10])],
            "bits_per_element": 8 * delta_bytes / (self.n * self.k),
            "m": m,
            "roofline": floor / seconds["xorz"],
        }
        row |= {f"{name} ms": 1e3 * s for name, s in seconds.items()}
        row |= {f"speed-up over {name}": s / seconds["xorz"] for name, s in seconds.items() if name != "xorz"}
        return row


def line(row: dict[str, object]) -> str:
    """One row as text."""
    over32 = f"{row['speed-up over dense fp32']:>6.2f}x" if "speed-up over dense fp32" in row else "      -"
    return (
        f"{row['shape']:>11} {row['dtype']:>9} {100 * row['changed']:>6.1f} % {row['encoding']:>9} "
        f"{row['bits_per_element']:>6.2f} b {row['m']:>4} {row['xorz ms']:>9.2f} {row['dense ms']:>9.2f} "
        f"{row['speed-up over dense']:>6.2f}x {over32} {100 * row['roofline']:>5.0f} %"
    )


def grouped(tenants: int, share: float, rounds: int, matrices: int = 3, size: int = 4096) -> str:
    """One batch of a row per tenant, beside a product per dense model, and beside one model with all rows."""
    generator = torch.Generator().manual_seed(0)
    dtype, op = torch.bfloat16, torch.ops.xorz.delta_linear_grouped
    bases = [(torch.randn(size, size, generator=generator) * 0.02).to(dtype) for _ in range(matrices)]
    dense = [[fine_tune(b, share, generator) for _ in range(tenants)] for b in bases]
    arenas, slots = [], []
    for base, tuned in zip(bases, dense, strict=True):
        deltas = [torch.ops.xorz.delta_encode(base, f) for f in tuned]
        padded = [F.pad(d, (0, -d.numel() % 64)) for d in deltas]
        starts = torch.tensor([0] + [d.numel() for d in padded]).cumsum(0)[:-1]
        arenas.append(torch.cat(padded))
        slots.append(torch.stack([starts, torch.tensor([d.numel() for d in deltas])], 1))
    rows = torch.arange(tenants, dtype=torch.int32)
    x = torch.randn(tenants, size, generator=generator).to(dtype)
    wide = [[f.float() for f in tuned] for tuned in dense]
    each = range(tenants)
    variants: dict[str, Callable[[int], object]] = {
        "xorz": lambda i: op(x, bases[i], None, arenas[i], slots[i], rows),
        "calls": lambda i: [F.linear(x[t], dense[i][t]) for t in each],
        "calls fp32": lambda i: [F.linear(x[t].float(), wide[i][t]) for t in each],
        "one": lambda i: F.linear(x, dense[i][0]),
        "one fp32": lambda i: F.linear(x.float(), wide[i][0]),
    }
    for i in range(matrices):
        want = torch.cat([F.linear(x[t : t + 1].float(), wide[i][t]) for t in each])
        got = variants["xorz"](i).float()
        assert torch.allclose(got, want, rtol=2e-2, atol=2e-2), (
            "the product is wrong, so its speed means nothing"
        )
    ms = {name: 1e3 * s for name, s in interleave(variants, matrices, rounds).items()}
    return (
        f"{size}x{size} bf16 {100 * share:>4.1f} % changed, {tenants:>2} tenants, a row each: xorz {ms['xorz']:.2f} ms; "
        f"{tenants} dense calls {ms['calls']:.2f} ({ms['calls'] / ms['xorz']:.2f}x), in fp32 {ms['calls fp32']:.2f} "
        f"({ms['calls fp32'] / ms['xorz']:.2f}x); one dense model, m = {tenants}: {ms['one']:.2f} "
        f"({ms['one'] / ms['xorz']:.2f}x), in fp32 {ms['one fp32']:.2f} ({ms['one fp32'] / ms['xorz']:.2f}x)"
    )


def main() -> None:
    """Run the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="bf16 4096x4096 only, fewer rounds")
    parser.add_argument("--json", type=pathlib.Path, help="write the rows here too")
    parser.add_argument("--grouped", action="store_true", help="only batches of many tenants")
    args = parser.parse_args()
    if args.grouped:
        for tenants in (2, 8, 16):
            print(grouped(tenants, 0.03, 3 if args.quick else 7), flush=True)
        return
    speed = bandwidth()
    chip = platform.processor() or platform.machine()
    machine = f"{chip}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{machine}, {torch.backends.cpu.get_cpu_capability()}, reads {speed / 1e9:.1f} GB/s")
    print(
        f"{'shape':>11} {'dtype':>9} {'changed':>8} {'encoding':>9} {'size':>8} {'m':>4} "
        f"{'xorz ms':>9} {'dense ms':>9} {'dense':>7} {'fp32':>7} {'roof':>7}"
    )
    shapes = [(4096, 4096, torch.bfloat16)]
    if not args.quick:
        shapes += [(4096, 4096, torch.float32), (768, 768, torch.bfloat16)]
    rows = []
    for n, k, dtype in shapes:
        matrices = 6 if n * k > 1 << 22 else 64
        for share, prefer in (
            (0.005, "speed"),
            (0.03, "speed"),
            (0.3, "speed"),
            (0.3, "memory"),
            (1.0, "speed"),
        ):
            case = Case(n, k, dtype, share, prefer, matrices)
            for m in (1, 8, 64, 256):
                rounds = 2 if m > 8 or args.quick else 5
                rows.append(case.measure(m, rounds, speed))
                print(line(rows[-1]), flush=True)
    if args.json:
        args.json.write_text(
            json.dumps({"machine": machine, "bytes_per_second": speed, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    with torch.inference_mode():
        main()
