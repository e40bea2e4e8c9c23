"""Promise: `benches/sizes.py` compares schemes that are exact and what they are said to be: each gives every file back, a rival
takes the bytes that its scheme must take, an inexact result is no row of the table, and the table says where xorz loses."""

import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[2] / "benches"))
import schemes
import sizes


@pytest.fixture
def pair(tmp_path):
    """A base and a fine-tune of every kind of tensor that a scheme must bring back."""
    generator = torch.Generator().manual_seed(9)
    base = {
        "bf16": torch.randn(700, 300, generator=generator).bfloat16(),
        "f32": torch.randn(64, 129, generator=generator),
        "same": torch.randn(50, 50, generator=generator).half(),
        "bytes": torch.arange(1001).to(torch.uint8),
        "other": torch.zeros(3, 4),
        "none": torch.zeros(0, 4),
        "far": torch.zeros(200_000, dtype=torch.bfloat16),
    }
    tuned = {name: t.clone() for name, t in base.items()}
    tuned["bf16"].view(torch.int16).view(-1)[::97] ^= 3
    tuned["f32"] += 1e-3
    tuned["bytes"][::5] += 1
    tuned["other"] = torch.randn(4, 3, generator=generator)
    tuned["new"] = torch.randn(17, generator=generator).double()
    tuned["far"][150_000] = 1.0
    save_file(base, tmp_path / "base", metadata={"format": "pt"})
    save_file(tuned, tmp_path / "ft")
    return schemes.Checkpoint(str(tmp_path / "base")), schemes.Checkpoint(str(tmp_path / "ft"))


@pytest.mark.parametrize("name", schemes.SCHEMES)
def test_every_scheme_gives_the_file_back(name, pair, tmp_path):
    base, tuned = pair
    schemes.write(str(tmp_path / "packed"), schemes.pack(schemes.SCHEMES[name](), base, tuned))
    packed = (tmp_path / "packed").read_bytes()
    schemes.write(str(tmp_path / "out"), schemes.unpack(schemes.SCHEMES[name](), base, packed))
    assert (tmp_path / "out").read_bytes() == (tmp_path / "ft").read_bytes()
    with pytest.raises(Exception):  # noqa: B017  # whatever numpy or zstd say
        list(schemes.unpack(schemes.SCHEMES[name](), base, packed[: len(packed) // 2]))


def test_rivals_take_what_their_schemes_must_take(pair):
    base, tuned = pair
    old, new = base.bytes("bf16"), tuned.bytes("bf16")
    changed = int((old.view("<u2") != new.view("<u2")).sum())
    assert changed == -(-700 * 300 // 97)
    positions = schemes.SCHEMES["positions"]().encode(old, new, 2)
    assert sum(map(len, positions)) == 6 * changed
    gaps = schemes.SCHEMES["gaps-1"]().encode(old, new, 2)
    assert sum(map(len, gaps)) == 4 * changed and set(np.frombuffer(gaps[0], "<u2")[1:]) == {97}
    far = schemes.SCHEMES["gaps-1"]().encode(base.bytes("far"), tuned.bytes("far"), 2)
    assert len(far[0]) == 4, "a gap of more than 16 bits"
    planes = schemes.SCHEMES["planes-3"]().encode(old, new, 2)
    inflate = schemes.SCHEMES["planes-3"]().inflate
    assert inflate(planes[1]) == bytes(len(old) // 2) and sum(b != 0 for b in inflate(planes[0])) == changed
    [frame] = schemes.SCHEMES["xor-1"]().encode(old, new, 2)
    assert inflate(frame) == (old ^ new).tobytes()


def test_an_inexact_result_is_no_row(pair, tmp_path):
    job = sizes.Job("rival", "unpack", 1, [], tmp_path / "out")
    scheme = sizes.Scheme("rival", [], [], jobs={"unpack": job})
    data = bytearray((tmp_path / "ft").read_bytes())
    for keeps in (True, False):
        scheme.keeps_file = keeps
        (tmp_path / "out").write_bytes(data)
        sizes.check(scheme, tmp_path / "ft")
        data[-1] ^= 1
        (tmp_path / "out").write_bytes(data)
        with pytest.raises(SystemExit, match="not exact"):
            sizes.check(scheme, tmp_path / "ft")
        data[-1] ^= 1
    # The same tensors behind another header are enough for those who keep tensors, and for nobody else.
    length = struct.unpack("<Q", data[:8])[0]
    header = json.dumps(json.loads(data[8 : 8 + length])).encode()
    (tmp_path / "out").write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    sizes.check(scheme, tmp_path / "ft")
    scheme.keeps_file = True
    with pytest.raises(SystemExit, match="not exact"):
        sizes.check(scheme, tmp_path / "ft")


def test_the_tables_name_the_best_and_say_where_xorz_loses(tmp_path):
    rows = {
        "xorz": {"bytes": 10, "bits": 0.5, "pack": 1.0, "unpack": 2.0},
        "rival": {"bytes": 9, "bits": 0.45, "pack": 2.0, "unpack": 1.0},
    }
    (tmp_path / "ft").write_bytes(bytes(1000))
    case = sizes.Case("pair", tmp_path / "ft", tmp_path / "ft", True, 160, 0.25, rows)
    assert "| rival | **0.450** |" in sizes.size_table([case]) and "pair (25 %)" in sizes.size_table([case])
    text = sizes.losses([case])
    assert "pair: rival (0.45) against 0.5" in text and "Decodes quicker than xorz: rival (1 of 1)" in text
    assert "Encodes quicker than xorz: nobody" in text
    rows["rival"]["bits"] = 0.6
    assert "nobody, on none of these" in sizes.losses([case])
    page = tmp_path / "page.md"
    page.write_text(f"before\n{sizes.MARKS[0]}\nold\n{sizes.MARKS[1]}\nafter\n")
    sizes.insert(page, "new")
    assert page.read_text() == f"before\n{sizes.MARKS[0]}\n\nnew\n\n{sizes.MARKS[1]}\nafter\n"
    page.write_text("nothing")
    with pytest.raises(SystemExit, match="marks"):
        sizes.insert(page, "new")


def test_the_results_hold_the_tables_that_the_command_makes():
    page = (Path(__file__).parents[2] / "docs" / "results.md").read_text()
    inside = page.partition(sizes.MARKS[0])[2].partition(sizes.MARKS[1])[0]
    names = [s.name for s in sizes.schemes("xorz", Path(__file__), Path(__file__))]
    assert len(names) == 12
    for name in names:
        assert inside.count(f"| {name} |") >= 2, name
    assert "Where xorz loses, as counted" in inside and "python benches/sizes.py" in inside
