"""Promise: each misuse of each op gets its sentence, which names the op, the argument and both values that
disagree; nothing crashes, nothing computes on memory that does not hold the values, and no page of torch's or
path of ours is shown."""

import re

import pytest
import torch
import xorz
from conftest import make_delta, random_weight, same_bits
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from xorz import XorDeltaLinear

ops = torch.ops.xorz


def misuses():
    base = random_weight(8, 12, torch.bfloat16)
    tuned = base + 1
    delta = xorz.delta_encode(base, tuned)
    x, b = torch.zeros(2, 12, dtype=torch.bfloat16), torch.zeros(8, dtype=torch.bfloat16)
    lin, f32 = ops.delta_linear, torch.float32
    damaged = delta.clone()
    damaged[12] = 99
    as_i64 = xorz.delta_encode(base.long(), base.long() + 1)
    yield (
        "weight shape",
        lambda: lin(x, base[:4], None, delta),
        r"weight is bfloat16 \[4, 12\].*delta is of bfloat16 \[8, 12\]",
    )
    yield (
        "weight dtype",
        lambda: lin(x, base.to(f32), None, delta),
        r"weight is float32 \[8, 12\].*delta is of bfloat16",
    )
    yield (
        "weight bits",
        lambda: lin(x, base.view(torch.int16).int(), None, delta),
        r"weight is int32 \[8, 12\].*bfloat16",
    )
    yield (
        "weight dims",
        lambda: lin(x, base[0], None, delta),
        r"weight must be 2-D \[n, k\], but is bfloat16 \[12\]",
    )
    yield (
        "weight strides",
        lambda: lin(x, base.T.contiguous().T, None, delta),
        r"weight bfloat16 \[8, 12\] must be contiguous",
    )
    yield (
        "input columns",
        lambda: lin(x[:, :5], base, None, delta),
        r"input is bfloat16 \[2, 5\].*weight\.shape\[1\] = 12",
    )
    yield (
        "input dtype",
        lambda: lin(x.to(f32), base, None, delta),
        r"input is float32 \[2, 12\].*delta's dtype is bfloat16",
    )
    yield "input 0-D", lambda: lin(x[0, 0], base, None, delta), r"input is bfloat16 \[\].*= 12"
    yield (
        "bias size",
        lambda: lin(x, base, b[:3], delta),
        r"bias is bfloat16 \[3\], but must be bfloat16 \[8\]",
    )
    yield (
        "bias dtype",
        lambda: lin(x, base, b.to(f32), delta),
        r"bias is float32 \[8\], but must be bfloat16 \[8\]",
    )
    yield "mode", lambda: lin(x, base, None, delta, mode="quick"), r'mode must be "fast".*but is "quick"'
    yield (
        "delta dtype",
        lambda: lin(x, base, None, delta.int()),
        r"delta must be a 1-D uint8 tensor.*but is int32",
    )
    yield (
        "delta dims",
        lambda: lin(x, base, None, delta[None]),
        r"delta must be a 1-D uint8 tensor.*uint8 \[1, ",
    )
    yield (
        "delta strides",
        lambda: lin(x, base, None, torch.cat([delta, delta])[::2]),
        r"delta .* must be contiguous",
    )
    yield "delta empty", lambda: lin(x, base, None, delta[:0]), r"delta: .*0 bytes"
    yield "delta short", lambda: lin(x, base, None, delta[:-64].clone()), r"delta: "
    yield "delta damaged", lambda: lin(x, base, None, damaged), r"delta: "
    yield (
        "delta of integers",
        lambda: lin(x, base.long(), None, as_i64),
        r"the delta is of int64; only float32",
    )
    yield (
        "complex",
        lambda: ops.delta_encode(x.to(torch.complex64), x.to(torch.complex64)),
        r"base is complex64 \[2, 12\], a dtype that xorz does not know",
    )
    yield (
        "encode shapes",
        lambda: ops.delta_encode(base, tuned[:4]),
        r"base is bfloat16 \[8, 12\].*fine_tuned is bfloat16 \[4, 12\]",
    )
    yield (
        "encode dtypes",
        lambda: ops.delta_encode(base, tuned.float()),
        r"base is bfloat16.*fine_tuned is float32",
    )
    yield (
        "encode prefer",
        lambda: ops.delta_encode(base, tuned, prefer="size"),
        r'prefer must be "auto", "speed" or "memory", but is "size"',
    )
    yield "restore", lambda: ops.delta_restore(base.float(), delta), r"base is float32.*delta is of bfloat16"
    cut = ops.delta_restore
    yield (
        "rows beyond",
        lambda: cut(base, delta, rows=(0, 9)),
        r"delta_restore: rows = \(0, 9\) must lie within 0 to 8, the size of base bfloat16 \[8, 12\] along dim 0",
    )
    yield (
        "columns beyond",
        lambda: cut(base, delta, columns=(7, 13)),
        r"columns = \(7, 13\) must lie within 0 to 12, the size of base bfloat16 \[8, 12\] along dim 1",
    )
    yield "rows backwards", lambda: cut(base, delta, rows=(5, 4)), r"rows = \(5, 4\) must lie within 0 to 8"
    yield "rows negative", lambda: cut(base, delta, rows=(-2, 4)), r"rows = \(-2, 4\) must lie within 0 to 8"
    yield (
        "one row",
        lambda: cut(base, delta, rows=(3,)),
        r"rows must be a pair \(first, end\), but holds 1 num",
    )
    yield (
        "rows of a vector",
        lambda: cut(base[0], xorz.delta_encode(base[0], tuned[0]), rows=(0, 1)),
        r"rows are along dim 0 of a base of two dimensions or more, but base is bfloat16 \[12\]",
    )
    yield (
        "columns of a cube",
        lambda: cut(base.view(8, 4, 3), delta, columns=(0, 1)),
        r"columns are along the last dim of a base of one dimension or two, but base is bfloat16 \[8, 4, 3\]",
    )
    yield (
        "apply base",
        lambda: ops.delta_apply_(tuned.clone(), delta),
        r"delta_apply_: .*digest [0-9a-f]{32}.*digest [0-9a-f]{32}",
    )
    yield "apply alias", lambda: ops.delta_apply_(delta, delta), r"delta_apply_: "
    yield (
        "check base",
        lambda: ops.delta_check(delta, tuned),
        r"delta_check: .*digest [0-9a-f]{32}.*digest [0-9a-f]{32}",
    )
    yield (
        "grad columns",
        lambda: ops.delta_linear_grad_input(x, base, delta),
        r"grad is bfloat16 \[2, 12\].*weight\.shape\[0\] = 8",
    )
    yield (
        "slice dim",
        lambda: ops.delta_slice(delta, base, 2, 0, 1),
        r"dim must be 0 \(rows\) or 1 \(columns\), but is 2",
    )
    yield (
        "slice range",
        lambda: ops.delta_slice(delta, base, 0, 3, 9),
        r"start = 3 and end = 9 must lie within 0 to 8",
    )
    yield "slice order", lambda: ops.delta_slice(delta, base, 1, 5, 4), r"start = 5 and end = 4"
    yield "slice negative", lambda: ops.delta_slice(delta, base, 1, -1, 4), r"start = -1"
    yield "concat empty", lambda: xorz.delta_concat([], [], 0), r"delta_concat: deltas is empty"
    yield "concat lengths", lambda: ops.delta_concat([delta], [], 0), r"1 deltas, but 0 bases"
    yield (
        "concat part",
        lambda: ops.delta_concat([delta, delta], [base, base[:2]], 0),
        r"bases\[1\] is bfloat16 \[2, 12\]",
    )
    yield "concat dim", lambda: ops.delta_concat([delta], [base], -1), r"dim must be 0 .* but is -1"


