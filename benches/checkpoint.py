"""Packing a checkpoint beside the rivals, in one table: ``make bench-checkpoint``, or ``python benches/checkpoint.py``.

The checkpoint is synthetic (a small Llama in bf16, ``rivals.py`` says how it is made) at 1 %, 5 % and 60 % of its
words changed; real pairs of ``../shared/pairs`` (or ``XORZ_PAIRS``) are added with ``--pairs``. Rivals: the seed
notebook's XOR + zstd-10 of each tensor in Python; ZipNN in delta mode, file against file; ``zstd --patch-from``.
Every result is compared with the fine-tune, byte for byte. Jobs take turns, a round each; medians are shown, and how
many runs they are of: a job slower than ``--patience`` seconds runs once. Programs are measured whole, by the system's
accounting of the process; Python jobs from after their imports. Everyone syncs but zstd, which cannot.

`load` makes resident deltas of the package, the base being in memory (rss is the base).
GB/s are bytes of the fine-tune by the wall clock; GB/s/core are the same by CPU seconds. Peak memory: `rss` counts
mapped file pages, `anon` does not (both sampled every 5 ms).
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field

ROOT = pathlib.Path(__file__).resolve().parent.parent
RIVALS = ROOT / "benches" / "rivals.py"


@dataclass
class Run:
    """One measured process."""

    seconds: float
    cpu: float
    rss: int
    anon: int


@dataclass
class Job:
    """One way to do one verb: what to run, what it reads and leaves."""

    tool: str
    verb: str
    threads: int
    command: list[str]
    out: pathlib.Path | None
    want: pathlib.Path | None = None  # what `out` must equal
    environment: dict[str, str] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    size: int = 0
    inner: bool = False  # the process tells its own seconds


def watch_memory(pid: int, peak: dict[str, int], done: threading.Event) -> None:
    """Follow a process's memory. The system's own account of it after the end counts its parent's, too."""
    while not done.wait(0.005):
        try:
            status = pathlib.Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return
        for line in status.splitlines():
            key, _, value = line.partition(":")
            if key in peak:
                peak[key] = max(peak[key], int(value.split()[0]) * 1024)


def run(job: Job) -> Run:
    """Run a job once."""
    read, write = os.pipe()
    peak, done = {"VmHWM": 0, "RssAnon": 0}, threading.Event()
    start = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            job.command,
            stdout=write,
            stderr=errors,
            env=os.environ | job.environment,
            stdin=subprocess.DEVNULL,
        )
        os.close(write)
        watcher = threading.Thread(target=watch_memory, args=(process.pid, peak, done))
        watcher.start()
        with os.fdopen(read) as pipe:
            text = pipe.read()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        done.set()
        watcher.join()
        if process.returncode:
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip()
            raise SystemExit(f"{' '.join(job.command)}\nexit {process.returncode}: {said}")
    cpu = usage.ru_utime + usage.ru_stime
    if job.inner:
        told = json.loads(text.strip().splitlines()[-1])
        seconds, cpu = told["seconds"], told["cpu"]
    return Run(seconds, cpu, peak["VmHWM"], peak["RssAnon"])


def same(a: pathlib.Path, b: pathlib.Path) -> bool:
    """Whether two files hold the same bytes."""
    if a.stat().st_size != b.stat().st_size:
        return False
    with open(a, "rb") as x, open(b, "rb") as y:
        while chunk := x.read(1 << 24):
            if chunk != y.read(1 << 24):
                return False
    return True


def one_file(path: pathlib.Path) -> pathlib.Path | None:
    """The only safetensors file of a checkpoint, for rivals that know files only."""
    if path.is_file():
        return path
    found = list(path.glob("*.safetensors"))
    return found[0] if len(found) == 1 else None


