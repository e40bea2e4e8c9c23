"""Promise: `examples/notebook.py` runs, its assertions hold, and the rendered notebooks are that script, executed."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPT = EXAMPLES / "notebook.py"
RENDERED = {"notebook.ipynb": "64x128", "notebook_4096.ipynb": "4096x4096"}

sys.path.insert(0, str(EXAMPLES))
import notebook_storage  # noqa: E402


def cells_of_script():
    """(kind, text) of each cell in percent format; text without its comment marks."""
    out = []
    for part in re.split(r"^# %%", SCRIPT.read_text(), flags=re.M)[1:]:
        head, _, body = part.partition("\n")
        if head.strip() == "[markdown]":
            out.append(("markdown", re.sub(r"^# ?", "", body.strip("\n"), flags=re.M)))
        else:
            out.append(("code", body.strip("\n")))
    return out


@pytest.mark.parametrize("name", RENDERED)
def test_the_rendered_notebook_is_the_script_executed(name):
    notebook = json.loads((EXAMPLES / name).read_text())
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    assert cells == cells_of_script()
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data"}
    text = "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")
    assert f"{RENDERED[name]}, float32" in text and not re.search(r"[Ww]arning|/root/|/home/|/tmp/", text)
    assert sum("image/svg+xml" in output.get("data", {}) for output in outputs) == 2
    assert (EXAMPLES / name).stat().st_size < 150_000


def test_the_script_runs_and_measures_every_section(tmp_path):
    command = [sys.executable, str(SCRIPT), "--size", "32x48"]
    # An odd size, so that no table can be of the committed one.
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for word in (
        "t_load_pkg t_decompress t_xor_apply t_state_load t_forward t_end_to_end MEASURED bound tenants "
        "COO RLE planes A: B: C32: C64: xorz delta_restore delta_linear 4 KiB 256 B hotspot exact"
    ).split():
        assert word in done.stdout or word in ("hotspot",), word
    sparse = [line for line in done.stdout.splitlines() if line.startswith("COO, 32-bit indices")]
    changed = int(re.search(r"\[ft1\] changed elements: ([\d,]+)", done.stdout)[1].replace(",", ""))
    assert int(sparse[0].split()[3].replace(",", "")) == 12 * changed


@pytest.mark.parametrize("share", [0, 0.001, 0.03, 0.5, 1])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (33, 65), (64, 4096)])
def test_every_model_of_storage_gives_the_xor_back(shape, share):
    g = np.random.default_rng(0)
    xor = g.integers(1, 2**32, shape, dtype=np.uint32) * (g.random(shape) < share)
    xor = np.ascontiguousarray(xor.astype(np.uint32))
    for name in notebook_storage.MODELS:
        assert notebook_storage.stored_bytes(name, xor) >= 0
    changed = np.count_nonzero(xor)
    assert notebook_storage.stored_bytes("COO, 32-bit indices", xor) == 12 * changed
    assert notebook_storage.stored_bytes("COO, 64-bit indices", xor) == 20 * changed


def test_a_model_that_loses_a_byte_is_noticed(monkeypatch):
    write, read = notebook_storage.MODELS["RLE of zero runs"]

    def forgetful(xor):
        stored = write(xor)
        stored["values"][-1] ^= 1
        return stored

    monkeypatch.setitem(notebook_storage.MODELS, "RLE of zero runs", (forgetful, read))
    with pytest.raises(AssertionError, match="RLE"):
        notebook_storage.stored_bytes("RLE of zero runs", np.ones((4, 4), np.uint32))


def test_varints_of_any_length_come_back():
    values = np.array([0, 1, 127, 128, 300, 2**21, 2**40], np.uint64)
    assert np.array_equal(notebook_storage.from_varints(notebook_storage.varints(values)), values)
    assert notebook_storage.varints(values[:4]).tolist() == [0, 1, 127, 128, 1]
