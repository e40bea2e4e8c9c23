"""What a kernel's machine code costs a warp: instructions by loop, and how often each is gone through.

A kernel is disassembled with the source lines that each instruction comes from, callers included. Comments in the sources
mark lines:

    // hot: NAME     the innermost loop round it is called NAME; how often it is gone through is a scenario's to say
    // each: NAME    what it and what it calls cost is taken that many times (a fraction, where code is unrolled for more)
    // cold: WHY     no scenario goes there: it costs nothing

The cost of a warp is that of the longest way through the code from its entry to an exit, cold blocks left out, loops
counted as often as the scenario says: at least what a warp issues, where lengths of loops are right.
"""

import re
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

LINE = re.compile(r'//## File "([^"]+)", line (\d+)(?: inlined at "([^"]+)", line (\d+))?')
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,6}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)(.*);")
TARGET = re.compile(r"(\.L_x_\d+)\)")
MARK = re.compile(r"// (hot|each|cold): (\w+)")


@dataclass
class Instruction:
    """One: its name, whether only some threads do it, where it may go, and the source lines that it is of."""

    name: str
    predicated: bool
    to: str | None
    lines: frozenset[tuple[str, int]]


@dataclass
class Kernel:
    """A kernel's instructions in order, and where labels are."""

    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    def count(self, first: int, last: int) -> Counter:
        """How many there are of each name from `first` to `last`."""
        return Counter(i.name.split(".")[0] for i in self.code[first : last + 1])

    def loops(self) -> list[tuple[int, int]]:
        """First and last instruction of each: jumps back, and what lies between. Smallest first."""
        found = []
        for at, i in enumerate(self.code):
            if i.name != "BRA" or i.to is None or self.labels[i.to] >= at:
                continue
            # What lies behind the kernel's end and jumps back is no loop, but what a warp does that has come apart.
            loop = (self.labels[i.to], at)
            if not any(j.name == "EXIT" and not j.predicated for j in self.code[loop[0] : at]):
                found.append(loop)
        return sorted(found, key=lambda loop: loop[1] - loop[0])


def marks(folder: Path) -> dict[str, dict[tuple[str, int], str]]:
    """The marked lines of the sources, by the kind of mark: file and line, and the name."""
    found: dict[str, dict[tuple[str, int], str]] = {"hot": {}, "each": {}, "cold": {}}
    for path in sorted([*folder.glob("*.cu"), *folder.glob("*.cuh")]):
        lines = path.read_text().splitlines()
        for last, line in enumerate(lines):
            for kind, name in MARK.findall(line):
                # A statement of several lines is marked at its end.
                first = last
                while first > 0 and re.search(
                    r"[^;{})\s]\s*$", lines[first - 1].split("//")[0].replace("else", "")
                ):
                    first -= 1
                for number in range(first, last + 1):
                    found[kind][path.name, number + 1] = name
    return found


def kernels(nvcc: Path, cubin: Path) -> dict[str, Kernel]:
    """Disassemble what was compiled with `-lineinfo`; kernels by name."""
    text = subprocess.run(
        [nvcc / "nvdisasm", "-gi", "-c", cubin], check=True, capture_output=True, text=True
    ).stdout
    return parsed(text)


def parsed(text: str) -> dict[str, Kernel]:
    """Kernels of nvdisasm's output."""
    found: dict[str, Kernel] = {}
    kernel, lines, fresh = None, set(), False
    for line in text.splitlines():
        if m := re.match(r"\.text\.(\w+):", line):
            kernel = found.setdefault(m[1], Kernel())
            lines, fresh = set(), False
        elif line.startswith("\t.section"):
            kernel = None
        elif kernel is None:
            continue
        elif m := LINE.search(line):
            if not fresh:
                lines, fresh = set(), True
            lines.add((Path(m[1]).name, int(m[2])))
            if m[3]:
                lines.add((Path(m[3]).name, int(m[4])))
        elif m := re.match(r"(\.L_x_\d+):", line):
            kernel.labels[m[1]] = len(kernel.code)
        elif m := INSTRUCTION.search(line):
            fresh = False
            jump = TARGET.search(m[3]) if m[2].startswith(("BRA", "CALL.REL")) else None
            kernel.code.append(Instruction(m[2], bool(m[1]), jump and jump[1], frozenset(lines)))
    return found


