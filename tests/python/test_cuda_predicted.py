"""Promise: `cuda/PREDICTED.md` counts what a warp issues: each loop as often as is said, the longest way where ways part,
nothing that is cold; and it is of the kernels that the host side launches.

The machine code here is made up, its cost added up by hand. What ptxas makes of the kernels is compared by
`make cuda-gate`, in CI.
"""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "cuda"), str(ROOT / "tests" / "cuda_gate")]
import predicted  # noqa: E402
import sass  # noqa: E402

# A line of source, and what it has become: a label, or an instruction as nvdisasm prints it.
CODE = [
    (1, "MOV R1, R2"),
    (1, "MOV R2, R3"),
    (0, ".L_x_1:"),
    (2, "FFMA R1, R2, R3, R1"),
    (3, "@P0 BRA `(.L_x_2)"),
    (4, "LDG.E R4, [R5]"),
    (4, "LDG.E R6, [R5]"),
    (0, ".L_x_2:"),
    (2, "IADD3 R1, R1, 0x1, RZ"),
    (2, "@P1 BRA `(.L_x_1)"),
    (0, ".L_x_3:"),
    (5, "ISETP.NE.AND P2, PT, R1, RZ, PT"),
    (5, "@!P2 BRA `(.L_x_4)"),
    (6, "FADD R1, R1, R2"),
    (5, "BRA `(.L_x_3)"),
    (0, ".L_x_4:"),
    (5, "BSYNC B0"),
    (7, "@P3 BRA `(.L_x_5)"),
    (8, "STS [R1], R2"),
    (0, ".L_x_5:"),
    (10, "@P4 BRA `(.L_x_7)"),
    (10, "FADD R1, R1, R2"),
    (10, "FADD R1, R1, R2"),
    (10, "BRA `(.L_x_8)"),
    (0, ".L_x_7:"),
    (10, "MOV R1, R2"),
    (0, ".L_x_8:"),
    (9, "BRA.DIV UR4, `(.L_x_6)"),
    (9, "EXIT"),
    (0, ".L_x_6:"),
    (9, "NOP"),
    (9, "BRA `(.L_x_1)"),
]


def kernel():
    text = [".text.made_up:"]
    for at, (line, what) in enumerate(CODE):
        if line == 0:
            text.append(what)
            continue
        text.append(
            f'\t//## File "/somewhere/cuda/parts.cuh", line {line} inlined at "/somewhere/cuda/all.cu", line 90'
        )
        text.append(f"        /*{16 * at:04x}*/                   {what} ;")
    return sass.parsed("\n".join(text))["made_up"]


def cost(weights=(), cold=()):
    found = kernel()
    weight = [1.0] * len(found.code)
    for loop in sass.marked_loops(found, {("parts.cuh", line): str(line) for line, _ in weights}):
        for at in range(loop.first, loop.last + 1):
            weight[at] *= dict(weights)[int(loop.name)]
    return sass.warp_cost(found, weight, {("parts.cuh", line) for line in cold})


def test_the_longest_way_is_counted_and_what_comes_apart_is_not():
    # The beginning, the first loop, the second, a barrier, a store and its branch, the longer of two ways, the end.
    assert cost() == 2 + 6 + 4 + 1 + 2 + 4 + 2


@pytest.mark.parametrize(("times", "also"), [(10, 0), (0, 0), (2.5, 4)])
def test_loops_count_as_often_as_is_said_wherever_they_are_left(times, also):
    # The first is left at its end, the second at its beginning, by a jump back that always jumps.
    assert cost([(2, times), (6, also)]) == 2 + 6 * times + 4 * also + 1 + 2 + 4 + 2


def test_nobody_goes_where_it_is_cold():
    assert cost(cold=[4]) == 2 + 4 + 4 + 1 + 2 + 4 + 2
    assert cost(cold=[8]) == 2 + 6 + 4 + 1 + 1 + 4 + 2


def test_a_mark_that_is_of_no_loop_is_an_error():
    predicted.check_marks([kernel()], {("parts.cuh", 2): "first", ("parts.cuh", 6): "second"})
    with pytest.raises(SystemExit, match="no loop has the mark second"):
        predicted.check_marks([kernel()], {("parts.cuh", 2): "first", ("parts.cuh", 8): "second"})


