"""Promise: the hot loops of the AVX-512 kernels cost what `tests/cpu_gate/loops.txt` says, on whatever
machine this runs.

`make cpu-gate`. Finds the loops in the library as it is shipped (build/cmake/libxorz.a), counts their
instructions, asks llvm-mca for the cycles of its model, and compares both with two tables: our own, and that
of the prototypes which reached memory's speed (`prototype.txt`). More than 10 % above either is a failure.
Nothing is executed, so no AVX-512 is needed.

    cpu_gate.py [--write] [--counts] [--library ARCHIVE] [--show LOOP]

`--write` replaces loops.txt: say in the commit why it changed. `--counts` leaves the model out, and needs no
llvm-mca. `--show` prints the worst copy of a loop.

**Finding.** Kernels are inlined, so names say little. A loop is known by its mix: it has no loop in it, and
so many dot products, expansions, compares and prefetches a step; or some whole times as many, where it is
unrolled. Of several copies the worst counts.

**The model** is AMD's Zen 4 as LLVM 19 has it, which takes it for Zen 5 as well. Of decoders it is right
within 5 to 40 %, but it charges three cycles for a bf16 dot product that takes Zen 5 0.55, and it knows
nothing of memory. So its cycles notice changes; they do not tell times.
"""

import argparse
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "tests" / "cpu_gate" / "loops.txt"
PROTOTYPE = ROOT / "tests" / "cpu_gate" / "prototype.txt"
ARCHIVE = ROOT / "build" / "cmake" / "libxorz.a"
PACKAGE = "llvm-19"
MCA = ["llvm-mca-19", "-mtriple=x86_64", "-mcpu=znver5"]
ITERATIONS = 500
SLACK = 1.10

# What a loop is known by: how often instructions occur whose text begins so.
MIX = {
    "dot": r"vdpbf16ps",
    "expand": r"vpexpandw",
    "expand32": r"vpexpandd",
    "compare": r"vpcmp(n?l[te]|n?eq)?u[wd]",
    "classes": r"vpsrlw +(\$0x7|%xmm)",
    "fma": r"vfn?m(add|sub)\d*ps .*zmm",
    "gather": r"vgather",
    "prefetch": r"prefetch",
    "store": r"vmov\w+ +%zmm\d+,[^%]*\(",
}


@dataclass(frozen=True)
class Loop:
    """A kernel's inner loop: its name in the tables, its mix a step, and what a step is."""

    name: str
    mix: tuple[tuple[str, int], ...]
    step: str


# Name: mix a step: what a step is. What is not named does not occur, but for prefetches and classes, which
# count only where they are named.
LOOPS_TEXT = """
exponent_1: dot 1, expand 1, compare 1, classes 1, prefetch 2: 32 words, one row of x
exponent_1_rows_2: dot 2, expand 1, compare 1, classes 1, prefetch 2: 32 words, two rows of x
exponent_1_rows_4: dot 4, expand 1, compare 1, classes 1, prefetch 2: 32 words, four rows of x
exponent_own_2: dot 2, expand 2, compare 2, classes 1, prefetch 3: 32 words of two tenants, a table each
exponent_shared_2: dot 2, expand 2, compare 1, classes 1, prefetch 3: 32 words of two tenants, one table
exponent_shared_4: dot 4, expand 4, compare 1, classes 1, prefetch 3: 32 words of four tenants, one table
exponent_shared_8: dot 8, expand 8, compare 1, classes 1, prefetch 3: 32 words of eight tenants, one table
exponent_restored: expand 1, compare 1, classes 1, store 1: 32 words to memory
exponent_f32_1: expand32 2, compare 2, fma 2, prefetch 4: 32 words of f32, one row of x
exponent_f32_restored: expand32 2, compare 2, store 2: 32 words of f32 to memory
base_1: dot 4, prefetch 0: 32 columns of 4 rows, one row of x
base_2: dot 16, prefetch 0: 32 columns of 8 rows, two rows of x
base_4: dot 16, prefetch 4: 32 columns of 4 rows, four rows of x of four
base_8: dot 16, prefetch 2: 32 columns of 4 rows, four rows of x of eight
base_16: dot 16, prefetch 1: 32 columns of 4 rows, four rows of x of sixteen
panel_6: dot 24: two columns of 64 rows, six rows of x
sparse_gathered: gather 1, fma 1: a record of 16 entries, one row of x
"""


def loop(line: str) -> Loop:
    name, mix, step = line.split(": ")
    named = {kind: int(n) for kind, n in (part.split() for part in mix.split(", "))}
    full = {kind: 0 for kind in MIX if kind not in ("prefetch", "classes")} | named
    return Loop(name, tuple(full.items()), step)


LOOPS = [loop(line) for line in LOOPS_TEXT.strip().splitlines()]


