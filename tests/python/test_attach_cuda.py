"""Promise: a model on a GPU is attached as one on the CPU is: each row has its tenant's weights, what tenants hold lies on the
device, a forward waits for nothing, and what is not served there is refused when it is attached.

No GPU is needed: `gpu_double` stands for one. It knows what a driver would be asked, and nothing of time.
"""

import copy

import gpu_double
import pytest
import torch
import xorz
from gpu_double import BY_THE_HOST, CUDA, OnGpu, to_gpu
from torch import Tensor, nn

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a double of a GPU, beside a real one")
F = nn.functional


class Block(nn.Module):
    def __init__(self, k: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(k), nn.Linear(k, 2 * k), nn.Linear(2 * k, k, bias=False)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    """A table, blocks with norms, and a head that is the table again."""

    def __init__(self, k: int = 48, words: int = 50) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(words, k), nn.Linear(k, words, bias=False)
        self.blocks = nn.Sequential(Block(k), Block(k))
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(self.blocks(self.table(ids)))


def tuned(base: nn.Module, seed: int, share: float = 0.3) -> nn.Module:
    out, g = copy.deepcopy(base), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in out.parameters():
            step = (torch.randn(p.shape, generator=g) * 0.2).to(p.dtype)
            p.copy_(torch.where(torch.rand(p.shape, generator=g) < share, p + step, p))
    return out


def made(dtype: torch.dtype = torch.float32):
    """A base and its fine-tunes, plain and as deltas."""
    torch.manual_seed(0)
    base = Model().to(dtype).eval()
    plain = {"alice": tuned(base, 1), "bob": tuned(base, 2, 0.1), None: base}
    deltas = {n: xorz.diff(base.state_dict(), m.state_dict()) for n, m in plain.items() if n}
    return base, plain, deltas


@pytest.fixture
def gpu(monkeypatch):
    with gpu_double.machine(monkeypatch) as ledger, torch.no_grad():
        yield ledger


NAMES = ["alice", None, "bob", "bob", "alice"]
IDS = torch.randint(0, 50, (5, 7), generator=torch.Generator().manual_seed(3))
NEAR = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def near(got, want) -> bool:
    got = got.words if isinstance(got, OnGpu) else got
    return got.shape == want.shape and float((got - want).abs().max()) <= NEAR[want.dtype] * float(
        want.abs().max()
    )


@pytest.mark.parametrize("mode", ["fast", "deterministic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_row_is_computed_with_its_tenants_weights(gpu, dtype, mode):
    base, plain, deltas = made(dtype)
    model = to_gpu(copy.deepcopy(base))
    tenants = xorz.attach(model, budget="16 MiB", mode=mode)
    for name, delta in deltas.items():
        tenants.load(name, delta)
    apart = {name: plain[name](IDS) for name in plain}
    pairs = (("alice", None), ("bob", None), ("bob", "alice"))
    assert not any(near(apart[one], apart[other]) for one, other in pairs)
    for name in plain:
        with tenants.use(name):
            assert near(model(OnGpu(IDS)), apart[name]), name
    want = torch.stack([apart[name][row] for row, name in enumerate(NAMES)])
    with tenants.use(NAMES):
        assert near(model(OnGpu(IDS)), want)
    # As the attached model on the CPU does, bit for bit: the double computes by the same kernels.
    cpu = copy.deepcopy(base)
    there = xorz.attach(cpu, mode=mode)
    for name, delta in deltas.items():
        there.load(name, delta)
    with there.use(NAMES), tenants.use(NAMES):
        assert torch.equal(model(OnGpu(IDS)).words, cpu(IDS))
    # The model's own tensors, where they were, and nothing of tenants left in them.
    assert tenants.detach() is model
    assert all(type(p) in (OnGpu, nn.Parameter) and p.device == CUDA for p in model.parameters())
    assert near(model(OnGpu(IDS)), apart[None])


def test_what_tenants_hold_lies_on_the_device(gpu):
    base, _, deltas = made()
    model = to_gpu(copy.deepcopy(base))
    tenants = xorz.attach(model, budget="16 MiB")
    tenants.load("alice", deltas["alice"])
    assert isinstance(tenants.arenas[CUDA].tensor, OnGpu) and tenants.arenas[CUDA].tensor.numel() == 16 << 20
    kinds = {"tables": 0, "values": 0, "deltas": 0}
    for site in tenants.sites.values():
        for kind, held in (
            ("tables", site.table),
            ("values", site.values.get(0, {})),
            ("deltas", site.deltas),
        ):
            assert all(isinstance(t, OnGpu) for t in held.values()), (site.name, kind)
            kinds[kind] += len(held)
    assert all(kinds.values()), kinds
    with tenants.use(["alice", None]):
        rows = tenants.active.get()
        assert isinstance(rows.tensor, OnGpu)
    assert tenants.memory()["deltas"] > 0


def test_a_forward_waits_for_nothing(gpu):
    base, _, deltas = made()
    model = to_gpu(copy.deepcopy(base))
    tenants = xorz.attach(model, budget="16 MiB")
    for name, delta in deltas.items():
        tenants.load(name, delta)
    x = OnGpu(IDS)
    for names in ("alice", None, NAMES):
        # The first batch of a kind is tried, to find out where its rows are.
        with tenants.use(names):
            model(x)
    for names in ("bob", None, NAMES, NAMES[::-1]):
        gpu.waits.clear()
        gpu.sent.clear()
        with tenants.use(names):
            # One tenant needs nothing; of several it is copied now who has which row, of pinned memory.
            assert gpu.waits == [] and gpu.sent == [CUDA] * (2 if isinstance(names, list) else 0)
            gpu.ops.clear()
            gpu.sent.clear()
            model(x)
            assert gpu.waits == gpu.sent == [], (names, gpu.waits)
            assert {"delta_linear", "delta_linear_grouped"} & set(gpu.ops) or names is None


def test_several_names_are_not_copied_inside_of_a_capture(gpu):
    base, _, deltas = made()
    model = to_gpu(copy.deepcopy(base))
    tenants = xorz.attach(model, budget="16 MiB")
    tenants.load("alice", deltas["alice"])
    with (
        gpu_double.Graph(),
        pytest.raises(RuntimeError, match="who has which row would be copied inside of the capture"),
    ):
        with tenants.use(["alice", None]):
            pass
    with gpu_double.Graph(), tenants.use("alice"):
        model(OnGpu(IDS))


def test_no_op_that_goes_by_the_host_is_called_on_the_device(gpu, tmp_path):
    base, plain, deltas = made()
    model = to_gpu(copy.deepcopy(base))
    tenants = xorz.attach(model, budget="16 MiB")
    xorz.pack(base.state_dict(), plain["bob"].state_dict(), tmp_path / "bob.xorz")
    tenants.load("alice", deltas["alice"])
    tenants.load("bob", tmp_path / "bob.xorz")
    with tenants.use(NAMES):
        model(OnGpu(IDS))
    tenants.swap("alice", tmp_path / "bob.xorz")
    with tenants.use(NAMES):
        model(OnGpu(IDS))
    assert "delta_linear_grouped" in gpu.ops and not BY_THE_HOST & {*gpu.ops, *gpu.waits}


@pytest.mark.parametrize("where", ["before it is attached", "while it is attached"])
def test_each_load_compares_the_words_that_lie_on_the_device_with_the_base_of_the_fine_tune(
    gpu, tmp_path, where
):
    base, plain, deltas = made()
    xorz.pack(base.state_dict(), plain["alice"].state_dict(), tmp_path / "alice.xorz")
    model = to_gpu(copy.deepcopy(base))
    words = model.blocks[1].down.weight.words
    tenants = xorz.attach(model, budget="16 MiB") if where.startswith("while") else None
    if tenants is not None:
        tenants.load("before", tmp_path / "alice.xorz")
    # One bit, past every counter of torch.
    words.view(torch.int32)[3, 5] ^= 1
    tenants = tenants or xorz.attach(model, budget="16 MiB")
    loaded = tenants.names()
    for source in (tmp_path / "alice.xorz", deltas["alice"], dict(deltas["alice"].deltas)):
        with pytest.raises(ValueError, match=r"`blocks.1.down.weight`: .*digest [0-9a-f]+.* [0-9a-f]{8}"):
            tenants.load("after", source)
        assert tenants.names() == loaded
    words.view(torch.int32)[3, 5] ^= 1
    tenants.load("after", tmp_path / "alice.xorz")


@pytest.mark.parametrize("kind", ["resident", "predicted", "sha256", "diff"])
def test_a_load_copies_of_the_base_what_must_be_encoded_anew_and_else_its_digests(gpu, tmp_path, kind):
    torch.manual_seed(0)
    base = Model().eval()
    plain = tuned(base, 1, 0.02)
    states = base.state_dict(), plain.state_dict()
    trust = "sha256" if kind == "sha256" else "digest"
    codec = "predicted" if kind == "predicted" else "resident"
    xorz.pack(*states, tmp_path / "alice.xorz", prefer="speed", codec=codec, trust=trust)
    source = xorz.diff(*states, prefer="speed") if kind == "diff" else tmp_path / "alice.xorz"
    # What is served as copies is restored from the base's words on the host: norms and biases here.
    pairs = zip(base.parameters(), plain.parameters(), strict=True)
    vectors = sum(p.nbytes for p, q in pairs if p.dim() == 1 and not torch.equal(p, q))
    words = sum(p.nbytes for p in base.parameters())
    tenants = xorz.attach(to_gpu(base), budget="8 MiB", prefer="speed", trust=trust)
    gpu.fetched.clear()
    tenants.load("alice", source)
    fetched = sum(gpu.fetched) - vectors
    # The head is the table, and its delta is compared with it once more.
    if kind in ("resident", "diff"):
        assert 16 * 7 <= fetched <= 16 * (len(states[0]) + 1)
    else:
        table = base.table.weight.nbytes
        assert words <= fetched <= words + 2 * table + 16 * (len(states[0]) + 1)
    with tenants.use("alice"):
        assert near(base(OnGpu(IDS)), plain(IDS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_reach_the_input_of_an_attached_model_and_wait_for_nothing(gpu, dtype):
    torch.manual_seed(4)
    base = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 16, bias=False)).to(dtype)
    plain = {"alice": tuned(base, 1), "bob": tuned(base, 2), None: base}
    model = to_gpu(copy.deepcopy(base))
    tenants = xorz.attach(model, budget="16 MiB")
    for name in ("alice", "bob"):
        tenants.load(name, xorz.diff(base.state_dict(), plain[name].state_dict()))
    x, seen = torch.randn(5, 24).to(dtype), torch.randn(5, 16).to(dtype)

    def by_plain(rows) -> Tensor:
        given = x.clone().requires_grad_()
        with torch.enable_grad():
            out = torch.stack([plain[name](row) for name, row in zip(rows, given, strict=True)])
        return torch.autograd.grad(out, given, seen)[0]

    for names in ("alice", None, NAMES, NAMES):
        rows = names if isinstance(names, list) else [names] * 5
        given = OnGpu(x.clone()).requires_grad_()
        with tenants.use(names), torch.enable_grad():
            gpu.waits.clear()
            out = model(given)
            forward = list(gpu.waits)
            gpu.ops.clear()
            gpu.waits.clear()
            got = torch.autograd.grad(out, given, OnGpu(seen))[0]
        assert near(got, by_plain(rows)), names
        # The first batch of several is tried forwards, which is all that waits.
        assert gpu.waits == [] and (forward == [] or names == NAMES), (names, forward, gpu.waits)
        used = {"delta_linear_grad_input", "delta_linear_grouped_grad_input"} & set(gpu.ops)
        assert used or names is None, gpu.ops


def test_memory_that_kernels_may_still_read_is_not_written_to(gpu):
    base, _, deltas = made()
    model = to_gpu(copy.deepcopy(base))
    tenants = xorz.attach(model, budget="16 MiB")
    for name, delta in deltas.items():
        tenants.load(name, delta)
    # Nothing was lent before.
    assert gpu.synchronized == 0
    tenants.unload("alice")
    tenants.load("carol", deltas["alice"])
    assert gpu.synchronized == 1
    # Also where a tenant takes another one's place.
    tenants.swap("carol", deltas["bob"])
    tenants.swap("carol", deltas["alice"])
    assert gpu.synchronized >= 2
    with tenants.use("carol"):
        got = model(OnGpu(IDS))
    assert near(got, made()[1]["alice"](IDS))


def test_packages_are_loaded_and_make_room_for_others(gpu, tmp_path):
    base, plain, _ = made()
    paths = {name: tmp_path / f"{name}.xorz" for name in ("alice", "bob")}
    for name, path in paths.items():
        xorz.pack(base.state_dict(), plain[name].state_dict(), path)
    model = to_gpu(copy.deepcopy(base))
    # Room for one of them: alice's deltas are nearly all of it.
    first = xorz.attach(model, budget="16 MiB")
    first.load("alice", paths["alice"])
    size = first.sizes()["alice"]
    first.detach()
    tenants = xorz.attach(model, budget=size + (size >> 4))
    for name, path in paths.items():
        tenants.load(name, path)
    for name in ("alice", "bob", "alice"):
        with tenants.use(name):
            assert near(model(OnGpu(IDS)), plain[name](IDS)), name
    assert not tenants.resident("bob") or not tenants.resident("alice")
    tenants.verify("alice", OnGpu(IDS))


def test_models_of_transformers(gpu):
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 60, "attn_implementation": "eager"}
    configs = {
        "llama": transformers.LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            **small,
        ),
        # Whose Conv1D is computed by the kernel of gradients.
        "gpt2": transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=32, **small),
    }
    for kind, config in configs.items():
        torch.manual_seed(1)
        base = transformers.AutoModelForCausalLM.from_config(config).eval()
        plain = {"alice": tuned(base, 1), "bob": tuned(base, 2), None: base}
        model = to_gpu(copy.deepcopy(base))
        tenants = xorz.attach(model, budget="16 MiB", max_copies="1 MiB")
        for name in ("alice", "bob"):
            tenants.load(name, xorz.diff(base.state_dict(), plain[name].state_dict()))
        apart = {name: m(IDS, use_cache=False).logits for name, m in plain.items()}
        for name in plain:
            with tenants.use(name):
                assert near(model(OnGpu(IDS), use_cache=False).logits, apart[name]), (kind, name)
        with tenants.use(NAMES):
            got = model(OnGpu(IDS), use_cache=False).logits
        want = torch.stack([apart[name][row] for row, name in enumerate(NAMES)])
        assert near(got, want), kind


def test_what_is_not_served_there_is_refused_by_name(gpu):
    base, _, _ = made()

    def refused(sentence, model, **options):
        with pytest.raises(ValueError, match=sentence):
            xorz.attach(model, **options)
        assert not any("_xorz" in module.__dict__ for module in model.modules())

    model = to_gpu(copy.deepcopy(base))
    refused(
        'mode="exact" is for models on the CPU, but this one is on cuda:0',
        model,
        mode="exact",
        budget="1 MiB",
    )
    refused('the model is on cuda:0, .* such as budget="4 GiB"', model)
    model.blocks[1].up.bias = nn.Parameter(base.blocks[1].up.bias.detach().clone())
    refused(
        "`table.weight` is on cuda:0, but `blocks.1.up.bias` is on cpu; .* not over them and the CPU",
        model,
        budget="1 MiB",
    )
