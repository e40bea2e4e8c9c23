"""Promise: whoever reads a weight of an attached model, and however, gets the tenant's numbers or an error; never the base's or
another tenant's without a word. Every expectation is the plain fine-tuned model's.
"""

import asyncio
import contextvars
import copy

import numpy as np
import pytest
import torch
import xorz
from conftest import same_bits
from torch import nn

F = nn.functional


def tuned_of(base, seed, scale=0.5):
    """A fine-tune that changes every floating tensor, far enough to be told apart."""
    out, g = copy.deepcopy(base), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        # Of what a checkpoint holds.
        for t in {id(t): t for t in out.state_dict(keep_vars=True).values()}.values():
            if t.is_floating_point():
                t.add_(scale * torch.rand(t.shape, generator=g).to(t.dtype) + 0.05)
    return out


class Case:
    """A base, fine-tunes a and b, and an attached copy of the base that serves them."""

    def __init__(self, model, **options):
        self.base = model.eval()
        self.plain = {None: self.base, "a": tuned_of(model, 1), "b": tuned_of(model, 2)}
        self.model = copy.deepcopy(self.base)
        self.tenants = xorz.attach(self.model, **options)
        for name in "ab":
            self.tenants.load(name, xorz.diff(self.base, self.plain[name]))

    def check_alone(self, *inputs, call=None):
        """Each tenant in turn, twice over, gives what the plain model gives; they differ."""
        call = call or (lambda m: m(*inputs))
        with torch.no_grad():
            seen = []
            for name in (None, "a", "b", "a", None):
                want = call(self.plain[name])
                with self.tenants.use(name):
                    got = call(self.model)
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
                seen.append(torch.cat([t.double().flatten() for t in tensors(want)]))
            assert not torch.allclose(seen[0], seen[1], rtol=1e-2) and not torch.allclose(
                seen[1], seen[2], rtol=1e-2
            )

    def check_mixed(self, x, dim=0, call=None):
        """Right for every row, or an error of ours; says which."""
        names = (["a", None, "b", "a"] * 9)[: x.size(0)]
        call = call or (lambda m, x: m(x))
        with torch.no_grad():
            try:
                with self.tenants.use(names):
                    got = call(self.model, x)
            except RuntimeError as error:
                assert "xorz: " in str(error), error
                return "refused"
            for row, name in enumerate(names):
                want = call(self.plain[name], x)
                torch.testing.assert_close(got[row], want[row], rtol=1e-4, atol=1e-5)
        return "right"


def tensors(value):
    return [value] if isinstance(value, torch.Tensor) else [t for v in value for t in tensors(v)]


# A1, A2: past the module, by whatever attribute, name, list or protocol.

READS = {
    "T": lambda w, x: x @ w.T,
    "t()": lambda w, x: x @ w.t(),
    "mT": lambda w, x: torch.matmul(x, w.mT),
    "transpose": lambda w, x: torch.mm(x, w.transpose(0, 1)),
    "data": lambda w, x: F.linear(x, w.data),
    "detach": lambda w, x: x @ w.detach().T,
    "linear": lambda w, x: F.linear(x, w),
    "real": lambda w, x: F.linear(x, w.real),
    "a view": lambda w, x: F.linear(x, w.view(-1).view(w.shape)),
    "a slice": lambda w, x: F.linear(x, w[:, :]),
    "einsum": lambda w, x: torch.einsum("bk,nk->bn", x, w),
    "mul": lambda w, x: (x[:, None] * w).sum(-1),
    "dlpack": lambda w, x: x @ torch.from_dlpack(w.detach()).T,
    "numpy": lambda w, x: x @ torch.from_numpy(np.asarray(w.detach().numpy())).T,
    "clone": lambda w, x: x @ w.clone().T,
    "bmm": lambda w, x: torch.bmm(x[None], w.T[None])[0],
    "addmm": lambda w, x: torch.addmm(torch.zeros(5), x, w.T),
    "dispatched": lambda w, x: torch.ops.aten.mm.default(x, torch.ops.aten.t.default(w)),
    "norm": lambda w, x: F.linear(x, w / w.norm(dim=1, keepdim=True)),
}
WAYS = {
    "attribute": lambda m: m.inner.weight,
    "_parameters": lambda m: m.inner._parameters["weight"],
    "parameters()": lambda m: next(m.inner.parameters()),
    "state_dict()": lambda m: m.inner.state_dict()["weight"],
    "get_parameter": lambda m: m.get_parameter("inner.weight"),
    "a list": lambda m: m.held[0],
    "a closure": lambda m: m.closure(),
}


