"""Promise: what can be known of a model before its first request is refused on attach or on load, without any
example; the rest is served. Every expectation is the plain fine-tuned model's.
"""

import copy
import functools
import re

import pytest
import torch
import xorz
from cases import Case, tuned_of
from torch import nn

F = nn.functional


class Keeper(nn.Module):
    """Keeps something of its layer's weight, of which no name is in the checkpoint."""

    def __init__(self, how):
        super().__init__()
        self.how, self.layer, self.free = how, nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
        self.link()

    def link(self):
        KEEPS[self.how][0](self)

    def __deepcopy__(self, memo):
        out = Keeper(self.how)
        out.load_state_dict(self.state_dict())
        out.link()
        return out.eval()

    def forward(self, x):
        return self.free(KEEPS[self.how][1](self, x))


def attribute(make):
    return lambda m: setattr(m, "kept", make(m.layer.weight)), lambda m, x: x @ m.kept


def buffer(m):
    m.register_buffer("kept", m.layer.weight.detach().t(), persistent=False)


class Holder:
    def __init__(self, weight):
        self.weight = weight.detach().t()


def closed_over(weight):
    turned = weight.detach().t()
    return lambda x: x @ turned


KEEPS = {
    "a view": attribute(lambda w: w.t()),
    "detached": attribute(lambda w: w.detach().t()),
    "a part": attribute(lambda w: w.detach()[1:2].t()),
    "a result": attribute(lambda w: (w * 2).sum(0, keepdim=True).t() @ w.sum(1, keepdim=True).t()),
    "a buffer": (buffer, lambda m, x: x @ m.kept),
    "in a list": (
        lambda m: setattr(m, "kept", [{"t": (m.layer.weight.detach().t(),)}]),
        lambda m, x: x @ m.kept[0]["t"][0],
    ),
    "an array": (
        lambda m: setattr(m, "kept", m.layer.weight.detach().numpy().T),
        lambda m, x: x @ torch.from_numpy(m.kept.copy()),
    ),
    "in an object": (lambda m: setattr(m, "kept", Holder(m.layer.weight)), lambda m, x: x @ m.kept.weight),
    "a closure": (lambda m: setattr(m, "kept", closed_over(m.layer.weight)), lambda m, x: m.kept(x)),
    "a partial": (
        lambda m: setattr(m, "kept", functools.partial(torch.matmul, other=m.layer.weight.detach().t())),
        lambda m, x: m.kept(x),
    ),
}


@pytest.mark.parametrize("how", KEEPS)
def test_what_was_made_of_a_weight_before_attach_is_refused_on_load(how):
    torch.manual_seed(0)
    base = Keeper(how).eval()
    tuned, tenants = tuned_of(base, 1), xorz.attach(base)
    with pytest.raises(
        ValueError, match=r"`layer\.weight` is changed, and `kept` of Keeper was made of the base's"
    ):
        tenants.load("a", diffed(base, tuned))
    # A fine-tune that leaves this weight as it is can be served.
    other = {n: d for n, d in diffed(base, tuned).deltas.items() if n == "free.weight"}
    tenants.load("free", other)
    assert tenants.names() == ["free"]


def diffed(attached, tuned):
    """Of an attached model's own words."""
    return xorz.diff({n: t.detach().clone() for n, t in attached.state_dict().items()}, tuned.state_dict())


def test_a_subclass_of_a_layer_that_keeps_tensors_is_refused_on_load():
    class Kept(nn.Linear):
        def __init__(self):
            super().__init__(5, 5)
            self.twice = self.weight.detach() * 2

        def forward(self, x):
            return F.linear(x, self.twice)

    torch.manual_seed(0)
    base = nn.Sequential(Kept()).eval()
    tenants = xorz.attach(copy.deepcopy(base))
    with pytest.raises(ValueError, match=r"`0\.weight` is changed, and 0 keeps tensors in `twice`"):
        tenants.load("a", xorz.diff(base, tuned_of(base, 1)))


class Derives(nn.Linear):
    """Made once, and kept, in the first forward."""

    def __init__(self):
        super().__init__(6, 6)
        self.twice, self.calls = None, 0

    def forward(self, x):
        self.calls += 1
        if self.twice is None:
            self.twice = self.weight * 2
        return F.linear(x, self.twice, self.bias)


@pytest.mark.parametrize("mode", ["fast", "exact"])
def test_layers_that_derive_values_in_a_forward_are_served_each_tenant_with_its_own(mode):
    torch.manual_seed(0)
    case = Case(nn.Sequential(Derives(), nn.Linear(6, 6)), mode=mode)
    case.plain = {n: copy.deepcopy(m) for n, m in case.plain.items()}
    x = torch.randn(4, 6)
    case.check_alone(x)
    assert case.check_mixed(x) == "right"
    case.check_alone(x)