def fail(text: str) -> None:
    raise SystemExit(f"cpu-gate: {text}")


@dataclass(frozen=True)
class Line:
    """An instruction: its address, its text as objdump has it (AT&T), and where it jumps to."""

    address: int
    text: str
    target: int | None


FUNCTION = re.compile(r"^[0-9a-f]+ <(.+)>:$")
INSTRUCTION = re.compile(r"^\s+([0-9a-f]+):\s+(\S.*?)\s*(?:#.*)?$")
JUMP = re.compile(r"^j\w+\s+([0-9a-f]+)(?:\s|$)")


def functions(text: str):
    """Name and instructions of each function of what `objdump -d --no-show-raw-insn` prints."""
    name, lines = None, []
    for row in text.splitlines():
        if m := FUNCTION.match(row):
            if lines:
                yield name, lines
            name, lines = m[1], []
        elif (m := INSTRUCTION.match(row)) and name is not None:
            jump = JUMP.match(m[2])
            lines.append(Line(int(m[1], 16), m[2], int(jump[1], 16) if jump else None))
    if lines:
        yield name, lines


def innermost(lines: list[Line]) -> list[list[Line]]:
    """The bodies of loops without loops in them: from where a jump backwards goes to the jump."""
    places = {line.address: i for i, line in enumerate(lines)}
    back = (
        (places[line.target], i)
        for i, line in enumerate(lines)
        if line.target is not None and line.target <= line.address and line.target in places
    )
    spans, found = sorted(set(back), key=lambda span: (span[0], -span[1])), []
    for i, (first, last) in enumerate(spans):
        # Sorted so, a span within this one comes after it, and the next to begin is within it if any is.
        inner = (span for span in spans[i + 1 :] if span[0] <= last)
        if not any(end <= last for _, end in inner):
            found.append(lines[first : last + 1])
    return found


def mixed(body: list[Line]) -> dict[str, int]:
    return {kind: sum(bool(re.match(p, line.text)) for line in body) for kind, p in MIX.items()}


def unrolled(wanted: Loop, mix: dict[str, int]) -> int:
    """How many steps of this loop a body with such a mix takes; 0 if it is another loop."""
    for steps in (1, 2, 3, 4):
        if all(mix[kind] == steps * n for kind, n in wanted.mix):
            return steps
    return 0


@dataclass(frozen=True)
class Copy:
    """A place where a loop was found: the function, the body, and how many steps it takes."""

    function: str
    body: tuple[str, ...]
    steps: int

    def instructions(self) -> float:
        return len(self.body) / self.steps


def find(text: str, loops: list[Loop] = LOOPS) -> dict[str, list[Copy]]:
    """All copies of each loop, bodies that are alike to the letter once."""
    found: dict[str, dict[tuple[str, ...], Copy]] = {each.name: {} for each in loops}
    for name, lines in functions(text):
        if not any("zmm" in line.text for line in lines):
            continue
        for body in innermost(lines):
            mix = mixed(body)
            for each in loops:
                if steps := unrolled(each, mix):
                    texts = tuple(plain(line) for line in body)
                    found[each.name].setdefault(texts, Copy(name, texts, steps))
    return {name: list(copies.values()) for name, copies in found.items()}


def plain(line: Line) -> str:
    """Without addresses, which mean nothing elsewhere: jumps go to a label."""
    return line.text if line.target is None else f"{line.text.split()[0]} elsewhere"


def cycles(copies: list[Copy]) -> list[float]:
    """Cycles a step of each, by the model."""
    regions = []
    for i, copy in enumerate(copies):
        regions += [f"# LLVM-MCA-BEGIN {i}", *copy.body, f"# LLVM-MCA-END {i}"]
    said = subprocess.run(
        [*MCA, f"-iterations={ITERATIONS}", "-summary-view=1", "-resource-pressure=0", "-instruction-info=0"],
        input="\n".join(["elsewhere:", *regions, ""]),
        capture_output=True,
        text=True,
    )
    total = [int(n) for n in re.findall(r"^Total Cycles:\s+(\d+)$", said.stdout, re.MULTILINE)]
    if said.returncode != 0 or len(total) != len(copies):
        fail(f"{MCA[0]} does not understand what objdump wrote: {said.stderr[-2000:]}")
    return [n / ITERATIONS / copy.steps for n, copy in zip(total, copies, strict=True)]


def disassembled(archive: Path) -> str:
    """What objdump makes of the archive's members that are of this crate."""
    if not archive.exists():
        fail(f"there is no {archive}; make build")
    listed = subprocess.run(["ar", "t", archive], check=True, capture_output=True, text=True).stdout.split()
    ours = [name for name in listed if name.startswith("xorz-")]
    if not ours:
        fail(f"{archive} has no member of this crate")
    with tempfile.TemporaryDirectory() as work:
        subprocess.run(["ar", "x", archive.resolve(), *ours], check=True, cwd=work)
        command = ["objdump", "-d", "--no-show-raw-insn", *ours]
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=work).stdout


