"""`python -m xorz.gpu_check`: does this GPU compute what the CPU does, and how fast? For the first day on a
new device.

    python -m xorz.gpu_check [--device cuda:0] [--quick] [--json FILE] [--no-timings]

Runs every op that has CUDA kernels on data that it makes, compares with the CPU by the promises of the README
(weights bit for bit, exact sums bit for bit, a bound elsewhere), captures a CUDA graph, and times
`delta_linear` against `torch.nn.functional.linear` (cuBLAS). Prints tables, and the same as JSON. Exits with
1 where anything differs.

`--device cpu` runs the same comparisons on the CPU's own kernels: it shows that this program works, nothing
of a GPU.
"""

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from . import (
    __version__,
    delta_apply_,
    delta_embedding,
    delta_encode,
    delta_linear,
    delta_linear_grouped,
    delta_restore,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ENCODINGS = ("unchanged", "sparse", "exponent", "raw")
BITS = {2: torch.int16, 4: torch.int32}
# No kernel, on CPU or GPU, has a chain of sums longer than k; tensor cores are allowed an error of 2^-22 per
# step.
STEP = {torch.bfloat16: 2.0**-22, torch.float16: 2.0**-22, torch.float32: 2.0**-23}


@dataclass
class Report:
    """What was found: a line for each check, a row for each timing."""

    device: str
    checks: list[dict] = field(default_factory=list)
    timings: list[dict] = field(default_factory=list)

    def check(self, name: str, wrong: str | None) -> None:
        """Note a check; `wrong` says what differs."""
        self.checks.append({"check": name, "passed": wrong is None, "wrong": wrong})
        print(
            f"{'ok  ' if wrong is None else 'FAIL'} {name}{'' if wrong is None else ': ' + wrong}", flush=True
        )

    @property
    def passed(self) -> bool:
        """Whether anything was checked, and nothing differed."""
        return bool(self.checks) and all(c["passed"] for c in self.checks)


def bits(t: Tensor) -> Tensor:
    """The words of a tensor, on the CPU."""
    return t.detach().cpu().contiguous().view(BITS[t.element_size()])


def differ(got: Tensor, want: Tensor) -> str | None:
    """The first word that differs, or None."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"{got.dtype} {list(got.shape)} for {want.dtype} {list(want.shape)}"
    wrong = (bits(got) != bits(want)).flatten().nonzero().flatten()
    if not len(wrong):
        return None
    at = int(wrong[0])
    found, wanted = (t.detach().cpu().flatten()[at].item() for t in (got, want))
    return f"{len(wrong)} of {want.numel()} words, the first at {at}: {found} for {wanted}"


def far(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """The first output that is further from the exact product than promised, or None. `weight`: one matrix, or one a row."""
    x, w = x.cpu().double(), weight.cpu().double()
    one = "mk,nk->mn" if w.dim() == 2 else "mk,mnk->mn"
    want, size = torch.einsum(one, x, w), torch.einsum(one, x.abs(), w.abs())
    if bias is not None:
        want, size = want + bias.cpu().double(), size + bias.cpu().double().abs()
    if got.shape != want.shape:
        return f"{list(got.shape)} for {list(want.shape)}"
    allowed = size * (x.shape[-1] + 8) * STEP[got.dtype] + want.abs() * torch.finfo(got.dtype).eps + 1e-30
    error = (got.detach().cpu().double() - want).abs()
    wrong = (~(error <= allowed)).flatten().nonzero().flatten()
    if not len(wrong):
        return None
    at = int(wrong[0])
    off, most = (float(t.flatten()[at]) for t in (error, allowed))
    return f"{len(wrong)} of {want.numel()} outputs, the first at {at}: off by {off:.3g} of {most:.3g}"


def random_words(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Weights as models have them."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)


def integers(shape: tuple[int, ...], most: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Whole numbers: every partial sum of their products is exact in f32."""
    return torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def fine_tune(base: Tensor, encoding: str, share: float = 0.05, seed: int = 1) -> tuple[Tensor, Tensor]:
    """A fine-tune, and its delta of that encoding."""
    g = torch.Generator().manual_seed(seed)
    words, some = bits(base).clone(), torch.rand(base.shape, generator=g) < share
    if encoding == "sparse":
        steps = torch.randint(1, 4, base.shape, generator=g, dtype=words.dtype)
        words = torch.where(some, words + steps, words)
    elif encoding == "exponent":
        words = words + torch.randint(-3, 4, base.shape, generator=g, dtype=words.dtype)
    elif encoding == "raw":
        words = bits(torch.randn(base.shape, generator=g).to(base.dtype).roll(1, -1) * base.flip(-1) * 97)
    tuned = words.view(base.dtype)
    delta = delta_encode(base, tuned, prefer="memory" if encoding == "exponent" else "speed")
    found = ENCODINGS[int(delta[10])]
    if found != encoding and base.numel() > 1000:
        raise AssertionError(f"made {found} where {encoding} was wanted")
    return tuned, delta


def name_of(dtype: torch.dtype) -> str:
    """The name of a dtype without its module, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def check_restores(report: Report, device: torch.device, shapes: list[tuple[int, int]]) -> None:
    """delta_restore and delta_apply_, word for word, NaN and infinities among them."""
    for dtype, encoding in itertools.product(DTYPES, ENCODINGS):
        wrong = None
        for shape in shapes:
            base = random_words(shape, dtype, 1)
            base.view(-1)[:: max(1, base.numel() // 7)] = torch.tensor([math.nan, math.inf, -0.0]).to(dtype)[
                torch.arange(len(base.view(-1)[:: max(1, base.numel() // 7)])) % 3
            ]
            tuned, delta = fine_tune(base, encoding)
            there, weight = delta.to(device), base.to(device, copy=True)
            delta_apply_(weight, there)
            for way, got in (("restore", delta_restore(base.to(device), there)), ("apply", weight)):
                if (d := differ(got, tuned)) is not None:
                    wrong = wrong or f"{way} of {list(shape)}: {d}"
        report.check(f"restore and apply, {encoding}, {name_of(dtype)}", wrong)


def check_linear(report: Report, device: torch.device, shape: tuple[int, int], rows: list[int]) -> None:
    """One tenant: one-hot rows and exact sums bit for bit, else within the bound; the same bits twice."""
    n, k = shape
    for dtype, encoding in itertools.product(DTYPES, ENCODINGS):
        base, bias = random_words(shape, dtype, 1), random_words((n,), dtype, 2)
        tuned, delta = fine_tune(base, encoding)
        weight, there, b = base.to(device), delta.to(device), bias.to(device)
        wrong: dict[str, str | None] = dict.fromkeys(("bound", "again", "deterministic"))
        if dtype != torch.float32:  # whose products with 1 are exact, too, but not promised
            got = delta_linear(torch.eye(k, dtype=dtype).to(device), weight, there)
            finite = torch.where(tuned == 0, torch.zeros_like(tuned), tuned)  # -0.0 + 0.0 is 0.0
            wrong["one-hot"] = differ(
                torch.where(got.cpu() == 0, torch.zeros_like(finite.T), got.cpu()), finite.T
            )
        for m, mode in itertools.product(rows, ("fast", "deterministic")):
            x = random_words((m, k), dtype, 3)
            got, again = (delta_linear(x.to(device), weight, there, b, mode=mode) for _ in range(2))
            wrong["bound"] = wrong["bound"] or far(got, x, tuned, bias)
            wrong["again"] = wrong["again"] or differ(again, got)
            if mode == "deterministic":
                alone = delta_linear(x[m // 2 : m // 2 + 1].to(device), weight, there, b, mode=mode)
                wrong["deterministic"] = wrong["deterministic"] or differ(got[m // 2 : m // 2 + 1], alone)
        for what, found in wrong.items():
            report.check(f"delta_linear, {what}, {encoding}, {name_of(dtype)}", found)


def arena_of(deltas: list[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Deltas side by side, and their slots."""
    parts, slots, at = [torch.zeros(64, dtype=torch.uint8)], [], 64
    for delta in deltas:
        slots.append([at, 0 if delta is None else delta.numel()])
        if delta is not None:
            parts.append(torch.nn.functional.pad(delta, (0, -delta.numel() % 64)))
            at += parts[-1].numel()
    return torch.cat(parts), torch.tensor(slots)


def row_maps(m: int, tenants: int) -> Iterator[tuple[str, Tensor]]:
    """Whose rows a batch may hold."""
    yield "distinct", torch.arange(m) % (tenants + 1) - 1
    yield "one tenant", torch.full((m,), 1)
    yield "base", torch.full((m,), -1)
    yield "skewed", torch.where(torch.arange(m) % 5 < 4, 2, torch.arange(m) % tenants)


def check_grouped(report: Report, device: torch.device, shape: tuple[int, int], rows: list[int]) -> None:
    """Many tenants of every encoding in one batch: exact sums bit for bit, and random words within the bound."""
    n, k = shape
    for dtype in DTYPES:
        wrong: dict[str, str | None] = {}
        for exact in (True, False):

            def make(
                shape: tuple[int, ...], seed: int, dtype: torch.dtype = dtype, exact: bool = exact
            ) -> Tensor:
                return integers(shape, 8, dtype, seed) if exact else random_words(shape, dtype, seed)

            base, biases = make(shape, 1), make((6, n), 2)
            tuned, deltas = [], []
            for slot, prefer in enumerate(("speed", "memory", "speed", "memory", None)):
                some = torch.rand(shape, generator=torch.Generator().manual_seed(slot)) < 0.02 * 4**slot
                tuned.append(base if prefer is None else torch.where(some, make(shape, 7 + slot), base))
                deltas.append(None if prefer is None else delta_encode(base, tuned[-1], prefer=prefer))
            arena, slots = arena_of(deltas)
            given = [t.to(device) for t in (base, arena, slots, biases)]
            for m in rows:
                x = integers((m, k), 3, dtype, 3) if exact else random_words((m, k), dtype, 3)
                for name, owners in row_maps(m, 5):
                    owners = owners.to(torch.int32)
                    got = delta_linear_grouped(x.to(device), *given[:3], owners.to(device), given[3])
                    mine = torch.stack([[*tuned, base][i] for i in owners.tolist()]), biases[owners.long()]
                    if exact:
                        want = torch.einsum("mk,mnk->mn", x.double(), mine[0].double()) + mine[1].double()
                        found = differ(got, want.float().to(dtype))
                    else:
                        found = far(got, x, *mine)
                    key = f"{name}, {'exact sums' if exact else 'bound'}"
                    wrong[key] = wrong.get(key) or found
        for key, found in wrong.items():
            report.check(f"delta_linear_grouped, {key}, {name_of(dtype)}", found)


def check_embedding(
    report: Report, device: torch.device, shapes: list[tuple[int, int]], rows: list[int]
) -> None:
    """Rows looked up in the tables of tenants of every encoding, word for word."""
    for dtype in DTYPES:
        wrong: dict[str, str | None] = {}
        for shape in shapes:
            base = random_words(shape, dtype, 1)
            tuned, deltas = zip(*(fine_tune(base, e, seed=i) for i, e in enumerate(ENCODINGS)), strict=True)
            arena, slots = arena_of([*deltas, None])
            tables, given = torch.stack([*tuned, base, base]), [t.to(device) for t in (base, arena, slots)]
            for m in rows:
                indices = torch.randint(shape[0], (m,), generator=torch.Generator().manual_seed(m))
                for name, owners in row_maps(m, 5):
                    owners = owners.to(torch.int32)
                    got = delta_embedding(indices.to(device), *given, owners.to(device))
                    found = differ(got, tables[owners.long(), indices])
                    wrong[name] = wrong.get(name) or (found and f"{m} rows of {list(shape)}: {found}")
        for name, found in wrong.items():
            report.check(f"delta_embedding, {name}, {name_of(dtype)}", found)


def check_reports(report: Report, device: torch.device) -> None:
    """A delta of another matrix gives NaN, and an error of a later call; then all is well again."""
    base = random_words((40, 300), torch.bfloat16, 1)
    tuned, delta = fine_tune(base, "sparse")
    _, foreign = fine_tune(base.half(), "sparse")
    weight, there, wrong = base.to(device), delta.to(device), None
    got = delta_restore(weight, foreign.to(device))
    if not bool(torch.isnan(got).all()):
        wrong = "a delta of float16 was applied to bfloat16"
    try:
        delta_restore(weight, there)
        wrong = wrong or "the next call raised nothing"
    except RuntimeError as error:
        if "an earlier delta_restore" not in str(error):
            wrong = wrong or f"the next call said: {error}"
    report.check(
        "a foreign delta gives NaN and is reported", wrong or differ(delta_restore(weight, there), tuned)
    )


def check_graph(report: Report, device: torch.device) -> None:
    """A captured call is replayed on new rows and another delta, with nothing launched from the host."""
    base = random_words((512, 1024), torch.bfloat16, 1)
    pairs = [fine_tune(base, "sparse", seed=seed) for seed in (1, 2)]
    arena, slots = arena_of([delta for _, delta in pairs])
    for m in (4, 200):
        x, owners = random_words((m, 1024), base.dtype, 3), torch.zeros(m, dtype=torch.int32)
        given = [t.to(device) for t in (x, base, arena, slots, owners)]
        delta_linear_grouped(*given)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = delta_linear_grouped(*given)
        wrong = None
        for tenant, (tuned, _) in enumerate(pairs):
            x = random_words((m, 1024), base.dtype, 10 + tenant)
            given[0].copy_(x)
            given[4].fill_(tenant)
            graph.replay()
            torch.cuda.synchronize(device)
            wrong = wrong or far(out, x, tuned, None)
        report.check(f"a CUDA graph of {m} rows, replayed for other rows and tenants", wrong)


def seconds(device: torch.device, call: Callable[[], object], rounds: int) -> float:
    """Median time of one call. On CUDA, of the device, the L2 cache swept before each."""
    times = []
    if device.type != "cuda":
        for _ in range(rounds):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return sorted(times)[rounds // 2]
    sweep = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    call()
    for _ in range(rounds):
        sweep.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[rounds // 2]


def change(base: Tensor, share: float | str) -> Tensor:
    """A delta of `base` with that share of words changed by a step or two; "exponent": nearly all, as long training does."""
    words, g = bits(base), torch.Generator().manual_seed(5)
    if share == "exponent":
        steps = torch.randint(-3, 4, base.shape, generator=g, dtype=words.dtype)
        return delta_encode(base, (words + steps).view(base.dtype), prefer="memory")
    some = torch.rand(base.shape, generator=g) < share
    steps = torch.randint(1, 3, base.shape, generator=g, dtype=words.dtype)
    return delta_encode(base, torch.where(some, words + steps, words).view(base.dtype), prefer="speed")


COLUMNS = ("n x k", "changed", "m", "F.linear us", "xorz us", "ratio", "delta/base", "GB/s")


def time_pair(
    device: torch.device, rounds: int, weight: Tensor, delta: Tensor, m: int | None
) -> dict[str, float]:
    """`F.linear` and `delta_linear` of m rows; where m is None, a copy of the base and `delta_restore`."""
    if m is None:
        plain = seconds(device, weight.clone, rounds)
        ours = seconds(device, lambda: delta_restore(weight, delta), rounds)
    else:
        x = random_words((m, weight.shape[1]), weight.dtype, 3).to(device)
        plain = seconds(device, lambda: torch.nn.functional.linear(x, weight), rounds)
        ours = seconds(device, lambda: delta_linear(x, weight, delta), rounds)
    size = weight.numel() * weight.element_size()
    moved = size * (2 if m is None else 1) + delta.numel()
    return {
        "plain_seconds": plain,
        "xorz_seconds": ours,
        "ratio": ours / plain,
        "delta_over_base": delta.numel() / size,
        "gigabytes_per_second": moved / ours / 1e9,
    }


def time_all(
    report: Report, device: torch.device, shapes: list[tuple[int, int]], rows: list[int], rounds: int
) -> None:
    """delta_linear and delta_restore beside F.linear on the plain matrix."""
    print("\n" + " ".join(f"{c:>12}" for c in COLUMNS))
    for n, k in shapes:
        base = random_words((n, k), torch.bfloat16, 1)
        weight = base.to(device)
        for share in (0.01, 0.05, 0.3, "exponent"):
            delta = change(base, share).to(device)
            for m in (*rows, None):
                found = time_pair(device, rounds, weight, delta, m)
                what = "restore" if m is None else m
                report.timings.append({"n": n, "k": k, "changed": share, "m": what, **found})
                a, b, ratio, size, rate = found.values()
                cells = (f"{n} x {k}", share, what, f"{a * 1e6:.1f}", f"{b * 1e6:.1f}", f"{ratio:.2f}")
                print(" ".join(f"{c!s:>12}" for c in (*cells, f"{size:.3f}", f"{rate:.0f}")), flush=True)


def run(device: torch.device, quick: bool, timings: bool) -> Report:
    """Every check, then the timings."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    report = Report(name)
    print(f"xorz {__version__}, torch {torch.__version__}, {name}")
    small = [(1, 1), (33, 300), (17, 4099)]
    check_restores(report, device, small if quick else [*small, (300, 5000), (4096, 4096)])
    check_linear(
        report,
        device,
        (67, 300) if quick else (1000, 1100),
        [1, 4, 17, 40] if quick else [1, 3, 4, 16, 17, 64, 200, 515],
    )
    check_grouped(report, device, (67, 300), [1, 7, 40] if quick else [1, 4, 7, 16, 40, 150])
    check_embedding(
        report, device, small if quick else [*small, (1000, 4500)], [1, 40] if quick else [1, 40, 700]
    )
    if device.type == "cuda":
        check_reports(report, device)
        check_graph(report, device)
    if timings:
        shapes = [(256, 512)] if quick else [(4096, 4096), (11008, 4096), (4096, 11008)]
        time_all(report, device, shapes, [1, 8] if quick else [1, 8, 16, 64, 512], 3 if quick else 30)
    return report


def main(arguments: list[str]) -> int:
    """Run it all; gives the exit code."""
    parser = argparse.ArgumentParser("python -m xorz.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--device", type=torch.device, default=torch.device("cuda"), help="cuda, cuda:1, or cpu"
    )
    parser.add_argument("--quick", action="store_true", help="small shapes: seconds")
    parser.add_argument("--json", type=Path, help="write what was found to this file")
    parser.add_argument("--no-timings", action="store_true")
    args = parser.parse_args(arguments)
    if args.device.type == "cuda" and not torch.cuda.is_available():
        print("xorz: torch sees no CUDA device; --device cpu shows what this program does", file=sys.stderr)
        return 2
    with torch.no_grad():
        report = run(args.device, args.quick, not args.no_timings)
    failed = sum(not c["passed"] for c in report.checks)
    print(f"\n{len(report.checks)} checks, {failed} failed")
    if args.json:
        facts = {"xorz": __version__, "torch": torch.__version__, "passed": report.passed, **asdict(report)}
        args.json.write_text(json.dumps(facts, indent=1) + "\n")
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
