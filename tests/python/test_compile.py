"""Promise: compiled, exported and packaged models give the bits of eager ones: whole graphs, one compilation
for every batch, training, mutation, fresh processes; the serving ops ask nothing of the host; the gradient
builds no dense matrix."""

import copy
import subprocess
import sys
import textwrap

import pytest
import torch
import xorz
from conftest import ENCODINGS, make_delta, random_weight, same_bits
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols
from xorz import XorDeltaLinear

ops = torch.ops.xorz
MODES = ("fast", "deterministic", "exact")
BACKENDS = ("aot_eager", "inductor")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layer(encoding, dtype, n=24, k=40, bias=True, mode="fast", seed=0):
    linear = nn.Linear(k, n, bias=bias).to(dtype)
    with torch.no_grad():
        linear.weight.copy_(random_weight(n, k, dtype, seed))
    _, delta = make_delta(linear.weight.detach(), encoding)
    return XorDeltaLinear.from_linear(linear, delta, mode=mode)


class Model(nn.Module):
    """A layer per mode, of different encodings, and the raw op."""

    def __init__(self, dtype):
        super().__init__()
        self.inner = nn.ModuleList(
            layer(encoding, dtype, 40, 40, mode=mode, bias=mode != "exact")
            for encoding, mode in zip(("sparse", "exponent", "sparse"), MODES, strict=True)
        )
        raw = layer("exponent", dtype)
        for name in ("weight", "delta"):
            self.register_buffer(name, getattr(raw, name).clone())

    def forward(self, x):
        for one in self.inner:
            x = torch.relu(one(x)) + x
        return torch.ops.xorz.delta_linear(x, self.weight, None, self.delta)


EVERY = [(b, d) for b in BACKENDS for d in (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize(("backend", "dtype"), EVERY[:2] + EVERY[3:], ids=str)
def test_compile_is_whole_and_happens_once_for_every_batch(backend, dtype):
    model = Model(dtype).eval()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    # inductor fuses what is between the layers and rounds it once where eager rounds twice.
    tolerance = {"rtol": 0, "atol": 0} if backend == "aot_eager" else {"rtol": 3e-2, "atol": 3e-2}
    for m in (2, 3, 17, 64):
        with torch.no_grad():
            x = random_weight(m, 40, dtype, m) * 20
            torch.testing.assert_close(compiled(x), model(x), **tolerance)
    assert counter.frame_count == 1
    if backend == "aot_eager":
        for m in (2, 3, 17):
            with torch.inference_mode():
                x = random_weight(m, 40, dtype, m) * 20
                assert same_bits(compiled(x), model(x))
        # Once more for inference mode, of which dynamo's guards speak, but not for a batch.
        assert counter.frame_count == 2
        with torch.no_grad():
            assert same_bits(compiled(x), model(x))


@pytest.mark.parametrize(("backend", "dtype"), EVERY[:3], ids=str)
def test_training_through_compile_moves_inputs_and_biases_only(backend, dtype):
    model = Model(dtype)
    frozen = {k: v.clone() for k, v in model.state_dict().items() if "bias" not in k}
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    biases = list(model.parameters())
    assert len(biases) == 2
    for m in (2, 3, 17, 64):
        x = random_weight(m, 40, dtype, m).mul(20).requires_grad_()
        got, want = (
            torch.autograd.grad(f(x).float().square().sum(), (x, *biases)) for f in (compiled, model)
        )
        for a, b in zip(got, want, strict=True):
            assert b.abs().max() > 0
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())
    assert counter.frame_count == 1
    assert all(torch.equal(model.state_dict()[k], v) for k, v in frozen.items())


def test_compile_under_autocast():
    module = layer("sparse", torch.bfloat16)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 40)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        y = compiled(x)
        assert y.dtype == torch.bfloat16 and same_bits(y, module(x))


