"""Promise: compiled code computes with its tenants' weights, those it reads itself included, or there is an
error; and it is compiled once, whatever the tenants.
"""

import pytest
import torch
import xorz
from cases import Case
from small import close, fine_tuned, in_thread, make_base, served
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

pytestmark = pytest.mark.usefixtures("one_thread")

F = nn.functional


class Parent(nn.Module):
    def __init__(self, read):
        super().__init__()
        self.out, self.read = nn.Linear(4, 4, bias=False), read

    def forward(self, x):
        return F.relu(F.linear(x + 1, self.read(self)))


OTHERS = {
    "attribute": lambda m: m.out.weight,
    "_parameters": lambda m: m.out._parameters["weight"],
    "parameters()": lambda m: next(m.out.parameters()),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("read", OTHERS.values(), ids=OTHERS)
def test_a_weight_read_in_compiled_code_is_the_tenants_or_refused(read, backend):
    torch.manual_seed(0)
    case, x = Case(Parent(read)), torch.randn(3, 4)
    torch._dynamo.reset()
    compiled = torch.compile(case.model, backend=backend)
    with torch.no_grad():
        for name in ("a", None, "b", "a"):
            try:
                with case.tenants.use(name):
                    got = compiled(x)
            except Exception as error:
                assert "xorz" in str(error), error
                continue
            torch.testing.assert_close(got, case.plain[name](x), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_compiled_once_whatever_the_tenants():
    base, tenants, ids, want = served()
    count = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(base, backend=count, fullgraph=True, dynamic=False)

    def check(names):
        with torch.no_grad(), tenants.use(names):
            y = compiled(ids)
        each = names if isinstance(names, list) else [names] * 3
        assert all(close(y[i], want[n][i]) for i, n in enumerate(each)), names

    check("a")
    for names in (["a", "b", None], ["b", "b", "a"], None, "b"):
        check(names)
    for i in range(6):  # more than there were slots
        tuned = fine_tuned(make_base(), 20 + i)
        tenants.load(f"n{i}", xorz.diff(base, tuned))
        with torch.no_grad():
            want[f"n{i}"] = tuned(ids)
        check([f"n{i}", "a", None])
    tenants.unload("n0")
    tenants.swap("b", xorz.diff(base, fine_tuned(make_base(), 1)))
    want["b"] = want["a"]
    check(["n5", "b", "a"])
    assert count.frame_count == 1, count.frame_count
    with pytest.raises(RuntimeError, match="no tenant is active"), torch.no_grad():
        compiled(ids)
    # Another thread compiles nothing either, and has its own tenants.
    with torch.no_grad():
        got = in_thread(lambda: use_compiled(tenants, compiled, ids))
    assert close(got, want["n3"]) and count.frame_count == 1
    torch._dynamo.reset()


def use_compiled(tenants, compiled, ids):
    with torch.no_grad(), tenants.use("n3"):
        return compiled(ids)
