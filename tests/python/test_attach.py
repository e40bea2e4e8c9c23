"""Promise: an attached model computes each batch row with its own tenant's weights, whatever kind of module
they are in, or raises; the base's memory is shared, and detach gives the plain model back."""

import copy

import pytest
import torch
import xorz
from conftest import same_bits
from torch import nn
from xorz.arena import Arena

F = torch.nn.functional


class Scale(nn.Module):
    """A parameter of its own beside a child's."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(16))
        self.inner = nn.Linear(16, 16)

    def forward(self, x):
        return self.inner(x * self.scale)


class Toy(nn.Module):
    """Every kind of module that torch alone has; [batch, length] token numbers in, [batch, length, 40] out."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.position = nn.Embedding(12, 16)
        self.norm = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.batch_norm = nn.BatchNorm1d(16)
        self.scale = Scale()
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids) + self.position(torch.arange(ids.size(1))[None])
        h = self.norm(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        x = x + self.batch_norm(self.conv(x.transpose(1, 2))).transpose(1, 2)
        return self.head(self.scale(x))


def tune(model, seed, share=0.4):
    """A fine-tune that changes every tensor of the model."""
    out = copy.deepcopy(model)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*out.parameters(), *out.buffers()):
            if tensor.is_floating_point():
                step = torch.randn(tensor.shape, generator=g) * 0.1
                mask = torch.rand(tensor.shape, generator=g) < share
                mask.view(-1)[0] = True
                tensor.add_(torch.where(mask, step, 0.0).to(tensor.dtype).abs() + 1e-3)
    return out


def family(model, count=3, **options):
    """(base, fine-tunes, attached copy of the base with tenants t0, t1, ...)."""
    base = model.eval()
    tuned = [tune(base, seed) for seed in range(count)]
    tenants = xorz.attach(copy.deepcopy(base), **options)
    for i, other in enumerate(tuned):
        tenants.load(f"t{i}", xorz.diff(base, other))
    return base, tuned, tenants


WHO = ["t1", None, "t0", "t2", "t1"]


def plain(base, tuned, who):
    return base if who is None else tuned[int(who[1])]


