"""Promise: what the documents show runs as it stands, in order, in one folder; and each message that
docs/serving.md lists is one that users get."""

import ast
import os
import pathlib
import re
import shutil
import subprocess
import sys

import cpp
import pytest
import torch
import xorz
from conftest import make_delta, random_weight
from xorz.__main__ import main

ops = torch.ops.xorz
TEXT = (cpp.ROOT / "docs" / "serving.md").read_text()
# Language, code, and the file that the line before it names, if any.
BLOCKS = [
    (m[1], m[2], re.search(r"`(\w+\.\w+)`[^`]*:$", TEXT[: m.start()].rstrip()))
    for m in re.finditer(r"^```(\w+)\n(.*?)^```$", TEXT, re.S | re.M)
]
BUILD = 'cmake -S . -B build -G Ninja -DPython_EXECUTABLE="$(command -v python)"\ncmake --build build\n'


def test_every_block_runs_in_order(tmp_path):
    files = [named[1] for *_, named in BLOCKS if named]
    assert files == ["model.py", "serve.cpp", "CMakeLists.txt", "multiply.c"]
    assert len(BLOCKS) == TEXT.count("\n```") // 2 and {language for language, *_ in BLOCKS} == {
        "python",
        "sh",
        "cpp",
        "cmake",
        "c",
    }
    env = {**os.environ, "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"}
    env |= {
        "PYTHONPATH": f"{tmp_path}:{pathlib.Path(xorz.__file__).parents[1]}",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
    }
    for number, (language, code, named) in enumerate(BLOCKS):
        if named:
            (tmp_path / named[1]).write_text(code)
        elif code == BUILD:
            # The very files of examples/, which make has built by the same commands: half a minute saved.
            for file in ("serve.cpp", "CMakeLists.txt"):
                assert (tmp_path / file).read_text() == (cpp.ROOT / "examples" / file).read_text(), file
            (tmp_path / "build").mkdir()
            shutil.copy(cpp.program(), tmp_path / "build")
        else:
            script = tmp_path / f"block{number}.{language}"
            script.write_text(code)
            command = (
                [sys.executable, "-W", "error", script] if language == "python" else ["bash", "-eu", script]
            )
            done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, f"{code}\n{done.stderr}"


def shown_by(name, blocks, tmp_path):
    """What the blocks of a document print, each in a process of its own, in one folder."""
    text = (cpp.ROOT / "docs" / name).read_text()
    found = re.findall(r"^```python\n(.*?)^```$", text, re.S | re.M)
    assert len(found) == text.count("\n```") // 2 == blocks
    env = {**os.environ, "PYTHONPATH": str(pathlib.Path(xorz.__file__).parents[1])}
    shown = ""
    for code in found:
        command = [sys.executable, "-W", "error", "-c", code]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{code}\n{done.stderr}"
        shown += done.stdout
    return shown


def test_every_block_about_transformers_runs_in_order(tmp_path):
    pytest.importorskip("transformers", minversion="5")
    shown = shown_by("transformers.md", 3, tmp_path)
    assert "model.embed_tokens                       Embedding" in shown and "alice, bob" in shown
    assert {"saved", "tenant-alice"} <= {p.name for p in tmp_path.iterdir()}


def test_every_block_about_tenants_runs_in_order(tmp_path):
    shown = shown_by("tenants.md", 4, tmp_path)
    assert (
        "0                                        Embedding" in shown
        and "alice, bob" in shown
        and "'base'" in shown
    )


def message(run) -> str:
    with pytest.raises((RuntimeError, AttributeError, OSError)) as caught:
        run()
    return str(caught.value)


# In a process that has not imported xorz: what it says, part by part.
FRESH = """
import sys, torch
module, first, second = sys.argv[1:]
for call in (lambda: torch.jit.load(module), lambda: torch.ops.xorz.delta_linear):
    try:
        call()
    except Exception as error:
        print(error, file=sys.stderr)
    print("----", file=sys.stderr, flush=True)
torch.ops.load_library(first)
torch.ops.load_library(second)
"""


def test_listed_messages_are_those_that_users_get(tmp_path):
    base = random_weight(8, 12, torch.float32)
    _, delta = make_delta(base, "sparse")
    x = torch.zeros(1, 12)
    linear = torch.nn.Linear(12, 8)
    with torch.no_grad():
        linear.weight.copy_(base)
    torch.jit.script(xorz.XorDeltaLinear.from_linear(linear, delta)).save(str(tmp_path / "m.pt"))
    copy = shutil.copy(xorz.library_path, tmp_path / "libxorz_torch.so")
    command = [sys.executable, "-I", "-c", FRESH, tmp_path / "m.pt", xorz.library_path, copy]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    unknown, no_attribute, second_copy = done.stderr.split("----\n")
    said = [
        unknown,
        no_attribute,
        message(lambda: torch.ops.load_library(tmp_path / "none" / "libxorz_torch.so")),
        second_copy,
        re.sub("[0-9a-f]{32}", "...", message(lambda: ops.delta_check(delta, base + 1))),
        message(lambda: ops.delta_linear(x, base[:6], None, delta)),
        message(lambda: ops.delta_linear(x, base.T.contiguous().T, None, delta)),
        message(lambda: ops.delta_linear(x, base.to_sparse(), None, delta)),
        message(lambda: ops.delta_linear(x, quantised(base), None, delta)),
        message(lambda: ops.delta_linear(x, base.to("meta"), None, delta)),
        message(lambda: ops.delta_linear(x.half(), base, None, delta)),
        message(lambda: ops.delta_apply_(torch.nn.Parameter(base), delta)),
    ]
    rows = re.findall(r"^\| `(.*?)` \|", TEXT, re.M)
    assert len(rows) == len(said)
    for row, text in zip(rows, said, strict=True):
        assert row in text, (row, text)


def quantised(t: torch.Tensor) -> torch.Tensor:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)


def test_the_module_tells_build_scripts_where_things_are(capfd):
    assert main(["--library-path"]) == 0 and capfd.readouterr().out == f"{xorz.library_path}\n"
    assert main(["--include-path"]) == 0 and capfd.readouterr().out == f"{xorz.include_path}\n"
    header = xorz.include_path / "xorz.h"
    assert header.read_bytes() == (cpp.ROOT / "csrc" / "xorz.h").read_bytes()
    assert main(["--version"]) == 0 and capfd.readouterr().out == f"xorz {xorz.__version__}\n"
    assert main([]) == 0 and capfd.readouterr().out.startswith("usage: python -m xorz --library-path")
    for wrong in (["--libary-path"], ["--version", "now"]):
        assert main(wrong) == 2
        told = capfd.readouterr()
        assert told.out == "" and f"unexpected argument '{wrong[-1]}'" in told.err
    # Other words are the command's: its output, its exit code.
    command = [sys.executable, "-m", "xorz", "inspect", "/nowhere.xorz"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 4 and done.stderr.startswith("xorz: /nowhere.xorz: No such file")


def test_docstrings_say_something():
    short = []
    for path in sorted((cpp.ROOT / "python").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text is not None and len(text.split()) <= 3:
                    short.append(f"{path.name}: {getattr(node, 'name', 'the module')}: {text!r}")
    assert not short, "\n".join(short)
