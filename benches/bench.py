"""``delta_linear`` and ``delta_linear_grouped`` beside every other way, in one run: ``make bench``, or ``--help``.

Floor: few rows must read the base (n * k words) once, for all tenants, and each tenant's delta; "roof" is those bytes over the
read bandwidth measured in the same run, as a share of the time taken. Opponents, on the same rows of x:

  one        ``F.linear`` with ONE dense model, all rows: what no serving of several fine-tunes can be expected to reach
  each       ``F.linear`` with each tenant's own dense model, one after another; T times the memory
  one32, each32   the same on fp32 copies, at twice the memory: torch has no fast bf16 product on CPUs without AVX-512
  csr        ``F.linear`` with the base, and ``torch.sparse`` (fp32 CSR) with the difference of each tenant
  scatter    the changed words written into the base, ``F.linear``, and the base's written back, tenant after tenant
  determ     ours with mode="deterministic", one tenant
  exact      ours with mode="exact": the bits of ``F.linear`` on the fine-tuned weights
  notebook   the XOR decompressed (zstd), applied to a copy of the base, ``F.linear``: per call, tenant after tenant

Each variant takes a turn in every round over matrices that together exceed the caches; medians are reported. A number beside an
opponent is its time over that of xorz: above 1 xorz is faster. The machine is noisy: believe the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import xorz  # noqa: F401  (registers the ops)
import zstandard
from torch import Tensor
from tunes import INTS, KINDS, pairs

Variants = dict[str, Callable[[int], object]]
FAST = ("xorz", "one", "each", "one32", "each32")
SLOW = ("csr", "scatter", "notebook")
MODES = {"determ": "deterministic", "exact": "exact"}
RATIOS = (*FAST[1:], *MODES, *SLOW)


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

    def __init__(self, base: Tensor, tuned: Tensor, prefer: str, rivals: bool) -> None:
        """Encode; the rivals' forms are made if asked for."""
        self.dense = tuned
        self.wide = tuned if tuned.dtype == torch.float32 else tuned.float()
        self.delta = torch.ops.xorz.delta_encode(base, tuned, prefer=prefer)
        if rivals:
            difference = self.wide - base.float()
            self.csr = difference.to_sparse_csr()
            ints = INTS[base.dtype]
            bits, old = tuned.view(ints), base.view(ints)
            self.at = (bits != old).reshape(-1).nonzero()[:, 0]
            self.new, self.old = bits.reshape(-1)[self.at], old.reshape(-1)[self.at]
            self.xor = zstandard.ZstdCompressor(level=10).compress((bits ^ old).numpy().tobytes())


class Case:
    """Some matrices of one kind with the fine-tunes of up to `tenants` tenants each."""

    def __init__(self, bases: list[Tensor], tuned: list[list[Tensor]], prefer: str, rivals: bool) -> None:
        """`tuned[i]` holds the fine-tunes of `bases[i]`; the rivals take the first matrix alone."""
        self.bases, self.rivals = bases, rivals
        pairs = zip(bases, tuned, strict=True)
        self.tenants = [
            [Tenant(b, f, prefer, rivals and i == 0) for f in fs] for i, (b, fs) in enumerate(pairs)
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
        if self.rivals:
            out |= {
                name: lambda i, call=call: call(x, parts, bases[i], tenants[i][:count])
                for name, call in (("csr", csr), ("scatter", scatter), ("notebook", notebook))
            }
        return out

    def check(self, variants: Variants, x: Tensor, count: int) -> None:
        """A wrong product's speed means nothing."""
        for i in range(len(self.bases)):
            parts = x.float().chunk(count)
            want = torch.cat([F.linear(p, t.wide) for p, t in zip(parts, self.tenants[i], strict=False)])
            for name in {"xorz", *MODES} & set(variants):
                assert torch.allclose(variants[name](i).float(), want, rtol=2e-2, atol=2e-2), name
        for name in set(SLOW) & set(variants):
            want = torch.cat(
                [F.linear(p, t.wide) for p, t in zip(x.float().chunk(count), self.tenants[0], strict=False)]
            )
            assert torch.allclose(variants[name](0).float(), want, rtol=2e-2, atol=2e-2), name

    def restore(self, rounds: int) -> dict[str, float]:
        """GB/s of fine-tuned weights restored, all threads, beside copying the base: ``base.clone()``."""
        call = torch.ops.xorz.delta_restore
        bases, tenants = self.bases, self.tenants
        for base, deltas in zip(bases, tenants, strict=True):
            ints = INTS[base.dtype]
            assert torch.equal(call(base, deltas[0].delta).view(ints), deltas[0].dense.view(ints))
        variants: Variants = {
            "restore": lambda i: call(bases[i], tenants[i][0].delta),
            "clone": lambda i: bases[i].clone(),
        }
        seconds = interleave(variants, len(bases), rounds)
        return {name: bases[0].nbytes / s / 1e9 for name, s in seconds.items()}

    def measure(self, m: int, count: int, rounds: int, bytes_per_second: float) -> dict[str, Any]:
        """One row of the table: `m` rows of x, dealt to `count` tenants."""
        n, k = self.bases[0].shape
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(1)).to(self.bases[0].dtype)
        variants = self.variants(x, count)
        self.check(variants, x, count)
        seconds = interleave(variants, len(self.bases), rounds)
        deltas = statistics.mean(sum(t.delta.numel() for t in ts[:count]) for ts in self.tenants)
        floor = (n * k * x.element_size() + deltas) / bytes_per_second
        encodings = ("unchanged", "sparse", "exponent", "raw")
        row: dict[str, Any] = {
            "shape": f"{n}x{k}",
            "dtype": str(x.dtype).removeprefix("torch."),
            "encoding": encodings[int(self.tenants[0][0].delta[10])],
            "bits": 8 * deltas / (n * k * count),
            "T": count,
            "m": m,
            "roof": floor / seconds["xorz"],
            "ms": {name: 1e3 * s for name, s in seconds.items()},
        }
        return row | {name: s / seconds["xorz"] for name, s in seconds.items() if name != "xorz"}