@pytest.mark.parametrize(("call", "sentence"), [pytest.param(c, s, id=i) for i, c, s in misuses()])
def test_each_misuse_has_its_sentence(call, sentence, capfd):
    with pytest.raises(RuntimeError, match=sentence) as caught:
        call()
    text = str(caught.value)
    assert text.startswith("xorz::") and ".cpp" not in text and "/" not in text
    assert capfd.readouterr().err == ""


def good(dtype=torch.float32):
    """Arguments that each op takes, by the names of its schema."""
    base = random_weight(8, 12, dtype)
    tuned, delta = make_delta(base, "sparse")
    x, g, b = (random_weight(2, k, dtype, k) for k in (12, 8, 4))
    many = {
        "weight": base,
        "arena": delta,
        "slots": torch.tensor([[0, delta.numel()], [0, 0]]),
        "tenant_of_row": torch.tensor([0, -1], dtype=torch.int32),
    }
    return {
        "delta_linear": {"input": x, "weight": base, "bias": b.flatten(), "delta": delta},
        "delta_linear_grouped": {"input": x, "biases": random_weight(3, 8, dtype), **many},
        "delta_linear_grouped_grad_input": {"grad": g, **many},
        "delta_embedding": {"indices": torch.tensor([7, 0]), **many},
        "delta_linear_grad_input": {"grad": g, "weight": base, "delta": delta},
        "delta_restore": {"base": base, "delta": delta, "rows": (1, 7), "columns": (0, 5)},
        "delta_apply_": {"weight": base.clone(), "delta": delta},
        "delta_encode": {"base": base, "fine_tuned": tuned},
        "delta_slice": {"delta": delta, "base": base, "dim": 0, "start": 1, "end": 5},
        "delta_concat": {"deltas": [delta, delta], "bases": [base, base], "dim": 1},
        "delta_check": {"delta": delta, "base": base},
        "delta_digest": {"base": base},
    }


