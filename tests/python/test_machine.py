"""What depends on the processor: `prefer="auto"`, and whose product many rows of x are."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
import xorz
from xorz import _core


def run(code, **environment):
    """stdout and stderr of a fresh process, since the processor is asked once."""
    environment = {**os.environ, **environment}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.split(), done.stderr


ENCODE = """
    import torch, xorz
    torch.manual_seed(0)
    base = (0.02 * torch.randn(64, 256)).bfloat16()
    tuned = (base.float() + 1e-5 * torch.randn(64, 256)).bfloat16()
    delta = xorz.delta_encode(base, tuned{})
    assert torch.equal(xorz.delta_restore(base, delta).view(torch.int16), tuned.view(torch.int16))
    print(xorz.delta_info(delta).encoding)
"""


def isas():
    """The instruction sets that this machine has."""
    probe = "import torch, xorz; xorz.delta_encode(torch.zeros(2, 2), torch.ones(2, 2)); print('ok')"
    for isa in ("scalar", "avx2", "avx512", "avx512vbmi2", "avx512bf16"):
        command = [sys.executable, "-c", probe]
        done = subprocess.run(command, env={**os.environ, "XORZ_ISA": isa}, capture_output=True, text=True)
        if done.returncode == 0:
            yield isa


def test_auto_is_memory_where_decoding_keeps_up_and_speed_elsewhere_and_the_trace_says_why():
    seen = []
    for isa in isas():
        for asked in ("", ', prefer="auto"'):
            (encoding,), said = run(ENCODE.format(asked), XORZ_ISA=isa, XORZ_TRACE="1")
            keeps_up = isa == "avx512bf16"
            assert encoding == ("exponent" if keeps_up else "sparse"), isa
            aim = "Memory: decoding keeps up" if keeps_up else "Speed: decoding does not keep up"
            assert said.count(f"xorz: prefer=auto is {aim} with memory on {isa}") == 1, said
        seen.append(isa)
    assert "scalar" in seen and "avx2" in seen


def test_auto_is_one_of_the_words_everywhere_and_others_are_refused():
    base = (0.02 * torch.randn(64, 256)).bfloat16()
    tuned = (base.float() + 1e-5 * torch.randn(64, 256)).bfloat16()
    here = xorz.delta_info(xorz.delta_encode(base, tuned, prefer=_core.resolved("auto"))).encoding
    delta = xorz.diff({"w": base}, {"w": tuned}, prefer="auto")
    assert xorz.delta_info(delta.deltas["w"]).encoding == here
    with pytest.raises(RuntimeError, match='prefer must be "auto", "speed" or "memory", but is "small"'):
        xorz.delta_encode(base, tuned, prefer="small")


LINEAR = """
    import torch, xorz
    from torch.nn.functional import linear
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    same = []
    for n, k, bias in ((1100, 256, True), (513, 7, False), (3, 4100, True), (64, 1, False)):
        base = torch.randn(n, k).bfloat16()
        tuned = torch.where(torch.rand(n, k) < 0.1, base * 1.01, base)
        b = torch.randn(n).bfloat16() if bias else None
        delta = xorz.delta_encode(base, tuned)
        for shape in ((17, k), (2, 30, k), (16, k)):
            x = torch.randn(shape).bfloat16()
            got, torchs = torch.ops.xorz.delta_linear(x, base, b, delta), linear(x, tuned, b)
            want = linear(x.double(), tuned.double(), b.double() if bias else None)
            near = (x.double().abs() @ tuned.double().abs().T + 1) * (2**-8 + k * 2**-23)
            assert got.dtype == torch.bfloat16 and got.shape == torchs.shape
            assert bool(((got.double() - want).abs() <= near).all()), (n, k, shape)
            if x.numel() // k > 16:
                same.append(torch.equal(got.view(torch.int16), torchs.view(torch.int16)))
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.ops.xorz.delta_linear(torch.ones(40, k).bfloat16(), base, b, delta).dtype == torch.bfloat16
    print(*same)
"""


def test_many_rows_are_torchs_to_multiply_where_it_has_matrix_units():
    same, said = run(LINEAR, XORZ_COSTS="torch_panels=1", XORZ_TRACE="1")
    assert "17 rows of one tenant: torch's product on restored panels" in said
    assert len(same) == 8 and set(same) == {"True"}
    # Without them the product is xorz's own, where it has one of its own for bf16.
    run(LINEAR, XORZ_COSTS="torch_panels=0")


GROUPED = """
    import torch, xorz
    from torch.nn.functional import linear
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    same = []
    for n, k, biased in ((1100, 256, True), (513, 7, False), (64, 1, True)):
        base = torch.randn(n, k).bfloat16()
        tuned = [torch.where(torch.rand(n, k) < 0.1, base * 1.01, base) for _ in range(3)]
        deltas = [xorz.delta_encode(base, t) for t in tuned]
        ends = torch.tensor([0] + [d.numel() for d in deltas]).cumsum(0)
        slots = torch.stack([ends[:-1], ends[1:] - ends[:-1]], 1)
        biases = torch.randn(4, n).bfloat16() if biased else None
        # 18 rows of tenant 0, 5 of tenant 1, 20 of the base, 17 of tenant 2; in one call nobody has more than 16.
        for counts in ((18, 5, 20, 17), (16, 1, 0, 16), (40, 0, 0, 0)):
            tenants = torch.tensor([0] * counts[0] + [1] * counts[1] + [-1] * counts[2] + [2] * counts[3])
            tenants = tenants[torch.randperm(len(tenants))].int()
            x = torch.randn(len(tenants), k).bfloat16()
            got = torch.ops.xorz.delta_linear_grouped(x, base, biases, torch.cat(deltas), slots, tenants)
            assert got.dtype == torch.bfloat16 and got.shape == (len(tenants), n)
            for t in tenants.unique().tolist():
                rows, w = tenants == t, base if t < 0 else tuned[t]
                b = biases[t] if biased else None
                torchs = linear(x[rows], w, b)
                want = linear(x[rows].double(), w.double(), b.double() if biased else None)
                size = x[rows].double().abs() @ w.double().abs().T + (b.double().abs() if biased else 0)
                near = size * (2**-7 + k * 2**-23)
                assert bool(((got[rows].double() - want).abs() <= near).all()), (n, k, counts, t)
                if rows.sum() > 16:
                    same.append(torch.equal(got[rows].view(torch.int16), torchs.view(torch.int16)))
    with torch.autocast("cpu", dtype=torch.float16):
        got = torch.ops.xorz.delta_linear_grouped(x, base, biases, torch.cat(deltas), slots, tenants)
        assert got.dtype == torch.bfloat16
    print(*same)
"""


def test_many_rows_of_a_tenant_in_a_mixed_batch_are_torchs_to_multiply_where_it_has_matrix_units():
    same, said = run(GROUPED, XORZ_COSTS="torch_panels=1", XORZ_TRACE="1")
    assert {f"{rows} rows of one tenant: torch's product" in said for rows in (17, 18, 20, 40)} == {True}
    assert "16 rows of one tenant: torch's" not in said and "60 rows of one tenant" not in said
    assert len(same) == 12 and set(same) == {"True"}
    run(GROUPED, XORZ_COSTS="torch_panels=0")


def test_bf16_words_are_widened_where_the_dot_product_is_slow():
    run(LINEAR, XORZ_COSTS="torch_panels=0,widen_from=4")
    run(LINEAR, XORZ_COSTS="torch_panels=0,widen_from=0")
