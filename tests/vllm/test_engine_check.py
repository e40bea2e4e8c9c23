"""Promise: `python -m xorz.gpu_check --vllm` finds vLLM's engine on the CPU right, by engines over each whole model without
xorz and by float64, `mode="exact"`, mixtures and a base that is updated in place included; and wrong where a tenant's package
holds another's words, or lacks one tensor.
"""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file
from xorz.gpu_check import serving
from xorz.gpu_check.family import BASE, TUNES, Family
from xorz.gpu_check.report import Report

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    """A family, its engines and what its plain ones say."""
    with torch.no_grad():
        kin = Family("qwen3", tmp_path_factory.mktemp("qwen3"), quick=True)
        engines = serving.Engines(kin, CPU, True, 600, timed=True)
        [eager, _exact, fast], _ = serving.ways_of(CPU, True, True)
        reference = serving.Reference(engines, dict.fromkeys(kin.folders, eager) | {BASE: fast})
    return kin, engines, reference, fast


def test_the_engine_is_found_right(tried, capsys):
    _kin, engines, reference, way = tried
    report = Report("CPU")
    with torch.no_grad():
        facts = serving.check_served(report, engines, reference, way)
    assert report.passed, report.checks
    by_phase = {check["check"].removeprefix("qwen3, fast: "): check for check in report.checks}
    assert list(by_phase) == [
        "together",
        "from the prefix cache",
        "while tenants come and go",
        "afterwards",
        "tenants that went have left nothing",
    ]
    everybody = [BASE, *TUNES]
    assert [by_phase[phase]["tenants"] for phase in list(by_phase)[:4]] == [everybody] * 3 + [everybody[:3]]
    assert [by_phase[phase]["answers"] for phase in list(by_phase)[:4]] == [12, 12, 19, 9]
    assert facts["device"] == "cpu" and any(
        "a GPU's memory does not grow" in what for what in report.left_out
    )
    assert [(t["who"], t["requests"]) for t in report.timings] == [
        ("the base", 1),
        ("one tenant", 1),
        ("eight tenants", 8),
    ]
    assert all(t["xorz_tokens_a_second"] > 0 < t["plain_tokens_a_second"] for t in report.timings)
    assert "tokens a second while decoding" in capsys.readouterr().out


def phases_of(report, way):
    """What was compared, and whose words those were."""
    found = {c["check"].split(f"{way.name}: ")[1]: c.get("tenants") for c in report.checks}
    assert report.passed, report.checks
    return found


def test_exact_sums_and_an_update_in_place_are_found_right(tried):
    _kin, engines, reference, _fast = tried
    way = serving.ways_of(CPU, True, True)[0][1]
    assert way.xorz == {"mode": "exact"}
    report = Report("CPU")
    with torch.no_grad():
        serving.check_served(report, engines, reference, way)
    found = phases_of(report, way)
    assert (found["after an update in place"], found["after it was rolled back"]) == (["all"], [BASE])


def test_a_mixture_is_found_right_and_its_base_updated(tmp_path):
    with torch.no_grad():
        kin = Family("mixtral", tmp_path, quick=True)
        engines = serving.Engines(kin, CPU, True, 600, timed=False)
        [eager, _exact, fast], _ = serving.ways_of(CPU, True, True)
        reference = serving.Reference(engines, dict.fromkeys(kin.folders, eager))
        report, way = Report("CPU"), dataclasses.replace(fast, update="all")
        serving.check_served(report, engines, reference, way)
    found = phases_of(report, way)
    assert found["together"] == [BASE, *TUNES]
    assert (found["after an update in place"], found["after it was rolled back"]) == (["all"], [BASE])


def lacking(kin, name, tensor):
    """The package of a fine-tune in which one tensor is the base's."""
    words = load_file(kin.folders[name] / "model.safetensors")
    words[tensor] = load_file(kin.folders[BASE] / "model.safetensors")[tensor]
    folder = kin.folder / "lacking"
    folder.mkdir()
    (folder / "config.json").write_bytes((kin.folders[name] / "config.json").read_bytes())
    save_file(words, folder / "model.safetensors", metadata={"format": "pt"})
    return kin.packed(folder, "lacking.xorz")


def test_an_engine_with_wrong_packages_is_found_wrong(tried, monkeypatch):
    kin, engines, reference, way = tried
    tensor = "model.layers.1.mlp.down_proj.weight"
    wrong = {"vectors": kin.packages["all"], "sparse": lacking(kin, "sparse", tensor)}
    monkeypatch.setattr(kin, "packages", kin.packages | wrong)
    monkeypatch.setattr(engines, "timed", False)
    report = Report("CPU")
    with torch.no_grad():
        serving.check_served(report, engines, reference, way)
    found = {check["check"].split(": ")[-1]: check["wrong"] for check in report.checks if not check["passed"]}
    # Whoever came and went left nothing all the same; afterwards the one who came anew was all's by right.
    assert set(found) == {"together", "from the prefix cache", "while tenants come and go", "afterwards"}
    together = found["together"]
    assert "(vectors, prompt of" in together and "from another model's answer" in together
    assert "sparse: root mean square" in together and "all: root mean square" not in together
    assert "base: root mean square" not in together