class Reader(nn.Module):
    def __init__(self, way, read):
        super().__init__()
        self.inner, self.way, self.read = nn.Linear(5, 5, bias=False), way, read
        self.link()

    def link(self):
        weight = self.inner.weight
        self.held, self.closure = [weight], lambda: weight

    def __deepcopy__(self, memo):
        out = Reader(self.way, self.read)
        out.load_state_dict(self.state_dict())
        return out.eval()

    def forward(self, x):
        return READS[self.read](WAYS[self.way](self), x)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "inference"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("read", READS)
def test_every_way_to_a_weight_gives_the_tenants(way, read, grad):
    torch.manual_seed(0)
    case, x = Case(Reader(way, read)), torch.randn(3, 5)
    with torch.inference_mode(grad):
        case.check_alone(x)
    said = case.check_mixed(torch.randn(4, 5))
    if read in ("T", "t()", "mT", "data", "detach", "linear", "transpose") and way != "state_dict()":
        assert said == "right"


def test_falcons_linear_layer_is_served_with_its_tenants():
    """`class FalconLinear(nn.Linear)` of transformers."""

    class Falcons(nn.Linear):
        def forward(self, x):
            states = x @ self.weight.T
            return states if self.bias is None else states + self.bias

    torch.manual_seed(1)
    for bias in (False, True):
        case = Case(nn.Sequential(Falcons(6, 7, bias=bias), Falcons(7, 3, bias=bias)))
        case.check_alone(torch.randn(2, 4, 6))
        assert case.check_mixed(torch.randn(4, 5, 6)) == "right"
        assert "made dense" not in case.tenants.summary()


def test_a_head_tied_through_parameters_is_the_tenants():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(9, 6)

        def forward(self, ids):
            return F.linear(self.embed(ids), next(self.embed.parameters()))

    case = Case(Tied())
    case.check_alone(torch.arange(8).view(2, 4))
    assert case.check_mixed(torch.arange(8).view(4, 2)) == "right"


def test_an_extension_that_takes_the_address_gets_none():
    case = Case(nn.Sequential(nn.Linear(4, 4)))
    weight = case.model[0]._parameters["weight"]
    assert weight.data_ptr() == case.model[0].weight.data_ptr()  # outside, it is the base's
    with case.tenants.use("a"):
        for read in (lambda: weight.data_ptr(), lambda: weight.untyped_storage(), lambda: weight.storage()):
            with pytest.raises(RuntimeError, match=r"asks where `0.weight` lies while 'a' is active"):
                read()
        # As C++ sees it, past every hook of Python.
        with torch._C.DisableTorchFunctionSubclass():
            assert weight.data_ptr() == 0
            with pytest.raises(RuntimeError, match="storage"):
                weight.untyped_storage().data_ptr()


def test_a_tensor_that_a_tenant_has_untied_is_refused_where_its_name_is_unknown():
    base = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
    base[1].weight = base[0].weight
    untied = copy.deepcopy(base)
    untied[1].weight = nn.Parameter(untied[1].weight.detach() + 1)
    tenants = xorz.attach(copy.deepcopy(base))
    deltas = {
        f"{i}.weight": xorz.delta_encode(base[i].weight.detach(), untied[i].weight.detach()) for i in (0, 1)
    }
    tenants.load("t", deltas)
    with tenants.use("t"), torch.no_grad():
        assert same_bits(tenants.model[1].weight + 0, untied[1].weight)
        with pytest.raises(RuntimeError, match=r"both `0.weight` and `1.weight`.*untied"):
            next(tenants.model[1].parameters()) + 0


# A3: compiled code.


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


# A5: generators.