def call(op, arguments):
    return getattr(ops, op)(**arguments)


def each_tensor(arguments, f):
    """The arguments with `f` over their tensors."""
    apply = {list: lambda v: [f(t) for t in v], torch.Tensor: f}
    return {k: apply.get(type(v), lambda v: v)(v) for k, v in arguments.items()}


def replaced(arguments, name, spoil):
    """The arguments with one tensor spoiled (of a list, the second), and the name that the sentence must say."""
    value = arguments[name]
    if isinstance(value, list):
        return {**arguments, name: [value[0], spoil(value[1])]}, f"{name}[1]"
    return {**arguments, name: spoil(value)}, name


def refusal(op, arguments, capfd):
    capfd.readouterr()
    with pytest.raises(RuntimeError) as caught:
        call(op, arguments)
    text = str(caught.value)
    assert type(caught.value) is RuntimeError and capfd.readouterr().err == ""
    assert text.startswith(f"xorz::{op}: ") and "/" not in text and "\n" not in text, text
    return text


TENSORS = [
    (op, a.name)
    for op in good()
    for a in getattr(ops, op).default._schema.arguments
    if "Tensor" in str(a.type)
]
# One tensor of any dtype has none beside it, and where it is missing torch finds no op.
BESIDE = [(op, name) for op, name in TENSORS if op != "delta_digest"]


def test_the_table_of_ops_is_whole():
    assert all(
        set(arguments) <= {a.name for a in getattr(ops, op).default._schema.arguments}
        for op, arguments in good().items()
    )
    registered = {n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith("xorz::")}
    assert registered == set(good())
    for op, arguments in good().items():
        call(op, arguments)


FOREIGN = {
    "sparse COO": (
        lambda t: t.to_sparse(),
        "{name} must be a dense tensor, but is sparse COO {dtype} {shape}",
    ),
    "sparse CSR": (
        lambda t: t.to_sparse_csr(),
        "{name} must be a dense tensor, but is sparse CSR {dtype} {shape}",
    ),
    "MKL-DNN": (
        lambda t: t.to_mkldnn(),
        "{name} must be a dense tensor, but is MKL-DNN {dtype} {shape}",
    ),
    "quantised": (
        lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
        "{name} is qint8 (quantised) {shape}, a dtype that xorz does not know",
    ),
    "complex": (
        lambda t: t.to(torch.complex64),
        "{name} is complex64 {shape}, a dtype that xorz does not know",
    ),
    "conjugated": (
        lambda t: t.to(torch.complex128).conj(),
        "{name} is complex128 {shape}, a dtype that xorz does not know",
    ),
    "unnamed": (
        lambda t: torch.zeros(t.shape, dtype=torch.float8_e8m0fnu),
        "{name} is torch's dtype number 44 {shape}, a dtype that xorz does not know",
    ),
}


MATRICES = {"weight", "base", "fine_tuned", "input", "grad", "bases", "biases", "slots"}
FLOATS = MATRICES - {"slots"} | {"bias"}


def cases(kinds, only):
    """Every tensor of every op with every kind of spoiling that there is for its rank and dtype."""
    return [(op, name, kind) for kind in kinds for op, name in TENSORS if name in only.get(kind, {name})]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(("op", "name", "kind"), cases(FOREIGN, {"sparse CSR": MATRICES, "MKL-DNN": FLOATS}))
def test_tensors_of_foreign_kinds(op, name, kind, capfd):
    spoil, sentence = FOREIGN[kind]
    arguments, said = replaced(good()[op], name, spoil)
    t = arguments[name][1] if isinstance(arguments[name], list) else arguments[name]
    dtype = str(t.dtype).removeprefix("torch.")
    assert refusal(op, arguments, capfd) == f"xorz::{op}: " + sentence.format(
        name=said, dtype=dtype, shape=list(t.shape)
    )


