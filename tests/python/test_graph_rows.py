"""Promise: a captured CUDA graph computes each row with the tenant that it has at the replay: tenants are exchanged, loaded,
unloaded and evicted between replays, neither a forward nor `set` waits for the device or reads it, and what cannot be computed
so is refused by name when the rows are first used.

Against the double of `gpu_double`, whose graphs are replayed on what lies in their buffers by then. What is expected is
computed by the plain fine-tuned models, on the CPU, by torch.
"""

import copy
import gc

import gpu_double
import pytest
import torch
import xorz
from gpu_double import Graph, OnGpu, to_gpu
from test_attach_cuda import made, near, tuned
from torch import nn

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a double of a GPU, beside a real one")
F = nn.functional
IDS = torch.randint(0, 50, (4, 3), generator=torch.Generator().manual_seed(8))
FIRST = ["alice", None, "bob", "alice"]


@pytest.fixture
def gpu(monkeypatch):
    with gpu_double.machine(monkeypatch) as ledger, torch.no_grad():
        yield ledger


class Captured:
    """A model on the device, its rows, and a graph of a forward of it; `plain` has each tenant's own model."""

    def __init__(self, base, plain, ids=IDS, capacity=8, loaded=("alice", "bob"), **options) -> None:
        self.base, self.plain, self.ids = base, plain, ids
        self.model = to_gpu(copy.deepcopy(base))
        self.tenants = xorz.attach(self.model, **{"budget": "16 MiB", **options})
        for name in loaded:
            self.load(name)
        self.rows = self.tenants.graph_rows(len(ids), capacity=capacity)
        self.x = OnGpu(ids.clone())
        self.rows.warm_up(self.x)
        self.graph, self.out = self.capture()

    def capture(self):
        with self.tenants.use(self.rows), Graph() as graph:
            out = self.model(self.x)
        return graph, out

    def load(self, name) -> None:
        self.tenants.load(name, xorz.diff(self.base.state_dict(), self.plain[name].state_dict()))

    def wrong(self, names) -> list:
        """Rows of the last replay that are not what these tenants' plain models give, told apart from the others'."""
        apart = {name: m(self.ids) for name, m in self.plain.items()}
        return [
            (row, name)
            for row, name in enumerate(names)
            if not near(self.out.words[row], apart[name][row])
            or any(near(apart[other][row], apart[name][row]) for other in apart if other != name)
        ]

    def replayed(self, names, late=False) -> list:
        self.rows.set(names)
        self.graph.replay(late=late)
        return self.wrong(names)


def family(dtype=torch.float32):
    base, plain, _ = made(dtype)
    plain |= {"carol": tuned(base, 3, 0.2), "dave": tuned(base, 4, 0.5)}
    return base, plain


EXCHANGED = (
    FIRST,
    FIRST[::-1],
    ["bob", "bob", None, "alice"],
    [None] * 4,
    ["bob"] * 4,
    ["alice", "bob", "bob", None],
)


