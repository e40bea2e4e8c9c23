"""A folder of checkpoints packed by Ray, a task for each: on the machines of a cluster, or on this one.

    pip install ray
    python examples/ray_pack.py BASE CHECKPOINTS PACKAGES [--address auto] [--workers 2] [--jobs 1]

BASE is a .safetensors file or a folder of them, CHECKPOINTS a folder that holds checkpoints (folders and .safetensors files);
both, and PACKAGES, lie where every machine finds them, such as on NFS. Each task packs one checkpoint and restores it from
the package, compares every tensor and the sha256 of every file with the checkpoint's, and hands back the package's own
sha256; the driver reads the package again and compares that, too, so that what one machine wrote is what another one reads.

A package appears whole or not at all. So a worker may be killed at any time (out of memory, a spot instance that is taken
away): Ray gives its task to another one, which makes the same bytes, and nothing half-made stays. A run that is started
again checks what is there and makes the rest. Where one machine does all of it, `xorz pack BASE CHECKPOINT... -o PACKAGES`
needs no Ray, and reads the base once.
"""

import argparse
import hashlib
import os
import sys
import time
from pathlib import Path
from typing import Any

import ray
import xorz
from ray.exceptions import RayError


def sha256(path: Path) -> str:
    """The sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verified(base: Path, package: Path, checkpoint: Path, jobs: int) -> bool:
    """Whether a package is there and gives exactly this checkpoint; one of another checkpoint or base does not."""
    if not package.exists():
        return False
    try:
        xorz.verify(base, package, checkpoint, jobs=jobs)
    except (ValueError, OSError):
        return False
    return True


# Workers that die are no fault of the task's. An error of xorz's is, and comes at once: it would be the same again.
@ray.remote(max_retries=10)
def pack_one(base: str, checkpoint: str, package: str, jobs: int) -> dict[str, Any]:
    """Make one package, unless it is there, and restore from it what it was made of."""
    old, new, out = Path(base), Path(checkpoint), Path(package)
    start = time.perf_counter()
    print(f"{new.name}: process {os.getpid()} on {ray.util.get_node_ip_address()}", flush=True)
    made = not verified(old, out, new, jobs)
    if made:
        xorz.pack(old, new, out, jobs=jobs)
        xorz.verify(old, out, new, jobs=jobs)
    return {"made": made, "sha256": sha256(out), "seconds": time.perf_counter() - start}


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder: .safetensors files, and folders that hold some."""
    found = [
        p
        for p in folder.iterdir()
        if p.suffix == ".safetensors" or (p.is_dir() and any(p.rglob("*.safetensors")))
    ]
    return sorted(found)


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", type=Path)
    parser.add_argument("checkpoints", type=Path)
    parser.add_argument("packages", type=Path)
    parser.add_argument("--address", help="a cluster that runs, such as auto [start one here]")
    parser.add_argument("--workers", type=int, default=2, help="of the cluster that is started here [2]")
    parser.add_argument(
        "--jobs", type=int, default=1, help="threads of a task, as many CPUs are asked for [1]"
    )
    return parser.parse_args()


def main() -> int:
    """Pack them all; the exit code is 1 if some could not be packed."""
    args = arguments()
    todo = checkpoints(args.checkpoints)
    args.packages.mkdir(parents=True, exist_ok=True)
    if args.address:
        ray.init(address=args.address, log_to_driver=True)
    else:
        ray.init(num_cpus=args.workers * args.jobs, include_dashboard=False, log_to_driver=True)
    try:
        tasks = {}
        for checkpoint in todo:
            package = args.packages / f"{checkpoint.name.removesuffix('.safetensors')}.xorz"
            places = [str(p.resolve()) for p in (args.base, checkpoint, package)]
            # By what a task takes, Ray gives each machine as many as it has room for.
            tasks[pack_one.options(num_cpus=args.jobs).remote(*places, args.jobs)] = (checkpoint, package)
        return collect(tasks)
    finally:
        ray.shutdown()


def collect(tasks: dict[Any, tuple[Path, Path]]) -> int:
    """What the tasks give, as they end."""
    waiting, failed = list(tasks), 0
    while waiting:
        [ready], waiting = ray.wait(waiting)
        checkpoint, package = tasks[ready]
        try:
            found = ray.get(ready)
            if sha256(package) != found["sha256"]:
                raise OSError(f"{package}: is not what the worker wrote")
        except (RayError, ValueError, OSError) as error:
            failed += 1
            print(f"{checkpoint}: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
            continue
        share = 100 * package.stat().st_size / size(checkpoint)
        verb = "packed" if found["made"] else "was there"
        print(
            f"{checkpoint.name}: {verb}, {share:.2f} %, {found['seconds']:.1f} s, sha256 {found['sha256']}",
            flush=True,
        )
    print(f"{len(tasks) - failed} of {len(tasks)} packed and verified")
    return min(failed, 1)


def size(checkpoint: Path) -> int:
    """Bytes of a checkpoint's files."""
    files = [checkpoint] if checkpoint.is_file() else [p for p in checkpoint.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files)


if __name__ == "__main__":
    sys.exit(main())
