"""Promise: every kernel compiles for every architecture without a spill or local memory, and costs what
`cuda/gate.txt` says.

`make cuda-gate`. Compiles cuda/*.cu for each architecture, spills and local memory being errors, and compares
registers, shared memory, blocks a multiprocessor and the memory instructions of each kernel with the
committed table, and what products cost to issue with cuda/PREDICTED.md (predicted.py); then runs the PTX in an
interpreter (ptx.py). No GPU is needed.

    gate.py [--write] [--only ARCH]...

The compiler is that of cuda/toolchain.py. `--write` replaces the table: say in the commit why it changed. The
table names the sources that it was made from by a digest of their code, so that `make test`, without a
compiler, refuses an old one.
"""

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "cuda"))
import toolchain  # noqa: E402

TABLE = ROOT / "cuda" / "gate.txt"
ARCHS = (80, 86, 89, 90, 100, 120)
THREADS = 256

# What one multiprocessor has: registers, warps, blocks, shared memory in bytes (CUDA's occupancy tables).
LIMITS = {
    80: (65536, 64, 32, 164 << 10),
    86: (65536, 48, 16, 100 << 10),
    89: (65536, 48, 24, 100 << 10),
    90: (65536, 64, 32, 228 << 10),
    100: (65536, 64, 32, 228 << 10),
    120: (65536, 48, 24, 100 << 10),
}

# Columns of the table: name, and what an instruction's name begins with.
COUNTED = {
    "ldg128": r"LDG\.E\.(\w+\.)*128",
    "ldg": r"LDG\.E",
    "stg128": r"STG\.E\.(\w+\.)*128",
    "stg": r"STG\.E",
    "lds": r"LDS",
    "sts": r"STS",
    "ldgsts": r"LDGSTS",
    "ldsm": r"LDSM",
    "hmma": r"HMMA",
    "ffma": r"FFMA",
    "shfl": r"SHFL",
    "vote": r"VOTE",
    "bar": r"BAR",
    "local": r"(LDL|STL)",
}
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)")


COMMENT = re.compile(r"//.*")
SOURCES = "# sources: "


def fail(text: str) -> None:
    raise SystemExit(f"cuda-gate: {text}")


def digest(folder: Path = ROOT / "cuda") -> str:
    """Of the kernels' code and their compiler's version; comments, blank lines and the ends of lines do not count."""
    sha = hashlib.sha256()
    for path in sorted([*folder.glob("*.cu"), *folder.glob("*.cuh"), folder / "requirements.txt"]):
        lines = (COMMENT.sub("", line).strip() for line in path.read_text().splitlines())
        sha.update("\n".join([path.name, *filter(None, lines), ""]).encode())
    return sha.hexdigest()[:32]


def noted(table: str) -> str | None:
    """The digest in a table."""
    found = [line.removeprefix(SOURCES) for line in table.splitlines() if line.startswith(SOURCES)]
    return found[0] if len(found) == 1 else None


def kept(table: str) -> list[str]:
    """The rows of a table."""
    return [line for line in table.splitlines() if not line.startswith("#")]