def test_two_streams_stepped_in_turn_have_each_their_tenant_or_an_error():
    torch.manual_seed(0)
    case, x = Case(nn.Sequential(nn.Linear(4, 4))), torch.randn(2, 4)

    def stream(name):
        with case.tenants.use(name):
            while True:
                yield case.model(x)

    with torch.no_grad():
        one, two = stream("a"), stream("b")
        assert torch.allclose(next(one), case.plain["a"](x), atol=1e-5)
        with pytest.raises(RuntimeError, match=r"tenants.stream"):
            case.model(x)  # not in the generator, whose tenant has leaked out of it
        assert torch.allclose(next(two), case.plain["b"](x), atol=1e-5)
        with pytest.raises(RuntimeError, match=r"tenants.stream"):
            next(one)
        two.close()
        # Nothing is left behind.
        with pytest.raises(RuntimeError, match="no tenant is active"):
            case.model(x)
        assert all(t.pins == 0 for t in case.tenants._slots.values())


def test_a_stream_stepped_in_copies_of_its_context_raises_at_its_first_wrong_step():
    torch.manual_seed(0)
    case, x = Case(nn.Sequential(nn.Linear(4, 4)), default="base"), torch.randn(2, 4)

    def stream(name):
        with case.tenants.use(name):
            while True:
                yield case.model(x)

    with torch.no_grad():
        steps = stream("a")
        step = lambda: contextvars.copy_context().run(next, steps)  # noqa: E731
        assert torch.allclose(step(), case.plain["a"](x), atol=1e-5)
        with pytest.raises(RuntimeError, match=r"tenants.stream"):
            step()
        other = stream("b")
        contextvars.copy_context().run(next, other)
        other.close()
        assert torch.allclose(case.model(x), case.base(x)) and not case.tenants.generators


def test_streams_are_stepped_by_tenants_stream():
    torch.manual_seed(0)
    case, x = Case(nn.Sequential(nn.Linear(4, 4))), torch.randn(2, 4)

    def outputs(count=3):
        for _ in range(count):
            yield case.model(x)

    async def outputs_later(count=3):
        for _ in range(count):
            await asyncio.sleep(0)
            yield case.model(x)

    async def both():
        streams = {n: case.tenants.stream(n, outputs_later()) for n in "ab"}
        for _ in range(3):
            for name, stream in streams.items():
                assert torch.allclose(await anext(stream), case.plain[name](x), atol=1e-5)
        for stream in streams.values():
            with pytest.raises(StopAsyncIteration):
                await anext(stream)

    with torch.no_grad():
        streams = {n: case.tenants.stream(n, outputs()) for n in "ab"}
        for _ in range(3):
            for name, stream in streams.items():
                assert torch.allclose(
                    contextvars.copy_context().run(next, stream), case.plain[name](x), atol=1e-5
                )
        assert [list(s) for s in streams.values()] == [[], []]
        with pytest.raises(RuntimeError, match="no tenant is active"):
            case.model(x)
        asyncio.run(both())
    for bad in (5, object()):
        with pytest.raises(TypeError, match="iterator"):
            case.tenants.stream("a", bad)


def test_a_use_inside_of_one_step_of_a_generator_is_right():
    case, x = Case(nn.Sequential(nn.Linear(4, 4))), torch.randn(2, 4)

    def steps(name):
        for _ in range(2):
            with case.tenants.use(name):
                y = case.model(x)
            yield y

    with torch.no_grad():
        for got in zip(steps("a"), steps("b"), strict=True):
            for name, y in zip("ab", got, strict=True):
                assert torch.allclose(y, case.plain[name](x), atol=1e-5)


def test_a_context_of_ones_own_may_open_a_use():
    from contextlib import ExitStack, contextmanager

    case, x = Case(nn.Sequential(nn.Linear(4, 4))), torch.randn(2, 4)

    @contextmanager
    def serving(name):
        with case.tenants.use(name):
            yield

    with torch.no_grad(), serving("a"):
        assert torch.allclose(case.model(x), case.plain["a"](x), atol=1e-5)
        with ExitStack() as stack:
            stack.enter_context(serving("b"))
            assert torch.allclose(case.model(x), case.plain["b"](x), atol=1e-5)
        assert torch.allclose(case.model(x), case.plain["a"](x), atol=1e-5)