def ids(batch=5, length=7, seed=0):
    return torch.randint(0, 40, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dt", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("mode", ["fast", "deterministic", "exact"])
def test_each_row_is_its_tenants(dt, mode):
    torch.manual_seed(0)
    base, tuned, tenants = family(Toy().to(dt), mode=mode)
    x = ids()
    with torch.no_grad():
        with tenants.use(WHO):
            y = tenants.model(x)
        outputs = set()
        for row, who in enumerate(WHO):
            with tenants.use(who):
                alone = tenants.model(x[row : row + 1])
            want = plain(base, tuned, who)(x[row : row + 1])
            if mode == "deterministic":
                assert same_bits(y[row : row + 1], alone)
            tolerance = 1e-5 if dt == torch.float32 else 3e-2
            torch.testing.assert_close(alone, want, rtol=tolerance, atol=tolerance * want.abs().max().item())
            torch.testing.assert_close(
                y[row : row + 1], want, rtol=tolerance, atol=tolerance * want.abs().max().item()
            )
            outputs.add(float(want.double().sum()))
        assert len(outputs) == 5
    same = tenants.detach()
    assert same_bits(same(x), base(x))


def test_exact_mode_gives_the_plain_fine_tunes_bits():
    torch.manual_seed(1)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        base, tuned, tenants = family(Toy().bfloat16(), mode="exact")
        with torch.no_grad():
            for who in WHO:
                with tenants.use(who):
                    assert same_bits(tenants.model(ids()), plain(base, tuned, who)(ids()))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_a_wrong_row_would_be_noticed():
    # The mutant of the tests above: the map of another batch.
    base, tuned, tenants = family(Toy())
    with torch.no_grad(), tenants.use(WHO[::-1]):
        y = tenants.model(ids())
    want = tuned[1](ids()[:1])
    assert not torch.allclose(y[1:2], base(ids()[1:2]), rtol=1e-3) and torch.allclose(
        y[:1], want, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("first", [True, False])
def test_the_fused_paths_of_torchs_transformer_do_not_bypass_tenants(first):
    torch.manual_seed(2)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=first, activation="gelu")
    base, tuned, tenants = family(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    x = torch.randn(5, 7, 16)
    x = x if first else x.transpose(0, 1)
    take = (lambda t, i: t[i : i + 1]) if first else (lambda t, i: t[:, i : i + 1])
    with torch.no_grad():
        uniform = {}
        for who in ("t0", None, "t1"):
            with tenants.use(who):
                uniform[who] = tenants.model(x)
            torch.testing.assert_close(uniform[who], plain(base, tuned, who)(x), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(uniform["t0"], uniform[None], rtol=1e-2)
        if first:
            with tenants.use(WHO):
                y = tenants.model(x)
            for row, who in enumerate(WHO):
                want = plain(base, tuned, who)(take(x, row))
                torch.testing.assert_close(take(y, row), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("shape", ["self", "cross", "widths", "bias_kv"])
def test_attention_of_every_kind(need_weights, shape):
    torch.manual_seed(3)
    options = {"widths": {"kdim": 12, "vdim": 20}, "bias_kv": {"add_bias_kv": True, "add_zero_attn": True}}
    module = nn.MultiheadAttention(16, 4, batch_first=True, **options.get(shape, {}))
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.05 * torch.randn_like(p))
    base, tuned, tenants = family(module)
    q = torch.randn(5, 6, 16)
    k = q if shape == "self" else torch.randn(5, 9, options.get(shape, {}).get("kdim", 16))
    v = k if shape != "widths" else torch.randn(5, 9, 20)
    padding = torch.zeros(5, k.size(1), dtype=torch.bool)
    padding[2, -2:] = True
    causal = torch.ones(6, k.size(1), dtype=torch.bool).triu(1)
    for masks in ({}, {"key_padding_mask": padding}, {"attn_mask": causal, "key_padding_mask": padding}):
        with torch.no_grad():
            with tenants.use(WHO):
                y, shares = tenants.model(q, k, v, need_weights=need_weights, **masks)
            for row, who in enumerate(WHO):
                own = {n: m[row : row + 1] if n == "key_padding_mask" else m for n, m in masks.items()}
                one = (t[row : row + 1] for t in (q, k, v))
                want, attended = plain(base, tuned, who)(*one, need_weights=need_weights, **own)
                torch.testing.assert_close(y[row : row + 1], want, rtol=1e-4, atol=1e-5)
                if need_weights:
                    torch.testing.assert_close(shares[row : row + 1], attended, rtol=1e-4, atol=1e-5)
                else:
                    assert shares is None


def test_a_weight_that_is_read_directly_is_the_tenants_or_refused():
    _, tuned, tenants = family(Toy())
    model = tenants.model
    assert isinstance(model.head.weight, nn.Parameter)
    with tenants.use("t0"):
        assert model.head.weight.dtype == torch.float32 and model.head.weight.shape == (40, 16)
        # Whatever else is done with it is done on that tenant's words.
        x = torch.randn(16)
        assert same_bits(torch.matmul(model.head.weight, x), torch.matmul(tuned[0].head.weight, x))
        assert same_bits(model.norm.weight * 2, tuned[0].norm.weight * 2)
        with pytest.raises(RuntimeError, match=r"asks where `head.weight` lies while 't0' is active"):
            model.head.weight.data_ptr()
        # Products and lookups are served, whoever asks for them.
        x = torch.randn(3, 16)
        torch.testing.assert_close(F.linear(x, model.head.weight), model.head(x))
        torch.testing.assert_close(F.embedding(ids(), model.embed.weight), model.embed(ids()))
    with tenants.use(["t0", "t1"]):
        with pytest.raises(
            RuntimeError, match=r"matmul reads `head.weight` directly while 't0', 't1' are active"
        ):
            torch.matmul(model.head.weight, torch.randn(16))
        with pytest.raises(RuntimeError, match=r"item asks|item reads"):
            model.head.weight.sum().item()
    with tenants.use(None):
        assert isinstance(model.head.weight, nn.Parameter)


def test_without_an_active_tenant_the_base_must_be_meant():
    base, _tuned, tenants = family(Toy())
    with pytest.raises(RuntimeError, match="no tenant is active here"):
        tenants.model(ids())
    with pytest.raises(RuntimeError, match="no tenant is active here"):
        tenants.model.attention(*[torch.zeros(1, 2, 16)] * 3)
    tenants.detach()
    with_base = xorz.attach(copy.deepcopy(base), default="base")
    with torch.no_grad():
        assert same_bits(with_base.model(ids()), base(ids()))


def test_shapes_that_the_map_cannot_explain_raise():
    _, _, tenants = family(Toy())
    with torch.no_grad(), tenants.use(WHO):
        with pytest.raises(
            RuntimeError, match=r"embed was given rows of shape \[4, 7\], but the active tenants map 5"
        ):
            tenants.model(ids(4))
        with pytest.raises(RuntimeError, match=r"head was given rows of shape \[35\]"):
            tenants.model.head(torch.zeros(35, 16))
        with pytest.raises(RuntimeError, match=r"norm was given shapes \[\[10, 16\]\]"):
            tenants.model.norm(torch.zeros(10, 16))
        assert tenants.model.head(torch.zeros(5, 16)).shape == (5, 40)
    with torch.no_grad(), tenants.use("t0"):
        assert tenants.model.head(torch.zeros(35, 16)).shape == (35, 40)


def test_sequence_first_batches():
    torch.manual_seed(4)
    base, tuned, tenants = family(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8)))
    x = torch.randn(7, 5, 16)
    with torch.no_grad(), tenants.use(WHO, dim=1):
        y = tenants.model(x)
    for row, who in enumerate(WHO):
        torch.testing.assert_close(y[:, row], plain(base, tuned, who)(x[:, row]), rtol=1e-4, atol=1e-5)


def test_tokens_regrouped_by_a_module_of_the_users():
    base, tuned, tenants = family(nn.Sequential(nn.Linear(16, 16)))
    x, order = torch.randn(5, 3, 16), torch.randperm(15)[:9]
    with torch.no_grad(), tenants.use(WHO), tenants.regroup(order, (5, 3)):
        y = tenants.model(x.reshape(15, 16)[order])
        with pytest.raises(RuntimeError, match=r"rows of shape \[8\], but the active tenants map 9 tokens"):
            tenants.model(x.reshape(15, 16)[:8])
    for i, token in enumerate(order.tolist()):
        want = plain(base, tuned, WHO[token // 3])(x.reshape(15, 16)[token])
        torch.testing.assert_close(y[i], want, rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_input_as_through_the_fine_tune():
    torch.manual_seed(5)
    base, tuned, tenants = family(nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8)))
    x = torch.randn(5, 3, 16, requires_grad=True)
    with tenants.use(WHO):
        (got,) = torch.autograd.grad(tenants.model(x).square().sum(), x)
    for row, who in enumerate(WHO):
        part = x.detach()[row : row + 1].requires_grad_()
        (want,) = torch.autograd.grad(plain(base, tuned, who)(part).square().sum(), part)
        torch.testing.assert_close(got[row : row + 1], want, rtol=1e-4, atol=1e-5)


def test_autocast_computes_on_the_tenants_own_weights():
    torch.manual_seed(6)
    base, tuned, tenants = family(nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 8)))
    x = torch.randn(5, 16)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), tenants.use(WHO):
        y = tenants.model(x)
        assert y.dtype == torch.bfloat16
        for row, who in enumerate(WHO):
            torch.testing.assert_close(y[row], plain(base, tuned, who)(x[row]), rtol=5e-2, atol=5e-2)


