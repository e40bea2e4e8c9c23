"""Promise: PyTorch's own samples of nn.functional.linear pass through delta_linear with random deltas of
every encoding, gradients too, and PyTorch's own checks of custom ops (opcheck) hold for every op, encoding
and odd shape."""

import collections
import re
from pathlib import Path

import pytest
import torch
import xorz
from conftest import DTYPES, ENCODINGS, PREFER, close, fine_tune, make_delta, random_weight, same_bits
from torch.autograd.gradcheck import GradcheckError
from torch.library import opcheck

ops = torch.ops.xorz
F = torch.nn.functional
ALL_UTILITIES = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)
# torch's own, in opcheck and gradcheck.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:Input #. requires gradient and is not a double precision"),
]


def passes(op, args, kwargs=None):
    done = opcheck(op.default, args, kwargs)
    assert done == dict.fromkeys(ALL_UTILITIES, "SUCCESS")


def deltas_to(tuned, seed):
    """(encoding, base, delta) for each encoding that a matrix of this shape admits; `tuned` is where all of them end."""
    for encoding in ENCODINGS:
        base = fine_tune(tuned, encoding, seed)
        delta = xorz.delta_encode(base, tuned, prefer=PREFER[encoding])
        if xorz.delta_info(delta).encoding == encoding:
            assert (encoding == "unchanged") == same_bits(base, tuned)
            yield encoding, base, delta


def expanded(x):
    """Strides of zero, as of a broadcast, and the same with a transposed lead."""
    yield x[..., :1, :].expand_as(x)
    yield x.expand(2, *x.shape).transpose(0, 1)


def linear_samples(dtype):
    methods = pytest.importorskip("torch.testing._internal.common_methods_invocations")
    (info,) = [o for o in methods.op_db if o.name == "nn.functional.linear"]
    for sample in info.sample_inputs("cpu", dtype, requires_grad=True):
        w, *rest = sample.args
        bias = rest[0] if rest else sample.kwargs.get("bias")
        if w.dim() == 2:  # torch also takes a vector for a weight
            yield sample.input, w.detach().contiguous(), bias


def test_opinfo_samples_of_linear_with_random_deltas(dtype):
    tried, seen = collections.Counter(), collections.Counter()
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    for i, (x, tuned, b) in enumerate(linear_samples(dtype)):
        plain_bias = None if b is None else b.detach()
        for encoding, base, delta in deltas_to(tuned, seed=i):
            seen[encoding] += 1
            rows = [x] if x.dim() < 2 else [x, *(v.detach().requires_grad_() for v in expanded(x.detach()))]
            for rank, v in enumerate(rows):
                want = F.linear(v, tuned, b)
                y = ops.delta_linear(v, base, b, delta)
                assert close(y.detach(), v.detach(), tuned, plain_bias), (encoding, tuned.shape, rank)
                if rank == 0:
                    assert same_bits(ops.delta_linear(v, base, b, delta, mode="exact"), want)
                inputs = [t for t in (v, b) if t is not None and t.requires_grad]
                g = torch.randn(y.shape, generator=torch.Generator().manual_seed(i)).to(dtype)
                got, like = (torch.autograd.grad(out, inputs, g) for out in (y, want))
                for a, c in zip(got, like, strict=True):
                    largest = c.abs().max().item() if c.numel() else 0
                    torch.testing.assert_close(a, c, rtol=tolerance, atol=tolerance * (1 + largest))
                tried[rank] += 1
    assert set(seen) == set(ENCODINGS) and min(seen.values()) >= 4, seen
    assert tried[0] >= 45 and tried[1] >= 35 and tried[2] >= 35, tried


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_opcheck_on_opinfo_samples(dtype):
    checked = 0
    for i, (x, tuned, b) in enumerate(linear_samples(dtype)):
        choices = list(deltas_to(tuned, seed=i))
        _, base, delta = choices[i % len(choices)]
        passes(ops.delta_linear, (x, base, b, delta), {"mode": ("fast", "deterministic", "exact")[i % 3]})
        checked += 1
    assert checked >= 15


def test_gradcheck_in_reverse_and_forward_mode(encoding):
    """Finite differences of a linear function are exact at any step, so that float32 will do."""
    base = random_weight(5, 7, torch.float32)
    tuned = fine_tune(base, encoding)
    delta = xorz.delta_encode(base, tuned, prefer=PREFER[encoding])
    x, b, g = (torch.randn(s, requires_grad=True) for s in ((2, 3, 7), (5,), (2, 3, 5)))
    scale = tuned.abs().max().item()
    for f, inputs in (
        (lambda v, c: ops.delta_linear(v, base, c, delta), (x, b)),
        (lambda v: ops.delta_linear(v, base, None, delta, mode="exact"), (x,)),
        (lambda v: ops.delta_linear_grad_input(v, base, delta), (g,)),
    ):
        options = {"eps": 0.5, "atol": 1e-3 * max(1, scale), "rtol": 1e-3, "nondet_tol": 0.0}
        assert torch.autograd.gradcheck(
            f,
            inputs,
            check_forward_ad=True,
            check_batched_grad=True,
            check_batched_forward_grad=True,
            **options,
        )
        assert torch.autograd.gradgradcheck(f, inputs, check_fwd_over_rev=True, **options)


