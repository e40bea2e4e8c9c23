"""Promise: `torch.ops.xorz` on CUDA tensors is what it is on the CPU's, on torch's device and stream, or
refuses in words.

No GPU is needed: a double of libcuda runs the kernels' own source, compiled for the host, and a double of
torch's device functions says which device and stream are current (tests/cuda_host). Each case is a process of
its own (cuda_child.py).
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
HOST = ROOT / "tests" / "cuda_host"
BUILT = ROOT / "build" / "cuda_double"


def compile_if_older(target: Path, sources: list[Path], flags: list[str], depends: list[Path]) -> None:
    newest = max(path.stat().st_mtime for folder in depends for path in folder.iterdir())
    if target.exists() and target.stat().st_mtime > newest:
        return
    command = [os.environ.get("CXX", "c++"), "-std=c++20", "-fPIC", "-shared", *flags, *map(str, sources)]
    partial = target.with_suffix(f".{os.getpid()}")
    subprocess.run([*command, "-o", str(partial), "-ldl"], check=True)
    partial.replace(target)


@pytest.fixture(scope="module")
def doubles() -> dict[str, str]:
    """The environment of a process with the doubles."""
    if sys.platform != "linux" or shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("needs Linux and a C++ compiler")
    BUILT.mkdir(parents=True, exist_ok=True)
    driver = [HOST / "driver.cpp", HOST / "runtime.cpp"]
    compile_if_older(
        BUILT / "libcuda.so.1",
        driver,
        ["-O2", "-ffp-contract=off", f"-I{ROOT / 'cuda'}", f"-I{HOST}"],
        [HOST, ROOT / "cuda"],
    )
    include = Path(torch.__path__[0]) / "include"
    flags = [
        "-O1",
        "-fvisibility=hidden",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        "-isystem",
        str(include),
    ]
    compile_if_older(BUILT / "libtorch_double.so", [HOST / "torch_double.cpp"], flags, [HOST])
    image = BUILT / "kernels.fatbin"
    mine = image.with_suffix(f".{os.getpid()}")  # by rename: another worker's child may be reading it
    mine.write_bytes(0xBA55ED50.to_bytes(4, "little") + b" for the double")
    mine.replace(image)
    libraries = os.pathsep.join(filter(None, (str(BUILT), os.environ.get("LD_LIBRARY_PATH"))))
    return {
        **os.environ,
        "LD_LIBRARY_PATH": libraries,
        "LD_PRELOAD": str(BUILT / "libtorch_double.so"),
        "XORZ_CUDA_IMAGE": str(image),
    }


@pytest.mark.parametrize(
    ("case", "machine"),
    [
        ("restores", "devices=1"),
        ("products", "devices=1"),
        ("panels", "devices=1"),
        ("groups", "devices=1"),
        ("gradients", "devices=1"),
        ("lookups", "devices=1"),
        ("devices", "devices=2"),
        ("refusals", "devices=2"),
        ("checks", "devices=1"),
        ("without_device", "devices=0"),
    ],
)
def test_ops_on_cuda_tensors(doubles, case, machine):
    child = [sys.executable, str(Path(__file__).with_name("cuda_child.py")), case]
    done = subprocess.run(child, env={**doubles, "XORZ_DOUBLE": machine}, capture_output=True, text=True)
    assert done.returncode == 0 and f"{case}: well" in done.stdout, done.stdout + done.stderr
