"""Promise: `cuda/gate.txt` is of the kernels that are in `cuda/`: all of them, for every architecture, from
these sources.

What nvcc makes of them is compared by `make cuda-gate`, in CI; this needs no compiler.
"""

import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "cuda_gate"))
import gate  # noqa: E402


def test_the_table_is_of_these_sources():
    noted = gate.noted(gate.TABLE.read_text())
    assert noted == gate.digest(), "cuda/ has changed since cuda/gate.txt: make cuda-gate ARGS=--write"


def test_every_kernel_has_a_row_for_each_architecture():
    rows = [tuple(line.split()[:2]) for line in gate.kept(gate.TABLE.read_text())]
    kernels = {kernel for kernel, _ in rows}
    assert len(kernels) >= 20
    assert sorted(rows) == sorted((kernel, str(arch)) for kernel in kernels for arch in gate.ARCHS)


@pytest.mark.parametrize(
    ("change", "counts"),
    [
        (lambda text: text.replace("return", "return 1 +", 1), True),
        (lambda text: text + "constexpr int kMore = 1;\n", True),
        (lambda text: "// A remark.\n\n" + text.replace("\n", "  \n"), False),
    ],
)
@pytest.mark.parametrize("name", ["word.cuh", "linear_large.cu"])
def test_code_counts_and_remarks_do_not(tmp_path, name, change, counts):
    shutil.copytree(ROOT / "cuda", tmp_path / "cuda")
    path = tmp_path / "cuda" / name
    path.write_text(change(path.read_text()))
    assert (gate.digest(tmp_path / "cuda") != gate.digest()) == counts


def test_a_file_more_or_less_or_another_compiler_counts(tmp_path):
    for i, change in enumerate(
        [
            lambda at: (at / "word.cuh").unlink(),
            lambda at: (at / "more.cu").write_text(""),
            lambda at: (at / "word.cuh").rename(at / "words.cuh"),
            lambda at: (at / "requirements.txt").write_text("nvidia-cuda-nvcc==0\n"),
        ]
    ):
        at = tmp_path / str(i)
        shutil.copytree(ROOT / "cuda", at)
        change(at)
        assert gate.digest(at) != gate.digest()
