"""A whole model on the device: attached, its tenants alone and mixed, generating, in a CUDA graph."""

import copy
import importlib.util
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .. import apply_, attach, diff
from .data import name_of
from .report import Report, differ

NEAR = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""How far two runs of one model may be from each other, of its largest output: other sums in each layer."""

NAMES = ("alice", None, "bob", "bob", "alice")


class _Block(nn.Module):
    def __init__(self, k: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(k), nn.Linear(k, 2 * k), nn.Linear(2 * k, k, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class _Model(nn.Module):
    """A table, blocks with norms, and a head that is the table again: each position is told from its own word alone."""

    def __init__(self, k: int, words: int) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(words, k), nn.Linear(k, words, bias=False)
        self.blocks = nn.Sequential(_Block(k), _Block(k))
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.blocks(self.table(ids)))


def _tuned(base: nn.Module, seed: int, share: float) -> nn.Module:
    out, g = copy.deepcopy(base), torch.Generator().manual_seed(seed)
    for p in out.parameters():
        # So much that no tenant is near another one by what bf16 rounds.
        step = (torch.randn(p.shape, generator=g) * 0.2).to(p.dtype)
        p.copy_(torch.where(torch.rand(p.shape, generator=g) < share, p + step, p))
    return out


def _family(base: nn.Module) -> dict[str | None, nn.Module]:
    """The base and its fine-tunes, on the CPU."""
    return {"alice": _tuned(base, 1, 0.4), "bob": _tuned(base, 2, 0.1), None: base}


def _attached(
    base: nn.Module, family: dict[str | None, nn.Module], device: torch.device, **options: Any
) -> Any:
    model = copy.deepcopy(base).to(device)
    tenants = attach(model, budget="256 MiB", **options)
    for name, tuned in family.items():
        if name is not None:
            tenants.load(name, diff(base.state_dict(), tuned.state_dict()))
    return model, tenants


def _far(got: Tensor, want: Tensor) -> str | None:
    """How far they are, if that is too far."""
    got, want = got.detach().cpu().double(), want.detach().cpu()
    if got.shape != want.shape:
        return f"{list(got.shape)} for {list(want.shape)}"
    most = NEAR[want.dtype] * float(want.abs().max())
    off = float((got - want.double()).abs().max())
    return None if off <= most else f"off by {off:.3g} of {most:.3g}"


def check_model(report: Report, device: torch.device, k: int) -> None:
    """Each row of a batch is computed with its tenant's weights, beside the plain fine-tunes on the CPU."""
    for dtype, mode in ((torch.float32, "fast"), (torch.bfloat16, "fast"), (torch.bfloat16, "deterministic")):
        base = _Model(k, 200).to(dtype).eval()
        family = _family(base)
        ids = torch.randint(0, 200, (len(NAMES), 9), generator=torch.Generator().manual_seed(5))
        apart = {name: plain(ids) for name, plain in family.items()}
        want = torch.stack([apart[name][row] for row, name in enumerate(NAMES)])
        model, tenants = _attached(base, family, device, mode=mode)
        wrong: dict[str, str | None] = {}
        for name in family:
            with tenants.use(name):
                wrong[f"{name or 'the base'} alone"] = _far(model(ids.to(device)), apart[name])
        for what in ("mixed", "mixed again"):
            with tenants.use(NAMES):
                wrong[what] = _far(model(ids.to(device)), want)
        # Of so many rows each tenant's are multiplied for it alone.
        prompts = torch.randint(0, 200, (len(NAMES), 140), generator=torch.Generator().manual_seed(7))
        long = torch.stack([family[name](prompts)[row] for row, name in enumerate(NAMES)])
        with tenants.use(NAMES):
            wrong["long prompts of several"] = _far(model(prompts.to(device)), long)
        tenants.swap("bob", diff(base.state_dict(), family["alice"].state_dict()))
        with tenants.use("bob"):
            wrong["swapped"] = _far(model(ids.to(device)), apart["alice"])
        tenants.unload("bob")
        tenants.load("carol", diff(base.state_dict(), family["bob"].state_dict()))
        with tenants.use("carol"):
            wrong["loaded where another was"] = _far(model(ids.to(device)), apart["bob"])
        tenants.detach()
        wrong["detached"] = _far(model(ids.to(device)), apart[None])
        for what, found in wrong.items():
            report.check(f"attach, {what}, {mode}, {name_of(dtype)}", found)


