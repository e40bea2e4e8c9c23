"""Promise: fine-tunes of mixtures of experts, their routers included, are answered in one engine as an engine over each full
fine-tune answers; a token's tenant goes with it through the experts; what of a mixture cannot be served is refused by name.
"""

import json
import re
import shutil
from types import SimpleNamespace

import engines
import models
import pytest
import torch
import xorz.vllm
from engines import PROMPTS, ask, score
from safetensors.torch import load_file, save_file
from torch import nn
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from xorz import _ops
from xorz.vllm import experts

KINDS = ("mixtral", "qwen3_moe", "qwen2_moe", "olmoe")
NAMES = (None, "A", "B")


def folder(kind, name):
    return models.tenant(kind, name, engines.FOLDER)[0] if name else models.base(kind, engines.FOLDER)


def package(kind, name):
    return models.tenant(kind, name, engines.FOLDER)[1]


@pytest.fixture(scope="module", params=KINDS)
def served(request):
    """An engine with two tenants; and what an engine over each full model says, with the same products."""
    paths = [folder(request.param, name) for name in NAMES]
    said = dict(zip(NAMES, engines.references(paths), strict=True))
    llm = engines.engine(paths[0])
    adapters = {None: None} | {n: xorz.vllm.load(llm, n, package(request.param, n)) for n in NAMES if n}
    yield llm, adapters, said
    engines.stop(llm)


def mixed(llm, adapters, names):
    llm.reset_prefix_cache()
    return ask(llm, [p for _ in names for p in PROMPTS], [adapters[n] for n in names for _ in PROMPTS])


def test_every_tensor_of_a_mixture_is_followed_and_changed(served):
    llm, _adapters, _said = served
    manager = engines.manager(llm)
    assert manager.loader.plan.refused == {}
    stacks = [m for m in manager.matrices if re.search(r"experts\.w(13|2)_weight\[\d\]$", m)]
    gates = [m for m in manager.matrices if m.endswith(".gate.weight")]
    assert len(gates) in (1, 2) and len(stacks) == len(gates) * 2 * 8
    for lora in manager._registered_adapters.cache.values():
        lengths = dict(zip(manager.matrices, lora.places[:, 1].tolist(), strict=True))
        assert min(lengths.values()) > 0, lengths


def test_each_request_is_answered_as_its_full_fine_tune(served):
    llm, adapters, said = served
    assert len({tuple(s.tokens) for each in said.values() for s in each}) == len(NAMES) * len(PROMPTS)
    got = mixed(llm, adapters, NAMES)
    wanted = [each for name in NAMES for each in said[name]]
    # To the bit: the products are those of an engine over each full model.
    assert [(g.tokens, g.logprob) for g in got] == [(w.tokens, w.logprob) for w in wanted]


@pytest.mark.parametrize("kind", KINDS)
def test_vllm_s_own_kernels_say_the_same_of_each_full_fine_tune(kind, tmp_path):
    """Of the same words as float32, whose rounding turns no choice of an expert and no token."""
    paths = {name: tmp_path / (name or "base") for name in NAMES}
    for name, path in paths.items():
        shutil.copytree(folder(kind, name), path)
        words = load_file(path / "model.safetensors")
        words = {n: w.float() for n, w in words.items()}
        save_file(words, path / "model.safetensors", metadata={"format": "pt"})
        if name:
            xorz.pack(paths[None], path, tmp_path / f"{name}.xorz")
    said = {}
    for name in ("A", "B"):
        full = engines.plain(paths[name], dtype="float32")
        try:
            said[name] = ask(full, PROMPTS)
        finally:
            engines.stop(full)
    llm = engines.engine(paths[None], mode="fast", dtype="float32")
    try:
        adapters = {name: xorz.vllm.load(llm, name, tmp_path / f"{name}.xorz") for name in said}
        got = mixed(llm, {None: None} | adapters, ("A", None, "B"))
        for name, mine in (("A", got[:2]), ("B", got[4:])):
            assert [g.tokens for g in mine] == [w.tokens for w in said[name]]
            assert max(abs(g.logprob - w.logprob) for g, w in zip(mine, said[name], strict=True)) < 0.01
        assert len({tuple(s.tokens) for s in got}) == len(got)
    finally:
        engines.stop(llm)


