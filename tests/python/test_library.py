"""Promise: one library for every torch from 2.10 on: it needs libtorch_cpu alone, exports the C ABI alone, carries no path of
the machine it was built on, and loading it twice, or a second copy, or after a fork harms nobody."""

import ctypes
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import xorz


def run(code, *args, expect=0):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == expect, done.stderr
    return done


def tool(name, *args):
    if shutil.which(name) is None:
        pytest.skip(f"{name} (binutils) is not installed")
    return subprocess.run([name, *args], capture_output=True, text=True, check=True).stdout


def test_it_needs_libtorch_cpu_and_the_system_only():
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", tool("readelf", "-d", str(xorz.library_path))))
    system = {"libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6", "ld-linux-x86-64.so.2"}
    assert "libtorch_cpu.so" in needed and needed - {"libtorch_cpu.so"} <= system, needed
    assert not re.search("RPATH|RUNPATH", tool("readelf", "-d", str(xorz.library_path)))


def test_it_exports_the_c_abi_and_nothing_else():
    exported = set(
        re.findall(r" [A-Za-z] (\S+)$", tool("nm", "-D", "--defined-only", str(xorz.library_path)), re.M)
    )
    header = Path(__file__).parents[2] / "csrc" / "xorz.h"
    text = re.sub(r"/\*.*?\*/", "", header.read_text(), flags=re.S)
    declared = set(re.findall(r"^\w[\w *]*\b(xorz_\w+)\(", text, re.M))
    assert len(declared) > 20 and exported == declared


def test_it_holds_no_path_of_the_build_machine():
    data = xorz.library_path.read_bytes()
    home = str(Path.home()).encode() + b"/.cargo"
    assert home not in data and str(Path(__file__).parents[2]).encode() not in data


def test_its_torch_abi_is_stable():
    audit = Path(sys.executable).with_name("torch-abi-audit")
    if not audit.exists():
        pytest.skip("torch-abi-audit is not installed")
    done = subprocess.run([audit, str(xorz.library_path)], capture_output=True, text=True)
    assert re.search(r"STABLE", done.stdout) and not re.search(r"UNSTABLE", done.stdout), (
        done.stdout + done.stderr
    )
    assert "2.10" in done.stdout, done.stdout


CHECK = """
    x, w = torch.ones(1, 4), torch.zeros(3, 4)
    d = torch.ops.xorz.delta_encode(w, w + 1)
    assert torch.ops.xorz.delta_linear(x, w, None, d).tolist() == [[4, 4, 4]]
"""


def test_a_second_copy_and_repeated_loading_are_harmless(tmp_path):
    copy = tmp_path / "libxorz_torch.so"
    shutil.copy(xorz.library_path, copy)
    loads = "\n".join(f"    torch.ops.load_library(sys.argv[{i}])" for i in (1, 1, 2, 1, 2))
    done = run(f"    import sys, torch\n{loads}\n{CHECK}", xorz.library_path, copy)
    assert "another copy" in done.stderr
    # The package after a foreign copy takes the ops that are there.
    run(f"    import sys, torch\n    torch.ops.load_library(sys.argv[1])\n    import xorz\n{CHECK}", copy)
    done = run(
        f"    import sys, torch, xorz\n    torch.ops.load_library(sys.argv[1])\n{CHECK}", xorz.library_path
    )
    assert done.stderr == ""


def test_it_loads_without_the_package():
    run(f"    import sys, torch\n    torch.ops.load_library(sys.argv[1])\n{CHECK}", xorz.library_path)
    assert ctypes.CDLL(str(xorz.library_path)).xorz_abi_version() == 2


def test_a_forked_child_with_one_thread_computes():
    run(
        """
        import os, torch, xorz
        x, w = torch.ones(4, 512), torch.zeros(512, 512)
        d = xorz.delta_encode(w, w + 1)
        want = xorz.delta_linear(x, w, d)
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            os._exit(0 if torch.equal(xorz.delta_linear(x, w, d), want) else 1)
        assert os.waitpid(child, 0)[1] == 0
        """
    )


def test_threads_are_torchs_own():
    run(
        """
        import os, torch, xorz
        torch.set_num_threads(2)
        x, w = torch.ones(64, 512), torch.randn(512, 512)
        x @ w
        d = xorz.delta_encode(w, w + 0.5)
        before = len(os.listdir("/proc/self/task"))
        for mode in ("fast", "deterministic", "exact"):
            xorz.delta_linear(x, w, d, mode=mode)
        xorz.delta_restore(w, d)
        assert len(os.listdir("/proc/self/task")) == before
        """
    )


def test_the_package_says_its_version_and_its_names():
    assert xorz.__version__ == re.search(
        r'^version = "(.*)"', (Path(__file__).parents[2] / "Cargo.toml").read_text(), re.M
    ).group(1)
    assert all(hasattr(xorz, name) for name in xorz.__all__)
    assert Path(xorz.__file__).with_name("py.typed").exists()
    assert xorz.library_path.is_file() and torch.ops.xorz.delta_linear is not None


def test_the_command_is_installed_beside_python():
    command = Path(sys.executable).with_name("xorz")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert xorz.__version__ in done.stdout