@pytest.mark.parametrize("mode", ["fast", "deterministic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_replay_has_the_tenants_of_its_time(gpu, dtype, mode):
    made = Captured(*family(dtype), mode=mode)
    for names in EXCHANGED:
        assert made.replayed(names) == [], names
        assert made.rows.names == tuple(names)
    # For other words, too.
    made.ids = IDS.flip(0)
    made.x.copy_(OnGpu(made.ids))
    assert made.replayed(FIRST) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_of_one_row(gpu, dtype):
    made = Captured(*family(dtype), ids=IDS[:1])
    for name in ("alice", None, "bob", "alice"):
        assert made.replayed([name]) == [], name
    made.rows.set("bob")
    made.graph.replay()
    assert made.wrong(["bob"]) == []


def test_neither_a_forward_nor_set_waits_or_reads_and_buffers_stay(gpu):
    made = Captured(*family())
    rows, site = made.rows, made.tenants.sites["blocks.0.norm"]

    def addresses() -> list[int]:
        held = [rows.tensor]
        for site in made.tenants.sites.values():
            held += [*site.fixed.tables.values(), *site.fixed.stacks.values()]
        return [t.data_ptr() for t in held]

    before, synchronized = addresses(), gpu.synchronized
    assert site.fixed.stacks
    gpu.waits.clear()
    for names in EXCHANGED:
        gpu.ops.clear()
        rows.set(names)
        # One copy, and one more for each shape in which layers have their rows.
        assert len(gpu.ops) <= 2 and set(gpu.ops) <= {"copy_", "index_select"}, gpu.ops
    with made.tenants.use(rows):
        made.model(made.x)
    assert gpu.waits == [] and gpu.synchronized == synchronized
    # Loads and unloads change what lies there, not where.
    made.load("carol")
    made.tenants.unload("bob")
    made.load("dave")
    made.tenants.swap("carol", xorz.diff(made.base.state_dict(), made.plain["bob"].state_dict()))
    assert addresses() == before


def test_tenants_that_are_loaded_after_the_capture(gpu):
    made = Captured(*family())
    made.load("carol")
    assert made.replayed(["carol", "alice", None, "carol"]) == []
    made.load("dave")
    assert made.replayed(["dave", "carol", "alice", "bob"]) == []
    # A model whose first tenant comes after the capture.
    bare = Captured(*family(), loaded=())
    bare.graph.replay()
    assert bare.wrong([None] * 4) == []
    bare.load("alice")
    assert bare.replayed(["alice", None, None, "alice"]) == []


def test_a_slot_that_another_tenant_had_is_empty_of_it(gpu):
    base, plain = family()
    # Each changes one tensor alone: of what the one before had in that slot nothing may be left.
    names = [n for n, _ in base.named_parameters()]
    for name in names:
        plain[name] = copy.deepcopy(base)
        with torch.no_grad():
            plain[name].get_parameter(name).add_(0.5)
    made = Captured(base, plain, capacity=2, loaded=())
    for before, name in zip([*names[1:], "alice"], names, strict=True):
        for one in (before, name):
            made.load(one)
            want = made.plain[one](made.ids)
            made.rows.set([one, None, one, None])
            made.graph.replay()
            for row in range(4):
                assert near(made.out.words[row], (want if row % 2 == 0 else base(made.ids))[row]), (one, row)
            made.rows.set(None)
            made.tenants.unload(one)


def test_a_tenant_that_rows_name_stays_until_others_are_set(gpu):
    made = Captured(*family())
    made.rows.set(FIRST)
    made.tenants.unload("alice")
    assert "alice" not in made.tenants.names()
    for name in ("carol", "dave"):
        made.load(name)
    made.graph.replay()
    assert made.wrong(FIRST) == []
    used = made.tenants.memory()["deltas"]
    with pytest.raises(KeyError, match="no tenant is called 'alice'"):
        made.rows.set(FIRST)
    made.graph.replay()
    assert made.wrong(FIRST) == []
    assert made.replayed(["bob", "carol", "dave", None]) == []
    # Only now its memory is free.
    assert made.tenants.memory()["deltas"] < used
    made.tenants.swap("bob", xorz.diff(made.base.state_dict(), made.plain["alice"].state_dict()))
    made.graph.replay()
    assert made.wrong(["bob", "carol", "dave", None]) == []
    made.rows.set(["bob"] * 4)
    made.graph.replay()
    assert made.wrong(["alice"] * 4) == []


def test_what_a_replay_that_runs_still_may_read_is_changed_after_it(gpu):
    made = Captured(*family())
    made.rows.set(FIRST)
    for goes, comes in (("alice", "carol"), ("bob", "dave")):
        want = list(made.rows.names)
        made.graph.replay(late=True)
        # The rows go on to others in the replays after it: here by the books alone, as it were on another stream.
        held, made.rows._give_back = made.rows._give_back, None
        held()
        synchronized = gpu.synchronized
        made.tenants.unload(goes)
        assert gpu.synchronized == synchronized
        made.load(comes)
        gpu.catch_up()
        assert made.wrong(want) == [], goes
        others = [comes if name == goes else name for name in want]
        made.rows.set(others)
        made.graph.replay()
        assert made.wrong(others) == []


def test_tenants_are_evicted_and_come_back(gpu, tmp_path):
    base, plain = family()
    files = {}
    for name in ("alice", "bob", "carol", "dave"):
        files[name] = tmp_path / f"{name}.xorz"
        xorz.pack(base.state_dict(), plain[name].state_dict(), files[name])
    model = to_gpu(copy.deepcopy(base))
    tenants = xorz.attach(model, budget="16 MiB")
    for name, path in files.items():
        tenants.load(name, path)
    room = sum(tenants.sizes().values())
    tenants.detach()
    made = Captured(base, plain, loaded=(), budget=room - min(64, room))
    for name, path in files.items():
        made.tenants.load(name, path)
    assert not made.tenants.resident("alice")
    for names in (
        ["alice", "bob", None, "alice"],
        ["carol", "alice", "bob", None],
        ["carol", None, "carol", None],
        ["carol", None, "carol", "dave"],
        ["dave", "carol", "carol", "bob"],
    ):
        assert made.replayed(names) == [], names
        assert all(made.tenants.resident(name) for name in names if name)
    # All four have no room; the rows are then as they were.
    with pytest.raises(MemoryError, match=r"tenant '[a-z]+' takes"):
        made.rows.set(["alice", "bob", "carol", "dave"])
    made.graph.replay()
    assert made.wrong(["dave", "carol", "carol", "bob"]) == []
    assert made.rows.names == ("dave", "carol", "carol", "bob")


def test_tables_do_not_grow_under_a_graph(gpu, tmp_path):
    base, plain = family()
    made = Captured(base, plain, capacity=4, loaded=())
    assert made.tenants.capacity == 4
    path = tmp_path / "alice.xorz"
    xorz.pack(base.state_dict(), plain["alice"].state_dict(), path)
    made.tenants.load("alice", path)
    for name in ("bob", "carol", "dave"):
        made.load(name)
    assert made.replayed(["alice", "bob", "carol", "dave"]) == []
    with pytest.raises(MemoryError, match="'erin' would be number 5 in memory, but graphs were made for 4"):
        made.tenants.load("erin", xorz.diff(base.state_dict(), plain["bob"].state_dict()))
    # One that is idle and in a file makes room.
    assert made.replayed([None, "bob", "carol", "dave"]) == []
    made.plain["erin"] = tuned(base, 9, 0.4)
    made.load("erin")
    assert not made.tenants.resident("alice")
    assert made.replayed(["erin", "bob", "carol", "dave"]) == []
    with pytest.raises(ValueError, match="capacity is 5, but graph_rows that are open were made for 4"):
        made.tenants.graph_rows(2, capacity=5)
    made.rows.close()
    made.tenants.load("frank", xorz.diff(base.state_dict(), plain["bob"].state_dict()))
    assert made.tenants.capacity == 8


def test_batches_by_name_and_other_graphs_beside_it(gpu):
    made = Captured(*family())
    second = made.tenants.graph_rows(2)
    x = OnGpu(IDS[:2].clone())
    second.warm_up(x)
    with made.tenants.use(second), Graph() as graph:
        out = made.model(x)
    made.load("carol")
    second.set(["carol", "alice"])
    made.rows.set(FIRST)
    graph.replay()
    made.graph.replay()
    assert made.wrong(FIRST) == []
    for row, name in enumerate(("carol", "alice")):
        assert near(out.words[row], made.plain[name](IDS)[row])
    # One more graph of the same rows, for longer inputs.
    made.rows.warm_up(OnGpu(torch.cat([IDS, IDS], dim=1)))
    longer = OnGpu(torch.cat([IDS, IDS], dim=1))
    with made.tenants.use(made.rows), Graph() as other:
        more = made.model(longer)
    for names in EXCHANGED:
        assert made.replayed(names) == []
        other.replay()
        for row, name in enumerate(names):
            assert near(more.words[row], made.plain[name](longer.words)[row]), (names, row)
        with made.tenants.use(names[::-1]):
            got = made.model(made.x)
        for row, name in enumerate(names[::-1]):
            assert near(got.words[row], made.plain[name](IDS)[row]), (names, row)


class Refusing(nn.Module):
    """A layer that is served, and one that is not."""

    def __init__(self, part, run=None) -> None:
        super().__init__()
        self.table, self.up, self.part = nn.Embedding(50, 16), nn.Linear(16, 16), part
        self.run = run or (lambda part, x: part(x))

    def forward(self, ids):
        return self.run(self.part, self.up(self.table(ids)))


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.randn(1, 3, 16))

    def forward(self, x):
        return x + self.at


class Backwards(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(16, 16))

    def forward(self, x):
        return x @ self.w


class Squares(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(16))

    def forward(self, x):
        return x * self.scale.square()


REFUSED = {
    "torch's attention": (nn.MultiheadAttention(16, 2, batch_first=True), lambda p, x: p(x, x, x)[0], "part"),
    "a convolution": (nn.Conv1d(3, 3, 1), None, "conv1d on `part.weight`|part"),
    "a recurrent layer": (nn.GRU(16, 16, batch_first=True), lambda p, x: p(x)[0], "part"),
    "learned positions of one's own": (Positions(), None, "`part.at`"),
    "x @ W": (Backwards(), None, "matmul on `part.w`"),
    "what is made of a weight": (Squares(), None, "`part.scale`"),
    "batch norm of places": (nn.BatchNorm1d(3), None, None),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_computed_so_is_refused_by_name_at_first_use(gpu, what):
    part, run, name = REFUSED[what]
    torch.manual_seed(1)
    base = Refusing(part, run).eval()
    model = to_gpu(copy.deepcopy(base))
    tenants = xorz.attach(model, budget="16 MiB")
    rows = tenants.graph_rows(4)
    if name is None:
        # Served row by row, by the op's own code.
        plain = {None: base, "alice": tuned(base, 1, 0.9), "bob": tuned(base, 2, 0.9)}
        made = Captured(base, plain)
        assert made.replayed(FIRST) == []
        return
    # No tenant is loaded that changes anything: whoever comes later might.
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"xorz: ({name}) is not served with rows of a graph"):
            rows.warm_up(OnGpu(IDS))
    with pytest.raises(RuntimeError, match="is not served with rows of a graph"), tenants.use(rows):
        model(OnGpu(IDS))
    # The next batch by names is served as ever.
    tenants.load("alice", xorz.diff(base.state_dict(), tuned(base, 1).state_dict()))
    with tenants.use("alice"):
        assert near(model(OnGpu(IDS)), tuned(base, 1)(IDS))
    if isinstance(part, nn.RNNBase):
        names, plain = ["alice", None, None, "alice"], {"alice": tuned(base, 1)(IDS), None: base(IDS)}
        with tenants.use(names):
            assert near(model(OnGpu(IDS)), torch.stack([plain[name][row] for row, name in enumerate(names)]))


class Choosy(nn.Module):
    """Takes these words and no others."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 16)

    def forward(self, ids):
        if not torch.equal(ids, OnGpu(IDS)):
            raise ValueError("these are other words")
        return self.table(ids)


def test_a_model_that_cannot_be_tried_is_refused_for_that_and_not_for_the_first_layers_sake(gpu):
    model = to_gpu(Choosy())
    tenants = xorz.attach(model, budget="1 MiB")
    rows = tenants.graph_rows(4)
    why = r"the model could not be tried on the base, .* \(ValueError: these are other words\), so that table and what follows"
    with pytest.raises(
        RuntimeError, match=f"{why} are not served; leave it out of the graph, or use one tenant at a"
    ):
        rows.warm_up(OnGpu(IDS))
    words = model.table.weight.base.words
    tenants.load("alice", xorz.diff({"table.weight": words}, {"table.weight": words + 1}))
    with (
        pytest.raises(RuntimeError, match=f"{why} are not served; use one tenant at a time"),
        tenants.use([None] * 3 + ["alice"]),
    ):
        model(OnGpu(IDS))


def test_experts_are_refused_by_name(gpu):
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    model = to_gpu(transformers.AutoModelForCausalLM.from_config(config).eval())
    tenants = xorz.attach(model, budget="16 MiB")
    with pytest.raises(RuntimeError, match=r"xorz: model.layers.0.mlp.* is not served with rows of a graph"):
        # Of one row, whose place need not be found out: the double cannot run these experts on the base.
        tenants.graph_rows(1).warm_up(OnGpu(IDS[:1]), use_cache=False)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_models_of_transformers(gpu, kind):
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 50, "attn_implementation": "eager", "use_cache": False}
    config = {
        "llama": lambda: transformers.LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            **small,
        ),
        # Conv1D, biases, and positions that are looked up for all rows.
        "gpt2": lambda: transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=32, **small),
    }[kind]()
    torch.manual_seed(1)
    base = transformers.AutoModelForCausalLM.from_config(config).eval()
    plain = {"alice": tuned(base, 1), "bob": tuned(base, 2), "carol": tuned(base, 3), None: base}
    model = to_gpu(copy.deepcopy(base))
    tenants = xorz.attach(model, budget="16 MiB")
    deltas = {n: xorz.diff(base.state_dict(), m.state_dict()) for n, m in plain.items() if n}
    for name in ("alice", "bob"):
        tenants.load(name, deltas[name])
    for ids in (IDS, IDS[:, :1], IDS[:1]):
        x, rows = OnGpu(ids.clone()), tenants.graph_rows(len(ids))
        rows.warm_up(x)
        with tenants.use(rows), Graph() as graph:
            out = model(x).logits
        if "carol" not in tenants.names():
            tenants.load("carol", deltas["carol"])
        apart = {name: m(ids).logits for name, m in plain.items()}
        for names in (
            ["alice", None, "bob", "carol"],
            ["carol", "carol", "alice", None],
            [None, "bob", "bob", "bob"],
        ):
            rows.set(names[: len(ids)])
            graph.replay()
            for row, name in enumerate(names[: len(ids)]):
                assert near(out.words[row], apart[name][row]), (ids.shape, names, row)


def test_norms_and_scales(gpu):
    class Norms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.scale, self.one = (
                nn.Embedding(50, 16),
                nn.Parameter(torch.randn(16)),
                nn.Parameter(torch.ones(())),
            )
            self.norms = nn.ModuleList(
                [
                    nn.LayerNorm(16),
                    nn.LayerNorm(16, bias=False),
                    nn.LayerNorm([3, 16], elementwise_affine=False),
                    nn.RMSNorm(16, eps=1e-6),
                    nn.RMSNorm(16),
                    nn.GroupNorm(3, 3),
                    nn.PReLU(3),
                ]
            )

        def forward(self, ids):
            x = self.one + self.table(ids) * self.scale
            for norm in self.norms:
                x = norm(x) + 0.5 * x
            x += self.scale
            return torch.where(x > 0, x, x * self.one) - self.scale

    torch.manual_seed(2)
    for dtype, mode in ((torch.float32, "fast"), (torch.bfloat16, "fast"), (torch.float32, "deterministic")):
        base = Norms().to(dtype).eval()
        plain = {None: base, "alice": tuned(base, 1, 0.9), "bob": tuned(base, 2, 0.9)}
        made = Captured(base, plain, mode=mode)
        for names in EXCHANGED:
            assert made.replayed(names) == [], (dtype, names)


def test_a_shape_is_warmed_up_before_it_is_captured(gpu):
    base, _ = family()
    model = to_gpu(copy.deepcopy(base))
    tenants = xorz.attach(model, budget="16 MiB")
    rows = tenants.graph_rows(4)
    x = OnGpu(IDS.clone())
    with pytest.raises(RuntimeError, match="first batch of a kind would be tried inside of the capture"):
        with tenants.use(rows), Graph():
            model(x)
    rows.warm_up(OnGpu(IDS[:, :2].clone()))
    with pytest.raises(
        RuntimeError, match=r"rows of shape \[4, 3\] are met for the first time inside of the capture"
    ):
        with tenants.use(rows), Graph():
            model(x)
    rows.warm_up(x)
    with pytest.raises(RuntimeError, match="rows of a graph would be set inside of the capture"), Graph():
        rows.set(None)
    with tenants.use(rows), Graph() as graph:
        out = model(x)
    graph.replay()
    assert near(out, base(IDS))


def test_misuse_is_refused_in_a_sentence(gpu):
    base, plain = family()
    on_cpu = xorz.attach(copy.deepcopy(base))
    with pytest.raises(ValueError, match="on the CPU, which has no graphs"):
        on_cpu.graph_rows(4)
    made = Captured(base, plain)
    tenants, rows = made.tenants, made.rows
    for options, sentence in (
        ({"batch": 0}, "batch must be a positive number, but is 0"),
        ({"batch": True}, "batch must be a positive number, but is True"),
        ({"batch": 4, "capacity": -1}, "capacity must be a positive number, but is -1"),
    ):
        with pytest.raises(ValueError, match=sentence):
            tenants.graph_rows(**options)
    rows.set(FIRST)
    for names, error, sentence in (
        (["alice"] * 3, ValueError, "3 names were given for 4 rows"),
        (["nobody"] * 4, KeyError, "no tenant is called 'nobody'"),
        ([1, 2, 3, 4], TypeError, "a tenant's name must be a str or None"),
        ([], ValueError, "names is empty"),
    ):
        with pytest.raises(error, match=sentence):
            rows.set(names)
    made.graph.replay()
    assert made.wrong(FIRST) == []
    with pytest.raises(ValueError, match="dim is 1"):
        tenants.use(rows, dim=1)
    with pytest.raises(ValueError, match="belong to the tenants of another model"), on_cpu.use(rows):
        pass
    with pytest.raises(RuntimeError, match=r"\[3\].* map 4 batch rows|rows of shape"), tenants.use(rows):
        made.model(OnGpu(IDS[:3].clone()))
    with pytest.raises(ValueError, match=r"tenant '(alice|bob)' is in use; .*close the rows of graphs"):
        tenants.detach()
    with tenants.use(rows), pytest.raises(RuntimeError, match="rows of a graph are in use"):
        rows.close()
    with pytest.raises(RuntimeError, match="regroup is not served with rows of a graph"), tenants.use(rows):
        tenants.regroup(OnGpu(torch.arange(4)), (4,)).__enter__()
    rows.set(None)
    with pytest.raises(ValueError, match=r"rows of a graph are open; close\(\) them first"):
        tenants.detach()
    rows.close()
    rows.close()
    for what in (lambda: rows.set(None), lambda: rows.warm_up(made.x)):
        with pytest.raises(RuntimeError, match="these rows of a graph are closed"):
            what()
    # A tenant with tokens of its own is served alone.
    grown = {
        n: (torch.cat([w, w[:1]]) if n in ("table.weight", "head.weight") else w)
        for n, w in base.state_dict().items()
    }
    tenants.load("grown", xorz.diff(base.state_dict(), grown))
    with pytest.raises(ValueError, match=r"'grown' has tensors of other shapes .* not in rows of a graph"):
        tenants.graph_rows(4).set(["grown"] * 4)


def test_the_double_replays_what_lies_in_memory_and_refuses_what_is_freed(gpu):
    x, kept = OnGpu(torch.arange(4.0)), OnGpu(torch.ones(4))
    lost = OnGpu(torch.full((4,), 2.0))
    with Graph() as graph:
        out = x * kept + lost
        view = out[1:3]
        view.add_(kept[:2])
    assert torch.equal(out.words, torch.tensor([2.0, 4.0, 5.0, 5.0]))
    x.copy_(OnGpu(torch.full((4,), 10.0)))
    kept.fill_(3.0)
    graph.replay()
    assert torch.equal(out.words, torch.tensor([32.0, 35.0, 35.0, 32.0]))
    assert torch.equal(view.words, out.words[1:3])
    del lost
    gc.collect()
    with pytest.raises(RuntimeError, match="a replay reads freed memory"):
        graph.replay()
    for waits in (lambda: out.sum().item(), lambda: out.cpu(), lambda: torch.cuda.synchronize()):
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"), Graph():
            waits()


def test_what_gpu_check_will_run_on_a_gpu_passes_on_the_double_and_sees_a_wrong_row(gpu, monkeypatch):
    from xorz.gpu_check import models
    from xorz.gpu_check.report import Report
    from xorz.serve.graphs import GraphRows

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)
    monkeypatch.setattr(
        nn.Module,
        "to",
        lambda self, to: to_gpu(self) if to == gpu_double.CUDA else self._apply(lambda t: t.to(to)),
    )
    report = Report("a double")
    models.check_graph_rows(report, gpu_double.CUDA, 48)
    assert len(report.checks) == 12 and report.passed, report.checks
    monkeypatch.setattr(GraphRows, "set", lambda self, names: None)
    report = Report("a double")
    models.check_graph_rows(report, gpu_double.CUDA, 48)
    assert sum(not check["passed"] for check in report.checks) >= 8


def test_a_step_with_a_static_cache(gpu):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eager",
    )
    torch.manual_seed(1)
    base = transformers.AutoModelForCausalLM.from_config(config).eval()
    plain = {"alice": tuned(base, 1), "bob": tuned(base, 2), None: base}
    model = to_gpu(copy.deepcopy(base))
    tenants = xorz.attach(model, budget="16 MiB")
    for name in ("alice", "bob"):
        tenants.load(name, xorz.diff(base.state_dict(), plain[name].state_dict()))
    rows = tenants.graph_rows(4)
    cache = transformers.StaticCache(config, max_cache_len=8)
    word, place = OnGpu(IDS[:, :1].clone()), OnGpu(torch.zeros(4, 1, dtype=torch.int64))
    inputs = {"past_key_values": cache, "use_cache": True, "position_ids": place}
    rows.warm_up(word, **inputs)
    with tenants.use(rows), Graph() as graph:
        out = model(word, **inputs).logits
    for names in (["alice", None, "bob", "alice"], ["bob", "alice", None, None]):
        cache.reset()
        rows.set(names)
        for step in range(IDS.size(1)):
            word.copy_(OnGpu(IDS[:, step : step + 1].clone()))
            place.fill_(step)
            graph.replay()
        for row, name in enumerate(names):
            want = plain[name](IDS, use_cache=False).logits[row, -1:]
            assert near(out.words[row], want), (names, row)
