"""How fast fine-tunes of one base run on this machine: ``python -m xorz.bench``, ``make bench``, or ``--help``.

With BASE and FT (safetensors files, or Hugging Face folders): the linear layers of that model, shape by shape, and their sum.
Without: synthetic matrices. Each case gives three things: `delta_linear` and `delta_linear_grouped` with a row of x for each
of T tenants, with m rows of one tenant, and `delta_restore`, of whole matrices and of tiles of 64x64. Where there are fewer FTs
than tenants they are served again, as copies in memory of their own.

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

and of a tile: `frame`, a zstd frame of that tile's XOR decompressed; `patched`, applied as well; `slice`, the delta cut by
`delta_slice` and restored.

Every result is checked before it is timed. Each variant takes a turn in every round over matrices that together exceed the
caches; medians are reported. A number beside an opponent is its time over that of xorz: above 1 xorz is faster. Where the
machine is noisy, believe the ratios.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pathlib
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

import xorz  # noqa: F401  (registers the ops)

from . import models, plot, report, restore, rivals, tile
from .products import Case, bandwidth, overhead, synthetic
from .tunes import INTS, KINDS

Pairs = Callable[[], Iterable[tuple[str, Tensor, Tensor]]]


def numbers(text: str) -> list[int]:
    """A list of numbers with commas."""
    return [int(part) for part in text.split(",") if part]


def _known(text: str, names: Iterable[str]) -> list[str]:
    for name in text.split(","):
        if name not in names:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(names)}")
    return text.split(",")


def shapes(text: str) -> list[tuple[int, int]]:
    """A list of n x k with commas."""
    found = [tuple(map(int, part.split("x"))) for part in text.split(",")]
    if any(len(shape) != 2 or min(shape) < 1 for shape in found):
        raise ValueError
    return [(n, k) for n, k in found]


def dtypes(text: str) -> list[torch.dtype]:
    """A list of names of dtypes that compute."""
    known = {str(dtype).removeprefix("torch."): dtype for dtype in INTS}
    return [known[name] for name in _known(text, known)]


def kinds(text: str) -> list[str]:
    """A list of names of synthetic fine-tunes."""
    return _known(text, KINDS)


def percents(text: str) -> list[str]:
    """Percents with commas, as they were written."""
    return [part for part in text.split(",") if float(part) >= 0]


def parser(pairs: Pairs | None) -> argparse.ArgumentParser:
    """Every option; `--pairs` where there are any."""
    out = argparse.ArgumentParser(
        prog="python -m xorz.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = out.add_argument
    add("base", nargs="?", help="a model: safetensors file or folder")
    add("fine_tuned", nargs="*", metavar="FT", help="its fine-tunes")
    add("--shapes", type=shapes, default="4096x4096", help="n x k, with commas (default %(default)s)")
    add("--dtypes", type=dtypes, default="bfloat16", help="float32, bfloat16, float16 (default %(default)s)")
    add(
        "--changed",
        type=percents,
        default="0.5,3,10,30,70",
        help="percent of the words (default %(default)s)",
    )
    add("--kinds", type=kinds, default="random", help="random, adamw (default %(default)s)")
    add("--prefer", default="speed", choices=("speed", "memory"))
    add("--tenants", type=numbers, default=[1, 2, 4, 8, 16], help="a row each (default 1,2,4,8,16)")
    add("--rows", type=numbers, default=[1, 4, 16, 64, 256], help="of one tenant (default 1,4,16,64,256)")
    if pairs is not None:
        add("--pairs", action="store_true", help="layers of real pairs too, where ../shared has them")
    add("--no-rivals", action="store_true", help="dense products only")
    add("--rounds", type=int, default=5)
    add("--full", action="store_true", help="every shape, dtype, share and kind of the project: an hour")
    add("--quick", action="store_true", help="3 percent only, two rounds")
    add("--json", type=pathlib.Path, help="write the rows here too")
    add("--plot", type=pathlib.Path, metavar="SVG", help="draw time by tenants here")
    return out


class Bench:
    """One run: what is measured, printed as it comes."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Measure the machine and print the heads of the columns."""
        self.args, self.speed = args, bandwidth()
        chip = platform.processor() or platform.machine()
        self.machine = (
            f"{chip}, {torch.get_num_threads()} threads, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, "
            f"reads {self.speed / 1e9:.1f} GB/s, load {os.getloadavg()[0]:.1f}"
        )
        self.calls = overhead()
        self.rows: list[dict[str, Any]] = []
        self.restores: list[dict[str, Any]] = []
        self.tiles: list[dict[str, Any]] = []
        self.totals: list[dict[str, Any]] = []
        print(self.machine)
        for where, us in self.calls.items():
            print(f"a call, {where}: " + ", ".join(f"{name} {t:.1f} us" for name, t in us.items()))
        if not args.no_rivals and rivals.zstandard is None:
            print("without zstandard, the notebook's way is left out: pip install zstandard")
        print(report.HEADER, flush=True)

    def product(self, case: Case, what: str, m: int, count: int) -> None:
        """`m` rows for `count` tenants."""
        rounds = self.args.rounds if m <= 16 else max(1, self.args.rounds // 2)
        self.rows.append({"what": what} | case.measure(m, count, rounds, self.speed))
        print(report.line(self.rows[-1]), flush=True)

    def case(self, case: Case, what: str, tenants: Sequence[int]) -> None:
        """Every number of tenants and rows, and restoring."""
        for count in tenants:
            self.product(case, what, count, count)
        for m in self.args.rows:
            if (m, 1) != (1, min(tenants)):
                self.product(case, what, m, 1)
        self.restores.append({"what": what} | restore.measure(case, self.args.rounds))
        self.tiles.append({"what": what} | tile.measure(case, self.args.rounds))

    def synthetic(self) -> None:
        """Matrices of every shape, dtype, kind and share that was asked for."""
        args = self.args
        rest = (max(args.tenants), args.prefer, not args.no_rivals)
        for (n, k), dtype, kind, percent in itertools.product(
            args.shapes, args.dtypes, args.kinds, args.changed
        ):
            case = synthetic(n, k, dtype, float(percent) / 100, kind, *rest)
            self.case(case, f"{percent} % {kind}", args.tenants)

    def model(self) -> None:
        """Measure the matrices of the user's own checkpoints, by shape and dtype."""
        args = self.args
        base = models.Checkpoint(args.base)
        tuned = [models.Checkpoint(path) for path in args.fine_tuned]
        found, apart = models.groups(base, tuned)
        if not found:
            raise models.BenchError(
                f"{args.base}: no matrix of F32, BF16 or F16 that {args.fine_tuned[0]} has in the same shape and dtype"
            )
        if apart:
            print(
                f"{apart} matrices are left out: a fine-tune has them in another shape or dtype, or not at all"
            )
        counts = {}
        for group in found:
            shape = f"{group.shape[0]}x{group.shape[1]}"
            matrices, most = models.affordable(group, max(args.tenants), models.available())
            tenants = [t for t in args.tenants if t <= most]
            if not tenants:
                print(f"{shape}: left out, {min(args.tenants)} dense copies do not fit in memory")
                continue
            case = models.case(group, base, tuned, matrices, max(tenants), args.prefer, not args.no_rivals)
            counts[f"{shape} {str(group.dtype).removeprefix('torch.')}"] = len(group.names)
            self.case(case, f"{100 * models.changed(case):.3g} % x {len(group.names)}", tenants)
        if len(counts) == len(found):
            self.totals = list(models.whole(self.rows, counts))
            for row in self.totals:
                print(report.total(row))

    def pairs(self, pairs: Pairs) -> None:
        """Measure layers of real pairs of base and fine-tune, with both values of `prefer`."""
        for what, base, tuned in pairs():
            print(what)
            for prefer in ("speed", "memory"):
                copies = [base.clone() for _ in range(max(1, models.BEYOND_CACHES // base.nbytes))]
                case = Case(copies, [[tuned.clone()] for _ in copies], prefer, not self.args.no_rivals)
                for m in self.args.rows:
                    self.product(case, f"real, {prefer}", m, 1)

    def finish(self) -> None:
        """What is printed and written at the end."""
        if self.restores:
            print(restore.HEADER)
            for row in self.restores:
                print(restore.line(row))
        if self.tiles:
            print(tile.HEADER)
            for row in self.tiles:
                print(tile.line(row))
        if self.args.json:
            found = {"machine": self.machine, "bytes_per_second": self.speed, "call_us": self.calls}
            found |= {"rows": self.rows, "restore": self.restores, "tile": self.tiles, "whole": self.totals}
            self.args.json.write_text(json.dumps(found, indent=1) + "\n")
        if self.args.plot:
            self.args.plot.write_text(self.drawing())

    def drawing(self) -> str:
        """Milliseconds by tenants, a panel for each case, and one for the whole model."""
        panels: dict[str, plot.Panel] = {}
        titled = [({"title": "all linear layers"} | row) for row in self.totals]
        for row in self.rows:
            if row["T"] == row["m"]:
                titled.append(
                    {"title": f"{row['shape']} {row['dtype']}, {row['what']}, {row['encoding']}"} | row
                )
        for row in titled:
            panel = panels.setdefault(row["title"], plot.Panel(row["title"], {}))
            for name, ms in row["ms"].items():
                panel.series.setdefault(name, []).append((row["T"], ms))
        return plot.svg(list(panels.values()), "tenants, a row of x each", "ms", self.machine)


def main(arguments: Sequence[str] | None = None, pairs: Pairs | None = None) -> int:
    """Run the table; gives the exit code."""
    args = parser(pairs).parse_args(arguments)
    if args.full:
        args.shapes = shapes("4096x4096,11008x4096,4096x11008,768x768")
        args.dtypes, args.kinds = dtypes("bfloat16,float32"), list(KINDS)
        args.changed, args.pairs = percents("0.5,1,3,10,30,70"), True
        args.tenants, args.rows = [1, 2, 4, 8, 16, 32], [1, 4, 16, 64, 256, 1024]
    if args.quick:
        args.changed, args.rounds = ["3"], 2
    if args.base and not args.fine_tuned:
        print("xorz.bench: a model takes two: BASE FT [FT ...]", file=sys.stderr)
        return 2
    try:
        with torch.inference_mode():
            bench = Bench(args)
            if args.base:
                bench.model()
            else:
                bench.synthetic()
            if pairs is not None and args.pairs:
                bench.pairs(pairs)
            bench.finish()
    except (models.BenchError, OSError) as error:
        print(f"xorz.bench: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