def test_compiled_modules_are_copied_whole():
    module = layer("exponent", torch.float32)
    compiled = torch.compile(module, backend="aot_eager")
    x = torch.randn(3, 40)
    want = compiled(x)
    twin = copy.deepcopy(compiled)
    assert same_bits(twin(x), want)
    with torch.no_grad():
        module.bias.add_(1)
    assert same_bits(twin(x), want) and not same_bits(compiled(x), want)
    assert twin.state_dict().keys() == compiled.state_dict().keys()


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_any_range_are_compiled_once(backend, encoding):
    base = random_weight(20, 30, torch.float32)
    tuned, delta = make_delta(base, encoding)
    counter = CompileCounterWithBackend(backend)

    def part(w, d, a, b):
        return ops.delta_restore(w, d, rows=(a, b), columns=(a + 1, 2 * b)) + 1

    compiled = torch.compile(part, fullgraph=True, dynamic=True, backend=counter)
    for a, b in ((3, 9), (4, 15), (2, 11)):
        assert same_bits(compiled(base, delta, a, b), tuned[a:b, a + 1 : 2 * b] + 1)
    assert counter.frame_count == 1
    # Torch compiles empty sizes apart.
    assert same_bits(compiled(base, delta, 7, 7), tuned[7:7, 8:14] + 1)
    with pytest.raises(RuntimeError, match=r"rows = \(\w+, \w+\) must lie within 0 to (20|s\d+)"):
        compiled(base, delta, 5, 21)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ops_that_write_check_and_make_deltas_keep_their_meaning(backend, encoding):
    base = random_weight(20, 30, torch.float32)
    tuned, delta = make_delta(base, encoding)
    x = torch.randn(5, 30)

    def whole(f):
        return torch.compile(f, fullgraph=True, backend=backend)

    def write(w, d, v):
        before = v @ w.T
        ops.delta_apply_(w, d)
        return before, v @ w.T, ops.delta_restore(w, ops.delta_encode(w, w * 2))

    w = base.clone()
    version, alias = w._version, w.view(-1)
    before, after, doubled = whole(write)(w, delta, x)
    assert same_bits(w, tuned) and w._version > version and same_bits(alias.view(20, 30), tuned)
    torch.testing.assert_close(before, x @ base.T)
    torch.testing.assert_close(after, x @ tuned.T, equal_nan=True)
    assert same_bits(doubled, tuned * 2)

    def copy_on_write(w, d):
        mine = w.clone()
        ops.delta_apply_(mine, d)
        return mine, ops.delta_restore(w, d)

    kept = base.clone()
    for out in whole(copy_on_write)(base, delta):
        assert same_bits(out, tuned)
    assert same_bits(base, kept)

    def cut(d, w):
        part = ops.delta_slice(d, w, 0, 2, 7)
        ops.delta_check(part, w[2:7])
        return part, ops.delta_concat([d, d], [w, w], 1)

    for out, like in zip(whole(cut)(delta, base), cut(delta, base), strict=True):
        assert torch.equal(out, like)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_check_is_not_optimised_away(backend):
    base = random_weight(20, 30, torch.float32)
    delta = xorz.delta_encode(base, base + 1)

    def checked(v, w, d):
        ops.delta_check(d, w)
        return ops.delta_linear(v, w, None, d)

    for x in (torch.randn(5, 30), torch.randn(5, 30, requires_grad=True)):
        compiled = torch.compile(checked, fullgraph=True, backend=backend)
        assert same_bits(compiled(x, base, delta), checked(x, base, delta))
        with pytest.raises(RuntimeError, match=r"delta_check: .*digest [0-9a-f]{32}.*digest"):
            compiled(x, base + 2, delta)
    program = torch.export.export(Checked(base, delta), (x.detach(),))
    assert "delta_check" in str(program.graph)


class Checked(nn.Module):
    def __init__(self, weight, delta):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("delta", delta)

    def forward(self, x):
        torch.ops.xorz.delta_check(self.delta, self.weight)
        return x + 1