@dataclass
class Loop:
    """A loop that is marked: its name, where it lies, and what is in it but for marked loops within."""

    name: str
    first: int
    last: int
    ops: Counter
    files: set[str]


def marked_loops(kernel: Kernel, hot: dict[tuple[str, int], str]) -> list[Loop]:
    """The marked loops, one for each copy that the compiler made."""
    every = kernel.loops()
    named: dict[tuple[int, int], list[str]] = {}
    for at, i in enumerate(kernel.code):
        for line in i.lines & hot.keys():
            loop = next((loop for loop in every if loop[0] <= at <= loop[1]), None)
            if loop is not None:
                named.setdefault(loop, []).append(hot[line])
    # Neither what was moved out of a loop, nor what is left of an unrolled one, gives its name to what is round it.
    found: dict[tuple[int, int], str] = {}
    for (first, last), names in named.items():
        within = {
            name
            for other, its in named.items()
            if other != (first, last) and first <= other[0] and other[1] <= last
            for name in its
        }
        own = next((name for name in names if name not in within), None)
        if own is not None:
            found[first, last] = own
    return [
        Loop(
            name,
            first,
            last,
            kernel.count(first, last),
            {file for i in kernel.code[first : last + 1] for file, _ in i.lines},
        )
        for (first, last), name in sorted(found.items())
    ]


def blocks(kernel: Kernel) -> list[tuple[int, int]]:
    """First and last instruction of each run that is entered at its beginning and left at its end only."""
    starts = {0, *kernel.labels.values()}
    starts |= {
        at + 1 for at, i in enumerate(kernel.code) if i.name.startswith(("BRA", "EXIT", "RET", "CALL"))
    }
    ordered = sorted(at for at in starts if at < len(kernel.code))
    return [(at, end - 1) for at, end in zip(ordered, [*ordered[1:], len(kernel.code)], strict=True)]


def next_of(kernel: Kernel, last: int) -> list[int]:
    """Where a warp may go on after instruction `last`, the end of a block."""
    end = kernel.code[last]
    jumps = end.to is not None
    always = end.name.startswith(("BRA", "EXIT", "RET")) and not end.predicated
    # Conditions may stand behind the name, too; and warps do not come apart here.
    if end.name == "BRA.DIV":
        return [last + 1]
    if "U" in end.name.split(".")[1:]:
        always = False
    return ([] if always else [last + 1]) + ([kernel.labels[end.to]] if jumps else [])


def warp_cost(kernel: Kernel, weight: list[float], cold: set[tuple[str, int]]) -> float:
    """The longest way from the entry to an exit, each instruction `weight` times; whoever jumps back leaves that loop next."""
    reached = {0: 0.0}
    longest = 0.0
    every = blocks(kernel)
    for first, last in every:
        here = reached.get(first)
        # What only brings a warp together is of the line that came before it.
        code = [
            i
            for i in kernel.code[first : last + 1]
            if not i.name.startswith(("BSYNC", "BSSY", "WARPSYNC", "NOP"))
        ]
        is_cold = 2 * sum(bool(i.lines & cold) for i in code) > len(code)
        if here is None:
            continue
        here += 0 if is_cold else sum(weight[first : last + 1])
        if kernel.code[last].name == "EXIT":
            longest = max(longest, here)
        for to in next_of(kernel, last):
            inside = [block for block in every if to <= block[0] <= last] if to <= last else []
            exits = [out for block in inside for out in next_of(kernel, block[1]) if out > last]
            for out in exits or [to]:
                reached[out] = max(reached.get(out, 0.0), here)
    return longest