def test_one_use_is_entered_once_at_a_time():
    case = Case(nn.Sequential(nn.Linear(4, 4)))
    use = case.tenants.use("a")
    with use, pytest.raises(RuntimeError, match="open already"), use:
        pass
    with use:
        pass
    assert all(t.pins == 0 for t in case.tenants._slots.values())


# A6: recurrent layers.


@pytest.mark.parametrize("first", [True, False], ids=["batch_first", "sequence_first"])
@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_recurrent_layers_give_each_row_its_outputs_and_states(kind, first):
    torch.manual_seed(0)
    names = ["a", None, "b"]
    # As many layers and steps as rows, where sizes tell nothing.
    case = Case(kind(8, 6, num_layers=3, batch_first=first))
    x, state = torch.randn(3, 3, 8), torch.randn(3, 3, 6)
    state = (state, state + 1) if kind is nn.LSTM else state
    with torch.no_grad():
        for given in (None, state):
            case.check_alone(call=lambda m, given=given: m(x, given))
            with case.tenants.use(names):
                out, last = case.model(x, given)
            for row, name in enumerate(names):
                want, end = case.plain[name](x, given)
                take = (lambda t, row=row: t[row]) if first else (lambda t, row=row: t[:, row])
                torch.testing.assert_close(take(out), take(want), rtol=1e-4, atol=1e-5)
                for mine, theirs in zip(tensors(last), tensors(end), strict=True):
                    assert mine.shape == theirs.shape
                    torch.testing.assert_close(mine[:, row], theirs[:, row], rtol=1e-4, atol=1e-5)
        with case.tenants.use(names), pytest.raises(RuntimeError, match="4 sequences"):
            case.model(torch.randn(4, 4, 8))


# A7: sizes that are the batch's by chance.


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x, mask):
        y = x * self.scale
        return torch.softmax(y @ y.transpose(1, 2) + mask, -1) @ y


class Strange(Masked):
    """Nothing that is known row by row."""

    def forward(self, x, mask):
        weights = torch.softmax(torch.einsum("btk,k,bsk->bts", x, self.scale, x) + mask, -1)
        return weights @ x


@pytest.mark.parametrize("kind", [Masked, Strange])
def test_a_mask_whose_size_is_the_batchs_is_never_cut(kind):
    torch.manual_seed(0)
    case, mask = Case(kind()), torch.full((4, 4), float("-inf")).triu(1)
    x = torch.randn(4, 4, 6)
    case.check_alone(x, mask)
    said = case.check_mixed(x, call=lambda m, x: m(x, mask))
    # Where sizes tell, it is served.
    other = torch.full((5, 5), float("-inf")).triu(1)
    assert case.check_mixed(torch.randn(4, 5, 6), call=lambda m, x: m(x, other)) == "right"
    assert said == "right"


# A8: buffers.


def scaled(cls):
    class Scaled(cls):
        def __init__(self, *args):
            super().__init__(*args)
            self.register_buffer("k", torch.tensor([1.5]))

        def forward(self, x):
            return super().forward(x) * self.k

    return Scaled