def test_compile_refuses_what_eager_refuses():
    base = random_weight(20, 30, torch.float32)
    delta, x = xorz.delta_encode(base, base + 1), torch.randn(5, 30)
    trained = nn.Parameter(base.clone())

    def compiled(f):
        return torch.compile(f, fullgraph=True, backend="aot_eager")

    product = compiled(lambda v, w: ops.delta_linear(v, w, None, delta))
    with pytest.raises(RuntimeError, match=r"xorz::delta_linear: weight requires grad, but it is frozen"):
        product(x, trained)
    with torch.no_grad():
        assert product(x, trained).shape == (5, 20)
    assert product(x, trained.detach()).shape == (5, 20)
    with pytest.raises(RuntimeError, match=r"xorz::delta_apply_: weight is a leaf that requires grad"):
        compiled(lambda w: ops.delta_apply_(w, delta))(trained)
    assert same_bits(trained, base)
    with pytest.raises(RuntimeError, match=r"input has a last dimension of \w+, but weight.shape\[1\] is 30"):
        product(x[:, 1:], base)
    with pytest.raises(RuntimeError, match=r"input is torch.bfloat16, but weight is torch.int32"):
        product(x.bfloat16(), base.view(torch.int32))
    with pytest.raises(RuntimeError, match=r'mode must be .*but is "quick"'):
        compiled(lambda v, w: ops.delta_linear(v, w, None, delta, mode="quick"))(x, base)


def serving(x, g, w, b, d):
    out = [ops.delta_linear(x, w, b, d, mode=mode) for mode in MODES]
    ops.delta_apply_(w, d)
    return *out, ops.delta_linear_grad_input(g, w, d), ops.delta_restore(w, d)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_serving_ops_ask_nothing_of_the_host(device):
    """As a CUDA graph needs it: with tensors that have no data at all, no size depends on data, nothing is read or moved."""
    for dtype in (torch.float32, torch.bfloat16):
        with FakeTensorMode(shape_env=ShapeEnv()):
            x = torch.empty(4, 30, dtype=dtype, device=device)
            g, w, b = x.new_empty(4, 20), x.new_empty(20, 30), x.new_empty(20)
            d = torch.empty(777, dtype=torch.uint8, device=device)
            graph = make_fx(serving, tracing_mode="symbolic")(x, g, w, b, d)
            shapes = [tuple(t.shape) for t in serving(x, g, w, b, d)]
        assert shapes == [(4, 20)] * 3 + [(4, 30), (20, 30)]
        targets = [n.target for n in graph.graph.nodes if n.op == "call_function"]
        mine = [t for t in targets if str(t).startswith("xorz.")]
        assert len(mine) == 6
        # Sizes are asked of tensors, and nothing else is.
        assert {str(t) for t in targets} - {str(t) for t in mine} <= {"aten.sym_size.int"}
        for node in graph.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor):
                assert value.device.type == device, node
                free = free_unbacked_symbols(value)
                assert not free, (node, free)
    # The same look at an op whose size does depend on data finds it.
    with FakeTensorMode(shape_env=ShapeEnv()):
        w = torch.empty(20, 30, device=device)
        graph = make_fx(lambda a, b: ops.delta_encode(a, b), tracing_mode="symbolic")(w, w)
        values = [n.meta["val"] for n in graph.graph.nodes if str(n.target).startswith("xorz.")]
        assert free_unbacked_symbols(values[0])


def test_devices_are_not_mixed_silently_while_tracing():
    with FakeTensorMode():
        x, w, b = torch.empty(4, 30), torch.empty(20, 30), torch.empty(20)
        d = torch.empty(777, dtype=torch.uint8)
        for name, args in (
            ("weight", (x.cuda(), w, b.cuda(), d.cuda())),
            ("delta", (x.cuda(), w.cuda(), b.cuda(), d)),
            ("bias", (x.cuda(), w.cuda(), b, d.cuda())),
        ):
            with pytest.raises(RuntimeError, match=f"delta_linear: input is on cuda:0, but {name} is on cpu"):
                ops.delta_linear(*args)


def test_schemas_say_what_is_written_and_nothing_aliases():
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("xorz::")]
    written = {}
    for name in names:
        schema = getattr(ops, name.removeprefix("xorz::")).default._schema
        assert all(r.alias_info is None for r in schema.returns), name
        written[name] = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
        assert schema.is_mutable == bool(written[name])
    assert written.pop("xorz::delta_apply_") == ["weight"]
    assert not any(written.values()), written
    assert "Tensor(a!) weight" in str(ops.delta_apply_.default._schema)


def test_the_profiler_shows_ops_by_name():
    module = layer("sparse", torch.float32)
    x = torch.randn(3, 40, requires_grad=True)
    with torch.profiler.profile() as profile:
        module(x).sum().backward()
        xorz.delta_restore(module.weight, module.delta)
    names = {e.key for e in profile.key_averages()}
    assert {"xorz::delta_linear", "xorz::delta_linear_grad_input", "xorz::delta_restore"} <= names