def needed(model: bool) -> None:
    """Complain about missing programs, or install the model's package where that is allowed."""
    for program in ("ar", "objdump"):
        if shutil.which(program) is None:
            fail(f"{program} is missing; install binutils")
    if not model or shutil.which(MCA[0]):
        return
    if os.geteuid() == 0 and shutil.which("apt-get"):
        subprocess.run(["apt-get", "update", "-qq"], check=False)
        install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", PACKAGE]
        subprocess.run(install, check=False, stdout=subprocess.DEVNULL)
    if shutil.which(MCA[0]) is None:
        fail(
            f"{MCA[0]} is missing; install LLVM 19 (Debian: sudo apt-get install {PACKAGE}), or pass --counts"
        )


def table(text: str) -> dict[str, tuple[float, float]]:
    """Instructions and cycles by loop."""
    rows = (line.split() for line in text.splitlines() if line and not line.startswith("#"))
    return {name: (float(instructions), float(cycles)) for name, instructions, cycles, *_ in rows}


Costs = dict[str, tuple[float, float | None]]


def costs(found: dict[str, list[Copy]], model: bool) -> Costs:
    """Instructions and cycles of the worst copy of each loop."""
    missing = [name for name, copies in found.items() if not copies]
    if missing:
        fail(
            f"no loop is as {', '.join(missing)} should be; a kernel has changed, or LOOPS must learn its mix"
        )
    every = [copy for copies in found.values() for copy in copies]
    modelled = iter(cycles(every) if model else [None] * len(every))
    out: Costs = {}
    for name, copies in found.items():
        taken = [next(modelled) for _ in copies]
        out[name] = (max(copy.instructions() for copy in copies), max(taken) if model else None)
    return out


def compared(now: Costs, kept: dict[str, tuple[float, float]], prototype: dict[str, tuple[float, float]]):
    """The rows of the report, and what is wrong in words."""
    head = ["instr", "was", "prototype", "cycles", "was", "prototype"]
    rows, wrong = [f"{'loop':24}" + "".join(f"{name:>10}" for name in head)], []
    for name in sorted({*now, *kept}):
        if name not in now or name not in kept:
            wrong.append(f"{name} is {'new' if name in now else 'gone'}")
            continue
        cells = []
        for what, i in (("instructions", 0), ("cycles", 1)):
            mine, was, theirs = now[name][i], kept[name][i], prototype.get(name, (None, None))[i]
            cells += ["-" if each is None else f"{each:.2f}" for each in (mine, was, theirs)]
            for limit, whose in ((was, "the table's"), (theirs, "the prototype's")):
                if mine is not None and limit is not None and mine > SLACK * limit:
                    wrong.append(f"{name} takes {mine:.2f} {what}, {whose} {limit:.2f}")
        rows.append(f"{name:24}" + "".join(f"{cell:>10}" for cell in cells))
    return rows, wrong


def written(now: Costs) -> str:
    compiler = subprocess.run(["rustc", "--version"], capture_output=True, text=True).stdout.strip()
    lines = [
        "# Written by `make cpu-gate ARGS=--write` and compared by `make cpu-gate`: instructions and model cycles of a step of",
        f"# each hot loop, the worst copy of it. {compiler}; {' '.join(MCA)}.",
        f"# {'loop':22} {'instr':>7} {'cycles':>7}  step",
    ]
    steps = {each.name: each.step for each in LOOPS}
    rows = (f"{name:24} {cost[0]:7.2f} {cost[1]:7.2f}  {steps[name]}" for name, cost in now.items())
    return "\n".join([*lines, *rows, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--counts", action="store_true")
    parser.add_argument("--library", type=Path, default=ARCHIVE)
    parser.add_argument("--show", choices=[each.name for each in LOOPS])
    args = parser.parse_args()
    needed(model=not args.counts)
    found = find(disassembled(args.library))
    if args.show:
        worst = max(found[args.show], key=Copy.instructions, default=None)
        print(f"{worst.function}\n    " + "\n    ".join(worst.body) if worst else "not found")
        return
    now = costs(found, model=not args.counts)
    if args.write:
        if args.counts:
            fail("--write takes the model, too")
        TABLE.write_text(written(now))
    rows, wrong = compared(now, table(TABLE.read_text()), table(PROTOTYPE.read_text()))
    print("\n".join(rows))
    if wrong:
        fail("\n  ".join(["too much:", *wrong, "If that is meant: make cpu-gate ARGS=--write, and say why"]))
    print(f"cpu-gate: {len(now)} loops, none more than 10 % above loops.txt or prototype.txt")


if __name__ == "__main__":
    main()