def blocks(arch: int, registers: int, shared: int) -> int:
    """How many blocks one multiprocessor holds."""
    have, warps, most, memory = LIMITS[arch]
    each = THREADS // 32
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = have // per_warp // 4 * 4 // each
    by_memory = memory // (-(-(shared + 1024) // 128) * 128)
    return min(most, warps // each, by_registers, by_memory)


def compiled(nvcc: Path, source: Path, arch: int, to: Path, *more: str) -> dict[str, tuple[int, int]]:
    """Compile one file for one architecture; registers and shared memory by kernel."""
    strict = "-v,-warn-spills,-warn-lmem-usage"
    command = [
        nvcc / "nvcc",
        "-std=c++17",
        "-O3",
        "-cubin",
        f"-arch=sm_{arch}",
        "-Werror",
        "all-warnings",
        *more,
    ]
    command += ["-Xptxas", strict, "-o", to, source]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        said = [
            line for line in done.stderr.splitlines() if "error" in line.lower() or "warning" in line.lower()
        ]
        fail(f"{source.name} for sm_{arch}: " + "\n  ".join(said[:8] or [done.stderr[-2000:]]))
    found, kernel = {}, None
    for line in done.stderr.splitlines():
        if m := re.search(r"Compiling entry function '(\w+)'", line):
            kernel = m[1]
        if m := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            found[kernel] = (int(m[1]), int(shared[1]) if shared else 0)
    return found


def instructions(nvcc: Path, cubin: Path) -> dict[str, Counter]:
    text = subprocess.run(
        [nvcc / "cuobjdump", "-sass", cubin], check=True, capture_output=True, text=True
    ).stdout
    counts, kernel = {}, None
    for line in text.splitlines():
        if m := re.search(r"Function : (\S+)", line):
            kernel = counts.setdefault(m[1], Counter())
        elif (m := INSTRUCTION.search(line)) and kernel is not None:
            # ptxas puts loads that are never executed round copies to shared memory.
            if "@!PT" not in line:
                kernel[m[1]] += 1
    return counts


def rows_of(nvcc: Path, source: Path, arch: int, work: Path) -> list[str]:
    cubin = work / f"{source.stem}_{arch}.cubin"
    used = compiled(nvcc, source, arch, cubin)
    counts, out = instructions(nvcc, cubin), []
    for kernel in sorted(used):
        registers, shared = used[kernel]
        each = [sum(n for name, n in counts[kernel].items() if re.match(p, name)) for p in COUNTED.values()]
        if each[-1]:
            fail(f"{kernel} for sm_{arch} uses local memory")
        held = blocks(arch, registers, shared)
        cells = [registers, shared, held, sum(counts[kernel].values()), *each[:-1]]
        out.append(f"{kernel:28} {arch:4} " + " ".join(f"{cell:7}" for cell in cells))
    print(f"cuda-gate: {source.name} for sm_{arch}", flush=True)
    return out


def rows(archs) -> list[str]:
    nvcc = toolchain.nvcc().parent
    jobs = [(source, arch) for source in sorted((ROOT / "cuda").glob("*.cu")) for arch in archs]
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(os.cpu_count()) as pool:
        return [row for rows in pool.map(lambda job: rows_of(nvcc, *job, Path(work)), jobs) for row in rows]


def main() -> None:
    # Which itself asks this module for registers and blocks.
    import predicted
    import ptx

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--only", type=int, action="append", choices=ARCHS)
    args = parser.parse_args()
    found = rows(args.only or ARCHS)
    names = ["regs", "shared", "blocks", "instr", *list(COUNTED)[:-1]]
    head = [
        "# Written by `make cuda-gate ARGS=--write` and compared by `make cuda-gate`: what ptxas makes of each kernel, at",
        "# 256 threads a block. blocks: of one multiprocessor, by registers and shared memory. Instructions are counted in",
        "# the code, not as executed. No spills and no local memory anywhere.",
        SOURCES + digest(),
        f"{'# kernel':28} {'sm':>4} " + " ".join(f"{name:>7}" for name in names),
    ]
    if args.write:
        if args.only:
            fail("--write takes all architectures")
        TABLE.write_text("\n".join([*head, *found]) + "\n")
        predicted.compare(write=True)
        return
    table = TABLE.read_text()
    before = [line for line in kept(table) if not args.only or int(line.split()[1]) in args.only]
    differ = sorted(set(before) ^ set(found))
    for line in differ:
        print(("- " if line in before else "+ ") + line)
    if differ or noted(table) != digest():
        what = "says otherwise" if differ else "says the same, but of other sources"
        fail(
            f"cuda/gate.txt {what}; if that is meant, write it anew (make cuda-gate ARGS=--write) and say why"
        )
    print(f"cuda-gate: {len(found)} rows as in cuda/gate.txt")
    if not args.only:
        predicted.compare(write=False)
        ptx.check()


if __name__ == "__main__":
    main()