def test_ties_hold_and_break_as_the_fine_tune_says():
    torch.manual_seed(7)
    base = Toy().eval()
    tied, untied = tune(base, 1), tune(base, 2)
    untied.head.weight = nn.Parameter(untied.head.weight.detach().flip(0).contiguous())
    tenants = xorz.attach(copy.deepcopy(base))
    before = tenants.memory()
    tenants.load("tied", xorz.diff(base, tied))
    one = tenants.memory()["deltas"]
    with torch.no_grad():
        with tenants.use("tied"):
            torch.testing.assert_close(tenants.model(ids()), tied(ids()), rtol=1e-4, atol=1e-4)
        tenants.load("untied", {n: d for n, d in xorz.diff(base, untied).deltas.items()})
        with tenants.use("untied"):
            torch.testing.assert_close(tenants.model(ids()), untied(ids()), rtol=1e-4, atol=1e-4)
    # One delta serves both names of a tied matrix.
    assert before["deltas"] == 0 and tenants.memory()["deltas"] > 2 * one
    assert tenants.model.head.weight is tenants.model.embed.weight


def test_a_tenant_with_added_tokens_is_served_alone():
    torch.manual_seed(8)
    base = Toy().eval()
    grown = tune(base, 1)
    grown.embed = nn.Embedding.from_pretrained(
        torch.cat([grown.embed.weight.detach(), torch.randn(3, 16)]), freeze=False
    )
    grown.head = nn.Linear(16, 43, bias=False)
    grown.head.weight = grown.embed.weight
    tenants = xorz.attach(copy.deepcopy(base))
    tenants.load("grown", xorz.diff(base, grown))
    tenants.load("other", xorz.diff(base, tune(base, 2)))
    x = torch.full((2, 4), 42)
    with torch.no_grad(), tenants.use("grown"):
        assert tenants.model(x).shape == (2, 4, 43)
        torch.testing.assert_close(tenants.model(x), grown(x), rtol=1e-4, atol=1e-4)
    with (
        pytest.raises(ValueError, match=r"'grown' has tensors of other shapes.*mixed with 'other'"),
        tenants.use(["grown", "other"]),
    ):
        pass
    with pytest.raises(ValueError, match="mixed with None"), tenants.use([None, "grown"]):
        pass
    with torch.no_grad(), tenants.use(["grown", "grown"]):
        assert tenants.model(x).shape == (2, 4, 43)


