"""Promise: `make cpu-gate` finds the loops that it speaks of, counts them right, and fails for what grew.

The comparison of the shipped library is `make cpu-gate`, in CI; this needs neither the library nor llvm-mca.
"""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "cpu_gate"))
import cpu_gate as gate  # noqa: E402

DECODER = """
    prefetcht0 (%r8,%rax,1)
    prefetcht0 0x400(%r9)
    vmovdqu64 (%r8,%rax,1),%zmm7
    vpsrlw $0x7,%zmm7,%zmm8
    vpcmpltuw %zmm9,%zmm16,%k1
    vpexpandw (%r9),%zmm8{%k1}{z}
    vdpbf16ps (%r14,%rax,1),%zmm8,%zmm3
"""


def listing(*bodies: str, name: str = "kernel", jump_back: int = 0) -> str:
    """As objdump prints a function of these loops one after the other, each with a jump to its own beginning."""
    rows, address = [f"0000000000000000 <{name}>:", f"{'0:':>8}\tpush   %rbx"], 1
    for body in bodies:
        first = address
        for text in [line.strip() for line in body.strip().splitlines()]:
            rows.append(f"{address:>7x}:\t{text}")
            address += 4
        rows.append(f"{address:>7x}:\tjne    {first - jump_back:x} <{name}+{first:#x}>")
        address += 2
    return "\n".join([*rows, f"{address:>7x}:\tret", ""])


def sizes(found, name):
    return sorted(copy.instructions() for copy in found[name])


def test_a_loop_is_found_by_its_mix_wherever_it_was_inlined():
    text = listing(DECODER, name="a") + listing("add $0x1,%rax", DECODER + "mov %rax,%rbx", name="b")
    found = gate.find(text)
    assert sizes(found, "exponent_1") == [8, 9]
    assert [name for name, copies in found.items() if copies] == ["exponent_1"]


def test_of_nested_loops_only_the_innermost_counts():
    inner = listing(DECODER)
    last = max(line.address for _, lines in gate.functions(inner) for line in lines)
    text = inner.replace("\tret", f"\tjne    0 <kernel>\n{last + 2:>7x}:\tret")
    assert sizes(gate.find(text), "exponent_1") == [8]


def test_an_unrolled_loop_counts_by_the_step():
    assert sizes(gate.find(listing(DECODER + DECODER)), "exponent_1") == [7.5]


def test_two_tenants_with_tables_of_their_own_are_not_one_tenant_unrolled():
    more = DECODER.replace("vpsrlw", "vpaddw").replace("prefetcht0 (%r8", "lea (%r8")
    found = gate.find(listing(DECODER + more))
    assert sizes(found, "exponent_own_2") == [15]
    assert not found["exponent_1"]


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.replace("vdpbf16ps", "vfmadd231ps"),
        lambda body: body + "vmovdqu64 %zmm3,(%rdi,%rax,1)\n",
        lambda body: body.replace("prefetcht0 (%r8,%rax,1)\n", "\n"),
        lambda body: body + "vpexpandd (%r9),%zmm8{%k1}{z}\n",
    ],
)
def test_another_mix_is_another_loop(change):
    assert not gate.find(listing(change(DECODER)))["exponent_1"]


def test_a_jump_ahead_or_into_another_function_is_no_loop():
    forward = listing(DECODER).replace("jne    1 ", "jne    ff ")
    elsewhere = listing(DECODER).replace("jne    1 ", "jne    3 ")
    assert not any(gate.find(forward).values())
    assert not any(gate.find(elsewhere).values())


def test_spills_and_moves_are_counted():
    spilled = listing(DECODER + "vmovups 0x40(%rsp),%zmm1\nvmovdqa64 %zmm1,%zmm2\n")
    assert sizes(gate.find(spilled), "exponent_1") == [10]


def test_the_worst_copy_counts_and_a_loop_that_is_gone_is_a_failure():
    found = gate.find(listing(DECODER) + listing(DECODER + "nop", name="b"), gate.LOOPS[:1])
    assert gate.costs(found, model=False) == {"exponent_1": (9, None)}
    with pytest.raises(SystemExit, match="exponent_own_2"):
        gate.costs(gate.find(listing(DECODER)), model=False)


def test_more_than_ten_percent_is_a_failure_and_says_which():
    kept, prototype = {"a": (20.0, 5.0), "b": (40.0, 9.0)}, {"a": (19.0, 5.0)}
    assert gate.compared({"a": (20.9, 5.5), "b": (30.0, 8.0)}, kept, prototype)[1] == []
    assert gate.compared({"a": (22.0, 5.5), "b": (44.0, 9.0)}, kept, prototype)[1] == [
        "a takes 22.00 instructions, the prototype's 19.00"
    ]
    assert gate.compared({"a": (19.0, 5.6), "b": (45.0, None)}, kept, prototype)[1] == [
        "a takes 5.60 cycles, the table's 5.00",
        "a takes 5.60 cycles, the prototype's 5.00",
        "b takes 45.00 instructions, the table's 40.00",
    ]
    assert gate.compared({"a": (20.0, 5.0)}, kept, prototype)[1] == ["b is gone"]


def test_the_tables_are_of_these_loops_and_within_ten_percent_of_the_prototypes():
    ours, prototype = (gate.table(path.read_text()) for path in (gate.TABLE, gate.PROTOTYPE))
    assert list(ours) == [each.name for each in gate.LOOPS]
    assert set(prototype) <= set(ours)
    assert len(prototype) >= 12
    assert gate.compared(ours, ours, prototype)[1] == []


def test_without_llvm_mca_the_gate_says_what_to_install(monkeypatch):
    monkeypatch.setattr(
        gate.shutil, "which", lambda program: None if "mca" in program or "apt" in program else program
    )
    with pytest.raises(
        SystemExit, match=r"llvm-mca-19 is missing; .* apt-get install llvm-19\), or pass --counts"
    ):
        gate.needed(model=True)
    gate.needed(model=False)