def check_applied(report: Report, device: torch.device, k: int) -> None:
    """The words of a model on the device are turned into a fine-tune's, bit for bit; another base is left as it was."""
    base = _Model(k, 200).to(torch.bfloat16)
    tuned = _tuned(base, 1, 0.02)
    for prefer in ("speed", "memory"):
        delta = diff(base.state_dict(), tuned.state_dict(), prefer=prefer)
        model, other = (copy.deepcopy(one).to(device) for one in (base, tuned))
        apply_(model, delta)
        wrong = _differ(model, tuned)
        try:
            apply_(other, delta)
            wrong = wrong or "a delta was applied to another base"
        except ValueError as error:
            wrong = wrong or (None if "digest" in str(error) else str(error))
        report.check(
            f"apply_ to a model, prefer={prefer}, {name_of(torch.bfloat16)}", wrong or _differ(other, tuned)
        )


def _differ(model: nn.Module, want: nn.Module) -> str | None:
    """The first tensor with other words."""
    there = dict(model.named_parameters())
    found = ((name, differ(there[name].detach(), p.detach())) for name, p in want.named_parameters())
    return next((f"{name}: {wrong}" for name, wrong in found if wrong is not None), None)


def check_spread(report: Report, devices: tuple[torch.device, torch.device], k: int) -> None:
    """A model whose second half is on another device, its inputs moved by hooks as accelerate's do."""
    base = _Model(k, 200).eval()
    base.head.weight = nn.Parameter(base.head.weight.detach().clone())  # not tied over devices
    family = _family(base)
    ids = torch.randint(0, 200, (len(NAMES), 9), generator=torch.Generator().manual_seed(6))
    apart = {name: plain(ids) for name, plain in family.items()}
    first, second = devices
    model = copy.deepcopy(base)
    for part, device in (
        (model.table, first),
        (model.blocks[0], first),
        (model.blocks[1], second),
        (model.head, second),
    ):
        part.to(device)
        part.register_forward_pre_hook(lambda _, given, to=device: tuple(x.to(to) for x in given))
    tenants = attach(model, budget="256 MiB")
    for name, tuned in family.items():
        if name is not None:
            tenants.load(name, diff(base.state_dict(), tuned.state_dict()))
    wrong: dict[str, str | None] = {}
    for name in family:
        with tenants.use(name):
            wrong[f"{name or 'the base'} alone"] = _far(model(ids.to(first)), apart[name])
    for what, names in (("mixed", NAMES), ("mixed in another order", NAMES[::-1])):
        with tenants.use(names):
            got = model(ids.to(first))
        wrong[what] = _far(got, torch.stack([apart[name][row] for row, name in enumerate(names)]))
    tenants.swap("bob", diff(base.state_dict(), family["alice"].state_dict()))
    with tenants.use(["bob", None] * 2 + ["bob"]):
        got = model(ids.to(first))
    wrong["swapped"] = _far(got[::2], apart["alice"][::2]) or _far(got[1::2], apart[None][1::2])
    for what, found in wrong.items():
        report.check(f"attach, over two devices, {what}", found)


def check_model_graph(report: Report, device: torch.device, k: int) -> None:
    """A forward of several tenants, captured and replayed for other words."""
    base = _Model(k, 200).eval()
    family = _family(base)
    model, tenants = _attached(base, family, device)
    ids = torch.zeros(len(NAMES), 3, dtype=torch.int64, device=device)
    with tenants.use(NAMES):
        model(ids)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(ids)
        wrong = None
        for seed in (1, 2):
            words = torch.randint(0, 200, ids.shape, generator=torch.Generator().manual_seed(seed))
            ids.copy_(words)
            graph.replay()
            torch.cuda.synchronize(device)
            want = torch.stack([family[name](words)[row] for row, name in enumerate(NAMES)])
            wrong = wrong or _far(out, want)
    report.check("attach, a CUDA graph of a mixed batch, replayed for other words", wrong)