def test_what_nothing_can_serve_is_refused_by_name():
    torch.manual_seed(9)
    base = Toy().eval()
    tuned = tune(base, 1)
    delta = xorz.diff(base, tuned)

    def refused(error, match, source=delta, **options):
        tenants = xorz.attach(copy.deepcopy(base), **options)
        with pytest.raises(error, match=match):
            tenants.load("t", source)
        assert tenants.names() == [] and tenants.memory()["deltas"] == tenants.memory()["copies"] == 0
        with torch.no_grad(), tenants.use(None):
            assert same_bits(tenants.model(ids()), base(ids()))

    refused(
        ValueError,
        r"`conv\.weight` is changed, but its module is not attached",
        filter_fn=lambda m, n: n != "conv",
    )
    refused(
        KeyError, "the model has no tensor `nobody`", {**delta.deltas, "nobody": delta.deltas["norm.weight"]}
    )
    refused(ValueError, r"`norm\.weight`.*digest", {"norm.weight": delta.deltas["norm.bias"]})
    refused(ValueError, r"tensor `norm\.weight`: ", {"norm.weight": torch.zeros(64, dtype=torch.uint8)})
    refused(TypeError, r"tensor `norm\.weight`: a delta must be a tensor", {"norm.weight": b"x"})
    other = xorz.diff(tuned, base)
    refused(ValueError, "tensor `[a-z.]+`.*digest", other)
    wide = tune(base, 3)
    wide.norm = nn.LayerNorm(17)
    refused(
        ValueError,
        r"`norm\.weight` is float32 \[17\] in the fine-tune and float32 \[16\] in the model",
        xorz.diff(base, wide),
    )
    half = tune(base, 3)
    half.conv = half.conv.half()
    refused(ValueError, r"`conv\.weight` is float16.*float32", xorz.diff(base, half))
    less = {n: t for n, t in tuned.state_dict().items() if n != "conv.bias"}
    refused(ValueError, "`conv.bias` is not in the fine-tune", xorz.diff(base.state_dict(), less))


