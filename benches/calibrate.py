"""What the cost model's numbers (src/cpu/costs.rs) lose on this machine: ``python benches/calibrate.py``, some minutes.

For each number of ``XORZ_COSTS``, a process for each of some values of it; the processes take turns on the same products
(cells), on matrices beyond the caches. A process's time is its best turn's, a turn's the median over the matrices. Printed are
the time of each value over that of the number that xorz knows for this processor, cell by cell, and what that one loses
against the best value of each cell and the best single value. Processes differ by where their memory lies: on a busy machine
fifteen percent are noise.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Any


def cell(
    m: int, percent: float, tenants: int = 1, n: int = 4096, k: int = 4096, **more: str
) -> dict[str, Any]:
    """One product: `m` rows of x dealt to `tenants`, `percent` of n x k words changed."""
    kind = {"dtype": "bfloat16", "prefer": "speed"} | more
    return {"m": m, "percent": percent, "tenants": tenants, "n": n, "k": k} | kind


#: Number of the model: values beside what xorz takes on this machine, and the cells that depend on it.
TABLE: dict[str, tuple[list[float], list[dict[str, Any]]]] = {
    "panel_above": (
        [16, 64, 128],
        [cell(m, p) for p in (0.5, 3, 30) for m in (24, 48, 96)]
        + [cell(m, 3, dtype="float32") for m in (24, 48, 96)],
    ),
    # With a bf16 dot product, in place of the two above and below.
    "packed_above": (
        [8, 24, 32],
        [cell(m, p) for p in (0.5, 3) for m in (12, 20, 28)]
        + [cell(m, 30, prefer="memory") for m in (12, 20, 28)],
    ),
    "widen_from": (
        [1, 4, 9],
        [cell(m, p, t) for p, t in ((3, 1), (3, 8)) for m in (8, 16)] + [cell(1, 3), cell(4, 3)],
    ),
    "decoded_above": ([8, 32, 64], [cell(m, 30, prefer="memory") for m in (12, 24, 48)]),
    # 2 * transposed <= m * gathered: from 8 rows on with the defaults; here from 4, 6, 12 and never.
    "transposed_ns": ([13, 19, 25, 39, 1e9], [cell(m, p) for p in (3, 10, 30) for m in (4, 6, 8, 12)]),
    "rare": ([16, 64, 256], [cell(m, p) for m in (8, 16) for p in (0.2, 0.5, 1, 2, 5)]),
    "cached_bytes": (
        [2 << 20, 4 << 20, 16 << 20],
        [cell(m, 3, mode="deterministic") for m in (32, 64)] + [cell(32, 3, 4)],
    ),
    "least_words": (
        [1 << 13, 1 << 17],
        [cell(1, 3, n=n, k=n) for n in (256, 768, 1536)] + [cell(8, 3, 8, n=768, k=768)],
    ),
}


def serve() -> None:
    """A process with its own `XORZ_COSTS`: a cell a line in; its seconds, or \"ready\" after a new one, out."""
    import torch
    import xorz  # noqa: F401
    from xorz.bench.tunes import at_random

    products: dict[str, Any] = {}

    def prepare(c: dict[str, Any]) -> Any:
        generator = torch.Generator().manual_seed(0)
        n, k, dtype = c["n"], c["k"], getattr(torch, c["dtype"])
        copies = max(2, min(64, (96 << 20) // (n * k * dtype.itemsize)))
        bases = [(torch.randn(n, k, generator=generator) * 0.02).to(dtype) for _ in range(copies)]
        arenas, slots = [], []
        for base in bases:
            tuned = [at_random(base, c["percent"] / 100, generator) for _ in range(c["tenants"])]
            deltas = [torch.ops.xorz.delta_encode(base, t, prefer=c["prefer"]) for t in tuned]
            deltas = [torch.nn.functional.pad(d, (0, -d.numel() % 64)) for d in deltas]
            ends = torch.tensor([d.numel() for d in deltas]).cumsum(0)
            lengths = torch.tensor([d.numel() for d in deltas])
            arenas.append(torch.cat(deltas))
            slots.append(torch.stack([ends - lengths, lengths], 1))
        x = torch.randn(c["m"], k, generator=generator).to(dtype)
        rows = torch.arange(c["tenants"], dtype=torch.int32).repeat_interleave(c["m"] // c["tenants"])
        mode = c.get("mode", "fast")
        op = torch.ops.xorz.delta_linear_grouped
        return lambda i: op(
            x, bases[i % copies], None, arenas[i % copies], slots[i % copies], rows, mode=mode
        ), copies

    with torch.inference_mode():
        for line in sys.stdin:
            if line not in products:
                products.clear()
                products[line] = prepare(json.loads(line))
                print("ready", flush=True)
                continue
            product, copies = products[line]
            times = []
            for i in range(copies + 1):
                start = time.perf_counter()
                product(i)
                times.append(time.perf_counter() - start)
            print(statistics.median(times[1:]), flush=True)


class Server:
    """A process that times cells with one value of one number."""

    def __init__(self, name: str, value: float | None) -> None:
        """Start it, with the known number of this machine for None; `XORZ_COSTS` of the caller holds for everything else."""
        given = os.environ.get("XORZ_COSTS", "")
        text = f"{value:g}" if isinstance(value, float) else str(value)
        costs = ",".join(part for part in (given, "" if value is None else f"{name}={text}") if part)
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"XORZ_COSTS": costs},
        )

    def send(self, cell: dict[str, Any]) -> None:
        """Ask for a cell."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps(cell) + "\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        """What it says."""
        assert self.process.stdout
        answer = self.process.stdout.readline().strip()
        if not answer:
            raise SystemExit(f"calibrate: a process ended with status {self.process.wait()}")
        return answer


def title(c: dict[str, Any]) -> str:
    """A cell in words."""
    more = " ".join(str(c[key]) for key in ("dtype", "mode") if c.get(key) not in (None, "bfloat16"))
    small = "exponent" if c["prefer"] == "memory" else ""
    return f"{c['n']}x{c['k']} m={c['m']} T={c['tenants']} {c['percent']:g} % {more} {small}".strip()


def calibrate(name: str, rounds: int) -> dict[str, Any]:
    """Time every cell of one number with every value of it, in turns."""
    others, cells = TABLE[name]
    values: list[float | None] = [None, *others]
    servers = [Server(name, v) for v in values]
    out = []
    print(
        f"\n{name}: time over that with the number known for this processor, with "
        + ", ".join(f"{v:g}" for v in others)
    )
    for c in cells:
        for server in servers:
            server.send(c)
        assert all(server.answer() == "ready" for server in servers)
        times: list[list[float]] = [[] for _ in values]
        for turn in range(rounds):
            order = list(range(len(values)))
            for i in order[turn % len(order) :] + order[: turn % len(order)]:
                servers[i].send(c)
                times[i].append(float(servers[i].answer()))
        best_of = [min(t) for t in times]
        ratios = [t / best_of[0] for t in best_of]
        out.append(c | {"ms": [1e3 * t for t in best_of], "ratios": ratios})
        print(
            f"  {title(c):42} {1e3 * best_of[0]:8.3f} ms  " + "  ".join(f"{r:5.2f}" for r in ratios[1:]),
            flush=True,
        )
    for server in servers:
        server.process.stdin.close()  # type: ignore[union-attr]
        server.process.wait()

    def mean(logs: list[float]) -> float:
        return math.exp(statistics.mean(map(math.log, logs)))

    whole = [mean([c["ratios"][i] for c in out]) for i in range(len(values))]
    best = min(range(len(values)), key=whole.__getitem__)
    lost = [1 / min(c["ratios"]) for c in out]
    print(
        f"  the known number loses {100 * mean(lost) - 100:.0f} % to the best of each cell, {100 * max(lost) - 100:.0f} % at "
        + f"most; best single value {values[best] or 'that'}, {100 / whole[best] - 100:.0f} % faster"
    )
    return {"values": values, "cells": out, "best": values[best]}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--only", help="numbers, with commas: " + ", ".join(TABLE))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=pathlib.Path, help="write the tables here too")
    args = parser.parse_args()
    if args.serve:
        return serve()
    names = args.only.split(",") if args.only else list(TABLE)
    if unknown := set(names) - set(TABLE):
        parser.error(f"--only takes {', '.join(TABLE)}; there is no {', '.join(sorted(unknown))}")
    found = {name: calibrate(name, args.rounds) for name in names}
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