def xorz_jobs(
    tool: str, loader: str | None, base: pathlib.Path, tuned: pathlib.Path, work: pathlib.Path
) -> list[Job]:
    """Pack, unpack with and without sha256, load; cold, and with the base's digests cached from an earlier run."""
    package, out = work / "xorz.xorz", work / "xorz.out"
    jobs = []
    cold = {"XORZ_CACHE_DIR": ""}
    warm = {"XORZ_CACHE_DIR": str(work / "cache")}
    for threads in (1, 2):
        pack = [tool, "pack", str(base), str(tuned), "-o", str(package), "--jobs", str(threads)]
        jobs.append(Job("xorz", "pack", threads, pack, package, environment=cold))
        jobs.append(Job("xorz, base digests cached", "pack", threads, pack, package, environment=warm))
        unpack = [tool, "unpack", str(base), str(package), "-o", str(out), "--jobs", str(threads)]
        jobs.append(Job("xorz", "unpack", threads, unpack, out, tuned, cold))
        fast = [*unpack, "--no-sha256"]
        jobs.append(Job("xorz --no-sha256", "unpack", threads, fast, out, tuned, cold))
        jobs.append(Job("xorz --no-sha256, cached", "unpack", threads, fast, out, tuned, warm))
    if loader is not None and base.is_file():
        load = [loader, str(base), str(package)]
        jobs.append(Job("xorz to resident deltas", "load", 1, load, None, inner=True))
        jobs.append(Job("xorz, and base digested", "load", 1, [*load, "digest"], None, inner=True))
    return jobs


def rival_jobs(base: pathlib.Path, tuned: pathlib.Path, work: pathlib.Path, wanted: set[str]) -> list[Job]:
    """The rivals; they know single files only."""
    jobs = []

    def python(
        name: str, title: str, verb: str, threads: int, given: pathlib.Path, out: pathlib.Path
    ) -> None:
        command = [
            sys.executable,
            str(RIVALS),
            f"{name}-{verb}",
            str(base),
            str(given),
            str(out),
            str(threads),
        ]
        want = tuned if verb == "unpack" else None
        jobs.append(Job(title, verb, threads, command, out, want, inner=True))

    for name, title, counts in (
        ("notebook", "notebook (XOR, zstd-10)", {"pack": (1, 2), "unpack": (1,)}),
        ("zipnn", "ZipNN 0.5.4 delta", {"pack": (1, 2), "unpack": (1, 2)}),
    ):
        if name in wanted:
            package, out = work / f"{name}.packed", work / f"{name}.out"
            for threads in counts["pack"]:
                python(name, title, "pack", threads, tuned, package)
            for threads in counts["unpack"]:
                python(name, title, "unpack", threads, package, out)
    zstd = shutil.which("zstd")
    if "zstd" in wanted and zstd is not None:
        package, out = work / "zstd.packed", work / "zstd.out"
        # A base longer than 128 MiB lies outside the default window.
        long = f"--long={max(27, (max(base.stat().st_size, tuned.stat().st_size) - 1).bit_length())}"
        patch = [zstd, "-q", "-f", f"--patch-from={base}"]
        for threads in (1, 2):
            command = [*patch, "-3", long, f"-T{threads}", str(tuned), "-o", str(package)]
            jobs.append(Job("zstd -3 --patch-from", "pack", threads, command, package))
        command = [*patch, "-d", long, str(package), "-o", str(out)]
        jobs.append(Job("zstd -3 --patch-from", "unpack", 1, command, out, tuned))
    return jobs


def compare(job: Job) -> None:
    """An inexact result is no result."""
    if job.out is None or job.want is None:
        return
    pairs = [(job.out, job.want)]
    if job.want.is_dir():
        pairs = [(job.out / p.relative_to(job.want), p) for p in job.want.rglob("*") if p.is_file()]
    for got, want in pairs:
        if not same(got, want):
            raise SystemExit(f"{job.tool} {job.verb}: {got} is not {want}: it is not exact")