@pytest.mark.parametrize("max_copies", [None, "1 MiB"])
def test_large_tensors_that_no_op_serves_stay_deltas_unless_copies_are_allowed(max_copies):
    model = nn.Sequential(
        nn.Linear(64, 64), nn.Conv1d(2, 512, 64, groups=2), nn.Linear(1, 512, bias=False)
    ).eval()
    tuned = tune(model, 1)
    tenants = xorz.attach(copy.deepcopy(model), max_copies=max_copies)
    tenants.load("t", xorz.diff(model, tuned))
    x = torch.randn(3, 2, 64)
    with torch.no_grad():
        with tenants.use("t"):
            torch.testing.assert_close(tenants.model(x), tuned(x), rtol=1e-4, atol=1e-4)
        with tenants.use(["t", None, "t"]):
            y = tenants.model(x)
        torch.testing.assert_close(y[0], tuned(x)[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(y[1], model(x)[1], rtol=1e-4, atol=1e-4)
    copies = tenants.memory()["copies"]
    made = "`1.weight" in tenants.summary() or "1.weight " in tenants.summary()
    if max_copies is None:
        assert copies < 8192 and made and "made dense for" in tenants.summary()
    else:
        assert copies > 131072 and not made


@pytest.mark.parametrize("mode", ["fast", "deterministic"])
def test_what_inference_mode_has_loaded_and_served_can_be_trained_through(mode):
    """Tensors made in inference mode can never be saved for a backward pass."""
    torch.manual_seed(4)
    base = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 4), nn.RMSNorm(4)).eval()
    tuned = tune(base, 1)
    tenants = xorz.attach(copy.deepcopy(base), mode=mode)
    x = torch.randn(3, 16)
    grads = {}
    with torch.inference_mode():
        tenants.load("t", xorz.diff(base, tuned))
    for names in ("t", ["t", None, "t"]):
        with tenants.use(names):
            with torch.inference_mode():
                tenants.model(x)
            leaf = x.clone().requires_grad_()
            tenants.model(leaf).square().sum().backward()
            grads[str(names)] = leaf.grad
    want = [x.clone().requires_grad_() for _ in range(2)]
    for model, leaf in zip((tuned, base), want, strict=True):
        model(leaf).square().sum().backward()
    assert torch.allclose(grads["t"], want[0].grad, atol=1e-4)
    mixed = torch.stack([want[0].grad[0], want[1].grad[1], want[0].grad[2]])
    assert torch.allclose(grads["['t', None, 't']"], mixed, atol=1e-4)