def csr(x: Tensor, parts: tuple[Tensor, ...], base: Tensor, tenants: list[Tenant]) -> Tensor:
    """Dense base, sparse differences."""
    extra = [
        torch.mv(t.csr, p[0].float())[None] if len(p) == 1 else (t.csr @ p.float().T).T
        for p, t in zip(parts, tenants, strict=True)
    ]
    return F.linear(x, base) + torch.cat(extra).to(x.dtype)


def scatter(x: Tensor, parts: tuple[Tensor, ...], base: Tensor, tenants: list[Tenant]) -> Tensor:
    """In place, and back."""
    flat, out = base.view(INTS[base.dtype]).view(-1), []
    for part, tenant in zip(parts, tenants, strict=True):
        flat[tenant.at] = tenant.new
        out.append(F.linear(part, base))
        flat[tenant.at] = tenant.old
    return torch.cat(out)


def notebook(x: Tensor, parts: tuple[Tensor, ...], base: Tensor, tenants: list[Tenant]) -> Tensor:
    """The seed notebook's way, for each call."""
    ints, out = INTS[base.dtype], []
    for part, tenant in zip(parts, tenants, strict=True):
        xor = torch.frombuffer(bytearray(zstandard.ZstdDecompressor().decompress(tenant.xor)), dtype=ints)
        out.append(F.linear(part, (base.view(ints) ^ xor.view(base.shape)).view(base.dtype)))
    return torch.cat(out)