@pytest.mark.parametrize("made_inside", [True, False])
def test_inference_mode_and_no_grad(made_inside, encoding):
    module = layer(encoding, torch.float32)
    want = module(torch.ones(3, 40)).detach()
    with torch.inference_mode():
        x = torch.ones(3, 40) if made_inside else None
    x = torch.ones(3, 40) if x is None else x
    with torch.inference_mode():
        y = module(x)
        assert y.is_inference() and same_bits(y, want)
        inner = copy.deepcopy(module)
        assert same_bits(inner(x), want)
    with torch.no_grad():
        y = module(x)
        assert not y.requires_grad and same_bits(y, want)
        assert same_bits(inner(x), want)
    if made_inside:
        # Autograd keeps no part of the input: the bias trains on tensors of inference mode.
        (grad,) = torch.autograd.grad(module(x).sum(), module.bias)
        assert torch.equal(grad, torch.full((24,), 3.0))


MEMORY = textwrap.dedent(
    """
    import sys, torch, xorz

    def resident(field):
        for line in open("/proc/self/status"):
            if line.startswith(field):
                return int(line.split()[1]) * 1024

    def peak_of(f):
        f()
        open("/proc/self/clear_refs", "w").write("5")
        before = resident("VmRSS")
        out = f()
        return resident("VmHWM") - before

    torch.set_num_threads(2)
    torch.manual_seed(0)
    base = torch.randn(8192, 4096).mul_(0.02).to(torch.bfloat16)
    assert base.nbytes == 64 << 20
    words = base.view(torch.int16)
    for prefer, share in (("speed", 0.02), ("memory", 0.6)):
        tuned = (words + (torch.rand(base.shape) < share).to(torch.int16)).view(torch.bfloat16)
        delta = xorz.delta_encode(base, tuned, prefer=prefer)
        assert xorz.delta_info(delta).encoding == {"speed": "sparse", "memory": "exponent"}[prefer]
        del tuned
        dense = peak_of(lambda: xorz.delta_restore(base, delta))
        assert dense >= 60 << 20, dense
        x = torch.randn(4, 4096).bfloat16().requires_grad_()
        for m in (4, 48):
            g = torch.randn(m, 8192).bfloat16()
            xorz._core.reset_counters()
            peak = peak_of(lambda: torch.ops.xorz.delta_linear_grad_input(g, base, delta))
            assert xorz._core.scratch_peak_bytes() <= 2 << 20, xorz._core.scratch_peak_bytes()
            assert peak < 16 << 20, (prefer, m, peak)
        whole = peak_of(lambda: torch.autograd.grad(torch.ops.xorz.delta_linear(x, base, None, delta).sum(), x))
        assert whole < 16 << 20, whole
        print(prefer, dense >> 20, peak >> 20, whole >> 20, xorz._core.scratch_peak_bytes())
    """
)


