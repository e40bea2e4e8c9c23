"""Promise: `python -m xorz.gpu_check` runs its comparisons, notices what differs, and says what it could not do. On the CPU: no
GPU is needed.
"""

import contextlib
import itertools
import json
import subprocess
import sys

import pytest
import torch
import xorz
from xorz.gpu_check import __main__ as gpu_check
from xorz.gpu_check import models, ops, timings
from xorz.gpu_check.report import BITS, Report

CPU = torch.device("cpu")


def test_it_runs_and_writes_what_it_found(tmp_path, capsys):
    found = tmp_path / "found.json"
    with torch.no_grad():
        code = gpu_check.main(["--device", "cpu", "--quick", "--json", str(found)])
    said = capsys.readouterr().out
    assert code == 0 and "FAIL" not in said, said
    facts = json.loads(found.read_text())
    assert facts["passed"] and facts["device"] == "CPU" and len(facts["checks"]) > 120
    assert f"{len(facts['checks'])} checks, 0 failed" in said
    # 4 deltas of one shape: 2 numbers of rows of one tenant, of eight tenants one, and the restore.
    assert len(facts["timings"]) == 16 and all(t["xorz_seconds"] > 0 for t in facts["timings"])
    assert {(t["tenants"], t["m"]) for t in facts["timings"]} == {(1, 1), (1, 8), (8, 8), (1, "restore")}
    rate = facts["facts"]["copy_gigabytes_per_second"] * 1e9
    for t in facts["timings"]:
        moved = (256 * 512 * 2) * (2 if t["m"] == "restore" else 1) + t["delta_over_base"] * 256 * 512 * 2
        assert t["share_of_a_copy"] == pytest.approx(moved / t["xorz_seconds"] / rate, rel=1e-6)
        assert t["ratio"] == pytest.approx(t["xorz_seconds"] / t["plain_seconds"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu_check.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    # As users call it.
    done = subprocess.run([sys.executable, "-m", "xorz.gpu_check"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("xorz: torch sees no CUDA device"), done.stderr


def test_where_no_kernel_runs_it_says_why(monkeypatch, capsys):
    def without(base, delta):
        raise RuntimeError("xorz was built without CUDA kernels: XORZ_CUDA was 0")

    monkeypatch.setattr(gpu_check, "delta_restore", without)
    assert gpu_check.main(["--device", "cpu"]) == 2
    assert "built without CUDA kernels: XORZ_CUDA was 0" in capsys.readouterr().err


def test_an_error_in_a_check_is_found_and_ends_no_other(monkeypatch, tmp_path, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(ops, "delta_linear_grouped", broken)
    monkeypatch.setattr(timings, "delta_linear", broken)
    found = tmp_path / "found.json"
    assert gpu_check.main(["--device", "cpu", "--quick", "--json", str(found)]) == 1
    failed = [c for c in json.loads(found.read_text())["checks"] if not c["passed"]]
    assert [c["check"] for c in failed] == [
        "delta_linear_grouped, exact runs",
        "delta_linear_grouped runs",
        "timings runs",
    ]
    assert all("illegal memory access" in c["wrong"] for c in failed)
    assert "ok   delta_embedding" in capsys.readouterr().out


def test_what_there_is_no_time_for_is_left_out(capsys):
    report = Report("CPU")
    timings.time_all(report, CPU, [(64, 128)], [1], 8, 1, until=-1.0, quick=True)
    assert report.timings == [] and len(report.left_out) == 4
    assert "left out: timings of 64 x 128, 0.01 changed" in capsys.readouterr().out
    # What is left out is no failure, and no success either.
    assert not report.passed
    assert json.loads(report.json())["left_out"] == report.left_out


def sanitizer(tmp_path, monkeypatch, script: str):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    report = Report("CPU")
    gpu_check.check_memory(report, torch.device("cuda:0"))
    return report


def test_the_memory_checker_is_asked_where_there_is_one(tmp_path, monkeypatch):
    report = Report("CPU")
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: None)
    gpu_check.check_memory(report, torch.device("cuda:0"))
    assert (
        report.checks == [] and "compute-sanitizer (of CUDA's toolkit) is not on PATH" in report.left_out[0]
    )
    monkeypatch.undo()
    report = sanitizer(
        tmp_path, monkeypatch, 'echo "$@" > "$0.asked"; echo "$PYTORCH_NO_CUDA_MEMORY_CACHING" >> "$0.asked"'
    )
    asked = (tmp_path / "compute-sanitizer.asked").read_text()
    assert (
        report.passed
        and "-m xorz.gpu_check --device cuda:0 --quick --no-timings --no-memcheck --no-graphs\n1\n" in asked
    )
    report = sanitizer(tmp_path, monkeypatch, 'echo "Invalid __global__ read of size 2 bytes"; exit 9')
    assert not report.passed and "exit code 9: Invalid __global__ read" in report.checks[0]["wrong"]
    monkeypatch.setattr(gpu_check, "MEMCHECK_SECONDS", 0.1)
    report = sanitizer(tmp_path, monkeypatch, "exec sleep 5")
    assert report.checks == [] and "not done in 0.1 s" in report.left_out[0]


def one_word(t):
    wrong = t.clone()
    bits = wrong.view(BITS[t.element_size()]).view(-1)
    bits[len(bits) // 2] ^= 1
    return wrong


NAMES = (
    "delta_restore",
    "delta_linear",
    "delta_linear_grad_input",
    "delta_linear_grouped",
    "delta_embedding",
    "delta_encode",
    "delta_slice",
    "delta_concat",
    "delta_digest",
)
real = {name: getattr(ops, name) for name in NAMES}
TURNS = itertools.count()


def noisy(*args, **kwargs):
    return real["delta_linear"](*args, **kwargs) * (1 + 1e-2 * torch.rand(()))


def of_company(x, weight, delta, bias=None, *, mode="fast"):
    """A row's bits that depend on how many there are."""
    y = real["delta_linear"](x, weight, delta, bias, mode=mode)
    return one_word(y) if len(x) == 1 else y


def of_grouped_company(x, w, a, s, rows, b, *, mode="fast"):
    y = real["delta_linear_grouped"](x, w, a, s, rows, b, mode=mode)
    return one_word(y) if mode == "deterministic" and len(x) == 1 else y


def inexact(*args, mode="fast", **kwargs):
    return real["delta_linear"](*args, mode="fast" if mode == "exact" else mode, **kwargs)


def grouped(change):
    """`delta_linear_grouped` with its arguments or its result changed, in mode fast."""

    def mutant(x, w, a, s, rows, b, *, mode="fast"):
        call = real["delta_linear_grouped"]
        return call(x, w, a, s, rows, b, mode=mode) if mode != "fast" else change(call, x, w, a, s, rows, b)

    return mutant


MUTANTS = {
    "a bit of the restored": (
        "delta_restore",
        lambda b, d: one_word(real["delta_restore"](b, d)),
        "restore and apply",
    ),
    "nothing applied": ("delta_apply_", lambda w, d: w, "restore and apply"),
    "another base applied": (
        "delta_apply_",
        lambda w, d: w.copy_(real["delta_restore"](w, d)),
        "restore and apply",
    ),
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
    "exact that is not": ("delta_linear", inexact, "delta_linear, exact"),
    "rows of the neighbour": (
        "delta_linear_grouped",
        grouped(lambda call, x, w, a, s, rows, b: call(x, w, a, s, rows.roll(1), b)),
        "distinct, bound",
    ),
    "a bit of the grouped product": (
        "delta_linear_grouped",
        grouped(lambda call, *args: one_word(call(*args))),
        "exact sums",
    ),
    "grouped bits that depend on company": (
        "delta_linear_grouped",
        of_grouped_company,
        "delta_linear_grouped, distinct, deterministic",
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
    "a byte of what is made": (
        "delta_encode",
        lambda *args, **kwargs: one_word(real["delta_encode"](*args, **kwargs)),
        "delta_encode",
    ),
    "other columns cut": (
        "delta_slice",
        lambda d, b, dim, start, end: real["delta_slice"](d, b, dim, start - 1, end - 1),
        "delta_slice",
    ),
    "nothing joined": (
        "delta_concat",
        lambda deltas, bases, dim: real["delta_encode"](torch.cat(bases), torch.cat(bases)),
        "delta_concat",
    ),
    "gradients of the base": (
        "delta_linear_grouped_grad_input",
        lambda grad, weight, *tenants: real["delta_linear_grad_input"](
            grad, weight, real["delta_encode"](weight, weight)
        ),
        "gradients for the input, exact sums",
    ),
    "grouped exact that is not": (
        "delta_linear_grouped",
        lambda *given, mode: real["delta_linear_grouped"](*given) * 1.001,
        "delta_linear_grouped, exact",
    ),
    "nothing checked": ("delta_check", lambda delta, base: None, "delta_check"),
    # Here both are the CPU's; every second one is wrong.
    "a bit of a digest": (
        "delta_digest",
        lambda base: one_word(real["delta_digest"](base)) if next(TURNS) % 2 else real["delta_digest"](base),
        "delta_digest",
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_it_notices(mutant, monkeypatch):
    name, wrong, noticed_by = MUTANTS[mutant]
    monkeypatch.setattr(ops, name, wrong)
    report = Report("CPU")
    with torch.no_grad():
        if mutant == "exact that is not":
            ops.check_exact(report, CPU, (37, 300), [1, 5])
        elif mutant == "grouped exact that is not":
            ops.check_exact_grouped(report, CPU, (37, 300), [7])
        elif name == "delta_linear_grouped_grad_input":
            ops.check_gradients(report, CPU, (37, 300), [7])
        elif name == "delta_linear":
            ops.check_linear(report, CPU, (37, 300), [1, 5])
        elif name == "delta_linear_grouped":
            ops.check_grouped(report, CPU, (37, 300), [7])
        elif name == "delta_embedding":
            ops.check_embedding(report, CPU, [(37, 300)], [7])
        elif name in ("delta_encode", "delta_slice", "delta_concat", "delta_check", "delta_digest"):
            ops.check_round_trip(report, CPU, (37, 300))
        else:
            ops.check_restores(report, CPU, [(33, 300)])
    failed = [check["check"] for check in report.checks if not check["passed"]]
    assert not report.passed and any(noticed_by in check for check in failed), failed
    assert all(check["wrong"] for check in report.checks if not check["passed"])


class Others:
    """Tenants in which something is done wrong."""

    def __init__(self, inner, wrong):
        self.inner, self.wrong = inner, wrong

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def use(self, names):
        return self.inner.use(self.wrong.get("use", lambda n: n)(names))

    def swap(self, name, source):
        if "swap" not in self.wrong:
            self.inner.swap(name, source)


def turned(names):
    return [*names[1:], names[0]] if isinstance(names, tuple) else names


WRONG_TENANTS = {
    "the base for all": ({"use": lambda names: None}, ["alice alone", "mixed,"]),
    "the row of another": ({"use": turned}, ["mixed,", "mixed again"]),
    "one for all": ({"use": lambda names: "alice"}, ["bob alone", "the base alone", "mixed,"]),
    "no swap": ({"swap": True}, ["swapped"]),
}


@pytest.mark.parametrize("mutant", WRONG_TENANTS)
def test_it_notices_a_model_that_is_served_wrong(mutant, monkeypatch):
    wrong, noticed_by = WRONG_TENANTS[mutant]
    real_attach = models.attach
    monkeypatch.setattr(models, "attach", lambda *args, **kwargs: Others(real_attach(*args, **kwargs), wrong))
    report = Report("CPU")
    with torch.no_grad():
        models.check_model(report, CPU, 32)
    failed = [f"{check['check']}," for check in report.checks if not check["passed"]]
    for what in noticed_by:
        assert sum(f"attach, {what}" in check for check in failed) == 3, (what, failed)


def another_word(model, delta):
    xorz.apply_(model, delta)
    with torch.no_grad():
        model.blocks[1].down.weight.view(torch.int16)[-1, -1] ^= 1


def whatever_it_was(model, delta):
    with contextlib.suppress(ValueError):
        xorz.apply_(model, delta)


@pytest.mark.parametrize("mutant", [another_word, whatever_it_was, lambda model, delta: None])
def test_it_notices_a_model_that_is_changed_wrong(mutant, monkeypatch):
    report = Report("CPU")
    with torch.no_grad():
        models.check_applied(report, CPU, 32)
        assert report.passed and len(report.checks) == 2
        monkeypatch.setattr(models, "apply_", mutant)
        models.check_applied(report, CPU, 32)
    assert [check["passed"] for check in report.checks] == [True, True, False, False]


def test_it_notices_other_tokens(monkeypatch):
    pytest.importorskip("transformers")
    real_attach = models.attach
    for wrong in ({}, {"use": turned}):
        monkeypatch.setattr(models, "attach", lambda *a, w=wrong, **k: Others(real_attach(*a, **k), w))
        report = Report("CPU")
        with torch.no_grad():
            models.check_generate(report, CPU)
        assert report.passed == (not wrong), report.checks