@pytest.mark.parametrize(("op", "name"), BESIDE)
def test_tensors_of_two_devices(op, name, capfd):
    arguments = good()[op]
    mixed, said = replaced(arguments, name, lambda t: t.to("meta"))
    text = refusal(op, mixed, capfd)
    assert re.search(rf"\b{re.escape(said)} is on (cpu|meta)", text), text
    assert "is on cpu" in text and "is on meta" in text and "one device" in text
    # The same where only shapes are traced, as for torch.compile and torch.export, and with CUDA.
    with FakeTensorMode() as mode:
        fake = each_tensor(arguments, mode.from_tensor)
        arguments, said = replaced(fake, name, lambda t: torch.empty_like(t, device="cuda"))
        with pytest.raises(
            RuntimeError, match=rf"xorz::{op}: .*\bis on (cpu|cuda:0), but .* is on (cpu|cuda:0)"
        ):
            call(op, arguments)


@pytest.mark.parametrize("op", list(good()))
def test_meta_tensors_alone_give_shapes(op, capfd):
    meta = each_tensor(good()[op], lambda t: t.to("meta"))
    if op in ("delta_encode", "delta_slice", "delta_concat"):
        assert "the length of its result follows from values" in refusal(op, meta, capfd)
        return
    want, got = call(op, good()[op]), call(op, meta)
    assert (want is None) == (got is None)
    assert want is None or (got.is_meta and got.shape == want.shape and got.dtype == want.dtype)


@pytest.mark.parametrize(("op", "name"), BESIDE)
def test_missing_tensors(op, name, capfd):
    value = good()[op][name]
    if isinstance(value, list) or name in ("bias", "biases"):
        with pytest.raises(
            RuntimeError, match=f"xorz::{op}.*Expected a value of type .* for argument '{name}'"
        ):
            call(op, {**good()[op], name: "weights"})
        return
    text = refusal(op, {**good()[op], name: None}, capfd)
    assert text == f"xorz::{op}: {name} must be a tensor, but is None"


@pytest.mark.parametrize(("op", "name"), BESIDE)
def test_other_dtypes_name_both(op, name, capfd):
    arguments, said = replaced(good()[op], name, lambda t: t.double())
    text = refusal(op, arguments, capfd)
    # A table of any dtype is looked up; the core finds that it is not the deltas'.
    text = text.replace("of F64", "float64").replace("of F32", "float32")
    assert (
        said in text
        and "float64" in text
        and re.search(r"float32|uint8|int64|int32", text.replace("float64", ""))
    )


STRIDES = {
    "transposed": lambda t: t.T.contiguous().T,
    "columns of a wider one": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "every other word": lambda t: torch.stack([t, t], -1)[..., 0],
    "one row for all": lambda t: t[:1].expand_as(t),
    "one word for all": lambda t: t.flatten()[:1].as_strided(t.shape, [0] * t.dim()),
}


@pytest.mark.parametrize(
    ("op", "name", "kind"), cases(STRIDES, {"transposed": MATRICES, "columns of a wider one": MATRICES})
)
def test_memory_that_is_not_contiguous(op, name, kind, capfd):
    arguments, said = replaced(good()[op], name, STRIDES[kind])
    t = arguments[name][1] if isinstance(arguments[name], list) else arguments[name]
    assert not t.is_contiguous()
    before = t.clone()
    if name == "biases" and t.stride(1) != 1:
        sentence = f"biases has a stride of {t.stride(1)} along its last dimension, but must have 1"
        assert refusal(op, arguments, capfd) == f"xorz::{op}: {sentence}"
    elif name in (
        "input",
        "grad",
        "bias",
        "biases",
        "slots",
        "tenant_of_row",
        "indices",
    ):  # activations may lie anyhow
        assert same_bits(call(op, arguments), call(op, {**arguments, name: t.contiguous()}))
    else:
        text = refusal(op, arguments, capfd)
        dtype = str(t.dtype).removeprefix("torch.")
        assert text.startswith(f"xorz::{op}: {said} {dtype} {list(t.shape)} must be contiguous")
    assert torch.equal(t, before)


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_views_that_are_whole_are_taken(op, name):
    """Slices of rows at an offset, and negated views, whose memory does not hold their values."""
    want = call(op, good()[op])
    for view in (
        lambda t: torch.cat([t, t, t])[t.shape[0] : 2 * t.shape[0]],
        lambda t: torch._neg_view(-t),
    ):
        arguments, _ = replaced(good()[op], name, view)
        got = call(op, arguments)
        assert (want is None and got is None) or torch.equal(got, want)
        if op == "delta_apply_" and name == "weight":
            plain = good()[op]
            call(op, plain)
            assert same_bits(arguments["weight"].resolve_neg(), plain["weight"])