def test_buffers_are_the_tenants():
    torch.manual_seed(0)
    case = Case(nn.Sequential(scaled(nn.Linear)(4, 4), scaled(nn.Linear)(4, 4)))
    case.check_alone(torch.randn(2, 4))
    assert case.check_mixed(torch.randn(4, 4)) == "right"
    case = Case(scaled(nn.Embedding)(6, 4))
    case.check_alone(torch.arange(6).view(2, 3))
    assert case.check_mixed(torch.arange(8).view(4, 2) % 6) == "right"
    case = Case(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    case.check_alone(torch.randn(2, 4))
    assert case.check_mixed(torch.randn(4, 4)) == "right"


# A9: values that are made from weights and kept.


class Keeps(nn.Module):
    """As LeViT keeps its biases of attention: made once, in evaluation."""

    def __init__(self, how):
        super().__init__()
        self.bias, self.how = nn.Parameter(torch.randn(6)), how
        self.index, self.cache = [0, 2, 4, 1], {} if how == "dict" else None

    def forward(self, x):
        if self.how == "dict":
            if "b" not in self.cache:
                self.cache["b"] = self.bias[self.index]
            return x + self.cache["b"]
        if self.cache is None:
            self.cache = self.bias[self.index]
        return x + self.cache


@pytest.mark.parametrize("how", ["attribute", "dict"])
@pytest.mark.parametrize("base_first", [True, False])
def test_values_made_from_weights_are_not_shared(how, base_first):
    torch.manual_seed(0)
    case, x = Case(Keeps(how)), torch.randn(4, 4)
    if base_first:
        with torch.no_grad(), case.tenants.use(None):
            assert torch.allclose(case.model(x), copy.deepcopy(case.base)(x))
    with torch.no_grad():
        for name in ("a", "b", None, "a", "b"):
            with case.tenants.use(name):
                got = case.model(x)
            torch.testing.assert_close(got, copy.deepcopy(case.plain[name])(x))
    for plain in case.plain.values():
        plain.cache = {} if how == "dict" else None
    case.check_mixed(torch.randn(4, 4), call=lambda m, x: m(x))


def test_what_was_kept_before_attach_is_refused_on_load():
    base = Keeps("attribute").eval()
    tuned = tuned_of(base, 1)
    with torch.no_grad():
        base(torch.randn(2, 4))
    tenants = xorz.attach(base)
    with pytest.raises(ValueError, match=r"`bias` is changed, and Keeps keeps tensors in `cache`"):
        tenants.load("a", {"bias": xorz.delta_encode(base.bias.detach(), tuned.bias.detach())})


def test_a_parent_that_keeps_what_it_makes_of_its_childrens_weights_is_refused():
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.both = nn.Linear(4, 4), nn.Linear(4, 4), None

        def forward(self, x):
            if self.both is None:
                self.both = torch.cat([self.q.weight, self.k.weight])
            return F.linear(x, self.both)

    case, x = Case(Fused()), torch.randn(2, 4)
    with torch.no_grad():
        with case.tenants.use("a"):
            assert torch.allclose(case.model(x), copy.deepcopy(case.plain["a"])(x), atol=1e-5)
        for name in ("b", None):
            with pytest.raises(
                RuntimeError, match=r"Fused reads weights of another module and kept .* `both`"
            ):
                case.tenants.use(name).__enter__()


def test_attributes_that_are_set_after_attach_are_everyones():
    class Times(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.factor = nn.Parameter(torch.ones(3)), 1.0

        def forward(self, x):
            return x * self.w * self.factor

    case, x = Case(Times()), torch.randn(2, 3)
    case.check_alone(x)
    for model in (*case.plain.values(), case.model):
        model.factor = 3.0
    case.check_alone(x)


# A10: the base is watched.


def load_in_place(model):
    with torch.no_grad():
        model[0].weight.detach().copy_(torch.ones(4, 4))


def replace_module(model):
    model[0] = nn.Linear(4, 4)


def replace_parameter(model):
    model[0].weight = nn.Parameter(torch.ones(4, 4))


@pytest.mark.parametrize("change", [load_in_place, replace_module, replace_parameter])
def test_a_base_that_changes_is_noticed_at_the_next_use(change):
    case = Case(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    change(case.model)
    with pytest.raises(
        RuntimeError, match=r"`0(\.weight)?` of the (base was changed|attached model was replaced)"
    ):
        with case.tenants.use("a"):
            pass


def test_what_would_change_the_base_through_any_other_name_is_refused_at_once():
    case = Case(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    weight = next(case.model.parameters())
    with torch.no_grad():
        for change in (
            lambda: weight.add_(1),
            lambda: case.model[0].weight.add_(1),
            lambda: case.model[0].weight.data.copy_(torch.ones(4, 4)),
            lambda: weight.mul_(2),
            lambda: weight.copy_(torch.ones(4, 4)),
            lambda: weight.__setitem__(0, 1),
            lambda: setattr(weight, "data", torch.ones(4, 4)),
            lambda: torch.add(weight, 1, out=weight),
            lambda: nn.init.normal_(weight),
            lambda: torch.ops.aten.add_.Tensor(weight, weight),
            lambda: xorz.apply_(case.model, xorz.diff(case.base, case.plain["a"])),
            lambda: torch._foreach_add_([weight], 1.0),
        ):
            with pytest.raises((RuntimeError, ValueError, TypeError), match=r"xorz|detach"):
                change()
            with case.tenants.use(None):
                assert same_bits(case.model(torch.ones(1, 4)), case.base(torch.ones(1, 4)))


def test_resized_embeddings_are_noticed():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=2)  # fmt: skip
    base = LlamaForCausalLM(config).eval()
    model = copy.deepcopy(base)
    tenants = xorz.attach(model)
    tenants.load("a", xorz.diff(base, tuned_of(base, 1)))
    try:
        model.resize_token_embeddings(40)
    except (RuntimeError, TypeError, ValueError) as error:
        assert "xorz" in str(error)
        return
    with pytest.raises(RuntimeError, match="was replaced or removed"), tenants.use("a"):
        pass


# A11: tracing.


def test_an_attached_model_is_not_traced():
    case, x = Case(nn.Sequential(nn.Linear(4, 4))), torch.randn(2, 4)
    with (
        case.tenants.use("a"),
        torch.no_grad(),
        pytest.raises(RuntimeError, match=r"torch\.jit\.trace of an attached"),
    ):
        torch.jit.trace(case.model, x, check_trace=False)
    torch.jit.trace(case.tenants.detach(), x)


# A12: forwards that were replaced on the instance.


def wrapped(module):
    original = module.forward
    module.forward = lambda *args, **kwargs: original(*args, **kwargs) + 1
    return module


LAYERS = {
    "linear": lambda: nn.Linear(4, 4),
    "norm": lambda: nn.LayerNorm(4),
    "rms": lambda: nn.RMSNorm(4),
    "conv": lambda: nn.Conv1d(5, 5, 3, padding=1),
    "batch_norm": lambda: nn.BatchNorm1d(5),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("layer", LAYERS)
def test_forwards_replaced_on_the_instance_are_served(layer, when):
    torch.manual_seed(0)
    base = nn.Sequential(LAYERS[layer]()).eval()
    plain = {None: base, "a": tuned_of(base, 1), "b": tuned_of(base, 2)}
    model = copy.deepcopy(base)
    deltas = {n: xorz.diff(base, plain[n]) for n in "ab"}
    if when == "before":
        wrapped(model[0])
    tenants = xorz.attach(model)
    if when == "after":
        wrapped(model[0])
    for name in "ab":
        tenants.load(name, deltas[name])
    x, names = torch.randn(4, 5, 4), ["a", None, "b", "a"]
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="no tenant is active"):
            model(x)
        for name in (None, "a", "b"):
            with tenants.use(name):
                torch.testing.assert_close(model(x), plain[name](x) + 1, rtol=1e-4, atol=1e-5)
        with tenants.use(names):
            y = model(x)
        for row, name in enumerate(names):
            torch.testing.assert_close(y[row], plain[name](x)[row] + 1, rtol=1e-4, atol=1e-5)


# A13: torch's fused encoder.


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("names", ["a", None, ["a", None, "b"]], ids=str)
def test_padded_places_of_torchs_encoder_are_zeros_as_in_the_plain_model(names):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    case, x = Case(nn.TransformerEncoder(layer, 2)), torch.randn(3, 5, 8)
    pad = torch.zeros(3, 5, dtype=torch.bool)
    pad[0, 3:] = pad[2, 4:] = True
    with torch.no_grad():
        plain = {n: m(x, src_key_padding_mask=pad) for n, m in case.plain.items()}
        assert not plain["a"][0, 3:].any()
        with case.tenants.use(names):
            got = case.model(x, src_key_padding_mask=pad)
    for row in range(3):
        want = plain[names if not isinstance(names, list) else names[row]]
        torch.testing.assert_close(got[row], want[row], rtol=1e-4, atol=1e-5)


# A4: experts that look like others.


def tiny(name, **more):
    """A causal model of transformers with experts."""
    import transformers

    cls = getattr(transformers, f"{name}ForCausalLM")
    sizes = {
        "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "num_local_experts": 4, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "kv_lora_rank": 16,
        "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_shared_experts": 1,
        "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": 1,
    }  # fmt: skip
    config = cls.config_class()
    for key, value in {**sizes, **more}.items():
        if hasattr(config, key):
            setattr(config, key, value)
    if isinstance(getattr(config, "layer_types", None), list):
        config.layer_types = config.layer_types[:2]
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = cls(config).eval().float()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape))
    return model


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids, use_cache=False).logits


