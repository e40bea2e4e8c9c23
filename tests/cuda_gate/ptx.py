"""Promise: the PTX that nvcc makes of these sources, run by an interpreter, gives what the kernels promise.

Part of `make cuda-gate`. The PTX is made as that in the library is (cuda/CMakeLists.txt): one unit, for compute_80.
What runs it, and what is checked, is tests/rust/ptx.

    ptx.py FOLDER     only writes it, for `XORZ_PTX=FOLDER cargo test --test ptx`
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "cuda"))
import toolchain  # noqa: E402


def fail(text: str) -> None:
    raise SystemExit(f"cuda-gate: {text}")


def compile_to(folder: Path) -> None:
    """Write the PTX of all kernels to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    unit = folder / "xorz.cu"
    sources = sorted((ROOT / "cuda").glob("*.cu"))
    unit.write_text("".join(f'#include "{source.name}"\n' for source in sources))
    nvcc = toolchain.nvcc()
    command = [nvcc, "-std=c++17", "-O3", "-ptx", "-arch=compute_80", "-I", ROOT / "cuda"]
    done = subprocess.run([*command, "-o", folder / "xorz.ptx", unit], capture_output=True, text=True)
    if done.returncode != 0:
        fail("no PTX: " + done.stderr[-2000:])


def check() -> None:
    """Compile, and run the tests on it."""
    with tempfile.TemporaryDirectory() as work:
        compile_to(Path(work))
        command = [os.environ.get("CARGO", "cargo"), "test", "--locked", "--quiet", "--test", "ptx"]
        try:
            done = subprocess.run(command, cwd=ROOT, env=os.environ | {"XORZ_PTX": work})
        except FileNotFoundError:
            fail(
                f"{command[0]} is missing, which builds the interpreter of the PTX; install Rust 1.90 or newer"
            )
        if done.returncode != 0:
            fail("what nvcc makes of cuda/ does not do what the kernels promise: see the test above")
    print("cuda-gate: the PTX does what the kernels promise")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        fail("ptx.py FOLDER")
    compile_to(Path(sys.argv[1]))
