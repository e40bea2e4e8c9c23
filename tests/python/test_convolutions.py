"""Promise: convolutions are computed on base + delta, or on dense weights made for the call, and both are the
plain fine-tuned convolution: of every dimension, stride, padding, dilation and group; alone, mixed, in every
mode.
"""

import copy

import pytest
import torch
import xorz
from cases import Case
from conftest import same_bits
from torch import nn
from xorz.serve.site import restored_as

F = nn.functional
NAMES = ["a", None, "b", "a"]

KINDS = {
    "patches": lambda: (nn.Conv2d(3, 96, 8, stride=8), (3, 16, 16)),
    "no bias": lambda: (nn.Conv2d(3, 96, 8, stride=8, bias=False), (3, 16, 16)),
    "1 x 1": lambda: (nn.Conv2d(40, 96, 1), (40, 3, 3)),
    "padded": lambda: (nn.Conv2d(16, 96, 3, padding=1), (16, 4, 5)),
    "oblong": lambda: (nn.Conv2d(16, 96, (3, 2), stride=(1, 2), padding=(1, 0), dilation=(2, 1)), (16, 6, 7)),
    "same": lambda: (nn.Conv2d(16, 96, (3, 2), padding="same", dilation=(1, 2)), (16, 4, 4)),
    "valid": lambda: (nn.Conv2d(16, 96, 3, padding="valid"), (16, 5, 5)),
    "reflect": lambda: (nn.Conv2d(16, 96, 3, padding=1, padding_mode="reflect"), (16, 4, 4)),
    "circular": lambda: (nn.Conv2d(16, 96, 3, padding=1, padding_mode="circular"), (16, 4, 4)),
    "replicate": lambda: (nn.Conv1d(16, 96, 3, padding=1, padding_mode="replicate"), (16, 9)),
    "sequence": lambda: (nn.Conv1d(32, 96, 5, stride=2, padding=2, dilation=2), (32, 11)),
    "volume": lambda: (nn.Conv3d(3, 96, (2, 3, 3), stride=2, padding=1), (3, 4, 4, 4)),
}
DENSE = {
    "many positions": lambda: (nn.Conv2d(64, 64, 3), (64, 12, 12)),
    "groups": lambda: (nn.Conv2d(32, 96, 6, groups=4), (32, 6, 6)),
    "depthwise": lambda: (nn.Conv1d(512, 512, 64, groups=512), (512, 64)),
    "transposed": lambda: (nn.ConvTranspose2d(96, 8, 6, stride=2), (96, 2, 2)),
    "transposed sequence": lambda: (nn.ConvTranspose1d(96, 48, 8), (96, 3)),
    "channels last": lambda: (nn.Conv2d(16, 96, 4).to(memory_format=torch.channels_last), (16, 4, 4)),
    "float64": lambda: (nn.Conv2d(16, 96, 4).double(), (16, 4, 4)),
}
EVERY = KINDS | DENSE


@pytest.fixture(autouse=True)
def no_copies(monkeypatch):
    """None of these weights is to be kept dense."""
    monkeypatch.setattr("xorz.serve.prepare.SMALL", 0)


def case_of(kind, dtype=torch.float32, **options):
    torch.manual_seed(0)
    layer, shape = EVERY[kind]()
    layer = layer if layer.weight.dtype == torch.float64 else layer.to(dtype)
    return Case(nn.Sequential(layer), **options), torch.randn(4, *shape, dtype=layer.weight.dtype)


def is_dense(case):
    return "made dense for" in case.tenants.summary()


@pytest.mark.parametrize("mode", ["fast", "deterministic"])
@pytest.mark.parametrize("kind", EVERY)
def test_convolutions_are_the_plain_fine_tuned_ones(kind, mode):
    case, x = case_of(kind, mode=mode)
    assert case.tenants.memory()["copies"] < 5000
    case.check_alone(x[:1])
    assert is_dense(case) == (kind in DENSE)
    assert case.check_mixed(x) == "right"
    assert is_dense(case) == (kind in DENSE)
    case.check_alone(x)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("kind", EVERY)
