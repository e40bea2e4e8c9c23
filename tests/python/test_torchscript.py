"""Promise: a scripted, traced, frozen or optimised module with real deltas is saved and gives the same bits
in a fresh Python that knows nothing but torch.ops.load_library, and in a C++ program that knows nothing but
libtorch; where something is missing or wrong, both say what."""

import shutil
import subprocess
import sys
import textwrap

import cpp
import pytest
import torch
import xorz
from conftest import ENCODINGS, make_delta, random_weight, same_bits
from torch import nn
from xorz import XorDeltaLinear

LOADER = textwrap.dedent(
    """
    import sys
    import torch

    torch.ops.load_library(sys.argv[1])
    for folder in sys.argv[2:]:
        module = torch.jit.load(folder + "/module.pt")
        inputs = torch.load(folder + "/inputs.pt", weights_only=True)
        torch.save([module(x) for x in inputs], folder + "/outputs.pt")
    assert "xorz" not in sys.modules
    """
)


class Model(nn.Module):
    def __init__(self, dtype, bias):
        super().__init__()
        self.layers = nn.ModuleList()
        for i, encoding in enumerate(ENCODINGS):
            linear = nn.Linear(48, 48, bias=bias).to(dtype)
            with torch.no_grad():
                linear.weight.copy_(random_weight(48, 48, dtype, i))
            tuned, delta = make_delta(linear.weight.detach(), encoding)
            assert encoding == "unchanged" or not same_bits(tuned, linear.weight.detach())
            self.layers.append(
                XorDeltaLinear.from_linear(linear, delta, mode=("fast", "deterministic", "exact")[i % 3])
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for layer in self.layers:
            out = out + layer(x)
        return out


WAYS = {
    "script": torch.jit.script,
    "trace": lambda model: torch.jit.trace(model, random_weight(2, 48, model.layers[0].dtype)),
    "freeze": lambda model: torch.jit.freeze(torch.jit.script(model)),
    "optimize_for_inference": lambda model: torch.jit.optimize_for_inference(torch.jit.script(model)),
}


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """Folders, each with a module of every encoding, inputs, and what Python computes."""
    cases = {}
    for dtype in (torch.bfloat16, torch.float32):
        for bias in (True, False):
            model = Model(dtype, bias).eval()
            # Many requests, so that those of one shape meet each other on several threads.
            inputs = [random_weight(m, 48, dtype, m) for m in (1, 5, 33, 2)] * 3
            for way, save in WAYS.items():
                folder = tmp_path_factory.mktemp(f"{way}-{dtype}-{bias}")
                with torch.no_grad():
                    saved = save(model)
                    cases[folder] = [model(x) for x in inputs]
                    assert "xorz::delta_linear" in str(saved.inlined_graph)
                saved.save(str(folder / "module.pt"))
                torch.save(inputs, folder / "inputs.pt")
    return cases


def assert_outputs(folder, want):
    got = torch.load(folder / "outputs.pt", weights_only=True)
    for a, b in zip(got, want, strict=True):
        assert same_bits(a, b), folder.name
    (folder / "outputs.pt").unlink()


def test_a_fresh_python_gives_the_same_bits(archives, tmp_path):
    script = tmp_path / "load.py"
    script.write_text(LOADER)
    command = [sys.executable, "-I", str(script), str(xorz.library_path), *map(str, archives)]
    subprocess.run(command, check=True, timeout=120)
    for folder, want in archives.items():
        assert_outputs(folder, want)


def test_cpp_threads_give_the_same_bits(archives):
    for folder, want in archives.items():
        done = cpp.serve(folder / "module.pt", folder / "inputs.pt", folder / "outputs.pt")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), folder.name
        assert_outputs(folder, want)


def test_cpp_needs_no_python(archives, tmp_path):
    folder = next(iter(archives))
    trace = {"LD_DEBUG": "files", "LD_DEBUG_OUTPUT": str(tmp_path / "loaded")}
    done = cpp.serve(folder / "module.pt", folder / "inputs.pt", folder / "outputs.pt", env=trace)
    assert done.returncode == 0, done.stderr
    (log,) = tmp_path.glob("loaded.*")
    loaded = log.read_text()
    assert "libxorz_torch.so" in loaded and "libtorch_cpu.so" in loaded
    assert "libpython" not in loaded and "libtorch_python" not in loaded


def test_cpp_says_what_is_wrong_with_an_input(archives, tmp_path):
    for folder in archives:
        if "float32-True" not in folder.name:
            continue
        torch.save([torch.zeros(2, 48), torch.zeros(2, 47)], tmp_path / "inputs.pt")
        done = cpp.serve(folder / "module.pt", tmp_path / "inputs.pt", tmp_path / "outputs.pt")
        assert done.returncode == 1 and not (tmp_path / "outputs.pt").exists()
        # Graphs that fuse or freeze say it too.
        sentence = "xorz::delta_linear: input is float32 [2, 47], but its last dimension must be weight.shape[1] = 48"
        assert sentence in done.stderr, folder.name


UNKNOWN = "Unknown builtin op: xorz::delta_linear"


def test_without_the_library_python_names_the_op(archives):
    folder = next(iter(archives))
    code = "import sys, torch; torch.jit.load(sys.argv[1])"
    command = [sys.executable, "-I", "-c", code, str(folder / "module.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and UNKNOWN in done.stderr


def test_without_the_library_cpp_names_the_op_or_the_file(archives, tmp_path):
    folder = next(iter(archives))
    paths = (folder / "module.pt", folder / "inputs.pt", tmp_path / "outputs.pt")
    done = cpp.serve(*paths, library="libm.so.6")
    assert done.returncode == 1 and UNKNOWN in done.stderr
    done = cpp.serve(*paths, library=tmp_path / "none.so")
    assert done.returncode == 2 and f"{tmp_path / 'none.so'}: cannot open shared object file" in done.stderr


def test_a_second_copy_of_the_library_stays_idle_in_cpp(archives, tmp_path):
    folder, want = next(iter(archives.items()))
    copy = tmp_path / "libxorz_torch.so"
    shutil.copy(xorz.library_path, copy)
    paths = (folder / "module.pt", folder / "inputs.pt", folder / "outputs.pt")
    done = cpp.serve(*paths, env={"LD_PRELOAD": str(copy)})
    assert done.returncode == 0 and "another copy of libxorz_torch.so" in done.stderr
    assert_outputs(folder, want)


def test_a_scripted_module_keeps_its_bits_through_dtype_changes():
    linear = nn.Linear(32, 32, bias=False)
    _tuned, delta = make_delta(linear.weight.detach(), "sparse")
    scripted = torch.jit.script(XorDeltaLinear.from_linear(linear, delta))
    x = torch.randn(2, 32)
    want = scripted(x)
    assert same_bits(scripted.half().float()(x), want)
    with pytest.raises(RuntimeError, match="input is float16"):
        scripted(x.half())