def check_graph_rows(report: Report, device: torch.device, k: int) -> None:
    """A forward whose tenants change between replays: exchanged, loaded after the capture, in the place of one that went."""
    for dtype in (torch.float32, torch.bfloat16):
        _check_rows(report, device, k, dtype)


def _check_rows(report: Report, device: torch.device, k: int, dtype: torch.dtype) -> None:
    base = _Model(k, 200).to(dtype).eval()
    family = _family(base) | {"carol": _tuned(base, 3, 0.2)}
    first = {name: family[name] for name in ("alice", "bob", None)}
    model, tenants = _attached(base, first, device)
    words = torch.randint(0, 200, (len(NAMES), 3), generator=torch.Generator().manual_seed(3))
    apart = {name: plain(words) for name, plain in family.items()}
    ids, rows = words.to(device), tenants.graph_rows(len(NAMES), capacity=8)
    rows.warm_up(ids)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with tenants.use(rows), torch.cuda.graph(graph):
        out = model(ids)
    wrong: dict[str, str | None] = {}

    def replay(what: str, names: tuple[str | None, ...]) -> None:
        rows.set(names)
        graph.replay()
        want = torch.stack([apart[name][row] for row, name in enumerate(names)])
        wrong[what] = _far(out, want)

    replay("captured", NAMES)
    replay("exchanged", NAMES[::-1])
    replay("the base", (None,) * len(NAMES))
    tenants.load("carol", diff(base.state_dict(), family["carol"].state_dict()))
    replay("loaded after the capture", ("carol", "alice", None, "bob", "carol"))
    # Replays are on their way when their tenant goes, and another one comes into its memory.
    for _ in range(50):
        rows.set(("alice",) * len(NAMES))
        graph.replay()
    before = out.clone()
    rows.set(("bob",) * len(NAMES))
    tenants.unload("alice")
    tenants.load("dave", diff(base.state_dict(), family["carol"].state_dict()))
    wrong["replayed while its tenant went"] = _far(before, apart["alice"])
    apart["dave"] = apart["carol"]
    replay("loaded where another was", ("dave", "bob", None, "carol", "dave"))
    rows.close()
    for what, found in wrong.items():
        report.check(f"attach, rows of a CUDA graph, {what}, {name_of(dtype)}", found)


def check_generate(report: Report, device: torch.device) -> None:
    """A small Llama of transformers writes for each prompt what that tenant's plain model writes."""
    if importlib.util.find_spec("transformers") is None:
        report.leave_out("generate: transformers is not installed")
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoModelForCausalLM, LlamaConfig

        torch.manual_seed(1)
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 120}
        config = LlamaConfig(
            num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=None, **sizes
        )
        base = AutoModelForCausalLM.from_config(config).eval()
        family = _family(base)
        prompts = torch.randint(1, 120, (len(NAMES), 6), generator=torch.Generator().manual_seed(7))
        options = {"max_new_tokens": 8, "do_sample": False}
        want = {name: plain.generate(prompts, **options) for name, plain in family.items()}
        model, tenants = _attached(base, family, device, max_copies="16 MiB")
        with tenants.use(NAMES):
            got = model.generate(prompts.to(device), **options).cpu()
    wrong = None
    for row, name in enumerate(NAMES):
        if not torch.equal(got[row], want[name][row]):
            wrong = (
                wrong
                or f"row {row} ({name or 'the base'}): {got[row].tolist()} for {want[name][row].tolist()}"
            )
    report.check("attach, generate for a mixed batch, beside each tenant's plain model", wrong)
