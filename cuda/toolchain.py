"""nvcc from PyPI, fetched once into the user's cache: for builds that find none (nvcc.cmake) and `make cuda-gate`.

    toolchain.py        prints the path of nvcc; where none can be had, ends with a sentence that says why

The folder is $XORZ_CUDA_TOOLS, else xorz/cuda in the user's cache: an environment made from cuda/requirements.txt. 313 MB.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REQUIREMENTS = Path(__file__).with_name("requirements.txt")


def home() -> Path:
    """The folder of the environment."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("XORZ_CUDA_TOOLS") or Path(cache) / "xorz" / "cuda")


def nvcc() -> Path:
    """The path of nvcc, which lies beside ptxas, cuobjdump and nvdisasm; SystemExit where none can be had."""
    folder = home()
    if not is_whole(folder):
        with alone(folder):
            if not is_whole(folder):
                fetch(folder)
    found = sorted(folder.glob("lib/python3*/site-packages/nvidia/cu*/bin/nvcc"))
    if not found:
        raise SystemExit(f"xorz: nvcc could not be fetched: {folder} holds none")
    return found[0]


def is_whole(folder: Path) -> bool:
    """Whether the last fetch came to its end, and was of these requirements."""
    stamp = folder / "requirements.txt"
    return stamp.exists() and stamp.read_text() == REQUIREMENTS.read_text()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Two builds at a time must not fetch into one folder: one waits for the other."""
    try:
        import fcntl

        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
    except (ImportError, OSError) as error:
        raise SystemExit(f"xorz: nvcc could not be fetched: {error}") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def fetch(folder: Path) -> None:
    """Make the environment anew."""
    print(f"xorz: fetching nvcc into {folder}", file=sys.stderr, flush=True)
    # In a build that pip isolates, PYTHONPATH names pip's own copy of the requirements; and whoever has pip install
    # to a place of his own does not mean this environment. Where from, he does: that stays.
    elsewhere = ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_USER", "PIP_PYTHON")
    environment = {name: value for name, value in os.environ.items() if name not in elsewhere}
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries", "2"]
    for command in ([sys.executable, "-m", "venv", folder], [*pip, "-r", REQUIREMENTS]):
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            print(done.stdout, file=sys.stderr)
            said = [line for line in done.stdout.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
            errors = [line for line in said if line.startswith(("ERROR", "Error"))]
            raise SystemExit(f"xorz: nvcc could not be fetched: {(errors or said)[-1]}")
    (folder / "requirements.txt").write_text(REQUIREMENTS.read_text())


if __name__ == "__main__":
    print(nvcc())