def test_other_neighbours_change_nothing_but_rounding(served):
    llm, adapters, said = served
    for names in (("B", "B", "A"), ("A", None), ("B",)):
        got = mixed(llm, adapters, names)
        wanted = [each for name in names for each in said[name]]
        assert [g.tokens for g in got] == [w.tokens for w in wanted]


def test_a_row_s_bits_are_its_own_in_deterministic_mode():
    """Also where a prompt is computed in chunks, beside others."""
    kind = KINDS[0]
    llm = engines.engine(folder(kind, None), mode="deterministic", max_num_batched_tokens=32, max_num_seqs=8)
    try:
        adapters = [n and xorz.vllm.load(llm, n, package(kind, n)) for n in NAMES]
        texts = [llm.get_tokenizer().encode(prompt) * 3 for prompt in PROMPTS]
        asked = [(text, adapter) for adapter in adapters for text in texts]
        together = score(llm, [text for text, _ in asked], [adapter for _, adapter in asked])
        assert together == [score(llm, [text], [adapter])[0] for text, adapter in asked]
        assert len({tuple(row) for row in together}) == len(together)
    finally:
        engines.stop(llm)


def test_an_update_of_the_base_changes_its_experts():
    kind = KINDS[0]
    said = engines.references([folder(kind, "A"), folder(kind, None)])
    settings = {"enable_lora": False, "weight_transfer_config": {"backend": "xorz"}}
    llm = engines.engine(folder(kind, None), **settings)
    try:
        llm.init_weight_transfer_engine({"init_info": {}})
        assert ask(llm, PROMPTS) == said[1]
        llm.start_weight_update()
        llm.update_weights({"update_info": {"source": str(package(kind, "A"))}})
        llm.finish_weight_update()
        assert [s.tokens for s in ask(llm, PROMPTS)] == [s.tokens for s in said[0]]
    finally:
        engines.stop(llm)


def dense(x, up, down, weights, ids, act, on_input):
    """In float64, token by token: what one tenant's experts give."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for row in range(x.size(0)):
        for choice, expert in enumerate(ids[row].tolist()):
            if expert < 0:
                continue
            scale = weights[row, choice].double()
            given = x[row].double() * (scale if on_input else 1)
            gate, lift = (up[expert].double() @ given).chunk(2)
            out[row] += (1 if on_input else scale) * (down[expert].double() @ (act(gate) * lift))
    return out


ACTIVATIONS = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("mode", ["fast", "deterministic", "exact"])
def test_each_row_has_its_tenant_s_experts(activation, mode):
    """Without an engine; three tenants and the base, experts that nobody has chosen, and choices that are none."""
    g = torch.Generator().manual_seed(5)
    many, size, inner, count, tenants = 6, 64, 48, 40, 3
    up, down = (torch.randn(many, n, k, generator=g) / 8 for n, k in ((2 * inner, size), (size, inner)))
    sets = [(up, down)]
    arena, slots = bytearray(64), [torch.zeros(many, tenants, 2, dtype=torch.int64) for _ in range(2)]
    for tenant in range(tenants):
        own = []
        for which, stack in enumerate((up, down)):
            moved = stack + torch.randn(stack.shape, generator=g) / 16
            if tenant == 0:
                moved[0] = stack[0]  # an expert as in the base
            for expert in range(many):
                if torch.equal(moved[expert], stack[expert]):
                    continue
                delta = _ops.delta_encode(stack[expert], moved[expert])
                slots[which][expert, tenant] = torch.tensor([len(arena), delta.numel()])
                arena += bytes(delta.tolist()) + bytes(-delta.numel() % 64)
            own.append(moved)
        sets.append(tuple(own))
    arena = torch.frombuffer(arena, dtype=torch.uint8)
    x = torch.randn(count, size, generator=g)
    rows = torch.randint(-1, tenants, (count,), generator=g, dtype=torch.int32)
    for on_input, choices in ((False, 2), (True, 1)):
        ids = torch.stack([torch.randperm(many - 1, generator=g)[:choices] for _ in range(count)]).int()
        ids[3, 0] = -1
        weights = torch.rand(count, choices, generator=g)
        args = (x, up, down, weights, ids)
        got = torch.ops.xorz_vllm.routed_experts(
            *args, arena, *slots, rows, mode, MoEActivation(activation).value, on_input
        )
        for tenant in range(-1, tenants):
            mine = rows == tenant
            wanted = dense(x, *sets[tenant + 1], weights, ids, ACTIVATIONS[activation], on_input)
            assert mine.any() and (got[mine] - wanted[mine]).abs().max() < 2e-4 * wanted.abs().max()
            other = dense(x, *sets[(tenant + 2) % len(sets)], weights, ids, ACTIVATIONS[activation], on_input)
            assert (got[mine] - other[mine]).abs().max() > 1e-2
        none = torch.ops.xorz_vllm.routed_experts(
            *args, None, None, None, None, "", MoEActivation(activation).value, on_input
        )
        wanted = dense(x, up, down, weights, ids, ACTIVATIONS[activation], on_input)
        assert (none - wanted).abs().max() < 2e-4 * wanted.abs().max()


def mixture(**changed):
    """vLLM's config of a mixture that is served, but for what is said."""
    parallel = SimpleNamespace(use_ep=False, dp_size=1, pcp_size=1, is_sequence_parallel=False)
    out = SimpleNamespace(activation=MoEActivation.SILU, has_bias=False, moe_parallel_config=parallel)
    for name, value in changed.items():
        setattr(parallel if hasattr(parallel, name) else out, name, value)
    return out


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"activation": MoEActivation.SWIGLUOAI}, "activation swigluoai"),
        ({"activation": MoEActivation.RELU2_NO_MUL}, "activation relu2_no_mul"),
        ({"has_bias": True}, "biases"),
        ({"swiglu_limit": 7.0}, "limits"),
        ({"use_ep": True}, "expert parallelism"),
        ({"dp_size": 2}, "data parallelism"),
        ({"pcp_size": 2}, "context parallelism"),
        ({"is_sequence_parallel": True}, "sequence parallelism"),
    ],
)
def test_mixtures_that_are_refused(changed, words):
    assert experts.unserved(mixture()) is None
    with pytest.raises(ValueError, match=f"mixtures of experts with .*{words}.* are not served"):
        experts.XorzExpertsMethod(mixture(**changed))