def synthetic(
    n: int, k: int, dtype: torch.dtype, share: float, kind: str, tenants: int, prefer: str, rivals: bool
) -> Case:
    """Matrices that together exceed the caches, and fine-tunes of each."""
    generator = torch.Generator().manual_seed(0)
    size = n * k * dtype.itemsize
    matrices = max(2 if tenants > 4 else 4, min(64, (96 << 20) // size))
    bases = [(torch.randn(n, k, generator=generator) * 0.02).to(dtype) for _ in range(matrices)]
    tuned = [[KINDS[kind](b, share, generator) for _ in range(tenants)] for b in bases]
    return Case(bases, tuned, prefer, rivals)


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


def line(row: dict[str, Any]) -> str:
    """One row as text."""
    ratios = " ".join(f"{row[name]:>8.2f}" if name in row else f"{'-':>8}" for name in RATIOS)
    return (
        f"{row['shape']:>11} {row['dtype']:>8} {row['what']:>14} {row['encoding']:>9} {row['bits']:>6.2f} {row['T']:>3} "
        f"{row['m']:>5} {row['ms']['xorz']:>8.2f} {100 * row['roof']:>5.0f} {ratios}"
    )


HEADER = (
    f"{'shape':>11} {'dtype':>8} {'changed':>14} {'encoding':>9} {'bits':>6} {'T':>3} {'m':>5} {'xorz ms':>8} {'roof%':>5} "
    + " ".join(f"{name:>8}" for name in RATIOS)
)


def numbers(text: str) -> list[int]:
    """A list of numbers with commas."""
    return [int(part) for part in text.split(",") if part]


def main() -> None:
    """Run the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="4096x4096", help="n x k, with commas (default %(default)s)")
    parser.add_argument(
        "--dtypes", default="bfloat16", help="float32, bfloat16, float16 (default %(default)s)"
    )
    parser.add_argument(
        "--changed", default="0.5,3,10,30,70", help="percent of the words (default %(default)s)"
    )
    parser.add_argument("--kinds", default="random", help="random, adamw (default %(default)s)")
    parser.add_argument("--prefer", default="speed", choices=("speed", "memory"))
    parser.add_argument(
        "--tenants", type=numbers, default=[1, 2, 4, 8, 16], help="a row each (default 1,2,4,8,16)"
    )
    parser.add_argument(
        "--rows", type=numbers, default=[1, 4, 16, 64, 256], help="of one tenant (default 1,4,16,64,256)"
    )
    parser.add_argument(
        "--pairs", action="store_true", help="layers of real pairs too, where ../shared has them"
    )
    parser.add_argument("--no-rivals", action="store_true", help="dense products only")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--full", action="store_true", help="every shape, dtype, share and kind of the project: an hour"
    )
    parser.add_argument("--quick", action="store_true", help="3 percent only, two rounds")
    parser.add_argument("--json", type=pathlib.Path, help="write the rows here too")
    args = parser.parse_args()
    if args.full:
        args.shapes, args.dtypes = "4096x4096,11008x4096,4096x11008,768x768", "bfloat16,float32"
        args.changed, args.kinds, args.pairs = "0.5,1,3,10,30,70", "random,adamw", True
        args.tenants, args.rows = [1, 2, 4, 8, 16, 32], [1, 4, 16, 64, 256, 1024]
    if args.quick:
        args.changed, args.rounds = "3", 2
    speed, chip = bandwidth(), platform.processor() or platform.machine()
    machine = (
        f"{chip}, {torch.get_num_threads()} threads, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, "
        f"reads {speed / 1e9:.1f} GB/s, load {os.getloadavg()[0]:.1f}"
    )
    calls = overhead()
    print(machine)
    for where, us in calls.items():
        print(f"a call, {where}: " + ", ".join(f"{name} {t:.1f} us" for name, t in us.items()))
    print(HEADER, flush=True)
    rows: list[dict[str, Any]] = []
    restored: list[dict[str, Any]] = []

    def add(case: Case, what: str, m: int, count: int) -> None:
        rounds = args.rounds if m <= 16 else max(1, args.rounds // 2)
        rows.append({"what": what} | case.measure(m, count, rounds, speed))
        print(line(rows[-1]), flush=True)

    for shape in args.shapes.split(","):
        n, k = map(int, shape.split("x"))
        for name in args.dtypes.split(","):
            for kind in args.kinds.split(","):
                for percent in args.changed.split(","):
                    dtype, share = getattr(torch, name), float(percent) / 100
                    rest = (args.prefer, not args.no_rivals)
                    case = synthetic(n, k, dtype, share, kind, max(args.tenants), *rest)
                    speeds = case.restore(args.rounds)
                    restored.append({"what": f"{n}x{k} {name} {percent} % {kind}"} | speeds)
                    for count in args.tenants:
                        add(case, f"{percent} % {kind}", count, count)
                    for m in args.rows:
                        if (m, 1) != (1, min(args.tenants)):
                            add(case, f"{percent} % {kind}", m, 1)
    for what, base, tuned in pairs() if args.pairs else ():
        print(what)
        for prefer in ("speed", "memory"):
            copies = [base.clone() for _ in range(max(1, (96 << 20) // base.nbytes))]
            case = Case(copies, [[tuned.clone()] for _ in copies], prefer, not args.no_rivals)
            for m in args.rows:
                add(case, f"real, {prefer}", m, 1)
    for row in restored:
        print(
            f"restore {row['what']}: {row['restore']:.1f} GB/s of weights, a copy of the base {row['clone']:.1f}"
        )
    if args.json:
        found = {
            "machine": machine,
            "bytes_per_second": speed,
            "call_us": calls,
            "rows": rows,
            "restore": restored,
        }
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