def clear(path: pathlib.Path) -> None:
    """Remove an output, file or folder."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def measure(jobs: list[Job], rounds: int, patience: float) -> None:
    """Every job in turn, `rounds` times; each output is compared with what it must be, once."""
    for turn in range(rounds):
        for job in jobs:
            if turn and job.runs[0].seconds > patience:
                continue
            if job.out is not None:
                clear(job.out)
            job.runs.append(run(job))
            if job.out is not None and job.want is None:
                job.size = job.out.stat().st_size
            if turn == 0:
                compare(job)
            if job.want is not None and job.out is not None:
                clear(job.out)


def rows(case: str, jobs: list[Job], tuned_bytes: int, words: int) -> list[dict[str, object]]:
    """What is printed, as data."""
    out = []
    for job in jobs:
        seconds = statistics.median(r.seconds for r in job.runs)
        cpu = statistics.median(r.cpu for r in job.runs)
        row: dict[str, object] = {
            "case": case,
            "verb": job.verb,
            "tool": job.tool,
            "threads": job.threads,
            "runs": len(job.runs),
            "seconds": seconds,
            "cpu_seconds": cpu,
            "gb_per_s": tuned_bytes / seconds / 1e9,
            "gb_per_s_core": tuned_bytes / cpu / 1e9,
            "rss_mib": max(r.rss for r in job.runs) / 2**20,
            "anon_mib": max(r.anon for r in job.runs) / 2**20,
        }
        if job.size:
            row |= {"bytes": job.size, "bits_per_word": 8 * job.size / words}
        out.append(row)
    return sorted(out, key=lambda r: ("pack", "unpack", "load").index(str(r["verb"])))


HEAD = (
    f"{'verb':<7}{'tool':<27}{'threads':>7}{'runs':>5}{'s':>9}{'CPU s':>8}{'GB/s':>8}{'GB/s/core':>10}"
    f"{'rss MiB':>9}{'anon':>7}{'MB':>9}{'bits/word':>10}"
)


def line(r: dict[str, object]) -> str:
    """One row as text."""
    size = f"{r['bytes'] / 1e6:>9.2f}{r['bits_per_word']:>10.3f}" if "bytes" in r else ""
    return (
        f"{r['verb']:<7}{r['tool']:<27}{r['threads']:>7}{r['runs']:>5}{r['seconds']:>9.3f}{r['cpu_seconds']:>8.2f}"
        f"{r['gb_per_s']:>8.2f}{r['gb_per_s_core']:>10.2f}{r['rss_mib']:>9.0f}{r['anon_mib']:>7.0f}{size}"
    )


def headers(path: pathlib.Path) -> list[dict[str, dict[str, object]]]:
    """The safetensors headers of a checkpoint."""
    out = []
    for file in [path] if path.is_file() else sorted(path.glob("*.safetensors")):
        with open(file, "rb") as f:
            out.append(json.loads(f.read(int.from_bytes(f.read(8), "little"))))
    return out


def count_words(path: pathlib.Path) -> int:
    """Elements of a checkpoint."""
    total = 0
    for header in headers(path):
        for name, info in header.items():
            count = 1
            for d in info.get("shape", []):  # type: ignore[attr-defined]
                count *= d
            total += count if name != "__metadata__" else 0
    return total


def changed_share(base: pathlib.Path, tuned: pathlib.Path) -> float:
    """The share of words that differ, counted, not hoped for."""
    import torch
    from safetensors import safe_open

    changed = total = 0
    files = [(base, tuned)] if tuned.is_file() else [(base / p.name, p) for p in tuned.glob("*.safetensors")]
    for b, t in files:
        with safe_open(b, "pt") as x, safe_open(t, "pt") as y:
            for name in y.keys():
                u, v = x.get_tensor(name), y.get_tensor(name)
                words = {2: torch.int16, 4: torch.int32}.get(u.element_size(), torch.uint8)
                changed += int((u.view(words) != v.view(words)).sum())
                total += u.numel()
    return changed / total


def filesystem(path: pathlib.Path) -> str:
    """The type of the filesystem that holds a path."""
    best, kind = "", "unknown"
    for mount in pathlib.Path("/proc/mounts").read_text().splitlines():
        _, point, this, *_ = mount.split()
        if path.resolve().is_relative_to(point) and len(point) >= len(best):
            best, kind = point, this
    return kind


def build(given: str | None) -> tuple[str, str | None]:
    """The release binary and the loader's executable, built if need be."""
    if given is not None:
        return given, None
    subprocess.run(
        ["cargo", "build", "--release", "--locked", "--quiet", "--bin", "xorz"], cwd=ROOT, check=True
    )
    made = subprocess.run(
        ["cargo", "bench", "--locked", "--bench", "checkpoint_load", "--no-run", "--message-format=json", "--quiet"],
        cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    found = [
        json.loads(text).get("executable") for text in made.stdout.splitlines() if '"checkpoint_load"' in text
    ]
    return str(ROOT / "target/release/xorz"), next((f for f in found if f), None)


def cases(args: argparse.Namespace, work: pathlib.Path) -> list[tuple[str, pathlib.Path, pathlib.Path]]:
    """Name, base and fine-tune of each table."""
    out = []
    if args.gb > 0:
        import rivals

        print(
            f"making {args.gb:g} GB in {args.shards} file(s), {len(args.changed)} fine-tunes", file=sys.stderr
        )
        tuned = {work / f"ft-{share:g}": share / 100 for share in args.changed}
        rivals.make(work / "base", tuned, args.gb, args.shards)
        for path in tuned:
            base, ft = (
                (one_file(work / "base"), one_file(path)) if args.shards == 1 else (work / "base", path)
            )
            assert base is not None and ft is not None
            out.append((f"synthetic Llama, bf16, {args.shards} file(s)", base, ft))
    if args.pairs:
        folder = pathlib.Path(os.environ.get("XORZ_PAIRS", ROOT.parent / "shared" / "pairs"))
        for path in sorted(folder.glob("*.ft*.safetensors")):
            out.append((path.name, folder / f"{path.name.split('.ft')[0]}.base.safetensors", path))
        if not folder.is_dir():
            print(f"no pairs: {folder} is not there", file=sys.stderr)
    return out


def main() -> None:
    """Run the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--gb", type=float, default=1.0, help="GB of the synthetic checkpoint; 0 leaves it out [1]"
    )
    parser.add_argument("--changed", type=float, nargs="+", default=[1, 5, 60], help="per cent [1 5 60]")
    parser.add_argument("--shards", type=int, default=1, help="files of it; rivals run on one file only [1]")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each job [3]")
    parser.add_argument(
        "--patience", type=float, default=30, help="a job slower than so many seconds runs once [30]"
    )
    parser.add_argument(
        "--rivals", nargs="*", default=["notebook", "zipnn", "zstd"], help="which; none if empty"
    )
    parser.add_argument("--pairs", action="store_true", help="the real pairs, too")
    parser.add_argument("--dir", type=pathlib.Path, help="where the files go [a temporary folder]")
    parser.add_argument("--xorz", help="another binary than target/release/xorz, which is built if need be")
    parser.add_argument("--json", type=pathlib.Path, help="write the rows here, too")
    args = parser.parse_args()
    tool, loader = build(args.xorz)
    with tempfile.TemporaryDirectory(dir=args.dir, prefix="xorz-bench-") as folder:
        work = pathlib.Path(folder)
        version = subprocess.run(
            [tool, "--version"], capture_output=True, text=True, check=True
        ).stdout.strip()
        where = filesystem(work)
        print(
            f"{version}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, files on {where}", flush=True
        )
        data = []
        for name, base, tuned in cases(args, work):
            tuned_bytes = sum(f.stat().st_size for f in ([tuned] if tuned.is_file() else tuned.iterdir()))
            share = changed_share(base, tuned)
            print(f"\n{name}, {tuned_bytes / 1e6:.1f} MB, {100 * share:.2f} % of the words changed\n{HEAD}")
            jobs = xorz_jobs(tool, loader, base, tuned, work)
            if base.is_file():
                jobs += rival_jobs(base, tuned, work, set(args.rivals))
            measure(jobs, args.rounds, args.patience)
            found = rows(name, jobs, tuned_bytes, count_words(tuned))
            print("\n".join(map(line, found)), flush=True)
            data += [r | {"changed": share, "model_bytes": tuned_bytes, "filesystem": where} for r in found]
            for job in jobs:
                if job.out is not None:
                    clear(job.out)
    if args.json:
        args.json.write_text(json.dumps(data, indent=2) + "\n")


if __name__ == "__main__":
    main()
