"""Promise: one library for every torch from 2.10 on: it needs libtorch_cpu alone, exports the C ABI alone,
carries no path of the machine it was built on, and loading it by any path, twice, before or after a fork,
changes no bit and harms nobody. Without a fit torch, the package says so."""

import ctypes
import importlib.util
import os
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
    assert shutil.which(name), f"{name} is missing; install binutils"
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
    # By module, not by script: an environment on top of another one has the module only.
    assert importlib.util.find_spec("torch_abi_audit"), (
        "torch-abi-audit is missing; install requirements-dev.txt"
    )
    audit = "import sys; from torch_abi_audit.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", audit, str(xorz.library_path)], capture_output=True, text=True
    )
    assert re.search(r"STABLE", done.stdout) and not re.search(r"UNSTABLE", done.stdout), (
        done.stdout + done.stderr
    )
    assert "2.10" in done.stdout, done.stdout


CHECK = """
    x, w = torch.ones(1, 4), torch.zeros(3, 4)
    d = torch.ops.xorz.delta_encode(w, w + 1)
    assert torch.ops.xorz.delta_linear(x, w, None, d).tolist() == [[4, 4, 4]]
"""

# A digest of what the ops give in every dtype and for two encodings; the same in whatever process, by
# whatever path.
WORK = textwrap.dedent(
    """
    import hashlib, os, sys, torch

    def work():
        ops, g, digest = torch.ops.xorz, torch.Generator().manual_seed(5), hashlib.sha256()
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            w, x = (torch.randn(n, 160, generator=g).to(dtype) for n in (96, 40))
            for part in (0.04, 1.0):
                t = torch.where(torch.rand(w.shape, generator=g) < part, w * 1.01, w)
                d = ops.delta_encode(w, t, prefer="memory")
                assert torch.equal(ops.delta_restore(w, d).view(torch.uint8), t.view(torch.uint8))
                exact = ops.delta_linear(x, w, None, d, mode="exact")
                assert torch.equal(exact, torch.nn.functional.linear(x, t))
                outs = [d, ops.delta_linear_grad_input(x[:, :96].contiguous(), w, d)]
                outs += [ops.delta_linear(x, w, None, d, mode=m) for m in ("fast", "deterministic")]
                for out in outs:
                    digest.update(out.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def in_child(job):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)  # libgomp's threads are not there after a fork; DataLoader does the same
            os.write(write, job().encode())
            os._exit(0)
        os.close(write)
        assert os.waitpid(child, 0)[1] == 0
        with os.fdopen(read) as pipe:
            return pipe.read()

    def load(*paths):
        for path in paths:
            torch.ops.load_library(path)
    """
)


def run_work(code, *args):
    return run(WORK + textwrap.dedent(code), *args)


@pytest.fixture(scope="module")
def digest():
    """What WORK gives here, where the package loaded the library."""
    space = {}
    exec(WORK, space)
    return space["work"]()


@pytest.fixture
def paths(tmp_path, monkeypatch):
    """One library by four paths: its own, a link, relative to the folder we are in, and a copy of the file."""
    monkeypatch.chdir(tmp_path)
    link, copy = tmp_path / "link.so", tmp_path / "copy" / "libxorz_torch.so"
    link.symlink_to(xorz.library_path)
    copy.parent.mkdir()
    shutil.copy(xorz.library_path, copy)
    relative = os.path.relpath(xorz.library_path)
    return {"own": str(xorz.library_path), "link": str(link), "relative": relative, "copy": str(copy)}


@pytest.mark.parametrize("first", ["link", "relative", "copy"])
def test_whichever_path_loads_first_the_others_are_harmless(first, paths, digest):
    others = [path for name, path in paths.items() if name != first]
    done = run_work(
        """
        load(sys.argv[1])
        before = work()
        load(*sys.argv[1:], *sys.argv[1:])
        assert work() == before
        import xorz
        load(*sys.argv[1:])
        print(work() == before, before)
        """,
        paths[first],
        *others,
    )
    assert done.stdout.split() == ["True", digest]
    # The idle copy says so, once.
    assert done.stderr.count("another copy") == 1, done.stderr


def test_the_package_after_itself_is_silent():
    done = run(
        f"    import sys, torch, xorz\n    torch.ops.load_library(sys.argv[1])\n{CHECK}", xorz.library_path
    )
    assert done.stderr == ""


def test_loading_before_and_after_a_fork_gives_the_same_bits(paths, digest):
    done = run_work(
        """
        torch.set_num_threads(2)
        torch.ones(512, 512) @ torch.ones(512, 512)  # torch's threads run before the first fork
        child_alone = in_child(lambda: (load(sys.argv[2]), work())[1])
        assert not hasattr(torch.ops.xorz, "delta_linear")
        load(sys.argv[1])
        parent = work()
        child_again = in_child(lambda: (load(*sys.argv[1:]), work())[1])
        grandchild = in_child(lambda: in_child(work))
        print(child_alone, parent, child_again, grandchild, work())
        """,
        *paths.values(),
    )
    assert done.stdout.split() == [digest] * 5


