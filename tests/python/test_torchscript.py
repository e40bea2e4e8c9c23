"""Promise: a scripted or traced module with a real delta is saved, loaded in a fresh process that knows nothing but
torch.ops.load_library, and gives the same bits."""

import subprocess
import sys
import textwrap

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


def test_saved_modules_give_the_same_bits_in_a_fresh_process(tmp_path):
    cases = []
    for dtype in (torch.bfloat16, torch.float32):
        for bias in (True, False):
            for how in ("script", "freeze", "trace"):
                folder = tmp_path / f"{dtype}-{bias}-{how}"
                folder.mkdir()
                model = Model(dtype, bias).eval()
                inputs = [random_weight(m, 48, dtype, m) for m in (1, 5, 33)]
                with torch.no_grad():
                    if how == "trace":
                        saved = torch.jit.trace(model, inputs[0])
                    else:
                        saved = torch.jit.script(model)
                        if how == "freeze":
                            saved = torch.jit.freeze(saved)
                    saved.save(str(folder / "module.pt"))
                    outputs = [model(x) for x in inputs]
                torch.save(inputs, folder / "inputs.pt")
                cases.append((folder, outputs))
    script = tmp_path / "load.py"
    script.write_text(LOADER)
    folders = [str(folder) for folder, _ in cases]
    command = [sys.executable, "-I", str(script), str(xorz.library_path), *folders]
    subprocess.run(command, check=True, timeout=120)
    for folder, want in cases:
        got = torch.load(folder / "outputs.pt", weights_only=True)
        for a, b in zip(got, want, strict=True):
            assert same_bits(a, b.detach()), folder.name


def test_without_the_library_the_archive_names_what_is_missing(tmp_path):
    linear = nn.Linear(4, 4)
    delta = xorz.delta_encode(linear.weight.detach(), linear.weight.detach() + 1)
    torch.jit.script(XorDeltaLinear.from_linear(linear, delta)).save(str(tmp_path / "m.pt"))
    code = f"import torch; torch.jit.load({str(tmp_path / 'm.pt')!r})"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "xorz::delta_linear" in done.stderr


def test_a_scripted_module_keeps_its_bits_through_dtype_changes():
    linear = nn.Linear(32, 32, bias=False)
    _tuned, delta = make_delta(linear.weight.detach(), "sparse")
    scripted = torch.jit.script(XorDeltaLinear.from_linear(linear, delta))
    x = torch.randn(2, 32)
    want = scripted(x)
    assert same_bits(scripted.half().float()(x), want)
    with pytest.raises(RuntimeError, match="input is float16"):
        scripted(x.half())