def clamped(model, limit=0.2):
    """Every experts module's gate is clamped, by its class."""
    for module in model.modules():
        if hasattr(module, "_apply_gate"):

            def gate(self, both):
                a, b = both.chunk(2, dim=-1)
                return torch.nn.functional.silu(a.clamp(max=limit)) * b.clamp(-limit, limit)

            def forward(self, hidden_states, top_k_index, top_k_weights):
                out = torch.zeros_like(hidden_states)
                for e in range(self.num_experts):
                    token, place = torch.where(top_k_index == e)
                    mine = self._apply_gate(F.linear(hidden_states[token], self.gate_up_proj[e]))
                    mine = F.linear(mine, self.down_proj[e]) * top_k_weights[token, place, None]
                    out.index_add_(0, token, mine)
                return out

            cls = type("ClampedExperts", (type(module),), {"_apply_gate": gate, "forward": forward})
            cls.__module__ = "transformers.models.nobody"
            module.__class__ = cls
    return model


@pytest.mark.parametrize(
    "name",
    ["Mixtral", "DeepseekV3", "DeepseekV2", "Glm4Moe", "GraniteMoe", "GptOss", "DeepseekV4", "clamped"],
)
@pytest.mark.parametrize("mode", ["fast", "deterministic"])
def test_experts_compute_as_their_class_does(name, mode):
    base = clamped(tiny("Mixtral")) if name == "clamped" else tiny(name)
    case = Case(Logits(base), mode=mode)
    for plain in case.plain.values():
        # Near enough for the routers to choose alike.
        with torch.no_grad():
            for p, q in zip(plain.parameters(), base.parameters(), strict=True):
                p.copy_(q + (p - q) * 0.2)
    tenants = xorz.attach(copy.deepcopy(case.base), mode=mode)
    for n in "ab":
        tenants.load(n, xorz.diff(case.base, case.plain[n]))
    ids, names = (
        torch.randint(1, 60, (4, 6), generator=torch.Generator().manual_seed(3)),
        ["a", None, "b", "a"],
    )
    with torch.no_grad():
        want = {n: m(ids) for n, m in case.plain.items()}
        near = 1e-3 * float(want["a"].abs().max())
        assert float((want["a"] - want["b"]).abs().max()) > 20 * near
        if (name, mode) == ("DeepseekV4", "deterministic"):
            # Its blocks are given token numbers, too: nothing is cut that is not declared.
            with (
                tenants.use("a"),
                pytest.raises(RuntimeError, match="is given other tensors beside its rows"),
            ):
                tenants.model(ids)
            return
        for n in case.plain:
            with tenants.use(n):
                assert float((tenants.model(ids) - want[n]).abs().max()) < near
        with tenants.use(names):
            got = tenants.model(ids)
    for row, n in enumerate(names):
        assert float((got[row] - want[n][row]).abs().max()) < near, (row, n)


