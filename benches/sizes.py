"""A fine-tune stored by everybody's scheme: sizes and times, in one run: ``make bench-sizes``, or ``python benches/sizes.py``.

The real pairs of ``../shared/pairs`` (or ``XORZ_PAIRS``), those in float32 as bf16, too, and a synthetic Llama of ``--gb``
GB at 1 %, 5 % and 60 % of its words changed (``rivals.py`` says how it is made). Schemes: xorz and ``xorz pack --fast``; the
notebook's zstd-10 of the XOR; those of ``schemes.py``; ZipNN in delta mode; ``zstd --patch-from``; and the fine-tune alone,
by zstd and by ZipNN. Each has one thread, and the level that its users use. Each result is decoded and compared with the
fine-tune: byte for byte, but for the notebook, which keeps tensors and no file.

Jobs take turns, a round each; times are medians; a job slower than ``--patience`` seconds runs once. Programs are timed
whole, Python from after its imports; all read their files, write their result and sync it, but zstd, which cannot sync.
``--write docs/results.md`` puts the tables between the two marks there.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field

import checkpoint
from checkpoint import ROOT, Job

HERE = pathlib.Path(__file__).resolve().parent
MARKS = ("<!-- made by benches/sizes.py -->", "<!-- until here -->")


@dataclass
class Scheme:
    """A row of the tables: what it is called, and how it packs and unpacks."""

    name: str
    pack: list[str]
    unpack: list[str]
    inner: bool = False  # the process tells its own seconds
    keeps_file: bool = True
    jobs: dict[str, Job] = field(default_factory=dict)


@dataclass
class Case:
    """A column: a fine-tune and its base."""

    name: str
    base: pathlib.Path
    tuned: pathlib.Path
    real: bool
    words: int = 0
    changed: float = 0.0
    rows: dict[str, dict[str, float]] = field(default_factory=dict)


def schemes(tool: str, base: pathlib.Path, tuned: pathlib.Path) -> list[Scheme]:
    """All of them; PACKED and OUT stand for the files that they write."""
    b, t, one = str(base), str(tuned), ["--jobs", "1", "--quiet"]
    unpack = [tool, "unpack", b, "PACKED", "-o", "OUT", *one]

    def python(name: str, script: str, scheme: str, keeps_file: bool = True) -> Scheme:
        command = [sys.executable, str(HERE / script)]
        if script == "rivals.py":
            pack = [*command, f"{scheme}-pack", b, t, "PACKED", "1"]
            return Scheme(
                name, pack, [*command, f"{scheme}-unpack", b, "PACKED", "OUT", "1"], True, keeps_file
            )
        pack = [*command, scheme, "pack", b, t, "PACKED"]
        return Scheme(name, pack, [*command, scheme, "unpack", b, "PACKED", "OUT"], True)

    zstd = shutil.which("zstd") or "zstd"
    # A base longer than 128 MiB lies outside the default window.
    long = f"--long={max(27, (max(base.stat().st_size, tuned.stat().st_size) - 1).bit_length())}"
    patch = [zstd, "-q", "-f", f"--patch-from={b}", long, "-T1"]
    alone = [zstd, "-q", "-f", "-T1"]
    return [
        Scheme("xorz", [tool, "pack", b, t, "-o", "PACKED", *one], unpack),
        Scheme("xorz --fast", [tool, "pack", "--fast", b, t, "-o", "PACKED", *one], unpack),
        python("the notebook: zstd-10 of the XOR", "rivals.py", "notebook", keeps_file=False),
        python("byte planes, zstd-3 (BitX)", "schemes.py", "planes-3"),
        python("byte planes, zstd-1 (TensorDex)", "schemes.py", "planes-1"),
        python("XOR, zstd-1 (slime, SkyRL)", "schemes.py", "xor-1"),
        python("gaps and XOR, zstd-1 (NeMo-RL)", "schemes.py", "gaps-1"),
        python("int32 positions, values (vLLM, verl)", "schemes.py", "positions"),
        python("ZipNN 0.5.4, delta", "schemes.py", "zipnn-delta"),
        Scheme("zstd -3 --patch-from", [*patch, "-3", t, "-o", "PACKED"], [*patch, "-d", "PACKED", "-o", "OUT"]),
        Scheme("the fine-tune alone, zstd -3", [*alone, "-3", t, "-o", "PACKED"], [*alone, "-d", "PACKED", "-o", "OUT"]),
        python("the fine-tune alone, ZipNN 0.5.4", "schemes.py", "zipnn-alone"),
    ]  # fmt: skip


def prepare(scheme: Scheme, number: int, work: pathlib.Path, tuned: pathlib.Path) -> None:
    """The two jobs of a scheme."""
    packed, out = work / f"{number}.packed", work / f"{number}.out"
    for verb, command, made, want in (
        ("pack", scheme.pack, packed, None),
        ("unpack", scheme.unpack, out, tuned),
    ):
        filled = [str(packed) if w == "PACKED" else str(out) if w == "OUT" else w for w in command]
        cold = {"XORZ_CACHE_DIR": ""}
        scheme.jobs[verb] = Job(scheme.name, verb, 1, filled, made, want, cold, inner=scheme.inner)


def check(scheme: Scheme, tuned: pathlib.Path) -> None:
    """An inexact result is no result."""
    out = scheme.jobs["unpack"].out
    assert out is not None
    if scheme.keeps_file:
        equal = checkpoint.same(out, tuned)
    else:
        equal = same_tensors(out, tuned)
    if not equal:
        raise SystemExit(f"{scheme.name}: {out} is not {tuned}: it is not exact")


def same_tensors(a: pathlib.Path, b: pathlib.Path) -> bool:
    """Whether two files hold the same tensors, bit for bit."""
    from schemes import Checkpoint

    x, y = Checkpoint(str(a)), Checkpoint(str(b))
    kind = ("dtype", "shape")
    return x.infos.keys() == y.infos.keys() and all(
        all(x.infos[n][k] == info[k] for k in kind) and bool((x.bytes(n) == y.bytes(n)).all())
        for n, info in y.infos.items()
    )


def measure(case: Case, found: list[Scheme], rounds: int, patience: float) -> None:
    """Every scheme in turn, `rounds` times; what it decodes is compared once."""
    for turn in range(rounds):
        for scheme in found:
            for job in scheme.jobs.values():
                if turn and job.runs[0].seconds > patience:
                    continue
                assert job.out is not None
                # zstd --patch-from may not find the file that it is to write.
                checkpoint.clear(job.out)
                job.runs.append(checkpoint.run(job))
                if job.verb == "unpack":
                    if turn == 0:
                        check(scheme, case.tuned)
                    checkpoint.clear(job.out)
                else:
                    job.size = job.out.stat().st_size
    for scheme in found:
        seconds = {verb: statistics.median(r.seconds for r in job.runs) for verb, job in scheme.jobs.items()}
        size = scheme.jobs["pack"].size
        case.rows[scheme.name] = {"bytes": size, "bits": 8 * size / case.words, **seconds}
        for job in scheme.jobs.values():
            if job.out is not None:
                checkpoint.clear(job.out)


def as_bf16(path: pathlib.Path, out: pathlib.Path) -> None:
    """The same checkpoint in bf16."""
    import torch
    from safetensors.torch import load_file, save_file

    cast = {name: t.bfloat16() if t.dtype == torch.float32 else t for name, t in load_file(path).items()}
    save_file(cast, out, metadata={"format": "pt"})


def cases(args: argparse.Namespace, work: pathlib.Path) -> list[Case]:
    """The real pairs, then the synthetic checkpoint."""
    out = []
    folder = pathlib.Path(os.environ.get("XORZ_PAIRS", ROOT.parent / "shared" / "pairs"))
    if args.pairs:
        if not folder.is_dir():
            raise SystemExit(
                f"{folder} is not there: set XORZ_PAIRS, or leave the real pairs out (--no-pairs)"
            )
        for path in sorted(folder.glob("*.ft*.safetensors")):
            stem, _, recipe = path.name.removesuffix(".safetensors").partition(".ft")
            name = f"{stem.replace('_', ' ')} {recipe.strip('_').replace('_', ' ')}".strip()
            base = folder / f"{stem}.base.safetensors"
            out.append(Case(name, base, path, True))
            if stem.endswith("fp32"):
                cast = [work / f"{stem}.{side}.safetensors" for side in ("base", "ft")]
                for source, target in zip((base, path), cast, strict=True):
                    as_bf16(source, target)
                out.append(Case(f"{stem.replace('_', ' ').replace('fp32', 'as bf16')}", *cast, True))
    if args.gb > 0:
        import rivals

        print(f"making {args.gb:g} GB, {len(args.changed)} fine-tunes", file=sys.stderr)
        tuned = {work / f"ft-{share:g}": share / 100 for share in args.changed}
        rivals.make(work / "base", tuned, args.gb, 1)
        file = "model.safetensors"
        for path, share in zip(tuned, args.changed, strict=True):
            out.append(Case(f"synthetic, {share:g} %", work / "base" / file, path / file, False))
    for case in out:
        case.words = checkpoint.count_words(case.tuned)
        case.changed = checkpoint.changed_share(case.base, case.tuned)
    return out


def cell(value: float, best: bool) -> str:
    """Bits or GB/s with three digits, in bold if it is the best of its kind."""
    text = f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"
    return f"**{text}**" if best else text


def size_table(found: list[Case]) -> str:
    """Bits per word of whole packages, a row for each scheme."""
    names = list(found[0].rows)
    head = "".join(f" {case.name} ({100 * case.changed:.2g} %) |" for case in found)
    lines = [f"| bits a word |{head}", "|---" * (len(found) + 1) + "|"]
    best = [min(row["bits"] for row in case.rows.values()) for case in found]
    for name in names:
        bits = [case.rows[name]["bits"] for case in found]
        lines.append(
            f"| {name} | " + " | ".join(cell(b, b == low) for b, low in zip(bits, best, strict=True)) + " |"
        )
    return "\n".join(lines)


def time_table(found: list[Case]) -> str:
    """GB/s of model: the real pairs together, each synthetic fine-tune for itself."""
    groups = [("real pairs", [c for c in found if c.real]), *((c.name, [c]) for c in found if not c.real)]
    groups = [(name, group) for name, group in groups if group]
    head = "".join(f" {name}: encode | decode |" for name, _ in groups)
    lines = [f"| GB/s, one thread |{head}", "|---" * (2 * len(groups) + 1) + "|"]
    rates: dict[str, list[float]] = {}
    for _, group in groups:
        size = sum(case.tuned.stat().st_size for case in group)
        for name in found[0].rows:
            for verb in ("pack", "unpack"):
                rates.setdefault(name, []).append(size / 1e9 / sum(case.rows[name][verb] for case in group))
    best = [max(column) for column in zip(*rates.values(), strict=True)]
    for name, row in rates.items():
        lines.append(
            f"| {name} | " + " | ".join(cell(r, r == top) for r, top in zip(row, best, strict=True)) + " |"
        )
    return "\n".join(lines)


def losses(found: list[Case]) -> str:
    """In plain words, where xorz is not the smallest, and where others are quicker."""
    larger = []
    for case in found:
        ours = case.rows["xorz"]["bits"]
        smaller = [f"{n} ({r['bits']:.3g})" for n, r in case.rows.items() if r["bits"] < ours and n != "xorz"]
        if smaller:
            larger.append(f"{case.name}: {', '.join(smaller)} against {ours:.3g}")
    text = [
        f"smaller than xorz: {'; '.join(larger)}" if larger else "smaller than xorz: nobody, on none of these"
    ]
    for verb, what in (("pack", "encodes"), ("unpack", "decodes")):
        quicker: dict[str, int] = {}
        for case in found:
            for name, row in case.rows.items():
                quicker[name] = quicker.get(name, 0) + (row[verb] < case.rows["xorz"][verb])
        told = [f"{name} ({n} of {len(found)})" for name, n in quicker.items() if n]
        text.append(f"{what} quicker than xorz: {', '.join(told) if told else 'nobody'}")
    return "Where xorz loses, as counted: " + ". ".join(t[0].upper() + t[1:] for t in text) + "."


def processor() -> str:
    """What /proc/cpuinfo calls it."""
    text = pathlib.Path("/proc/cpuinfo").read_text()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def chosen(args: argparse.Namespace) -> list[str]:
    """The options that change what is measured, if they are not what they are anyway."""
    standing = parser().parse_args([])
    out = [] if args.pairs else ["--no-pairs"]
    for name in ("gb", "changed", "rounds", "patience"):
        value = getattr(args, name)
        if value != getattr(standing, name):
            values = value if isinstance(value, list) else [value]
            out += [f"--{name}", *(f"{v:g}" for v in values)]
    return out


def report(found: list[Case], args: argparse.Namespace, version: str, where: str) -> str:
    """All of it, as it stands in the documents."""
    command = " ".join(["python benches/sizes.py", *chosen(args)])
    synthetic = f"a synthetic Llama of {args.gb:g} GB in bf16, " if args.gb > 0 else ""
    top = (
        f"{version}, `{command}`: {processor()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f} at the end, files on "
        f"{where}; {synthetic}medians of {args.rounds} rounds (a job of more than {args.patience:g} s ran once). Whole files, "
        "headers included; every result was decoded and compared. The rivals' transforms are numpy's, their zstd is the "
        "library itself; BitX, TensorDex and the weight syncs have quicker transforms on many threads of large machines."
    )
    real, made = [c for c in found if c.real], [c for c in found if not c.real]
    parts = [top, *(size_table(group) for group in (real, made) if group), time_table(found), losses(found)]
    return "\n\n".join(parts)


def insert(path: pathlib.Path, text: str) -> None:
    """Put the tables between the marks of a document."""
    old = path.read_text()
    before, start, rest = old.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not start or not end:
        raise SystemExit(f"{path}: the marks {MARKS[0]} and {MARKS[1]} are not there")
    path.write_text(f"{before}{start}\n\n{text}\n\n{end}{after}")


def parser() -> argparse.ArgumentParser:
    """What may be asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gb", type=float, default=1.0, help="GB of the synthetic one; 0 leaves it out [1]")
    parser.add_argument("--changed", type=float, nargs="+", default=[1, 5, 60], help="per cent [1 5 60]")
    parser.add_argument("--no-pairs", dest="pairs", action="store_false", help="leave the real pairs out")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each job [3]")
    parser.add_argument(
        "--patience", type=float, default=30, help="a job slower than so many seconds runs once [30]"
    )
    parser.add_argument("--dir", type=pathlib.Path, help="where the files go [a temporary folder]")
    parser.add_argument("--xorz", help="another binary than target/release/xorz, which is built if need be")
    parser.add_argument("--json", type=pathlib.Path, help="write the numbers here, too")
    parser.add_argument(
        "--write", type=pathlib.Path, help="write the tables into this document, between its marks"
    )
    return parser


def main() -> None:
    """Run it."""
    args = parser().parse_args()
    tool = args.xorz or checkpoint.build(None)[0]
    version = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    with tempfile.TemporaryDirectory(dir=args.dir, prefix="xorz-sizes-") as folder:
        work = pathlib.Path(folder)
        found = cases(args, work)
        if not found:
            raise SystemExit("nothing to compare: --gb 0 and --no-pairs")
        for case in found:
            rows = schemes(tool, case.base, case.tuned)
            for number, scheme in enumerate(rows):
                prepare(scheme, number, work, case.tuned)
            measure(case, rows, args.rounds, args.patience)
            print(f"\n{case.name}, {100 * case.changed:.2f} % of {case.words} words changed")
            for name, row in case.rows.items():
                print(
                    f"  {name:<37}{row['bits']:>9.4f} bits{row['pack']:>9.3f} s{row['unpack']:>9.3f} s",
                    flush=True,
                )
        text = report(found, args, version, checkpoint.filesystem(work))
    print(f"\n{text}")
    if args.json:
        args.json.write_text(
            json.dumps({c.name: {"changed": c.changed, **c.rows} for c in found}, indent=2) + "\n"
        )
    if args.write:
        insert(args.write, text)


if __name__ == "__main__":
    main()
