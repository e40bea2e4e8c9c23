"""Promise: a model whose modules are on several GPUs (accelerate's `device_map`) is attached as one on one GPU is: each row has
its tenant's weights on every device, who has which row is copied to each device once and read nowhere, a tenant is loaded,
exchanged and unloaded on all devices or on none, tied tensors that became copies stay tied, and what is not served so is
refused by name.

Against the double of `gpu_double`, which refuses an op on tensors of two devices as torch does. What is expected is computed by
the plain fine-tuned models, on the CPU.
"""

import copy

import gpu_double
import pytest
import torch
import xorz
from gpu_double import CUDA, OTHER, OnGpu, to_gpu
from test_attach_cuda import IDS, NAMES, Model, made, near, tuned
from torch import nn
from xorz.serve.site import Site

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a double of GPUs, beside real ones")
OFFLOADED = nn.Parameter(torch.empty(96, 48, device="meta"))
MAP = {"": CUDA, "blocks.1": OTHER, "head": OTHER}


@pytest.fixture
def gpu(monkeypatch):
    with gpu_double.machine(monkeypatch) as ledger, torch.no_grad():
        yield ledger


def follow(module: nn.Module, device: torch.device) -> None:
    """As accelerate's hooks: what a module is given is moved to where it is."""
    module.register_forward_pre_hook(lambda _, given: tuple(t.to(device) for t in given))


def spread(base: nn.Module) -> nn.Module:
    model = to_gpu(copy.deepcopy(base), MAP)
    for name, device in MAP.items():
        if name:
            follow(model.get_submodule(name), device)
    return model


def attached(budget="16 MiB", **options):
    base, plain, deltas = made()
    model = spread(base)
    return model, plain, deltas, xorz.attach(model, budget=budget, **options)


def wrong(model, tenants, plain) -> list:
    """What a model gives that is not what plain fine-tuned models give: each tenant alone, and all in one batch."""
    apart = {name: m(IDS) for name, m in plain.items()}
    out = []
    for name in plain:
        with tenants.use(name):
            if not near(model(OnGpu(IDS)), apart[name]):
                out.append(name)
    names = [name if name in plain else None for name in NAMES]
    with tenants.use(names):
        got = model(OnGpu(IDS))
    assert got.device == OTHER
    want = torch.stack([apart[name][row] for row, name in enumerate(names)])
    return [*out, *(row for row in range(len(names)) if not near(got.words[row], want[row]))]


@pytest.mark.parametrize("mode", ["fast", "deterministic"])
def test_each_row_has_its_tenants_weights_on_every_device(gpu, mode):
    model, plain, deltas, tenants = attached(mode=mode)
    assert tenants.devices == (CUDA, OTHER)
    for name, delta in deltas.items():
        tenants.load(name, delta)
    assert wrong(model, tenants, plain) == []
    for site in tenants.sites.values():
        held = (site.arena.tensor, *site.table.values(), *site.deltas.values(), *site.fixed.stacks.values())
        held += tuple(t for own in site.values.values() for t in own.values())
        assert {t.device for t in held} == {site.device}, site.name
    assert tenants.detach() is model
    assert near(model(OnGpu(IDS)), plain[None](IDS))


def test_who_has_which_row_is_copied_once_to_each_device_and_nothing_waits(gpu):
    model, _, deltas, tenants = attached()
    for name, delta in deltas.items():
        tenants.load(name, delta)
    with tenants.use(NAMES):
        model(OnGpu(IDS))  # the first batch of a kind is tried
    for names in ("bob", NAMES, NAMES[::-1]):
        for noted in (gpu.waits, gpu.sent, gpu.between):
            noted.clear()
        with tenants.use(names):
            # Rows, and each tenant's rows.
            assert gpu.sent == ([] if names == "bob" else [CUDA, CUDA, OTHER, OTHER]) and gpu.between == []
            gpu.sent.clear()
            for _ in range(2):
                gpu.between.clear()
                gpu.events = 0
                model(OnGpu(IDS))
                # Streams wait for the copies, wherever those were asked for, and the host for none.
                assert gpu.events == (0 if names == "bob" else 2)
                # What the model computes goes from device to device, and nothing of tenants.
                assert gpu.between == [(CUDA, OTHER, torch.float32)], names
        assert gpu.waits == gpu.sent == [], names


