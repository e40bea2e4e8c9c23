"""Promise: `cuda/PREDICTED.md` says what products cost a GPU to issue, by the machine code that ptxas makes of these sources.

Part of `make cuda-gate`. Nothing here was measured on a GPU: instructions of a warp come from the disassembly (sass.py), how
often loops are gone through from the shape and the encoding, bytes from the format.

    predicted.py [--write] [--show KERNEL]
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "cuda"), str(ROOT / "tests" / "cuda_gate")]
import gate  # noqa: E402
import sass  # noqa: E402
import toolchain  # noqa: E402

TABLE = ROOT / "cuda" / "PREDICTED.md"
N = K = 4096
WARPS = 8
# Rows of x of a tile of `linear_large`.
TILE = 128


@dataclass(frozen=True)
class Machine:
    """A GPU by its data sheet: multiprocessors, GHz, TB/s, and mma (16 x 8 x 16) a cycle of each of them."""

    name: str
    processors: int
    ghz: float
    terabytes: float
    matrices: float


MACHINES = {
    80: Machine("A100 40 GB", 108, 1.41, 1.555, 0.5),
    90: Machine("H200", 132, 1.755, 4.8, 1.0),
    100: Machine("B200", 148, 1.85, 8.0, 2.0),
}


@dataclass(frozen=True)
class Case:
    """Rows of x of so many tenants, rows of one side by side, and their words: a share that differs, or bits of each."""

    m: int
    tenants: int
    kind: str
    amount: float

    @property
    def name(self) -> str:
        return {
            "base": "base",
            "sparse": f"sparse {self.amount:.0%}",
            "exponent": f"exponent {self.amount} bits",
        }[self.kind]

    @property
    def kernel(self) -> str:
        """Of `plan.rs`."""
        tiled, small = self.m // TILE + (self.tenants + 1 if self.tenants > 1 else 1), -(-self.m // 16)
        if self.m > 32 and tiled <= 2 * small:
            return "linear_large_bf16"
        return "linear_small_bf16_m16"

    @property
    def tiles(self) -> int:
        """Tiles of rows of x of `linear_large`."""
        return self.tenants * -(-max(1, self.m // self.tenants) // TILE)

    @property
    def tile_rows(self) -> int:
        """Rows of x of the fullest of them."""
        return min(TILE, max(1, self.m // self.tenants))

    @property
    def records(self) -> float:
        """Of a tile of 16 rows: its fullest lane's entries."""
        mean = K * self.amount if self.kind == "sparse" else 0.0
        return mean + 1.77 * math.sqrt(mean * max(0.0, 1 - self.amount))

    @property
    def bytes(self) -> float:
        """What has to move: the base, each tenant's delta, x and y, once."""
        delta = {
            "base": 0.0,
            "sparse": N / 16 * (self.records * 48 + 4),
            "exponent": N * K * self.amount / 8 + N / 16 * (K / 1024) * 4,
        }[self.kind]
        return 2.0 * N * K + self.tenants * delta + 2 * self.m * (N + K)


# As in src/cuda/plan.rs.
MANY = 32
CASES = [
    Case(m, tenants, kind, amount)
    for kind, amount in [
        ("base", 0.0),
        ("sparse", 0.01),
        ("sparse", 0.05),
        ("exponent", 0.3),
        ("exponent", 3.5),
    ]
    for m in (1, 4, 8, 16, 64, 256)
    for tenants in ((1, 8) if kind != "base" else (1,))
    if tenants <= m
]