def test_layers_that_derive_values_are_refused_on_load_where_bits_must_not_depend_on_the_batch():
    torch.manual_seed(0)
    base = nn.Sequential(Derives()).eval()
    tuned = tuned_of(base, 1)
    delta = xorz.diff(base, tuned)
    tenants = xorz.attach(copy.deepcopy(base), mode="deterministic")
    with torch.no_grad(), tenants.use(None):
        tenants.model(torch.randn(2, 6))
    with pytest.raises(
        ValueError, match=r"`0\.weight` is changed, and 0 has kept values in `calls`.*mode=\"fast\""
    ):
        tenants.load("a", delta)


@pytest.mark.parametrize("made", ["script", "trace"])
def test_torchscript_inside_of_a_model_is_refused_on_attach(made):
    layer = nn.Linear(5, 5)
    scripted = torch.jit.script(layer) if made == "script" else torch.jit.trace(layer, torch.randn(2, 5))
    model = nn.Sequential(nn.Linear(5, 5), scripted)
    with pytest.raises(ValueError, match=r"`1` is TorchScript"):
        xorz.attach(model)
    assert type(model[0]) is nn.Linear and "_xorz" not in model[0].__dict__
    tenants = xorz.attach(model, filter_fn=lambda m, n: not n.startswith("1"))
    with pytest.raises(ValueError, match=r"`1\.[a-z]+` is changed, but its module is not attached"):
        tenants.load("a", {n: d for n, d in changed(model).items() if n.startswith("1.")})


def changed(model):
    base = {n: t.detach().clone() for n, t in model.state_dict().items()}
    return xorz.diff(base, {n: t + 1 for n, t in base.items()}).deltas


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_weights_without_a_shape_are_refused_on_attach():
    with pytest.raises(ValueError, match=r"`0\.weight` has no shape yet; run the model once"):
        xorz.attach(nn.Sequential(nn.LazyLinear(5)))


def test_tables_that_change_what_they_look_up_leave_the_base_as_it_is():
    """`max_norm` writes to the rows of a table where they are longer."""
    torch.manual_seed(0)
    for table in (nn.Embedding(90, 5, max_norm=0.5), nn.EmbeddingBag(90, 5, max_norm=0.5)):
        case = Case(nn.Sequential(table))
        before = {n: t.clone() for n, t in case.base.state_dict().items()}
        ids = torch.randint(0, 90, (4, 3))
        plain = {n: copy.deepcopy(m) for n, m in case.plain.items()}
        with torch.no_grad():
            for name in ("a", None, "b", None, "a"):
                with case.tenants.use(name):
                    got = case.model(ids)
                torch.testing.assert_close(got, copy.deepcopy(plain[name])(ids))
            names = ["a", None, "b", "a"]
            with case.tenants.use(names):
                got = case.model(ids)
            for row, name in enumerate(names):
                torch.testing.assert_close(got[row], copy.deepcopy(plain[name])(ids)[row])
        assert all(torch.equal(t, before[n]) for n, t in case.tenants.detach().state_dict().items())


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(5), nn.InstanceNorm1d(5, affine=True, track_running_stats=True)]
)
def test_layers_that_count_what_they_see_are_refused_in_training(layer):
    case, x = Case(nn.Sequential(layer)), torch.randn(4, 5, 3)
    case.check_alone(x)
    case.model.train()
    for names in (None, "a", ["a", None, "b", "a"]):
        with torch.no_grad(), case.tenants.use(names), pytest.raises(RuntimeError, match=r"0 is in training"):
            case.model(x)
    case.model.eval()
    case.check_alone(x)
    assert case.check_mixed(x) == "right"


def odd(layer, weight):
    layer.weight = nn.Parameter(weight)
    return layer


LINEAR = {
    "float64": lambda: nn.Linear(5, 5).double(),
    "transposed": lambda: odd(nn.Linear(5, 5), torch.randn(5, 5).t()),
    "every other row": lambda: odd(nn.Linear(5, 5), torch.randn(10, 5)[::2]),
    "old spectral norm": lambda: nn.utils.spectral_norm(nn.Linear(5, 5)),
    "pruned": lambda: nn.utils.prune.random_unstructured(nn.Linear(5, 5), "weight", 0.4),
}


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*deprecated")
@pytest.mark.parametrize("kind", LINEAR)
def test_linear_layers_whose_weights_no_op_takes_are_served(kind):
    import torch.nn.utils.prune

    torch.manual_seed(0)
    layer = LINEAR[kind]().eval()
    with torch.no_grad():
        for name in [n for n in vars(layer) if n == "weight"]:
            vars(layer)[name] = vars(layer)[name].detach()
    case = Case(nn.Sequential(layer))
    x = torch.randn(4, 5, dtype=next(layer.parameters()).dtype)
    case.check_alone(x)
    assert case.check_mixed(x) == "right"


def test_the_refusal_names_every_part():
    """The tensor, who keeps what, and what to do."""
    torch.manual_seed(0)
    base = nn.Sequential(Keeper("a view")).eval()
    tenants = xorz.attach(base)
    said = (
        "tensor `0.layer.weight` is changed, and `kept` of 0 was made of the base's words of it before the model was attached, "
        "so that it would be used for all tenants; clear it before attach"
    )
    with pytest.raises(ValueError, match=re.escape(said)):
        tenants.load("a", changed(base))