def test_the_model_stays_the_same_object_until_it_is_detached():
    base, _, tenants = family(Toy())
    model = tenants.model
    assert list(model.state_dict()) == list(base.state_dict())
    assert isinstance(model.head, nn.Linear) and isinstance(model.attention, nn.MultiheadAttention)
    assert repr(model) == repr(base)
    with pytest.raises(ValueError, match="attached already"):
        xorz.attach(model)
    with pytest.raises(TypeError, match="detach"):
        copy.deepcopy(model)
    for move in (model.half, model.double, lambda: model.to(torch.bfloat16)):
        with pytest.raises(
            RuntimeError, match=r"deltas are of torch.float32 on cpu; call tenants.detach\(\)"
        ):
            move()
    with pytest.raises(RuntimeError, match="attached to tenants of its weights"):
        model.load_state_dict(base.state_dict())
    with tenants.use("t0"), pytest.raises(ValueError, match="'t0' is in use"):
        tenants.detach()
    plain_model = tenants.detach()
    assert plain_model is model and type(model.head) is nn.Linear and type(model) is Toy
    assert not any("_xorz" in name for m in model.modules() for name in m.__dict__)
    assert copy.deepcopy(model).half() is not None
    with pytest.raises(ValueError, match="detached"):
        tenants.load("t", xorz.diff(base, tune(base, 3)))
    assert xorz.attach(model).names() == []


def test_arguments_are_checked():
    model = Toy()
    with pytest.raises(TypeError, match=r"must be an nn.Module, but is dict"):
        xorz.attach({})
    for options, match in (
        ({"default": ""}, "default must be"),
        ({"default": 7}, "default must be"),
        ({"mode": "quick"}, "mode must be one of"),
        ({"prefer": "size"}, "prefer must be"),
        ({"budget": "many"}, "budget must be bytes"),
        ({"budget": -1}, "budget must be a positive"),
    ):
        with pytest.raises(ValueError, match=match):
            xorz.attach(model, **options)
    assert type(model.head) is nn.Linear
    with torch.device("meta"):
        meta = Toy()
    with pytest.raises(ValueError, match="is on the meta device"):
        xorz.attach(meta)
    _, _, tenants = family(Toy())
    for names, error, match in (
        ("nobody", KeyError, r"no tenant is called 'nobody'; loaded: 't0', 't1', 't2'"),
        ([], ValueError, "names is empty"),
        (["t0", 3], TypeError, "must be a str or None, but is int"),
    ):
        with pytest.raises(error, match=match), tenants.use(names):
            pass
    with pytest.raises(ValueError, match="dim must be 0 or 1"), tenants.use("t0", dim=2):
        pass
    with pytest.raises(ValueError, match="'t0' is loaded already"):
        tenants.load("t0", {})
    with pytest.raises(KeyError, match="no tenant is called 'x'"):
        tenants.unload("x")
    with pytest.raises(TypeError, match="must be a str that is not empty"):
        tenants.load("", {})


def test_swap_changes_a_name_and_open_uses_keep_the_old_one():
    base, tuned, tenants = family(Toy(), count=1)
    fresh = tune(base, 77)
    with torch.no_grad():
        with tenants.use("t0"):
            tenants.swap("t0", xorz.diff(base, fresh))
            torch.testing.assert_close(tenants.model(ids()), tuned[0](ids()), rtol=1e-4, atol=1e-4)
            with tenants.use("t0"):
                torch.testing.assert_close(tenants.model(ids()), fresh(ids()), rtol=1e-4, atol=1e-4)
            held = tenants.memory()["deltas"]
        assert tenants.memory()["deltas"] < held
        with tenants.use("t0"):
            torch.testing.assert_close(tenants.model(ids()), fresh(ids()), rtol=1e-4, atol=1e-4)
            tenants.unload("t0")
            torch.testing.assert_close(tenants.model(ids()), fresh(ids()), rtol=1e-4, atol=1e-4)
    assert tenants.names() == [] and tenants.memory()["deltas"] == tenants.memory()["copies"] == 0


def test_more_tenants_than_there_were_slots():
    _base, tuned, tenants = family(Toy(), count=11)
    who = [f"t{i}" for i in range(11)]
    x = ids(11)
    with torch.no_grad(), tenants.use(who):
        y = tenants.model(x)
    for row in range(11):
        torch.testing.assert_close(y[row : row + 1], tuned[row](x[row : row + 1]), rtol=1e-4, atol=1e-4)