def small_trips(case: Case) -> Callable[[sass.Loop, list[sass.Loop]], float]:
    """How often loops of `linear_small` are gone through, each time that what is round them is."""
    block = int(case.kernel.rsplit("_m", 1)[1])
    rows = min(case.m, block)
    each = max(1, case.m // case.tenants)
    tenants = max(1, rows // each)
    of_round = min(4, rows)
    of_segment = min(of_round, each)
    runs = {1: 16, 2: 8}.get(of_round // of_segment, 4)
    pairs = tenants * K / 1024
    rounds = math.ceil(pairs / WARPS)

    def trips(loop: sass.Loop, same: list[sass.Loop]) -> float:
        if loop.name == "gather":
            return tenants
        if loop.name == "tenants":
            return tenants + 1
        if loop.name == "product_tensor":
            wanted = 16 if rows > 8 else 8
            return K / 1024 if loop.ops["HMMA"] == wanted else 0
        if loop.name == "round":
            return math.ceil(rows / 4) if case.kind == "sparse" else 0
        if loop.name == "stage":
            return K / 2 / 256 / 4
        if loop.name == "gaps":
            # Of both: what does not go by fours is done apart, and counted whole.
            return math.ceil(case.records / runs) // 4
        if loop.name == "entries":
            rows_at_once = 1 if of_segment == 1 else 4
            return math.ceil(case.records / runs) // 4 if loop.ops["FFMA"] == 4 * rows_at_once else 0
        if loop.name == "pairs":
            return rounds if case.kind == "exponent" else 0
        if loop.name == "rows":
            return 16 * pairs / (rounds * WARPS)
        if loop.name == "steps":
            return 1024 / 128
        raise KeyError(f"nobody knows how often {loop.name} is gone through")

    return trips


# Columns of W that `linear_large` patches at a time, of words of 2 bytes; rows that a warp has of them, records of a row at
# once, and the share of the warps that patch (patch_rows.cuh).
WINDOW, WARP_ROWS, AT_ONCE, PATCHERS = 64, 32, 4, 2 / WARPS


def rounds_of_window(share: float) -> float:
    """How often a warp goes on with a window of `sparse`: a row whose four records are all taken has another round, and the
    warp has as many as its fullest row. Records of a row are binomial: of `share` of the columns, and what steps over more
    than 255 columns that did not change."""
    skipped = (1 - share) ** 255
    records = share * (1 + skipped / (1 - skipped))
    some = [math.comb(WINDOW, i) * records**i * (1 - records) ** (WINDOW - i) for i in range(WINDOW + 1)]
    # Round r + 1 comes where some row has at least 4 r.
    return 1 + sum(1 - sum(some[:least]) ** WARP_ROWS for least in range(AT_ONCE, WINDOW + 1, AT_ONCE))


def large_trips(case: Case) -> Callable[[sass.Loop, list[sass.Loop]], float]:
    """The same of `linear_large`, of one pair of a panel and a tile of rows of x."""
    across = K / 1024 if case.kind == "exponent" else 1

    def trips(loop: sass.Loop, same: list[sass.Loop]) -> float:
        # The compiler may have put parts of the others' loops into that of streams.
        streams, entries = ("patch_streams.cuh" in loop.files, "patch_rows.cuh" in loop.files)
        of = "exponent" if streams else "sparse" if entries else "base"
        if of != case.kind:
            return 0
        if loop.name == "across":
            return across
        if loop.name == "step":
            return K / WINDOW / across
        if loop.name == "entries_taken":
            return rounds_of_window(case.amount)
        if loop.name == "walk":
            # Four of the block's warps have a tile of 16 rows of the panel.
            return 16 * 1024 / 256 / 2
        raise KeyError(f"nobody knows how often {loop.name} is gone through")

    return trips


def restore_trips(case: Case) -> Callable[[sass.Loop, list[sass.Loop]], float]:
    """The same of `restore`, of a block that has a tile of 16 x 4096 (sparse), or four warps of eight a tile of 16 x 1024."""
    sparse = case.kind == "sparse"
    runs = 16

    def trips(loop: sass.Loop, same: list[sass.Loop]) -> float:
        unrolled = max(other.ops["LDG"] + other.ops["LDS"] for other in same)
        if loop.name in ("copied", "before") and loop.ops["LDG"] + loop.ops["LDS"] != unrolled:
            return 0  # what is left of the unrolled loop
        if loop.name == "copied":
            # Two rows a warp, by pieces of 16 bytes; here it is gone through once for both.
            return 2 * K / 8 / 32 / unrolled if sparse else 0
        if loop.name == "gaps":
            return math.ceil(case.records / runs) // 4 if sparse else 0
        if loop.name == "before":
            return runs / 2 / unrolled if sparse else 0
        if loop.name == "run":
            return case.records / runs + 1 if sparse else 0
        if loop.name == "chunk":
            return 0 if sparse else 16 / 2
        if loop.name == "decoded":
            return 32 / loop.ops["STS"]
        raise KeyError(f"nobody knows how often {loop.name} is gone through")

    return trips


FULL = Case(TILE, 1, "base", 0.0)


def matrices(case: Case) -> float:
    """How many mma of 16 x 8 x 16 `linear_large` has for a panel and a tile: sixteens of x without rows have none."""
    return math.ceil(case.tile_rows / 16) * 64 / 8 * K / 16


def fractions(case: Case) -> dict[str, float]:
    """Of what is unrolled for more than there is, or not always done."""
    each = max(1, case.m // case.tenants)
    block = 16  # rows of x
    return {
        "row": min(each, block) / block,
        # What one of the block's warps does for all of them.
        "one_warp": 1 / WARPS,
        # What half a warp does for each tenant, and a thread for each output.
        "tenants": math.ceil(max(1, min(case.m, block) // each) / 2) / WARPS,
        "outputs": math.ceil(min(case.m, block) / 2) / WARPS,
        # Of rows whose columns are no whole steps, or that lie at odd addresses.
        "pieces": 0.0,
        "product": 0.0 if case.kind == "exponent" else 1 / (max(1, min(case.m, block) // each) + 1),
        "streams": float(case.kind == "exponent"),
        "entries": float(case.kind == "sparse"),
        "patchers": PATCHERS,
        # A warp with sixteen rows of x loads three quarters of what one with 32 does, for half of the mma. Here it loads half:
        # the table has no such warp.
        "multiplied": matrices(case) / matrices(FULL),
        "differences": 0.0,
        "refill": case.amount / 16 if case.kind == "exponent" else 0.0,
    }


AROUND = {"rows": "pairs"}


def instructions(kernel_name: str, kernel: sass.Kernel, case: Case, marks: dict) -> float:
    """What a warp issues for its share of a panel, or of a block's tile."""
    trips = (
        large_trips if "large" in kernel_name else restore_trips if "restore" in kernel_name else small_trips
    )(case)
    share = fractions(case)
    weight = [1.0] * len(kernel.code)
    loops = sass.marked_loops(kernel, marks["hot"])
    for loop in loops:
        times = trips(loop, [other for other in loops if other.name == loop.name])
        # The compiler may put an inner loop beside the one round it.
        for outer in (outer for outer in loops if outer.name == AROUND.get(loop.name)):
            if not outer.first <= loop.first <= loop.last <= outer.last:
                times *= trips(outer, [outer])
        for at in range(loop.first, loop.last + 1):
            weight[at] *= times
    names = [{marks["each"][line] for line in i.lines & marks["each"].keys()} for i in kernel.code]
    for at, here in enumerate(names):
        for name in here - {"multiplied"}:
            weight[at] *= share[name]
    if "large" in kernel_name:
        # Before the rows of x are looked at, so of a full tile, whatever the case has.
        mma = [i.name.startswith("HMMA") for i in kernel.code]
        if any(is_mma and "multiplied" not in here for is_mma, here in zip(mma, names, strict=True)):
            raise SystemExit(
                f"cuda-gate: {kernel_name} has mma that are of no line marked `each: multiplied`"
            )
        of_mma = [w if is_mma else 0.0 for w, is_mma in zip(weight, mma, strict=True)]
        counted, wanted = WARPS * sass.warp_cost(kernel, of_mma, set(marks["cold"])), matrices(FULL)
        if counted != wanted:
            raise SystemExit(
                f"cuda-gate: {kernel_name} has {counted} mma for a panel and a full tile of `{case.kind}` by the machine code, "
                f"and {wanted} by its shape"
            )
    for at, here in enumerate(names):
        if "multiplied" in here:
            weight[at] *= share["multiplied"]
    return sass.warp_cost(kernel, weight, set(marks["cold"]))


def panels(case: Case) -> int:
    """Blocks' worth of work: panels of W by blocks or tiles of rows of x."""
    if "large" not in case.kernel:
        return N // 16 * -(-case.m // 16)
    return N // 64 * case.tiles


def times(case: Case, cost: float, arch: int) -> tuple[float, float, float]:
    """Microseconds to issue, to move the bytes, and to multiply where tensor cores do, of one machine."""
    machine = MACHINES[arch]
    most = math.ceil(panels(case) / machine.processors)
    issue = most * cost * WARPS / 4 / machine.ghz / 1e3
    multiplied = most * matrices(case) if "large" in case.kernel else 0
    return issue, case.bytes / machine.terabytes / 1e6, multiplied / machine.matrices / machine.ghz / 1e3


HEAD = """# What products cost a GPU, predicted

Written by `make cuda-gate ARGS=--write` and compared by `make cuda-gate`. **Predicted, not measured**: no GPU has run
this. For 4096 x 4096 of bf16:

- *instructions*: what a block's eight warps issue for a panel (16 rows of W by up to 16 rows of x; `large`: 64 by up to
  128), on sm_90: the longest way through the machine code that ptxas makes, loops counted as often as shape and encoding
  say. What one warp does for the block (whose rows are whose, opening deltas) counts once, what such rows never reach does not.
- *issue*: that of the multiprocessor with the most panels, at four instructions a cycle; *bytes*: base, deltas, x and y
  once, at the memory's full speed. Microseconds, by the machines' data sheets ({machines}). A ratio below 1 says that
  issuing is not what such a product waits for; what it does wait for (latency, barriers, a pipe that takes fewer than four
  a cycle: integers on half the lanes, shuffles and bit counts on a quarter or less) only a GPU can tell.
- *mma*: `large` alone: the matrix instructions' own time as a share of the issue time (not of shared memory's, below). Two
  of its eight warps patch `sparse`: what they issue for it counts a quarter, as if the four schedulers had even shares.
  Warps without rows of x multiply nothing.
  `large` of one tenant is mode deterministic; in mode fast its rows go to restored panels, below.

Rows of a tenant lie side by side. `sparse`: a tile has as many records as its fullest row is expected to have.
`exponent`: tiles of 16 x 1024, no differences.

"""


RESTORE = "delta_restore_16"
RESTORED = f"""## Restored panels

More than {MANY} rows of one tenant in mode fast, bf16 and f16: {RESTORE} writes the fine-tuned words of a panel (here of the
whole matrix), torch's own product reads them. Microseconds: *restore*, to issue and, in brackets, to read base and delta and
write the words, all in device memory, though L2 keeps much of what is written; *product*, what it takes at least: matrix
instructions at the machine's peak, or words, x and y at the memory's speed; what torch takes is longer, and was not predicted;
*large*, what `linear_large` would take to issue instead. Restoring `exponent`, a warp has one tile and half the warps have
none, so that waiting, not issuing, may decide.
"""


def restored(found: dict[int, dict[str, sass.Kernel]], marks: dict) -> list[str]:
    """The rows of many rows of one tenant by restored panels."""
    lines = [RESTORED]
    lines.append("| words | m |" + "".join(f" sm_{arch}: restore | product | large |" for arch in MACHINES))
    lines.append("|---|---|" + "---|---|---|" * len(MACHINES))
    for kind, amount in [("sparse", 0.01), ("sparse", 0.05), ("exponent", 0.3), ("exponent", 3.5)]:
        for m in (64, 256, 1024):
            case = Case(m, 1, kind, amount)
            cells = [case.name, str(m)]
            for arch, machine in MACHINES.items():
                cost = instructions(RESTORE, found[arch][f"xorz_{RESTORE}"], case, marks)
                most = math.ceil(N / 16 / machine.processors)
                issue = most * cost * WARPS / 4 / machine.ghz / 1e3
                moved = (case.bytes - 2 * m * (N + K) + 2 * N * K) / machine.terabytes / 1e6
                peak = m / 16 * N / 8 * K / 16 / machine.processors / machine.matrices / machine.ghz / 1e3
                product = max(peak, 2 * (N * K + m * (N + K)) / machine.terabytes / 1e6)
                large = instructions(case.kernel, found[arch][f"xorz_{case.kernel}"], case, marks)
                cells += [
                    f"{issue:.1f} ({moved:.1f})",
                    f"{product:.1f}",
                    f"{times(case, large, arch)[0]:.1f}",
                ]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def in_flight(
    found: dict[int, dict[str, sass.Kernel]], used: dict[int, dict[str, tuple[int, int]]]
) -> list[str]:
    """What a multiprocessor has asked the memory for at once."""
    out = [
        "## In flight",
        "",
        "Bytes of W that a multiprocessor has asked for and not got, at most: of each warp of the blocks that it holds. The",
        "memory's time to answer times its speed is some 25 KB on an H200.",
        "",
        "| kernel | sm | registers | blocks | warps | KiB in flight |",
        "|---|---|---|---|---|---|",
    ]
    for name, bytes_of_warp in [
        ("linear_small_bf16_m16", 8 * 512),
        ("linear_large_bf16", 2 * 512),
    ]:
        for arch in MACHINES:
            registers, shared = used[arch][f"xorz_{name}"]
            blocks = gate.blocks(arch, registers, shared)
            flight = blocks * WARPS * bytes_of_warp / 1024
            out.append(f"| {name} | {arch} | {registers} | {blocks} | {blocks * WARPS} | {flight:.0f} |")
    return out


# What an access of one word by each of 32 lanes to banks by chance takes: the fullest of 32 banks has 3.5 of the lanes.
BY_CHANCE = 3.5


def shared_memory() -> list[str]:
    """What a multiprocessor's shared memory moves for `linear_large`, by the sources: 128 bytes a cycle."""
    out = [
        "## Shared memory",
        "",
        "Bytes of shared memory for 64 columns of a pair of `linear_large_bf16`, by 128 a cycle of a multiprocessor: *copies*,",
        "x and W as they arrive; *matrices*, what eight warps load of both, 32 rows of each a warp; *patches*, words that a",
        "lane reads or writes by itself, in cycles of 128 bytes: of `sparse` 3.5 for 32 lanes, since banks are by chance, of",
        "`exponent` one for 32 columns of a row. *mma*: the matrix instructions' own time as a share of the sum: what shared",
        "memory leaves of the tensor peak, however little is issued. Tiles of 64 x 128 are small for sm_90: a warp's 32 x 32",
        "load 256 bytes an mma, and copies are 96 more.",
        "",
        "| words | copies | matrices | patches | cycles | mma, sm_80 | mma, sm_90 | mma, sm_100 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    copies, loads = (128 + 64) * WINDOW * 2, WARPS * (32 + 32) * WINDOW * 2
    products = 128 / 16 * 64 / 8 * WINDOW / 16
    for kind, amount in [("base", 0.0), ("sparse", 0.01), ("sparse", 0.05), ("exponent", 3.5)]:
        patches = {
            "base": 0.0,
            "sparse": 2 * AT_ONCE * rounds_of_window(amount) * WARPS * PATCHERS * BY_CHANCE
            if amount
            else 0.0,
            "exponent": 2 * 64 * WINDOW / 32,
        }[kind] * 128
        cycles = (copies + loads + patches) / 128
        shares = [f"{products / machine.matrices / cycles:.0%}" for machine in MACHINES.values()]
        name = Case(64, 1, kind, amount).name if kind != "exponent" else kind
        out.append(f"| {name} | {copies} | {loads} | {patches:.0f} | {cycles:.0f} | {' | '.join(shares)} |")
    return out


def check_marks(kernels: list[sass.Kernel], hot: dict[tuple[str, int], str]) -> None:
    """SystemExit where a mark is of no loop: what it stands at has no instruction of its own any more, or another name."""
    lost = set(hot.values()) - {loop.name for kernel in kernels for loop in sass.marked_loops(kernel, hot)}
    if lost:
        raise SystemExit(
            f"cuda-gate: no loop has the mark {', '.join(sorted(lost))}; move it to a line of the loop"
        )


def table(found: dict[int, dict[str, sass.Kernel]], used: dict[int, dict[str, tuple[int, int]]]) -> str:
    marks = sass.marks(ROOT / "cuda")
    for kernels in found.values():
        check_marks(
            [kernels[f"xorz_{name}"] for name in {case.kernel for case in CASES} | {RESTORE}], marks["hot"]
        )
    machines = "; ".join(
        f"sm_{arch}: {m.name}, {m.processors} multiprocessors, {m.ghz} GHz, {m.terabytes} TB/s"
        for arch, m in MACHINES.items()
    )
    lines = [
        HEAD.format(machines=machines)
        + "| words | m | tenants | kernel | instructions |"
        + "".join(f" sm_{arch}: issue | bytes | ratio |" for arch in MACHINES)
        + " mma, sm_90 |"
    ]
    lines.append("|---|---|---|---|---|" + "---|---|---|" * len(MACHINES) + "---|")
    for case in CASES:
        cost = {
            arch: instructions(case.kernel, found[arch][f"xorz_{case.kernel}"], case, marks)
            for arch in MACHINES
        }
        cells = [case.name, str(case.m), str(case.tenants), case.kernel, f"{cost[90] * WARPS:.0f}"]
        for arch in MACHINES:
            issue, moved, _ = times(case, cost[arch], arch)
            cells += [f"{issue:.1f}", f"{moved:.1f}", f"{issue / moved:.2f}"]
        issue, _, multiplied = times(case, cost[90], 90)
        cells.append(f"{multiplied / issue:.0%}" if multiplied else "")
        lines.append("| " + " | ".join(cells) + " |")
    return (
        "\n".join([*lines, "", *restored(found, marks), "", *in_flight(found, used), "", *shared_memory()])
        + "\n"
    )


def disassembled() -> tuple[dict, dict]:
    """Kernels by architecture and name; their registers and shared memory."""
    nvcc = toolchain.nvcc().parent
    found: dict[int, dict] = {arch: {} for arch in MACHINES}
    used: dict[int, dict] = {arch: {} for arch in MACHINES}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        work = Path(folder)

        def one(job: tuple[int, str]) -> None:
            arch, name = job
            source = ROOT / "cuda" / f"{name}.cu"
            cubin = work / f"{name}_{arch}.cubin"
            used[arch] |= gate.compiled(nvcc, source, arch, cubin, "-lineinfo")
            found[arch] |= sass.kernels(nvcc, cubin)

        sources = ("linear_small", "linear_large", "restore")
        list(pool.map(one, [(arch, name) for arch in MACHINES for name in sources]))
    return found, used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--show", help="the marked loops of a kernel, on sm_90")
    args = parser.parse_args()
    found, used = disassembled()
    if args.show:
        kernel, marks = found[90][f"xorz_{args.show}"], sass.marks(ROOT / "cuda")
        for loop in sass.marked_loops(kernel, marks["hot"]):
            print(loop.name, loop.last - loop.first + 1, dict(loop.ops.most_common(12)))
        return
    compare(args.write, table(found, used))


def compare(write: bool, text: str | None = None) -> None:
    """SystemExit where `cuda/PREDICTED.md` does not say what the sources make; or write it."""
    text = text or table(*disassembled())
    if write:
        TABLE.write_text(text)
    elif not TABLE.exists() or TABLE.read_text() != text:
        raise SystemExit(
            "cuda-gate: cuda/PREDICTED.md says otherwise; write it anew (make cuda-gate ARGS=--write) and say why"
        )
    print("cuda-gate: predictions as in cuda/PREDICTED.md")


if __name__ == "__main__":
    main()
