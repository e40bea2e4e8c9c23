"""`python -m xorz.gpu_check`: does this GPU compute what the CPU does, and how fast? For the first day on a new device.

    python -m xorz.gpu_check [--device cuda:0] [--quick] [--json FILE] [--no-timings] [--no-memcheck] [--no-graphs]
                             [--minutes 8] [--vllm [--folder FOLDER]]

Runs every op that takes CUDA tensors on data that it makes, beside the CPU by the promises of the README (weights bit for bit,
exact sums bit for bit, a bound elsewhere) and beside torch; a whole model with tenants, alone, mixed, swapped, generating, in a
CUDA graph; all ops again under compute-sanitizer, where there is one. Then times `delta_linear`, `delta_linear_grouped` and
`delta_restore` beside `torch.nn.functional.linear` (cuBLAS) of one plain matrix, with shares of what a copy reaches here.
Prints tables, and the same as JSON.

Exits with 0 where all is as promised, 1 where anything differs, 2 where nothing can be told: there is no such device, or this
xorz has no kernels for it.

`--vllm`, in the Python that has vLLM, tries its engines instead: many tenants in one, beside each tenant's whole model in vLLM
without xorz and beside float64; eager, in graphs, in each of its model runners, on two GPUs; `serving` says how. `--folder` is
where models, packages and what engines said stay; without it they go.

`--device cpu` runs the same comparisons on the CPU's own kernels: it shows that this program works, nothing of a GPU.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from .. import __version__, delta_restore
from .data import fine_tune, random_words
from .models import (
    check_applied,
    check_generate,
    check_graph_rows,
    check_model,
    check_model_graph,
    check_spread,
)
from .ops import (
    check_embedding,
    check_exact,
    check_exact_grouped,
    check_gradients,
    check_graph,
    check_grouped,
    check_linear,
    check_reports,
    check_restores,
    check_round_trip,
)
from .report import Report
from .serving import cannot_serve, check_vllm
from .timings import time_all

SANITIZER = "compute-sanitizer"
MEMCHECK_SECONDS = 150


def check_memory(report: Report, device: torch.device) -> None:
    """The quick checks again, under the memory checker of CUDA's toolkit."""
    tool = shutil.which(SANITIZER)
    if tool is None:
        report.leave_out(f"the memory checker: {SANITIZER} (of CUDA's toolkit) is not on PATH")
        return
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "xorz.gpu_check"]
    command += ["--device", str(device), "--quick", "--no-timings", "--no-memcheck", "--no-graphs"]
    # torch's allocator hands out parts of large pieces, in which the checker would see no end; without it nothing is captured.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=MEMCHECK_SECONDS
        )
    except subprocess.TimeoutExpired:
        report.leave_out(f"the memory checker: not done in {MEMCHECK_SECONDS} s")
        return
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    wrong = None if done.returncode == 0 else f"exit code {done.returncode}: {' | '.join(said[-6:])}"
    report.check(f"{SANITIZER} finds no access out of bounds", wrong)


def begin(device: torch.device) -> Report:
    """Say what this is, and where."""
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else "CPU"
    report = Report(name)
    print(f"xorz {__version__}, torch {torch.__version__}, {name}")
    if on_gpu:
        found = torch.cuda.get_device_properties(device)
        report.facts |= {
            "capability": list(torch.cuda.get_device_capability(device)),
            "multiprocessors": found.multi_processor_count,
            "memory": found.total_memory,
            "cuda_of_torch": torch.version.cuda,
        }
    return report