def test_a_tenant_is_loaded_on_all_devices_or_on_none(gpu):
    model, plain, deltas, tenants = attached(budget="96 KiB", max_copies="1 MiB")
    tenants.load("alice", deltas["alice"])
    plain = {"alice": plain["alice"], None: plain[None]}
    assert wrong(model, tenants, plain) == []
    before = tenants.memory()
    # Random words all over, which no delta makes small: too much for the second device alone, whose share is less.
    large = copy.deepcopy(plain[None])
    with torch.no_grad():
        for p in large.blocks[1].parameters():
            p.copy_(torch.randn(p.shape))
    delta = xorz.diff(plain[None].state_dict(), large.state_dict())
    second = tenants.residencies[OTHER]
    whole = second.limit
    second.limit = second.capacity = second.used + 64
    for attempt in (lambda: tenants.load("large", delta), lambda: tenants.swap("alice", delta)):
        with pytest.raises(MemoryError, match=r"on cuda:1, but of the budget's .* there only"):
            attempt()
        assert tenants.memory() == before and tenants.names() == ["alice"]
        assert wrong(model, tenants, plain) == []
    # Nor is the one that would be replaced given up where that makes room on one device alone.
    wide = copy.deepcopy(plain[None])
    with torch.no_grad():
        for p in (wide.table.weight, *wide.blocks[0].parameters()):
            p.copy_(torch.randn(p.shape))
    first = tenants.residencies[CUDA]
    limit = first.limit
    first.limit = first.capacity = first.used
    with pytest.raises(MemoryError, match="on cuda:0"):
        tenants.swap("alice", xorz.diff(plain[None].state_dict(), wide.state_dict()))
    assert tenants.memory() == before
    first.limit = first.capacity = limit
    # No gap is long enough on the second device, where there are bytes enough: what the first has taken is given back.
    second.limit = second.capacity = whole
    arena = tenants.arenas[OTHER]
    free, arena._free = arena._free, []
    with pytest.raises(MemoryError):
        tenants.load("large", delta)
    arena._free = free
    assert tenants.memory() == before
    assert wrong(model, tenants, plain) == []


def test_tenants_are_exchanged_and_unloaded_on_all_devices(gpu):
    model, plain, deltas, tenants = attached()
    tenants.load("alice", deltas["alice"])
    assert all(arena.used for arena in tenants.arenas.values())
    tenants.swap("alice", deltas["bob"])
    # The first device that memory was lent on again, and the other.
    assert {*gpu.settled} == set() or {*gpu.settled} == {CUDA, OTHER}
    assert wrong(model, tenants, {"alice": plain["bob"], None: plain[None]}) == []
    gpu.settled.clear()
    tenants.swap("alice", deltas["alice"])
    assert {*gpu.settled} == {CUDA, OTHER}
    assert wrong(model, tenants, {"alice": plain["alice"], None: plain[None]}) == []
    # What a tenant has left in tables is emptied when its device has done all, where the next one brings nothing, too.
    gpu.settled.clear()
    first = {n: d for n, d in deltas["bob"].deltas.items() if n.startswith("blocks.0.up.")}
    tenants.swap("alice", first)
    tenants.unload("alice")
    tenants.load("alice", first)
    assert {*gpu.settled} == {CUDA, OTHER}
    tenants.unload("alice")
    assert all(arena.used == 0 for arena in tenants.arenas.values())
    assert wrong(model, tenants, {None: plain[None]}) == []


def llama(tied: bool):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eager",
        tie_word_embeddings=tied,
    )
    torch.manual_seed(1)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def given_to(model: nn.Module):
    """Attached as `from_pretrained` does it once accelerate has spread the model."""
    from xorz.pretrained import XorzConfig, XorzQuantizer

    hook = XorzQuantizer(XorzConfig(budget="16 MiB", max_copies="1 MiB"))
    hook.validate_environment(device_map={name: str(device) for name, device in LAYERS.items()})
    assert hook.update_device_map({"": 0, "lm_head": 1}) == {"": 0, "lm_head": 1}
    # Room for the budget on each.
    free = hook.adjust_max_memory({0: 30 << 20, 1: 20 << 20, "cpu": 9})
    assert free == {0: 22 << 20, 1: 12 << 20, "cpu": 9}
    return hook.postprocess_model(model).xorz