def test_slices_of_a_weight_are_not_the_weight():
    base = random_weight(8, 12, torch.float32)
    _, delta = make_delta(base, "sparse")
    twice = torch.cat([base, base])
    for weight in (twice[2:10], twice[:8].flip(0)):  # right shape, other words: found on request
        with pytest.raises(RuntimeError, match=r"digest [0-9a-f]{32}.*digest [0-9a-f]{32}"):
            ops.delta_check(delta, weight)
    with pytest.raises(
        RuntimeError, match=r"weight is float32 \[6, 12\], but the delta is of float32 \[8, 12\]"
    ):
        ops.delta_linear(torch.zeros(1, 12), twice[2:8], None, delta)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0,), (0, 0)])
def test_empty_tensors_have_no_memory_and_harm_nobody(shape):
    t = torch.empty(shape)
    assert t.data_ptr() == 0
    delta = ops.delta_encode(t, t)
    ops.delta_check(delta, t)
    ops.delta_apply_(t, delta)
    assert ops.delta_restore(t, delta).shape == t.shape
    n, k = (1, *shape)[-2:]
    for dim, size in ((0, n), (1, k)):
        ops.delta_check(ops.delta_slice(delta, t, dim, 0, size), t)
    if len(shape) == 2:
        ops.delta_check(ops.delta_concat([delta, delta], [t, t], 0), torch.cat([t, t]))


@pytest.mark.parametrize(("op", "name"), [(o, n) for o, n in TENSORS if n in ("delta", "deltas")])
def test_deltas_of_another_matrix(op, name, capfd):
    others = {
        "shape": (random_weight(9, 12, torch.float32), r"\[8, 12\].*\[9, 12\]"),
        "dtype": (random_weight(8, 12, torch.bfloat16), r"float32.*bfloat16"),
    }
    for base, both in others.values():
        _, delta = make_delta(base, "sparse")
        arguments, _ = replaced(good()[op], name, lambda _, delta=delta: delta)
        text = refusal(op, arguments, capfd)
        assert re.search(both, text), text
    # Of the same shape: only the digest tells. What writes in place always asks, the rest on request.
    _, delta = make_delta(random_weight(8, 12, torch.float32, 7), "sparse")
    arguments, _ = replaced(good()[op], name, lambda _: delta)
    if op in ("delta_apply_", "delta_check"):
        assert len(set(re.findall("[0-9a-f]{32}", refusal(op, arguments, capfd)))) == 2


def test_a_base_that_changed_after_encoding_is_found_on_request():
    linear = nn.Linear(12, 8)
    delta = xorz.delta_encode(linear.weight.detach(), linear.weight.detach() + 1)
    layer = XorDeltaLinear.from_linear(linear, delta)
    layer.check_base()
    with torch.no_grad():
        linear.weight[3, 4] += 1
    digests = r"made against a base of digest ([0-9a-f]{32}), but this base has digest ([0-9a-f]{32})"
    with pytest.raises(ValueError, match=digests) as caught:
        layer.check_base()
    made, now = re.search(digests, str(caught.value)).groups()
    assert made == xorz.delta_info(delta).base_digest != now
    with pytest.raises(ValueError, match=digests):
        XorDeltaLinear.from_linear(linear, delta)
    layer.delta[-1] ^= 1
    with pytest.raises(ValueError):
        layer.check_base()


def test_layers_refuse_weights_that_hold_no_plain_words():
    linear = nn.Linear(12, 8)
    weight = linear.weight.detach()
    delta = xorz.delta_encode(weight, weight + 1)
    for other, error, sentence in (
        (weight.to_sparse(), TypeError, r"weight must be a dense tensor, but is torch\.sparse_coo"),
        (weight.to_mkldnn(), TypeError, r"weight must be a dense tensor, but is torch\._mkldnn"),
        (torch._neg_view(-weight), ValueError, r"weight is a negated view.*resolve_neg"),
        (torch.cat([weight, weight], 1)[:, :12], ValueError, r"base float32 \[8, 12\] must be contiguous"),
        (weight[:1].expand(8, 12), ValueError, r"base float32 \[8, 12\] must be contiguous"),
        (weight.to("meta"), ValueError, r"delta is on cpu, but base is on meta"),
    ):
        linear.weight = nn.Parameter(other, requires_grad=False)
        with pytest.raises(error, match=sentence):
            XorDeltaLinear.from_linear(linear, delta)
    linear.weight = nn.Parameter(weight)
    for other in (delta.to("meta"), delta.to_sparse()):
        with pytest.raises(
            TypeError, match=r"delta must be a dense tensor with data, but is torch\.uint8 torch\."
        ):
            XorDeltaLinear.from_linear(linear, other)
