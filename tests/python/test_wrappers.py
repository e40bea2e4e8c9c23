"""Promise: what other libraries put around a model (accelerate's hooks, PEFT, torch.compile) may come before attach or after
it, in any order, and be taken off again: each row is its own tenant's, or there is an error that says what to do.
"""

import copy
import itertools

import pytest
import torch
import xorz
from cases import tuned_of
from torch import nn

F = nn.functional
NAMES = ["a", None, "b", "a"]
pytestmark = [
    # What PEFT asks of transformers.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Some parameters are on the meta device"),
]


class Small(nn.Module):
    """Embedding, norm, linear layers, a head tied to the embedding, and a convolution."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.up = nn.Embedding(40, 8), nn.LayerNorm(8), nn.Linear(8, 12)
        self.down, self.mix = nn.Linear(12, 8), nn.Conv1d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.head(x + self.mix(x.transpose(1, 2)).transpose(1, 2))


def hooked(model):
    accelerate = pytest.importorskip("accelerate")
    accelerate.hooks.attach_align_device_hook(model, execution_device="cpu")
    return model


def adapted(model):
    """With a LoRA whose effect is not nothing, the same one each time."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(5)
    out = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False)
    )
    return out.eval()


def compiled(model):
    torch._dynamo.reset()
    return torch.compile(model, backend="eager")


WRAPPERS = {"hooks": hooked, "peft": adapted, "compile": compiled}


def orders(wrappers=("hooks", "peft")):
    """Attach among any of them, in any order."""
    for n in range(1, len(wrappers) + 1):
        for some in itertools.combinations(wrappers, n):
            yield from itertools.permutations(("attach", *some))


# Each compilation takes seconds, so that these are some of the 48 orders of `orders(tuple(WRAPPERS))`.
COMPILED = [
    ("attach", "compile"),
    ("compile", "attach"),
    ("hooks", "attach", "compile"),
    ("compile", "attach", "peft"),
    ("peft", "attach", "hooks", "compile"),
]


@pytest.fixture(scope="module")
def family():
    torch.manual_seed(0)
    base = Small().eval()
    return {None: base, "a": tuned_of(base, 1), "b": tuned_of(base, 2)}


def built(family, order):
    """(model, tenants), the wrappers put on in this order."""
    model, tenants = copy.deepcopy(family[None]), None
    for step in order:
        if step == "attach":
            tenants = xorz.attach(model)
        else:
            model = WRAPPERS[step](model)
    for name in "ab":
        tenants.load(name, xorz.diff(family[None], family[name]))
    return model, tenants