def test_gradcheck_notices_the_gradient_of_another_delta():
    base = random_weight(5, 7, torch.float32)
    delta, other = xorz.delta_encode(base, base + 1), xorz.delta_encode(base, base + 1.1)

    class Mutant(torch.autograd.Function):
        @staticmethod
        def forward(ctx, v):
            return ops.delta_linear(v, base, None, delta)

        @staticmethod
        def backward(ctx, grad):
            return ops.delta_linear_grad_input(grad, base, other)

    with pytest.raises(GradcheckError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(Mutant.apply, (torch.randn(3, 7, requires_grad=True),), eps=0.5, atol=1e-3)


def admitted(shape, dtype):
    base = random_weight(*shape, dtype)
    seen = {}
    for encoding in ENCODINGS:
        tuned = fine_tune(base, encoding)
        delta = xorz.delta_encode(base, tuned, prefer=PREFER[encoding])
        seen.setdefault(xorz.delta_info(delta).encoding, (tuned, delta))
    return base, seen


LEADS = ((0,), (3,), (), (2, 1, 3, 1), (2, 0, 1, 2))
ODD = ((0, 5), (5, 0), (0, 0), (1, 1), (33, 257))


@pytest.mark.parametrize("shape", ODD, ids=str)
def test_opcheck_of_every_op_on_odd_shapes(shape):
    n, k = shape
    turn = ODD.index(shape)
    dtype = DTYPES[turn % len(DTYPES)]
    base, seen = admitted(shape, dtype)
    if shape == (33, 257):
        assert set(seen) == set(ENCODINGS)
    for i, (tuned, delta) in enumerate(seen.values()):
        for j in range(2):
            lead = LEADS[(turn + 2 * i + j) % len(LEADS)]
            x, g = torch.randn(*lead, k).to(dtype), torch.randn(*lead, n).to(dtype)
            bias = torch.randn(n).to(dtype).requires_grad_() if j else None
            mode = {"mode": ("fast", "deterministic", "exact")[(i + j) % 3]}
            passes(ops.delta_linear, (x.requires_grad_(), base, bias, delta), mode)
            passes(ops.delta_linear_grad_input, (g.requires_grad_(bool(j)), base, delta))
        passes(ops.delta_restore, (base, delta))
        passes(ops.delta_restore, (base, delta), {"rows": (n // 3, n), "columns": (0, k // 2)})
        passes(ops.delta_apply_, (base.clone(), delta))
        passes(ops.delta_encode, (base, tuned), {"prefer": ("speed", "memory")[i % 2]})
        passes(ops.delta_slice, (delta, base, i % 2, 0, base.shape[i % 2]))
        passes(ops.delta_concat, ([delta, delta], [base, base], i % 2))
        passes(ops.delta_check, (delta, base))
        passes(ops.delta_digest, (base,))


def test_opcheck_of_every_op(encoding, dtype):
    base = random_weight(20, 40, dtype)
    tuned, delta = make_delta(base, encoding)
    words = base.view(torch.int32 if dtype == torch.float32 else torch.int16)
    x = random_weight(3, 40, dtype).requires_grad_()
    bias = random_weight(1, 20, dtype)[0].requires_grad_()
    passes(ops.delta_linear, (x, base, bias, delta))
    passes(ops.delta_linear, (x.detach().T.contiguous().T[0], words, None, delta), {"mode": "deterministic"})
    passes(ops.delta_linear, (x.detach().expand(2, 3, 40), base, None, delta), {"mode": "exact"})
    passes(ops.delta_linear_grad_input, (random_weight(3, 20, dtype).requires_grad_(), words, delta))
    if DTYPES[ENCODINGS.index(encoding) % len(DTYPES)] != dtype:
        return  # what is left knows words, not numbers
    passes(ops.delta_restore, (base, delta))
    passes(ops.delta_restore, (words, delta), {"columns": (7, 31)})
    passes(ops.delta_apply_, (words.clone(), delta))
    passes(ops.delta_encode, (base, tuned), {"prefer": "memory"})
    passes(ops.delta_slice, (delta, base, 0, 3, 9))
    passes(ops.delta_concat, ([delta, delta], [base, base], 1))
    passes(ops.delta_check, (delta, base))
    passes(ops.delta_digest, (words,))


def test_no_op_is_left_without_a_check():
    all_ops = (name.partition("::") for name in torch._C._dispatch_get_all_op_names())
    named = {name.split(".")[0] for space, _, name in all_ops if space == "xorz"}
    source = "".join(path.read_text() for path in sorted(Path(__file__).parent.glob("test_*.py")))
    missing = [n for n in sorted(named) if not re.search(rf"(passes|opcheck)\(\s*ops\.{n}\b", source)]
    assert named >= {"delta_linear", "delta_restore"} and not missing, missing
