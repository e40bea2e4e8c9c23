"""Promise: what a linear layer remembers of a call is never used where it does not hold: other shapes, tenants that
come and go, gradients, ended uses. Every expectation is the plain fine-tuned model's.
"""

import contextvars
import copy

import pytest
import torch
import xorz
from cases import tuned_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


def made(count=9, **options):
    """(tenants with t0 and t1, {name: plain model}); the plain ones of all `count` tenants."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 6, bias=False), nn.Linear(6, 5)).eval()
    plain = {None: base, **{f"t{i}": tuned_of(base, i + 1) for i in range(count)}}
    tenants = xorz.attach(copy.deepcopy(base), **options)
    for name in ("t0", "t1"):
        tenants.load(name, xorz.diff(base, plain[name]))
    return tenants, plain


def right(tenants, plain, x, names):
    """Every row of `x` is its tenant's; one name is for all."""
    got, each = tenants.model(x), names if len(names) > 1 else names * len(x)
    for row, name in enumerate(each):
        torch.testing.assert_close(got[row], plain[name](x)[row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["fast", "deterministic", "exact"])
@pytest.mark.parametrize("names", [("t0",), ("t0", None, "t1"), ("t1", "t1", None)])
def test_tenants_that_come_and_go_while_a_use_is_open_change_nothing(names, mode):
    tenants, plain = made(mode=mode)
    base, x = plain[None], torch.randn(3, 8)
    with torch.no_grad():
        with tenants.use(names):
            right(tenants, plain, x, names)
            # More than there were slots for, in the place of one that goes, and another one under a name that is used.
            for i in range(2, 9):
                tenants.load(f"t{i}", xorz.diff(base, plain[f"t{i}"]))
                right(tenants, plain, x, names)
            tenants.unload("t3")
            tenants.swap("t1", xorz.diff(base, plain["t8"]))
            right(tenants, plain, x, names)
            with tenants.use(["t2", "t8", "t2"]):
                right(tenants, plain, x, ["t2", "t8", "t2"])
            right(tenants, plain, x, names)
        now = {**plain, "t1": plain["t8"]}
        with tenants.use(names):
            right(tenants, now, x, names)


def test_each_shape_has_its_own_rows():
    tenants, plain = made()
    names = ["t0", None, "t1"]
    with torch.no_grad(), tenants.use(names):
        for shape in ((3, 8), (3, 2, 8), (3, 4, 8), (3, 3, 8), (3, 1, 2, 8), (3, 8), (3, 2, 8)):
            right(tenants, plain, torch.randn(shape), names)
        layer = tenants.model[0]
        for _ in range(2):
            with pytest.raises(RuntimeError, match="rows of shape"):
                layer(torch.randn(4, 8))
    assert tenants.apart is None  # each batch went through the model once


@pytest.mark.parametrize("names", [["t0"], ["t0", None, "t1"]])
def test_gradients_flow_after_calls_without_them(names):
    tenants, plain = made()
    x = torch.randn(3, 8)
    with tenants.use(names):
        with torch.no_grad():
            right(tenants, plain, x, names)
        mine = x.clone().requires_grad_()
        tenants.model(mine).square().sum().backward()
    theirs = x.clone().requires_grad_()
    rows = [plain[name](theirs)[i] for i, name in enumerate(names if len(names) > 1 else names * 3)]
    torch.stack(rows).square().sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("names", [["t0"], ["t0", None, "t1"]])
def test_an_ended_use_is_an_error_for_layers_that_it_has_served(names):
    tenants, plain = made()
    x = torch.randn(3, 8)
    with torch.no_grad():
        with tenants.use(names):
            right(tenants, plain, x, names)
            inside = contextvars.copy_context()
        with pytest.raises(RuntimeError, match="has ended"):
            inside.run(tenants.model[0], x)


class Ops(TorchDispatchMode):
    """The names of the ops that it sees."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "names, op", [(["t0"], "delta_linear"), (["t0", None, "t1"], "delta_linear_grouped")]
)
def test_modes_and_profilers_of_torch_see_the_ops(names, op):
    tenants, plain = made()
    x, mode = torch.randn(3, 8), Ops()
    with torch.no_grad(), tenants.use(names):
        right(tenants, plain, x, names)
        mode.seen = []
        with mode:
            right(tenants, plain, x, names)
        assert mode.seen.count(f"xorz::{op}") == 3
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            tenants.model(x)
    assert next(e for e in profile.key_averages() if e.key == f"xorz::{op}").count == 3