LAYERS = {
    "": CUDA, "model.layers.1": OTHER, "model.norm": OTHER, "lm_head": OTHER,
}  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_of_transformers_that_accelerate_has_spread(gpu, tied, tmp_path, monkeypatch):
    accelerate = pytest.importorskip("accelerate")
    monkeypatch.setattr(accelerate.big_modeling, "check_cuda_p2p_ib_support", lambda: True)  # asks a driver
    base = llama(tied)
    plain = {"alice": tuned(base, 1), "bob": tuned(base, 2), None: base}
    model = to_gpu(copy.deepcopy(base), LAYERS)
    if tied:
        # dispatch_model ties the copies again, after which the plain model fails, too: by hooks alone it runs.
        for name, module in model.named_modules():
            if name in LAYERS:
                hook = accelerate.hooks.AlignDevicesHook(LAYERS[name], io_same_device=name == "")
                accelerate.hooks.add_hook_to_module(module, hook)
    else:
        parts = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0}
        parts |= {"model.layers.1": 1, "model.norm": 1, "lm_head": 1}
        accelerate.dispatch_model(model, device_map=parts, main_device=0)
    tenants = given_to(model)
    for name in ("alice", "bob"):
        words = plain[name].state_dict()
        start = base.state_dict()
        if tied:
            # As files of safetensors have it: the table alone, of which the output layer is another name.
            del words["lm_head.weight"], start["lm_head.weight"]
            assert not torch.equal(words["model.embed_tokens.weight"], start["model.embed_tokens.weight"])
        xorz.pack(start, words, tmp_path / f"{name}.xorz")
        tenants.load(name, tmp_path / f"{name}.xorz")
    apart = {name: m(IDS, use_cache=False).logits for name, m in plain.items()}
    for name in plain:
        with tenants.use(name):
            assert near(model(OnGpu(IDS), use_cache=False).logits, apart[name]), name
    with tenants.use(NAMES):
        got = model(OnGpu(IDS), use_cache=False).logits
    # The hook of the model brings what it gives back to where its inputs were.
    assert got.device == CUDA
    assert near(got, torch.stack([apart[name][row] for row, name in enumerate(NAMES)]))


def test_copies_of_which_nobody_says_whether_they_are_tied_are_refused_by_name(gpu):
    _, _, deltas, tenants = attached()
    (table,) = (
        delta for name, delta in deltas["alice"].deltas.items() if name in ("table.weight", "head.weight")
    )
    with pytest.raises(
        ValueError, match=r"`table.weight` is changed, and `head.weight` has the same words on"
    ):
        tenants.load("alice", {"table.weight": table})
    assert tenants.names() == []
    tenants.load("alice", {"table.weight": table, "head.weight": table})
    # Norms that began as the same ones, and biases as zeros, are not taken for each other.
    norm = {n: d for n, d in deltas["bob"].deltas.items() if n.startswith("blocks.0.norm.")}
    assert norm
    tenants.load("norm", norm)


class Parts(nn.Module):
    """A table on the first device, and a part on the second whose tenants are told apart in ways of its own."""

    def __init__(self, part: nn.Module, run=None) -> None:
        super().__init__()
        self.table, self.part, self.run = nn.Embedding(50, 16), part, run or (lambda part, x: part(x))
        self.place: torch.device | None = None

    def forward(self, ids):
        x = self.table(ids)
        return self.run(self.part, x if self.place is None else x.to(self.place))


