"""Promise: `python -m xorz.bench` measures what it says, on synthetic matrices and on the user's own model: a
rival's result is checked before it is timed; a table, JSON and a drawing; a mistake of the user is one
sentence."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from xorz.bench import models, plot, products, restore, rivals, tile, tunes
from xorz.bench.__main__ import main

ROOT = Path(__file__).parents[2]
FAST = ["--rounds", "1", "--tenants", "1,2,4", "--rows", "1,5"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """No need to read a gigabyte in order to see that a table has rows."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr("xorz.bench.__main__.bandwidth", lambda: 1e9)
    monkeypatch.setattr("xorz.bench.__main__.overhead", dict)
    yield
    torch.set_num_threads(threads)


def run(*arguments, tmp_path):
    """Exit code, what was written as JSON, and the drawing's words."""
    out, drawing = tmp_path / "out.json", tmp_path / "out.svg"
    code = main([*map(str, arguments), *FAST, "--json", str(out), "--plot", str(drawing)])
    found = json.loads(out.read_text()) if out.exists() else None
    text = " ".join(ET.fromstring(drawing.read_text()).itertext()) if drawing.exists() else ""
    return code, found, text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_synthetic_matrices_give_rows_json_and_a_drawing(dtype, tmp_path, capsys):
    code, found, text = run("--shapes", "48x64", "--changed", "3", "--dtypes", dtype, tmp_path=tmp_path)
    assert code == 0
    rows = found["rows"]
    assert [(r["T"], r["m"]) for r in rows] == [(1, 1), (2, 2), (4, 4), (1, 5)]
    wide = set() if dtype == "float32" else {"one32", "each32"}
    for row in rows:
        modes = {"determ", "exact"}
        each = {"each"} | wide if row["T"] > 1 else modes | wide - {"each32"}
        assert set(row["ms"]) == {"xorz", "one", "csr", "scatter", "notebook"} | each
        assert all(ms > 0 for ms in row["ms"].values())
        assert row["csr"] == pytest.approx(row["ms"]["csr"] / row["ms"]["xorz"])
    assert [r["encoding"] for r in found["restore"]] == ["sparse"]
    assert set(found["restore"][0]["ms"]) == {"xorz", "copy", "notebook"}
    (tiled,) = found["tile"]
    assert tiled["tile"] == "48x64" and set(tiled["us"]) == {"xorz", "frame", "patched", "slice"}
    assert tiled["frame"] == pytest.approx(tiled["us"]["frame"] / tiled["us"]["xorz"])
    printed = capsys.readouterr().out
    assert printed.count("48x64") == len(rows) + 3
    assert "48x64" in text and "notebook" in text and "tenants" in text


def checkpoint(path, layers, seed, base=None, share=0.05, dtype=torch.bfloat16):
    """A model of `layers` small layers and an embedding; a fine-tune of `base` if given."""
    g = torch.Generator().manual_seed(seed)
    if base is None:
        tensors = {"embed.weight": torch.randn(32, 16, generator=g), "norm.weight": torch.ones(16)}
        for i in range(layers):
            tensors[f"layers.{i}.up.weight"] = torch.randn(24, 16, generator=g)
            tensors[f"layers.{i}.down.weight"] = torch.randn(16, 24, generator=g)
        tensors = {name: t.to(dtype) for name, t in tensors.items()}
    else:
        tensors = {name: t if t.dim() < 2 else tunes.at_random(t, share, g) for name, t in base.items()}
    if path.suffix:
        save_file(tensors, path)
    else:
        path.mkdir()
        half = len(tensors) // 2
        save_file(dict(list(tensors.items())[:half]), path / "model-00001-of-00002.safetensors")
        save_file(dict(list(tensors.items())[half:]), path / "model-00002-of-00002.safetensors")
    return tensors


def test_a_model_of_ones_own_is_measured_shape_by_shape_and_as_a_whole(tmp_path, capsys):
    base = checkpoint(tmp_path / "base", 3, 0)
    checkpoint(tmp_path / "ann.safetensors", 3, 1, base)
    checkpoint(tmp_path / "bob", 3, 2, base)
    arguments = [tmp_path / "base", tmp_path / "ann.safetensors", tmp_path / "bob"]
    code, found, text = run(*arguments, tmp_path=tmp_path)
    assert code == 0, capsys.readouterr().err
    assert {r["shape"] for r in found["rows"]} == {"24x16", "16x24"}
    assert all(r["what"].endswith("x 3") for r in found["rows"])
    assert [t["T"] for t in found["whole"]] == [1, 2, 4]
    for total in found["whole"]:
        parts = [r["ms"] for r in found["rows"] if r["T"] == r["m"] == total["T"]]
        for name, ms in total["ms"].items():
            assert ms == pytest.approx(3 * sum(part[name] for part in parts))
    assert "all linear layers" in text and "all layers" in capsys.readouterr().out


