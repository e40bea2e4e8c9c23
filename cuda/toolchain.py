"""nvcc from PyPI, fetched once into the user's cache: for `make build CUDA=1` and `make cuda-gate`.

    toolchain.py        prints the path of nvcc

The folder is $XORZ_CUDA_TOOLS, else xorz/cuda in the user's cache: an environment made from cuda/requirements.txt. 313 MB.
"""

import os
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).with_name("requirements.txt")


def home() -> Path:
    """The folder of the environment."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("XORZ_CUDA_TOOLS") or Path(cache) / "xorz" / "cuda")


def nvcc() -> Path:
    """The path of nvcc, which lies beside ptxas, cuobjdump and nvdisasm."""
    folder = home()
    stamp = folder / "requirements.txt"
    if not stamp.exists() or stamp.read_text() != REQUIREMENTS.read_text():
        print(f"xorz: fetching nvcc into {folder}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "-r", REQUIREMENTS], check=True, stdout=sys.stderr)
        stamp.write_text(REQUIREMENTS.read_text())
    found = sorted(folder.glob("lib/python3*/site-packages/nvidia/cu*/bin/nvcc"))
    if not found:
        raise SystemExit(f"xorz: no nvcc in {folder}")
    return found[0]


if __name__ == "__main__":
    print(nvcc())