def test_a_budget_evicts_to_files_and_reads_back(tmp_path):
    torch.manual_seed(10)
    base = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256)).eval()
    tuned = [tune(base, i) for i in range(4)]
    for i, other in enumerate(tuned):
        xorz.pack(base.state_dict(), other.state_dict(), tmp_path / f"{i}.xorz")
    probe = xorz.attach(copy.deepcopy(base))
    probe.load("t", tmp_path / "0.xorz")
    size = probe.sizes()["t"]
    tenants = xorz.attach(copy.deepcopy(base), budget=int(2.5 * size))
    x = torch.randn(3, 256)
    for i in range(4):
        tenants.load(f"t{i}", tmp_path / f"{i}.xorz")
    assert [tenants.resident(f"t{i}") for i in range(4)] == [False, False, True, True]
    assert tenants.names() == ["t0", "t1", "t2", "t3"]
    for i in (0, 3, 1, 2, 0):
        with torch.no_grad(), tenants.use(f"t{i}"):
            torch.testing.assert_close(tenants.model(x), tuned[i](x), rtol=1e-3, atol=1e-4)
        assert tenants.memory()["deltas"] + tenants.memory()["copies"] <= 2.5 * size
    # What is in use cannot make room.
    with (
        tenants.use(["t0", "t1"]),
        pytest.raises(MemoryError, match=r"'t2' takes .* no other tenant is idle"),
        tenants.use("t2"),
    ):
        pass
    # A file that is not what it was is not served.
    with tenants.use(["t0", "t1"]):
        pass
    (tmp_path / "3.xorz").write_bytes((tmp_path / "0.xorz").read_bytes())
    with pytest.raises(ValueError, match=r"'t3': .* has changed since it was loaded"), tenants.use("t3"):
        pass
    (tmp_path / "2.xorz").unlink()
    with pytest.raises(FileNotFoundError), tenants.use("t2"):
        pass
    tenants.unload("t2")
    assert tenants.names() == ["t0", "t1", "t3"]


def test_what_the_summary_and_the_memory_say():
    base, _, tenants = family(Toy())
    text = tenants.summary()
    for name, kind in (
        ("head", "delta"),
        ("embed", "delta"),
        ("norm", "split"),
        ("conv", "split"),
        ("attention", "delta"),
    ):
        (line,) = [row for row in text.splitlines() if row.startswith(name + " ")]
        assert kind in line and "t0, t1, t2" in line
    memory = tenants.memory()
    assert memory["base"] == sum({t.data_ptr(): t.nbytes for t in base.state_dict().values()}.values())
    assert memory["total"] == memory["base"] + memory["deltas"] + memory["copies"]
    assert memory["deltas"] + memory["copies"] == sum(tenants.sizes().values())
    assert "3 loaded, 3 in memory" in repr(tenants)


def test_the_arena_lends_each_byte_once_and_gives_pages_back():
    arena = Arena(1 << 20)
    g = torch.Generator().manual_seed(0)
    held = {}
    for step in range(3000):
        if held and torch.rand((), generator=g) < 0.5:
            offset = list(held)[int(torch.randint(len(held), (), generator=g))]
            data = held.pop(offset)
            assert torch.equal(arena.tensor[offset : offset + data.numel()], data)
            arena.free(offset, data.numel())
        else:
            data = torch.randint(0, 256, (int(torch.randint(1, 9000, (), generator=g)),), dtype=torch.uint8)
            try:
                offset = arena.allocate(data.numel())
            except MemoryError:
                continue
            assert offset % 64 == 0 and offset not in held
            arena.write(offset, data)
            held[offset] = data
        if step % 500 == 0:
            for offset, data in held.items():
                assert torch.equal(arena.tensor[offset : offset + data.numel()], data)
    for offset, data in held.items():
        arena.free(offset, data.numel())
    assert arena.used == 0 and arena.allocate(1 << 20) == 0
    with pytest.raises(MemoryError, match="64 free bytes"):
        arena.allocate(1)