# Names are those of prompts.


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2, "temperature": 1e-4}],
                         ids=["beams", "returned"])  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_generate_expands_the_names_of_prompts(family, options):
    from models import Family

    made = Family(family, torch.float32)
    ids = made.tokens(2, 6)
    with made.attached("deterministic") as (model, tenants), torch.no_grad():
        run = {"max_new_tokens": 5, "attention_mask": torch.ones_like(ids), **options}
        each = options.get("num_return_sequences", 1)
        with tenants.use(["ann", "bob"]):
            together = model.generate(ids, **run)
            # Afterwards they are the prompts' again.
            assert model(**made.inputs(ids)).logits.size(0) == 2
        for row, name in enumerate(("ann", "bob")):
            want = made.tuned[name].generate(
                ids[row : row + 1], **{**run, "attention_mask": torch.ones(1, 6, dtype=torch.int64)}
            )
            assert torch.equal(together[row * each : (row + 1) * each], want), name


# verify.


def test_verify_names_the_first_module_that_differs(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)).eval()
    case, x = Case(model), torch.randn(4, 8)
    case.tenants.verify("a", x)
    with pytest.raises(KeyError, match="no tenant is called 'c'"):
        case.tenants.verify("c", x)
    site = case.tenants.sites["2"]
    right = type(site).linear

    def wrong(self, rows, input):
        out = right(self, rows, input)
        return out + 0.1 if self is site and rows.only not in (None, -1) else out

    monkeypatch.setattr(type(site), "linear", wrong)
    with pytest.raises(ValueError, match=r"module `2`, 'a' alone: differs .* by 0\.1"):
        case.tenants.verify("a", x)

    def swapped(self, rows, input):
        out = right(self, rows, input)
        return out.flip(0) if self is case.tenants.sites["0"] and rows.only is None else out

    monkeypatch.setattr(type(site), "linear", swapped)
    with pytest.raises(ValueError, match=r"module `0`, row 0 \('a'\) of a mixed batch"):
        case.tenants.verify("a", x)