DATASET = """
import torch
import xorz
from torch.utils.data import DataLoader, Dataset

g = torch.Generator().manual_seed(3)
W = torch.randn(256, 512, generator=g)
T = torch.where(torch.rand(W.shape, generator=g) < 0.03, W * 1.001, W)


class Rows(Dataset):
    def __init__(self, path):
        self.path = path
        self.delta = xorz.delta_encode(W, T)

    def __len__(self):
        return 24

    def __getitem__(self, i):
        torch.ops.load_library(self.path)  # a copy, in the worker
        x = torch.randn(7, 512, generator=torch.Generator().manual_seed(i))
        return i, xorz.delta_linear(x, W, self.delta), xorz.delta_restore(W, self.delta)[i]


def collate(rows):
    delta = xorz.delta_encode(W, T)
    return [(i, y, xorz.delta_linear_grad_input(y, W, delta), t) for i, y, t in rows]


def collected(path, **kwargs):
    loader = DataLoader(Rows(path), batch_size=5, collate_fn=collate, **kwargs)
    return [row for batch in loader for row in batch]
"""


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_the_workers_of_a_dataloader_give_the_bits_of_their_parent(start, paths, tmp_path):
    (tmp_path / "rows.py").write_text(DATASET)
    script = tmp_path / "main.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            import torch, xorz, rows

            if __name__ == "__main__":
                torch.set_num_threads(2)
                alone = rows.collected(sys.argv[2])  # the ops and their threads have run here before
                workers = rows.collected(sys.argv[2], num_workers=2, multiprocessing_context=sys.argv[1])
                assert len(alone) == len(workers) == 24
                for (i, *a), (j, *b) in zip(alone, workers):
                    assert i == j and all(torch.equal(p, q) for p, q in zip(a, b)), i
                    assert torch.equal(b[2], rows.T[i])
                print("same bits")
            """
        )
    )
    done = subprocess.run(
        [sys.executable, str(script), start, paths["copy"]], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stdout == "same bits\n", done.stderr


def test_the_number_of_threads_may_change_between_calls(digest):
    done = run_work(
        """
        import threading, xorz
        found = []
        for threads in (2, 1, 4, 3, 1):
            torch.set_num_threads(threads)
            found.append(work())
        thread = threading.Thread(target=lambda: (torch.set_num_threads(2), found.append(work())))
        thread.start()
        thread.join()
        print(*found, work())
        """
    )
    assert done.stdout.split() == [digest] * 7


def test_it_loads_without_the_package():
    run(f"    import sys, torch\n    torch.ops.load_library(sys.argv[1])\n{CHECK}", xorz.library_path)
    assert ctypes.CDLL(str(xorz.library_path)).xorz_abi_version() == 4


ALONE = """
    import sys
    sys.path.insert(0, sys.argv[1])
    try:
        import xorz
    except ImportError as error:
        print(type(error).__name__, error.name, error)
"""


def import_alone(folder):
    # -I -S: nothing of this environment is in reach, torch neither.
    (folder / "xorz").symlink_to(xorz.library_path.parent)
    command = [sys.executable, "-I", "-S", "-c", textwrap.dedent(ALONE), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


NEWER = f"; install one that is, for example with `{sys.executable} -m pip install 'torch>=2.10'`"


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, "has no torch; install it there, for example with `pip install torch`"),
        ({"torch/__init__.py": "__version__ = '2.9.1+cpu'"}, f"is 2.9.1+cpu{NEWER}"),
        ({"torch/__init__.py": "__version__ = '1.13.0'"}, f"is 1.13.0{NEWER}"),
        ({"torch/readme.txt": "a folder of this name, no torch"}, f"is of no version{NEWER}"),
    ],
)
def test_without_a_fit_torch_the_package_says_so(files, sentence, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    said = import_alone(tmp_path)
    assert said.startswith("ImportError torch xorz needs torch 2.10 or newer, but "), said
    assert said.endswith(f"{sentence}\n") and said.count("\n") == 1, said


def test_a_torch_that_cannot_be_imported_is_not_called_missing(tmp_path):
    (tmp_path / "torch.py").write_text("import a_part_of_torch")
    assert import_alone(tmp_path).startswith("ModuleNotFoundError a_part_of_torch ")


def test_a_library_that_is_missing_or_broken_is_named(tmp_path):
    package = tmp_path / "xorz"
    shutil.copytree(xorz.library_path.parent, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    library = package / "libxorz_torch.so"
    broken = "\n    import pathlib; pathlib.Path(sys.argv[2]).write_bytes(b'no library' * 100)\n"
    missing, unloadable = run(ALONE + broken + ALONE, tmp_path, library).stdout.splitlines()
    assert f"{library} is missing; install the package" in missing
    assert f"torch {torch.__version__} cannot load {library}: " in unloadable
    assert unloadable.endswith("(`make build` or `pip install .` in its source tree)"), unloadable
    assert "invalid ELF header" in unloadable  # the linker's word, which torch keeps to itself


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


TRACED = """
    import torch, xorz
    torch.manual_seed(0)
    base = torch.randn(64, 96).bfloat16()
    tuned = torch.where(torch.rand(64, 96) < 0.03, base + 1, base)
    sparse = torch.ops.xorz.delta_encode(base, tuned, prefer="speed")
    for m, mode in ((1, "fast"), (16, "fast"), (40, "fast"), (40, "deterministic")):
        torch.ops.xorz.delta_linear(torch.randn(m, 96).bfloat16(), base, None, sparse, mode=mode)
"""


def test_a_trace_says_what_each_call_chose(monkeypatch):
    monkeypatch.setenv("XORZ_TRACE", "1")
    monkeypatch.setenv("XORZ_ISA", "scalar")  # What is chosen may differ where there is a bf16 dot product.
    lines = run(TRACED).stderr.splitlines()
    assert len(lines) == 4 and all(line.startswith("xorz: [64, 96] BF16, ") for line in lines), lines
    assert "rows 1, tenants 1, on the base's words, then entries: 1 gathered, 0 transposed" in lines[0]
    assert "entries: 0 gathered, 1 transposed" in lines[1]
    assert "rows 40, tenants 1, on panels restored from Sparse (more than 32 rows of one tenant)" in lines[2]
    assert "Deterministic" in lines[3] and "never panels" in lines[3]
    for off in ("0", ""):
        monkeypatch.setenv("XORZ_TRACE", off)
        assert run(TRACED).stderr == ""
