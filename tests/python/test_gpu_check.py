"""Promise: `python -m xorz.gpu_check` runs its comparisons, and notices what differs. On the CPU: no GPU is needed."""

import json

import pytest
import torch
from xorz import gpu_check

CPU = torch.device("cpu")


def test_it_runs_and_writes_what_it_found(tmp_path, capsys):
    found = tmp_path / "found.json"
    with torch.no_grad():
        code = gpu_check.main(["--device", "cpu", "--quick", "--json", str(found)])
    said = capsys.readouterr().out
    assert code == 0 and "FAIL" not in said
    facts = json.loads(found.read_text())
    assert facts["passed"] and facts["device"] == "CPU" and len(facts["checks"]) > 60
    assert f"{len(facts['checks'])} checks, 0 failed" in said
    # 4 deltas of one shape; 2 numbers of rows and the restore.
    assert len(facts["timings"]) == 12 and all(t["xorz_seconds"] > 0 for t in facts["timings"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu_check.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def one_word(t):
    wrong = t.clone()
    bits = wrong.view(gpu_check.BITS[t.element_size()]).view(-1)
    bits[len(bits) // 2] ^= 1
    return wrong


NAMES = ("delta_restore", "delta_linear", "delta_linear_grouped", "delta_embedding")
real = {name: getattr(gpu_check, name) for name in NAMES}


def noisy(*args, **kwargs):
    return real["delta_linear"](*args, **kwargs) * (1 + 1e-2 * torch.rand(()))


def of_company(x, weight, delta, bias=None, *, mode="fast"):
    """A row's bits that depend on how many there are."""
    y = real["delta_linear"](x, weight, delta, bias, mode=mode)
    return one_word(y) if len(x) == 1 else y


MUTANTS = {
    "a bit of the restored": (
        "delta_restore",
        lambda b, d: one_word(real["delta_restore"](b, d)),
        "restore and apply",
    ),
    "nothing applied": ("delta_apply_", lambda w, d: w, "restore and apply"),
    "delta ignored": (
        "delta_linear",
        lambda x, w, d, b=None, *, mode="fast": torch.nn.functional.linear(x, w, b),
        "delta_linear, bound",
    ),
    "a bit of the product": (
        "delta_linear",
        lambda *args, **kwargs: one_word(real["delta_linear"](*args, **kwargs)),
        "delta_linear, one-hot",
    ),
    "other bits each time": ("delta_linear", noisy, "delta_linear, again"),
    "bits that depend on company": ("delta_linear", of_company, "delta_linear, deterministic"),
    "rows of the neighbour": (
        "delta_linear_grouped",
        lambda x, w, a, s, rows, b: real["delta_linear_grouped"](x, w, a, s, rows.roll(1), b),
        "distinct, bound",
    ),
    "a bit of the grouped product": (
        "delta_linear_grouped",
        lambda *args: one_word(real["delta_linear_grouped"](*args)),
        "exact sums",
    ),
    "rows of the neighbour's table": (
        "delta_embedding",
        lambda i, w, a, s, rows: real["delta_embedding"](i, w, a, s, rows.roll(1)),
        "delta_embedding, distinct",
    ),
    "the base's rows": (
        "delta_embedding",
        lambda i, w, a, s, rows: real["delta_embedding"](i, w, a, s, torch.full_like(rows, -1)),
        "delta_embedding, one tenant",
    ),
    "a bit of a row": (
        "delta_embedding",
        lambda *args: one_word(real["delta_embedding"](*args)),
        "delta_embedding, base",
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_it_notices(mutant, monkeypatch):
    name, wrong, noticed_by = MUTANTS[mutant]
    monkeypatch.setattr(gpu_check, name, wrong)
    report = gpu_check.Report("CPU")
    with torch.no_grad():
        if name == "delta_linear":
            gpu_check.check_linear(report, CPU, (37, 300), [1, 5])
        elif name == "delta_linear_grouped":
            gpu_check.check_grouped(report, CPU, (37, 300), [7])
        elif name == "delta_embedding":
            gpu_check.check_embedding(report, CPU, [(37, 300)], [7])
        else:
            gpu_check.check_restores(report, CPU, [(33, 300)])
    failed = [check["check"] for check in report.checks if not check["passed"]]
    assert not report.passed and any(noticed_by in check for check in failed), failed
    assert all(check["wrong"] for check in report.checks if not check["passed"])