def test_gates_that_are_multiplied_at_once_are_not_served(monkeypatch):
    from vllm.model_executor.layers.fused_moe import MoERunner
    from xorz.vllm import manager

    class Runner(MoERunner):
        def __init__(self, gate, shared):
            nn.Module.__init__(self)
            self.gate, self.shared_expert_gate = gate, shared

    both = Runner(nn.Linear(4, 4), nn.Linear(4, 1))
    one = Runner(nn.Linear(4, 4), None)
    model = nn.ModuleList([both, one])
    assert manager._read_by_others(model) == {id(both.gate), id(both.shared_expert_gate)}


def test_experts_that_are_stored_in_fp8_are_refused_by_name(tmp_path):
    """Whoever asks for products of other words than those that are stored is told which."""
    kind, eights = KINDS[0], torch.float8_e4m3fn
    base, full = tmp_path / "base", tmp_path / "full"
    for to, name in ((base, None), (full, "A")):
        shutil.copytree(folder(kind, name), to)
        words = load_file(to / "model.safetensors")
        words = {n: w.to(eights) if ".experts." in n else w for n, w in words.items()}
        save_file(words, to / "model.safetensors", metadata={"format": "pt"})
    xorz.pack(base, full, tmp_path / "A.xorz")
    llm = engines.engine(base)
    try:
        why = r"`model\.layers\.\d\..*experts\.\d.*` is changed.* holds torch.float8_e4m3fn, but the model computes in"
        with pytest.raises(Exception, match=why):
            xorz.vllm.load(llm, "A", tmp_path / "A.xorz")
        assert len(ask(llm, PROMPTS)) == len(PROMPTS)
    finally:
        engines.stop(llm)
    # And a checkpoint that says it is quantized is one of another method, which is named before anything is loaded.
    about = json.loads((base / "config.json").read_text())
    about["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    (base / "config.json").write_text(json.dumps(about))
    with pytest.raises(Exception, match=r"(?s)fp8.*xorz"):
        engines.engine(base)