def test_marks_are_of_whole_statements(tmp_path):
    (tmp_path / "a.cuh").write_text(
        "f();\ng(one,\n  two);  // each: part\n}  // a remark\nh();  // hot: loop\n"
    )
    marks = sass.marks(tmp_path)
    assert marks["each"] == {("a.cuh", 2): "part", ("a.cuh", 3): "part"} and marks["hot"] == {
        ("a.cuh", 5): "loop"
    }


def steps(mma, each=True):
    """A kernel of one loop: the steps of `linear_large`, of so many mma each and two loads of what they multiply."""
    code = [
        "MOV R1, R2",
        ".L_x_1:",
        *["LDSM R4, [R5]"] * 2,
        *["HMMA R4, R8, R12, R4"] * mma,
        "@P1 BRA `(.L_x_1)",
        "EXIT",
    ]
    text = [".text.steps:"]
    for at, what in enumerate(code):
        line = 2 if what.startswith(("LDSM", "HMMA")) else 3 if "BRA" in what else 1
        text.append(f'\t//## File "/somewhere/cuda/parts.cuh", line {line}')
        text.append(what if what.startswith(".") else f"        /*{16 * at:04x}*/                   {what} ;")
    marks = {
        "hot": {("parts.cuh", 3): "step"},
        "each": {("parts.cuh", 2): "multiplied"} if each else {},
        "cold": {},
    }
    return sass.parsed("\n".join(text))["steps"], marks


def test_mma_are_those_of_the_shape_and_warps_without_rows_have_none():
    name = predicted.FULL.kernel
    # A warp multiplies 32 rows of x by 32 of W: 8 mma for each 16 of a window's 64 columns.
    found, marks = steps(32)
    for m, tenants, sixteens in [
        (256, 1, 8),
        (128, 1, 8),
        (100, 1, 7),
        (64, 1, 4),
        (256, 8, 2),
        (256, 32, 1),
    ]:
        case = predicted.Case(m, tenants, "base", 0.0)
        assert predicted.matrices(case) == 64 / 8 * 4096 / 16 * sixteens
        assert predicted.instructions(name, found, case, marks) == 1 + 64 * (34 * sixteens / 8 + 1) + 1
    for mma in (31, 33):
        found, marks = steps(mma)
        for m in (256, 64):
            # Of a full tile, whatever the rows.
            with pytest.raises(
                SystemExit, match=rf"{mma * 512}\.0 mma .* full tile of `base` .* 16384\.0 by its shape"
            ):
                predicted.instructions(name, found, predicted.Case(m, 1, "base", 0.0), marks)
    found, marks = steps(32, each=False)
    with pytest.raises(SystemExit, match="no line marked"):
        predicted.instructions(name, found, predicted.FULL, marks)


def kernels_of(path, m, tenants, kernel):
    """(m, tenants) -> few rows or many, of a table's rows for 4096 x 4096."""
    section = path.read_text().split("\n## 4096 x 4096\n")[-1].split("\n## 11008")[0]
    rows = [line.split("|")[1:-1] for line in section.splitlines() if re.match(r"\| [a-z0-9]", line)]
    return {
        (row[m].strip(), row[tenants].strip()): re.search("small|large", row[kernel])[0]
        for row in rows
        if len(row) > 6 and "linear_" in row[kernel] and "not planned" not in row[kernel]
    }


def test_predictions_are_of_the_kernels_that_are_planned():
    # BYTES.md asks the host side itself.
    planned = kernels_of(ROOT / "cuda" / "BYTES.md", 1, 2, 3)
    here = kernels_of(predicted.TABLE, 1, 2, 3)
    both = planned.keys() & here.keys()
    assert len(both) >= 6 and {planned[key] for key in both} == {"small", "large"}
    assert {key: here[key] for key in both} == {key: planned[key] for key in both}
    # Blocks of four rows are of f32 alone.
    text = (ROOT / "src" / "cuda" / "plan.rs").read_text()
    assert "if four_byte && m <= 4 { 4 } else { 16 }" in text
    # From how many rows on one tenant's go to restored panels.
    assert f"const SMALL_ROWS: usize = {predicted.MANY};" in text and "|| rows.m <= SMALL_ROWS" in text


def test_the_table_has_every_case():
    rows = predicted.TABLE.read_text().splitlines()
    for case in predicted.CASES:
        assert any(
            row.startswith(f"| {case.name} | {case.m} | {case.tenants} | {case.kernel} |") for row in rows
        ), case