def test_changed_shares_are_those_of_the_bits(tmp_path):
    base = checkpoint(tmp_path / "base.safetensors", 2, 0)
    tuned = checkpoint(tmp_path / "ann.safetensors", 2, 1, base, share=0.3)
    names = [n for n in base if n.endswith("up.weight")]
    (group,) = [
        g
        for g in models.groups(models.Checkpoint(str(tmp_path / "base.safetensors")), [])[0]
        if g.shape == (24, 16)
    ]
    opened = [models.Checkpoint(str(tmp_path / f"{n}.safetensors")) for n in ("base", "ann")]
    case = models.case(group, opened[0], opened[1:], 2, 1, "speed", False)
    want = sum((base[n].view(torch.int16) != tuned[n].view(torch.int16)).float().mean() for n in names) / 2
    assert models.changed(case) == pytest.approx(want.item()) and want > 0.2


def wrong(call):
    """A rival that forgets the fine-tune."""

    def instead(x, parts, base, tenants):
        return torch.nn.functional.linear(x, base)

    return instead


@pytest.mark.parametrize("name", products.SLOW)
@pytest.mark.parametrize("count", [1, 2])
def test_a_rival_that_is_wrong_is_not_timed(name, count, monkeypatch):
    case = products.synthetic(32, 48, torch.bfloat16, 0.01, "random", 2, "speed", True)
    case.measure(2, count, 1, 1e9)
    monkeypatch.setitem(rivals.RIVALS, name, wrong(rivals.RIVALS[name]))
    with pytest.raises(AssertionError, match=name):
        case.measure(2, count, 1, 1e9)


def test_a_wrong_product_or_matrix_of_ours_is_not_timed():
    case = products.synthetic(32, 48, torch.bfloat16, 0.01, "random", 1, "speed", False)
    first = case.tenants[1][0]
    first.delta = torch.ops.xorz.delta_encode(case.bases[1], case.bases[1])
    with pytest.raises(AssertionError, match="xorz"):
        case.measure(1, 1, 1, 1e9)
    with pytest.raises(AssertionError, match="other bits"):
        restore.measure(case, 1)
    with pytest.raises(AssertionError, match="xorz gives back other bits than the fine-tune's tile"):
        tile.measure(case, 1)


def test_without_zstandard_the_notebook_is_left_out(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(rivals, "zstandard", None)
    code, found, _ = run("--shapes", "16x32", "--changed", "3", tmp_path=tmp_path)
    assert code == 0 and "pip install zstandard" in capsys.readouterr().out
    assert all("notebook" not in row["ms"] for row in found["rows"] + found["restore"])
    assert set(found["tile"][0]["us"]) == {"xorz", "slice"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["base.safetensors"], "a model takes two: BASE FT"),
        (["base.safetensors", "missing.safetensors"], "missing.safetensors: no such file"),
        (["base.safetensors", "empty"], "empty: no *.safetensors in this folder"),
        (["base.safetensors", "notes.txt"], "notes.txt: not a safetensors file"),
        (["base.safetensors", "other.safetensors"], "no matrix of F32, BF16 or F16 that"),
    ],
)
def test_what_the_user_can_put_right_is_a_sentence(arguments, sentence, tmp_path, capsys):
    checkpoint(tmp_path / "base.safetensors", 1, 0)
    checkpoint(tmp_path / "other.safetensors", 1, 0, dtype=torch.float32)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    code = main([str(tmp_path / a) for a in arguments])
    assert code in (1, 2) and sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [["--shapes", "4096"], ["--dtypes", "int8"], ["--kinds", "sgd"], ["--changed", "x"]]
)
def test_options_that_mean_nothing_are_refused(options, capsys):
    with pytest.raises(SystemExit) as error:
        main(options)
    assert error.value.code == 2 and options[0] in capsys.readouterr().err


def test_little_memory_means_fewer_matrices_then_fewer_tenants():
    group = models.Group((1024, 1024), torch.bfloat16, [f"layers.{i}" for i in range(32)])
    each = 8 * 1024 * 1024
    assert models.affordable(group, 16, 1 << 40) == (32, 16)
    assert models.affordable(group, 16, 2 * 16 * each * 5) == (2, 16)
    assert models.affordable(group, 16, 2 * 4 * each * 4) == (1, 4)
    assert models.affordable(group, 16, each) == (0, 0)


def test_a_drawing_of_one_point_or_of_none_is_still_one():
    panels = [plot.Panel("a < b", {"xorz": [(1, 2.0)]}), plot.Panel("empty", {})]
    text = " ".join(ET.fromstring(plot.svg(panels, "x", "y", "a & b")).itertext())
    assert "a < b" in text and "empty: nothing measured" in text and "a & b" in text


def test_make_bench_is_the_same_program():
    command = [sys.executable, "benches/bench.py", "--help"]
    by_make = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    installed = [sys.executable, "-m", "xorz.bench", "--help"]
    alone = subprocess.run(installed, cwd="/", capture_output=True, text=True, check=True).stdout
    options = {word.rstrip(",") for word in alone.split() if word.startswith("--")}
    today = {"--shapes", "--dtypes", "--changed", "--kinds", "--prefer", "--tenants", "--rows", "--no-rivals"}
    assert today | {"--rounds", "--full", "--quick", "--json", "--plot"} <= options
    assert "--pairs" in by_make and "--pairs" not in alone
