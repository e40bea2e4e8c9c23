"""Promise: the cost model chooses between ways to the same bits. Whatever ``XORZ_COSTS`` says, products keep
every bit, but for those on panels in mode fast, which keep the documented bound; what it cannot mean is named
once and ignored.
"""

import hashlib
import io
import os
import subprocess
import sys

import pytest
import torch
import xorz  # noqa: F401
from torch import Tensor

CHILD = (
    "import sys; sys.path[:0] = sys.argv[1:2]; from test_costs import products, digest;"
    "print(digest(products('fast')), digest(products('deterministic')))"
)


def tenants() -> tuple[Tensor, list[Tensor]]:
    """A base and five fine-tunes of it: 2, 5, 20 % of the words, all by noise (`exponent`), none."""
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(200, 700, generator=generator).bfloat16()
    chosen = [torch.rand(base.shape, generator=generator) < share for share in (0.02, 0.05, 0.2)]
    tuned = [torch.where(c, base * 1.0625, base) for c in chosen]
    tuned.append((base.float() + 1e-3 * torch.randn(base.shape, generator=generator)).bfloat16())
    return base, [*tuned, base]


def products(mode: str) -> list[Tensor]:
    """Each fine-tune in each form, at 1 to 16 rows (no panels in any mode), and beyond in mode deterministic."""
    base, tuned = tenants()
    out = []
    for prefer in ("speed", "memory"):
        for t in tuned:
            delta = torch.ops.xorz.delta_encode(base, t, prefer=prefer)
            for m in (1, 3, 8, 16, *((17, 40) if mode == "deterministic" else ())):
                x = torch.randn(m, 700, generator=torch.Generator().manual_seed(m)).bfloat16()
                out.append(torch.ops.xorz.delta_linear(x, base, None, delta, mode=mode))
    return out


def digest(tensors: list[Tensor]) -> str:
    """Of all their words."""
    return hashlib.sha256(b"".join(t.view(torch.int16).numpy().tobytes() for t in tensors)).hexdigest()


def child(costs: str) -> subprocess.CompletedProcess[str]:
    here = os.path.dirname(__file__)
    env = os.environ | {"XORZ_COSTS": costs, "OMP_NUM_THREADS": "2"}
    return subprocess.run(
        [sys.executable, "-c", CHILD, here], env=env, capture_output=True, text=True, timeout=600, check=True
    )


@pytest.mark.parametrize(
    "costs",
    [
        "gathered_ns=1e-9,rare=1",
        "gathered_ns=1e9,rare=1000000",
        "cached_bytes=0,least_words=1",
        "least_words=100000000",
    ],
)
def test_no_cost_changes_a_bit(costs):
    want = f"{digest(products('fast'))} {digest(products('deterministic'))}"
    done = child(costs)
    assert (done.stdout.strip(), done.stderr) == (want, "")


def test_panels_may_be_asked_for_and_are_right():
    """With another cost, other bits (so the variable is obeyed), within the bound of bf16 results."""
    script = (
        "import sys; sys.path[:0] = sys.argv[1:2]; import torch; from test_costs import products;"
        "torch.save(products('fast'), sys.stdout.buffer)"
    )
    env = os.environ | {"XORZ_COSTS": "panel_above=0,decoded_above=0,packed_above=0"}
    args = [sys.executable, "-c", script, os.path.dirname(__file__)]
    raw = subprocess.run(args, env=env, capture_output=True, timeout=600, check=True).stdout
    got, want = torch.load(io.BytesIO(raw)), products("fast")
    assert any(not torch.equal(g, w) for g, w in zip(got, want, strict=True))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.float(), w.float(), rtol=2**-7, atol=2**-6)


@pytest.mark.parametrize(
    ("costs", "named"), [("speed=1", '"speed"'), ("rare=0", 'rare is "0"'), ("panel_above", "not name=value")]
)
def test_what_costs_cannot_mean_is_named_once_and_ignored(costs, named):
    want = f"{digest(products('fast'))} {digest(products('deterministic'))}"
    done = child(costs)
    assert done.stdout.strip() == want
    assert named in done.stderr and done.stderr.count("XORZ_COSTS") == 1, done.stderr