def test_an_example_refuses_on_load_what_a_client_would_find_out():
    class Unmixable(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.rand(4))

        def forward(self, x, state):
            return x * float(self.w.sum()), state

    base = nn.Sequential(nn.Linear(4, 4)).eval()
    tuned = tuned_of(base, 1)
    tenants = xorz.attach(copy.deepcopy(base), example=torch.randn(3, 4))
    tenants.load("a", xorz.diff(base, tuned))
    assert tenants.names() == ["a"]
    odd = Unmixable().eval()
    served = xorz.attach(copy.deepcopy(odd), example=(torch.randn(3, 4), object()))
    with pytest.raises(ValueError, match=r"'a' cannot be served: xorz: .*use one tenant at a time"):
        served.load("a", xorz.diff(odd, tuned_of(odd, 1)))
    assert served.names() == [] and served.memory()["copies"] == 0


def test_positions_as_many_as_rows_are_positions():
    """[T] position numbers where T is the batch: their embeddings are not one for each row."""

    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.place = nn.Embedding(9, 6), nn.Embedding(9, 6)

        def forward(self, ids):
            return self.embed(ids) + self.place(torch.arange(ids.size(1)))

    class Labels(Positions):
        def forward(self, ids):
            return self.place(ids[:, 0])

    case = Case(Positions())
    for length in (4, 3):
        assert case.check_mixed(torch.randint(0, 9, (4, length))) == "right"
    assert Case(Labels()).check_mixed(torch.randint(0, 9, (4, 2))) == "right"


def test_attention_of_linear_layers_of_ones_own_keeps_their_biases():
    """As WavLM calls torch's function: with weights of three layers, and their biases joined."""

    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x):
            x = x.transpose(0, 1)
            bias = torch.cat([self.q.bias, self.k.bias, self.v.bias])
            y, _ = F.multi_head_attention_forward(
                x, x, x, 8, 2, torch.empty(0), bias, None, None, False, 0.0, self.out.weight, self.out.bias, self.training,
                use_separate_proj_weight=True, q_proj_weight=self.q.weight, k_proj_weight=self.k.weight,
                v_proj_weight=self.v.weight,
            )  # fmt: skip
            return y.transpose(0, 1)

    torch.manual_seed(0)
    case = Case(Attends())
    case.check_alone(torch.randn(3, 5, 8))
    assert case.check_mixed(torch.randn(4, 5, 8)) in ("right", "refused")


# B9.


@pytest.mark.parametrize("prefer", ["speed", "memory", None])
def test_attachs_preference_holds_for_deltas_made_in_memory(prefer):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(256, 256)).eval()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned[0].weight.mul_(1 + 1e-6 * (torch.rand(256, 256) < 0.05))
    made = {}
    for other in ("speed", "memory"):
        tenants = xorz.attach(copy.deepcopy(base), prefer=prefer)
        tenants.load("a", xorz.diff(base, tuned, prefer=other))
        made[other] = xorz.delta_info(tenants.sites["0"].deltas["weight", 0]).encoding
        x = torch.randn(3, 256)
        with torch.no_grad(), tenants.use("a"):
            torch.testing.assert_close(tenants.model(x), tuned(x))
    assert len(set(made.values())) == (2 if prefer is None else 1), made