PARTS = {
    "a recurrent layer": (nn.GRU(16, 16, batch_first=True), lambda p, x: p(x)[0]),
    "torch's attention": (nn.MultiheadAttention(16, 2, batch_first=True), lambda p, x: p(x, x, x)[0]),
    "a convolution": (nn.Conv1d(7, 7, 1), None),
    "group norm": (nn.GroupNorm(7, 7), None),
    "learned positions": (nn.Embedding(7, 16), lambda p, x: x + p(torch.arange(7, device=x.device))),
    "an op that is computed once for each": (nn.Bilinear(16, 16, 5), lambda p, x: p(x, x)),
}


@pytest.mark.parametrize("what", PARTS)
def test_what_tells_rows_apart_on_the_second_device(gpu, what):
    torch.manual_seed(5)
    base = Parts(*PARTS[what]).eval()
    plain = {"alice": tuned(base, 1, 0.9), "bob": tuned(base, 2, 0.9), None: base}
    model = to_gpu(copy.deepcopy(base), {"": CUDA, "part": OTHER})
    model.place = OTHER
    tenants = xorz.attach(model, budget="16 MiB")
    for name in ("alice", "bob"):
        tenants.load(name, xorz.diff(base.state_dict(), plain[name].state_dict()))
    apart = {name: m(IDS) for name, m in plain.items()}
    with tenants.use("bob"):
        assert near(model(OnGpu(IDS)), apart["bob"])
    with tenants.use(NAMES):
        got = model(OnGpu(IDS))
    assert near(got, torch.stack([apart[name][row] for row, name in enumerate(NAMES)]))


def test_the_words_on_every_device_are_compared_with_the_base_of_the_fine_tune(gpu):
    model, _, deltas, tenants = attached()
    for name in ("blocks.0.up.weight", "blocks.1.up.weight"):
        words = model.get_parameter(name).base.words.view(torch.int32)
        words[3, 5] ^= 1
        with pytest.raises(ValueError, match=f"`{name}`: .*digest"):
            tenants.load("alice", deltas["alice"])
        words[3, 5] ^= 1
    assert tenants.names() == [] and all(arena.used == 0 for arena in tenants.arenas.values())
    tenants.load("alice", deltas["alice"])


def test_what_gpu_check_will_run_on_two_gpus_passes_on_the_double_and_sees_a_wrong_row(gpu, monkeypatch):
    from xorz.gpu_check import models
    from xorz.gpu_check.report import Report

    monkeypatch.setattr(nn.Module, "to", lambda self, to: to_gpu(self, {"": to}))
    report = Report("a double")
    models.check_spread(report, (CUDA, OTHER), 48)
    assert len(report.checks) == 6 and report.passed, report.checks
    # Rows that are the first device's tenants, and the base's on the second.
    monkeypatch.setattr(Site, "changes", lambda self, param, rows: self.device == CUDA)
    monkeypatch.setattr(Site, "serves", lambda self, rows: self.device == CUDA)
    report = Report("a double")
    models.check_spread(report, (CUDA, OTHER), 48)
    assert [check["passed"] for check in report.checks] == [False, False, True, False, False, False]


def test_what_is_not_served_on_several_devices_is_refused_by_name(gpu):
    base = Model().eval()

    def refused(sentence, model):
        with pytest.raises(ValueError, match=sentence):
            xorz.attach(model, budget="1 MiB")
        assert not any("_xorz" in module.__dict__ for module in model.modules())

    model = spread(base)
    model.blocks[1].up.bias = nn.Parameter(base.blocks[1].up.bias.detach().clone())
    refused(
        "`table.weight` is on cuda:0, but `blocks.1.up.bias` is on cpu; .* not over them and the CPU", model
    )
    model = spread(base)
    model.blocks[1].up.bias = nn.Parameter(OnGpu(base.blocks[1].up.bias.detach().clone(), CUDA))
    refused(
        "`weight` of `blocks.1.up` is on cuda:1, but its `bias` is on cuda:0; .* each module's own", model
    )
    model = spread(base)
    model.blocks[1].up.weight = OFFLOADED
    refused("`blocks.1.up.weight` is on the meta device, .* without offload to CPU or disk", model)
    *_, tenants = attached()
    with pytest.raises(
        ValueError, match=r"spread over cuda:0, cuda:1, and a CUDA graph is captured on one device"
    ):
        tenants.graph_rows(4)