def run(report: Report, device: torch.device, args: argparse.Namespace) -> None:
    """Every check, then the timings."""
    quick = args.quick
    on_gpu = device.type == "cuda"
    small = [(1, 1), (33, 300), (17, 4099)]
    shapes = small if quick else [*small, (300, 5000), (4096, 4096)]
    one = ((67, 300), [1, 4, 17, 40]) if quick else ((1000, 1100), [1, 3, 4, 16, 17, 64, 200, 515])
    report.attempt("restore and apply", check_restores, device, shapes)
    report.attempt(
        "encode, slice, concat and check", check_round_trip, device, (67, 300) if quick else (600, 1100)
    )
    report.attempt("delta_linear", check_linear, device, *one)
    report.attempt("delta_linear, exact", check_exact, device, *one)
    report.attempt("delta_linear_grouped, exact", check_exact_grouped, device, *one)
    report.attempt("gradients", check_gradients, device, (67, 300), [1, 40] if quick else [1, 40, 150])
    report.attempt(
        "delta_linear_grouped",
        check_grouped,
        device,
        (67, 300),
        [1, 7, 40] if quick else [1, 4, 7, 16, 40, 150],
    )
    shapes, rows = (small, [1, 40]) if quick else ([*small, (1000, 4500)], [1, 40, 700])
    report.attempt("delta_embedding", check_embedding, device, shapes, rows)
    report.attempt("attach", check_model, device, 64 if quick else 512)
    report.attempt("apply_", check_applied, device, 64 if quick else 512)
    report.attempt("generate", check_generate, device)
    if on_gpu:
        report.attempt("reports", check_reports, device)
        if not args.no_graphs:
            report.attempt("graphs", check_graph, device)
            report.attempt("a graph of a model", check_model_graph, device, 256)
            report.attempt("a graph whose tenants change", check_graph_rows, device, 256)
        if torch.cuda.device_count() > 1:
            other = torch.device("cuda", ((device.index or 0) + 1) % torch.cuda.device_count())
            report.attempt("several devices", check_spread, (device, other), 256)
        if not args.no_memcheck:
            report.attempt("memory", check_memory, device)
    if not args.no_timings:
        shapes = [(256, 512)] if quick else [(4096, 4096), (11008, 4096), (4096, 11008)]
        rows, rounds = ([1, 8], 3) if quick else ([1, 8, 16, 64, 512], 30)
        report.attempt("timings", time_all, device, shapes, rows, 8, rounds, 60 * args.minutes, quick)


def cannot_run(device: torch.device) -> str | None:
    """Why nothing can be told here."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device; --device cpu shows what this program does"
    base = random_words((16, 64), torch.bfloat16, 1)
    _, delta = fine_tune(base, "sparse")
    try:
        delta_restore(base.to(device), delta.to(device))
    except RuntimeError as error:
        return str(error)
    return None


def main(arguments: list[str]) -> int:
    """Run it all; gives the exit code."""
    parser = argparse.ArgumentParser("python -m xorz.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--device", type=torch.device, default=torch.device("cuda"), help="cuda, cuda:1, or cpu"
    )
    parser.add_argument("--quick", action="store_true", help="small shapes: seconds")
    parser.add_argument("--json", type=Path, help="write what was found to this file")
    parser.add_argument("--no-timings", action="store_true")
    parser.add_argument("--no-memcheck", action="store_true")
    parser.add_argument("--no-graphs", action="store_true")
    parser.add_argument(
        "--minutes", type=float, default=8, help="no timing and no engine begins later than this"
    )
    parser.add_argument("--vllm", action="store_true", help="try vLLM's engines instead")
    parser.add_argument(
        "--folder", type=Path, help="of --vllm: keep models and what engines said in this new folder"
    )
    args = parser.parse_args(arguments)
    if args.folder is not None and args.folder.exists():
        parser.error(f"--folder: {args.folder} is there already")
    why = (cannot_serve() if args.vllm else None) or cannot_run(args.device)
    if why is not None:
        print(f"xorz: {why}", file=sys.stderr)
        return 2
    with torch.no_grad():
        report = begin(args.device)
        (check_vllm if args.vllm else run)(report, args.device, args)
    failed = sum(not c["passed"] for c in report.checks)
    left = f", {len(report.left_out)} left out" if report.left_out else ""
    print(f"\n{len(report.checks)} checks, {failed} failed{left}; {report.seconds():.0f} s")
    if args.json:
        args.json.write_text(report.json(xorz=__version__, torch=torch.__version__))
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