@pytest.mark.parametrize("order", [*orders(), *COMPILED], ids=", ".join)
def test_wrappers_come_before_or_after_attach(family, order):
    ids = torch.randint(0, 40, (4, 5), generator=torch.Generator().manual_seed(1))
    wrap = adapted if "peft" in order else copy.deepcopy
    plain = {n: wrap(copy.deepcopy(m)) for n, m in family.items()}
    model, tenants = built(family, order)
    with torch.no_grad():
        want = {n: m(ids) for n, m in plain.items()}
        for name in (None, "a", "b", "a"):
            with tenants.use(name):
                torch.testing.assert_close(model(ids), want[name], rtol=1e-4, atol=3e-4)
        with tenants.use(NAMES):
            got = model(ids)
        for row, name in enumerate(NAMES):
            torch.testing.assert_close(got[row], want[name][row], rtol=1e-4, atol=3e-4)
        assert not torch.allclose(want["a"], want["b"], rtol=1e-2)
        # Taken off again, whatever of the attached classes the wrappers hold.
        tenants.detach()
        torch._dynamo.reset()
        torch.testing.assert_close(model(ids), want[None], rtol=1e-4, atol=3e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize("when", ["before", "after"])
def test_accelerates_hooks_come_off_before_and_after_detach(family, when):
    accelerate = pytest.importorskip("accelerate")
    model = copy.deepcopy(family[None])
    if when == "before":
        hooked(model)
    tenants = xorz.attach(model)
    if when == "after":
        hooked(model)
    tenants.load("a", xorz.diff(family[None], family["a"]))
    ids = torch.randint(0, 40, (2, 5))
    accelerate.hooks.remove_hook_from_submodules(model)
    with torch.no_grad():
        with tenants.use("a"):
            torch.testing.assert_close(model(ids), family["a"](ids), rtol=1e-4, atol=3e-4)
        with pytest.raises(RuntimeError, match="no tenant is active"):
            model(ids)
        tenants.detach()
        assert torch.equal(model(ids), family[None](ids))
    assert [type(m) for m in model.modules()] == [type(m) for m in family[None].modules()]


@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_offload_is_refused_with_what_to_do(family, how, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    offload = {
        "cpu": lambda m: accelerate.cpu_offload(m, execution_device="cpu"),
        "disk": lambda m: accelerate.disk_offload(m, tmp_path, execution_device="cpu"),
    }[how]
    first = copy.deepcopy(family[None])
    offload(first)
    with pytest.raises(ValueError, match=r"`embed\.weight` is on the meta device.*without offload"):
        xorz.attach(first)
    model = copy.deepcopy(family[None])
    tenants = xorz.attach(model)
    with pytest.raises(RuntimeError, match=r"cannot be made anew, moved or offloaded.*tenants\.detach\(\)"):
        offload(model)
    # What was on its way is not the base's any more, or is.
    ids = torch.randint(0, 40, (2, 5))
    with torch.no_grad(), tenants.use(None):
        torch.testing.assert_close(model(ids), family[None](ids))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_models_that_accelerate_prepares_are_served(family, when, precision):
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    model = copy.deepcopy(family[None])
    if when == "before":
        model = accelerator.prepare(model)
    tenants = xorz.attach(model)
    if when == "after":
        model = accelerator.prepare(model)
    ids = torch.randint(0, 40, (4, 5))
    near = 1e-5 if precision == "no" else 0.02  # of the largest output
    plain = {n: accelerator.prepare(copy.deepcopy(m)) for n, m in family.items()}
    for name in "ab":
        tenants.load(name, xorz.diff(family[None], family[name]))
    with torch.no_grad():
        for name in (None, "a", "b"):
            with tenants.use(name):
                got = model(ids)
            want = plain[name](ids)
            assert got.dtype == want.dtype
            assert float((got - want).abs().max()) <= near * float(want.abs().max())
        with tenants.use(NAMES):
            got = model(ids)
    for row, name in enumerate(NAMES):
        want = plain[name](ids)[row].detach()
        assert float((got[row] - want).abs().max()) <= near * float(want.abs().max())


def test_peft_cannot_merge_into_the_base_of_all_tenants(family):
    model, tenants = built(family, ("attach", "peft"))
    with pytest.raises(RuntimeError, match="which is the base of all tenants"):
        model.merge_and_unload()
    # Nothing of it was merged.
    ids = torch.randint(0, 40, (2, 5))
    with torch.no_grad(), tenants.use("a"), model.disable_adapter():
        torch.testing.assert_close(model(ids), family["a"](ids), rtol=1e-4, atol=3e-4)


def test_adapters_of_peft_are_switched_beside_tenants(family):
    """An adapter is everyone's: with it and without, each row is still its tenant's."""
    model, tenants = built(family, ("peft", "attach"))
    ids = torch.randint(0, 40, (4, 5))
    with torch.no_grad(), tenants.use(NAMES):
        with model.disable_adapter():
            off = model(ids)
        on = model(ids)
    plain = {n: adapted(copy.deepcopy(m)) for n, m in family.items()}
    with torch.no_grad():
        for row, name in enumerate(NAMES):
            torch.testing.assert_close(off[row], family[name](ids)[row], rtol=1e-4, atol=3e-4)
            torch.testing.assert_close(on[row], plain[name](ids)[row], rtol=1e-4, atol=3e-4)