def test_exact_gives_the_plain_convolutions_bits(kind, kept, monkeypatch):
    if kept:
        monkeypatch.setattr("xorz.serve.prepare.SMALL", 1 << 30)
    for dtype in (torch.float32, torch.bfloat16):
        case, x = case_of(kind, dtype, mode="exact")
        with torch.no_grad():
            for name in (None, "a", "b"):
                with case.tenants.use(name):
                    assert same_bits(case.model(x), case.plain[name](x))


@pytest.mark.parametrize(
    "laid",
    [
        lambda t: t,
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: t.transpose(0, 1),
        lambda t: t.permute(3, 1, 0, 2),
    ],
)
def test_a_tenants_dense_words_lie_as_the_bases_do(laid):
    """By that torch chooses how it computes, on some machines with other last bits."""
    base = laid(torch.randn(6, 5, 4, 3))
    tuned = torch.where(torch.rand(base.shape) < 0.3, torch.randn(base.shape), base)
    words = restored_as(base, xorz.delta_encode(base.contiguous(), tuned.contiguous()))
    assert words.stride() == base.stride() and torch.equal(words, tuned)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_rows_bits_never_depend_on_the_batch_in_deterministic_mode(kind, dtype):
    case, x = case_of(kind, dtype, mode="deterministic")
    with torch.no_grad():
        with case.tenants.use(NAMES):
            together = case.model(x)
        for row, name in enumerate(NAMES):
            with case.tenants.use(name):
                assert same_bits(case.model(x[row : row + 1]), together[row : row + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_fast_is_within_the_bound_of_a_linear_layer(kind, dtype):
    """docs/numerics.md: `D` roundings of f32 of all that was added, and one to the dtype; against float64."""
    case, x = case_of(kind, dtype)
    eps = torch.finfo(dtype).eps
    with torch.no_grad():
        for name in "ab":
            with case.tenants.use(name):
                got = case.model(x[:1]).double()
            plain, base = (copy.deepcopy(case.plain[n]).double() for n in (name, None))
            want = plain(x[:1].double())
            sizes = copy.deepcopy(base)
            for p, b, t in zip(sizes.parameters(), base.parameters(), plain.parameters(), strict=True):
                p.copy_(b.abs() + 2 * (t - b).abs())
            added = sizes(x[:1].double().abs())
            steps = 2 * base[0].weight[0].numel() + 16
            bound = steps * 2.0**-24 * added + eps * want.abs() + 1e-30
            assert bool(((got - want).abs() <= bound).all())


def test_the_layout_of_what_is_given_is_torchs():
    case, x = case_of("padded")
    for given in (x[:1], x[:1].contiguous(memory_format=torch.channels_last), x[:1].transpose(2, 3)):
        with torch.no_grad(), case.tenants.use("a"):
            got, want = case.model(given), case.plain["a"](given)
        assert got.is_contiguous() == want.is_contiguous(), given.stride()
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_batch_of_tenants_with_deltas_copies_and_neither():
    """Of one layer: a delta, a dense copy, the base's words with another bias, and the base."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(3, 96, 8, stride=8)).eval()
    plain = {None: base, **{n: copy.deepcopy(base) for n in ("delta", "copy", "bias")}}
    with torch.no_grad():
        for i, name in enumerate(("delta", "copy", "bias")):
            plain[name][0].bias.add_(i + 1)
            if name != "bias":
                plain[name][0].weight.add_(torch.rand_like(base[0].weight))
    for mode in ("fast", "deterministic"):
        tenants = xorz.attach(copy.deepcopy(base), mode=mode)
        for name in ("delta", "copy", "bias"):
            tenants.max_copies = None if name != "copy" else 1 << 20
            tenants.load(name, xorz.diff(base, plain[name]))
        site = tenants.sites["0"]
        assert [len(site.pieces.get("weight", {})), sum("weight" in v for v in site.values.values())] == [
            1,
            1,
        ]
        names = ["copy", "delta", None, "bias", "delta", "copy"]
        x = torch.randn(6, 3, 16, 16)
        with torch.no_grad(), tenants.use(names):
            got = tenants.model(x)
        with torch.no_grad():
            for row, name in enumerate(names):
                torch.testing.assert_close(got[row], plain[name](x)[row], rtol=1e-4, atol=1e-5)
                if mode == "deterministic":
                    with tenants.use(name):
                        assert same_bits(tenants.model(x[row : row + 1])[0], got[row])


@pytest.mark.parametrize("names", ["a", NAMES], ids=["alone", "mixed"])
@pytest.mark.parametrize("kind", ["patches", "padded", "oblong", "sequence", "volume", "transposed"])
def test_gradients_reach_the_input(kind, names):
    case, x = case_of(kind)
    x = x if names == NAMES else x[:1]
    leaf = x.clone().requires_grad_()
    with case.tenants.use(names):
        case.model(leaf).square().sum().backward()
    for row, name in enumerate(NAMES[: x.size(0)]):
        want = x.clone().requires_grad_()
        case.plain[name](want)[row].square().sum().backward()
        torch.testing.assert_close(leaf.grad[row], want.grad[row], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["patches", "sequence", "1 x 1"])
def test_autocast_gives_its_dtype(kind):
    case, x = case_of(kind)
    for names in ("a", NAMES):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            with case.tenants.use(names):
                got = case.model(x)
            want = case.plain["a"](x)
        assert got.dtype == want.dtype == torch.bfloat16
        torch.testing.assert_close(got[0].float(), want[0].float(), rtol=3e-2, atol=3e-1)


def test_rows_that_are_gathered_take_no_more_than_the_weight(monkeypatch):
    """However many rows and tenants there are."""
    from xorz.serve.site import Site

    right, most = Site.product, []
    monkeypatch.setattr(
        Site, "product", lambda self, rows, *more: most.append(rows.nbytes) or right(self, rows, *more)
    )
    for kind in KINDS:
        case, x = case_of(kind, mode="deterministic")
        most.clear()
        with torch.no_grad(), case.tenants.use((NAMES * 10)[:40]):
            case.model(x.repeat(10, *[1] * (x.dim() - 1)))
        assert most and max(most) <= case.base[0].weight.nbytes, kind


@pytest.mark.parametrize("cls", ["own class", "own forward", "unbatched", "parent"])
def test_convolutions_that_others_call_are_served(cls):
    class Own(nn.Conv1d):
        def __init__(self):
            super().__init__(16, 96, 3)

    class Forward(Own):
        def forward(self, x):
            return F.conv1d(x, self.weight / self.weight.norm(), bias=self.bias)

    class Unbatched(Own):
        def forward(self, x):
            return torch.stack([super(Unbatched, self).forward(row) for row in x])

    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Own()

        def forward(self, x):
            return (
                F.conv1d(x, self.layer.weight, self.layer.bias, stride=2)
                + F.conv1d(x, weight=self.layer.weight)[..., :3]
            )

    torch.manual_seed(0)
    made = {"own class": Own, "own forward": Forward, "unbatched": Unbatched, "parent": Parent}[cls]
    case, x = Case(nn.Sequential(made())), torch.randn(4, 16, 7 if cls == "parent" else 8)
    case.check_alone(x[:1])
    case.check_alone(x)
    assert case.check_mixed(x) == "right"


def test_what_torch_refuses_is_refused():
    case, x = case_of("patches")
    for bad in (x[:, :2], x[:, :, :4], x.long(), x[0, 0]):
        for names in ("a", NAMES[: bad.size(0)]):
            with torch.no_grad(), case.tenants.use(names), pytest.raises(RuntimeError):
                case.model(bad)