def run(code, *arguments, fails=False):
    done = subprocess.run(
        [sys.executable, "-I", "-W", "ignore", "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode != 0) == fails, done.stderr[-4000:]
    return done.stderr if fails else done.stdout


def test_the_gradient_builds_no_dense_matrix():
    """By the process's own peak, on a matrix of 64 MiB; restoring it, for comparison, is seen."""
    assert run(MEMORY).count("\n") == 2


class RawOps(nn.Module):
    """The op itself, a delta of each encoding."""

    def __init__(self, dtype):
        super().__init__()
        for encoding in ENCODINGS:
            base = random_weight(24, 40, dtype)
            self.register_buffer(f"{encoding}_weight", base)
            self.register_buffer(f"{encoding}_delta", make_delta(base, encoding)[1])
        self.bias = nn.Parameter(random_weight(1, 24, dtype)[0])

    def forward(self, x):
        op = torch.ops.xorz.delta_linear
        return torch.stack(
            [
                op(x, self.unchanged_weight, self.bias, self.unchanged_delta),
                op(x, self.sparse_weight, None, self.sparse_delta, mode="deterministic"),
                op(x, self.exponent_weight, self.bias, self.exponent_delta, mode="exact"),
                op(x, self.raw_weight, self.bias, self.raw_delta),
            ]
        )


class Layers(nn.Module):
    """A layer of each encoding."""

    def __init__(self, dtype):
        super().__init__()
        self.layers = nn.ModuleList(layer(e, dtype, mode=MODES[i % 3]) for i, e in enumerate(ENCODINGS))

    def forward(self, x):
        return torch.stack([one(x) for one in self.layers])


LOAD_EXPORTED = textwrap.dedent(
    """
    import sys
    import torch

    torch.ops.load_library(sys.argv[1])
    for folder in sys.argv[2:]:
        module = torch.export.load(folder + "/model.pt2").module()
        inputs = torch.load(folder + "/inputs.pt", weights_only=True)
        torch.save([module(x).detach() for x in inputs], folder + "/outputs.pt")
    assert "xorz" not in sys.modules
    """
)


def test_exported_programs_keep_a_dynamic_batch_in_a_fresh_process(tmp_path):
    cases = []
    batch = torch.export.Dim("batch", min=1, max=4096)
    for strict in (True, False):
        for module_class in (RawOps, Layers):
            for dtype in (torch.float32, torch.bfloat16):
                module, folder = module_class(dtype), tmp_path / str(len(cases))
                folder.mkdir()
                example = (random_weight(3, 40, dtype),)
                program = torch.export.export(module, example, dynamic_shapes=({0: batch},), strict=strict)
                torch.export.save(program, folder / "model.pt2")
                inputs = [random_weight(m, 40, dtype, m) for m in (1, 3, 40)]
                torch.save(inputs, folder / "inputs.pt")
                cases.append((folder, [module(x).detach() for x in inputs]))
    run(LOAD_EXPORTED, xorz.library_path, *(folder for folder, _ in cases))
    for folder, want in cases:
        got = torch.load(folder / "outputs.pt", weights_only=True)
        assert all(same_bits(a, b) for a, b in zip(got, want, strict=True)), folder
    # Without the library torch says which op it lacks.
    text = run(f"import torch; torch.export.load({str(cases[0][0] / 'model.pt2')!r})", fails=True)
    assert "failed to resolve torch.ops.xorz.delta_linear.default to an operator" in text


LOAD_PACKAGED = textwrap.dedent(
    """
    import sys
    import torch

    if sys.argv[1]:
        torch.ops.load_library(sys.argv[1])
    model = torch._inductor.aoti_load_package(sys.argv[2] + "/model.pt2")
    inputs = torch.load(sys.argv[2] + "/inputs.pt", weights_only=True)
    torch.save([model(*x) for x in inputs], sys.argv[2] + "/outputs.pt")
    assert "xorz" not in sys.modules
    """
)


class Many(nn.Module):
    """A layer of each encoding in both dtypes, in every mode."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            layer(encoding, dtype, mode=MODES[i % 3], bias=i != 1)
            for dtype in (torch.float32, torch.bfloat16)
            for i, encoding in enumerate(ENCODINGS)
        )

    def forward(self, x, y):
        return [one(v) for one, v in zip(self.layers, [x] * 4 + [y] * 4, strict=True)]


def test_an_aot_package_runs_in_a_fresh_process_with_the_library_alone(tmp_path):
    model = Many().eval()
    batch = torch.export.Dim("batch", min=2, max=4096)
    with torch.no_grad():
        example = (random_weight(3, 40, torch.float32), random_weight(3, 40, torch.bfloat16))
        program = torch.export.export(model, example, dynamic_shapes=({0: batch}, {0: batch}))
        torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        inputs = [tuple(random_weight(m, 40, t.dtype, m) for t in example) for m in (2, 3, 40)]
        want = [model(*x) for x in inputs]
    torch.save(inputs, tmp_path / "inputs.pt")
    run(LOAD_PACKAGED, xorz.library_path, tmp_path)
    for got, like in zip(torch.load(tmp_path / "outputs.pt", weights_only=True), want, strict=True):
        assert all(same_bits(a, b) for a, b in zip(got, like, strict=True))
    assert "Could not find schema for xorz::delta_linear" in run(LOAD_PACKAGED, "", tmp_path, fails=True)
