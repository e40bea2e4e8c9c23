"""Promise: `xorz.sglang.load` makes a model of SGLang's layout (merged qkv and gate_up, padded and tied tables) what its own
loader makes of the new checkpoint, bit for bit; what does not fit, or fails midway, leaves every word as it was.

Without SGLang, for which the model here stands: its loader is that of SGLang 0.5.23's Llama.
"""

import pytest
import torch
import xorz
from safetensors.torch import load_file, save_file
from torch import nn
from xorz import _ops, sglang

HIDDEN, HEADS, KV, MLP, VOCABULARY = 96, 96, 48, 160, 100
FUSED = {
    "q": ("qkv_proj", 0, HEADS),
    "k": ("qkv_proj", HEADS, KV),
    "v": ("qkv_proj", HEADS + KV, KV),
    0: ("gate_up_proj", 0, MLP),
    1: ("gate_up_proj", MLP, MLP),
}
MAPPING = [
    (".qkv_proj", ".q_proj", "q"),
    (".qkv_proj", ".k_proj", "k"),
    (".qkv_proj", ".v_proj", "v"),
    (".gate_up_proj", ".gate_proj", 0),
    (".gate_up_proj", ".up_proj", 1),
]


def default_loader(param, loaded):
    param.data[: loaded.size(0)].copy_(loaded)
    param.data[loaded.size(0) :].fill_(0)


def parameter(*shape, fused=False, cut=1):
    out = nn.Parameter(torch.zeros(shape).bfloat16(), requires_grad=False)

    def into(param, loaded, shard):
        _, at, rows = FUSED[shard]
        at, rows = at // cut, rows // cut
        param.data.narrow(0, at, rows).copy_(loaded.narrow(0, 0, rows))

    out.weight_loader = into if fused else default_loader
    return out


class Block(nn.Module):
    def __init__(self, cut):
        super().__init__()
        names = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "norm")
        self.update({n: nn.Module() for n in names})
        self.qkv_proj.weight = parameter((HEADS + 2 * KV) // cut, HIDDEN, fused=True, cut=cut)
        self.qkv_proj.bias = parameter((HEADS + 2 * KV) // cut, fused=True, cut=cut)
        self.o_proj.weight = parameter(HIDDEN, HEADS)
        self.gate_up_proj.weight = parameter(2 * MLP // cut, HIDDEN, fused=True, cut=cut)
        self.down_proj.weight = parameter(HIDDEN, MLP)
        self.norm.weight = parameter(HIDDEN)

    def update(self, modules):
        for name, module in modules.items():
            setattr(self, name, module)


class Model(nn.Module):
    def __init__(self, tied=False, cut=1):
        super().__init__()
        self.layers = nn.ModuleList(Block(cut) for _ in range(2))
        self.embed_tokens, self.lm_head = nn.Module(), nn.Module()
        self.embed_tokens.weight = parameter(128, HIDDEN)
        self.tied = tied
        self.lm_head.weight = self.embed_tokens.weight if tied else parameter(128, HIDDEN)

    def load_weights(self, weights):
        params = dict(self.named_parameters())
        for name, loaded in weights:
            if self.tied and "lm_head.weight" in name:
                continue
            for ours, theirs, shard in MAPPING:
                if theirs in name:
                    param = params[name.replace(theirs, ours)]
                    param.weight_loader(param, loaded, shard)
                    break
            else:
                params[name].weight_loader(params[name], loaded)


def checkpoint(seed, tied=False):
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(shape, generator=generator).bfloat16()  # noqa: E731
    out = {"embed_tokens.weight": make(VOCABULARY, HIDDEN)}
    if not tied:
        out["lm_head.weight"] = make(VOCABULARY, HIDDEN)
    for i in range(2):
        rows = {"q_proj": HEADS, "k_proj": KV, "v_proj": KV, "gate_proj": MLP, "up_proj": MLP}
        for name, n in rows.items():
            out[f"layers.{i}.{name}.weight"] = make(n, HIDDEN)
            if name in ("q_proj", "k_proj", "v_proj"):
                out[f"layers.{i}.{name}.bias"] = make(n)
        out[f"layers.{i}.o_proj.weight"] = make(HIDDEN, HEADS)
        out[f"layers.{i}.down_proj.weight"] = make(HIDDEN, MLP)
        out[f"layers.{i}.norm.weight"] = make(HIDDEN)
    return out


def moved(words, seed):
    """Some words of most tensors are others; whole tensors, and k of the merged one, stay."""
    generator = torch.Generator().manual_seed(seed)
    out = dict(words)
    for name, tensor in words.items():
        if "o_proj" not in name and "k_proj" not in name:
            hit = torch.rand(tensor.shape, generator=generator) < 0.1
            out[name] = torch.where(hit, tensor + 0.25, tensor)
    return out


def loaded(words, **settings):
    model = Model(**settings)
    model.load_weights(iter(words.items()))
    return model


def words_of(model):
    return {name: param.data.view(torch.int16).clone() for name, param in model.named_parameters()}


def same(model, words):
    found = words_of(model)
    return found.keys() == words.keys() and all(torch.equal(found[name], words[name]) for name in words)


def sent(package, old, new):
    xorz.pack(old, new, package)
    return sglang.named_tensors(package)


@pytest.mark.parametrize("tied", [False, True])
def test_versions_in_turn(tmp_path, tied):
    versions = [checkpoint(0, tied)]
    model = loaded(versions[0], tied=tied)
    places = {name: param.data_ptr() for name, param in model.named_parameters()}
    for step in range(3):
        versions.append(moved(versions[-1], step))
        given = sent(tmp_path / f"{step}.xorz", *versions[-2:])
        before = words_of(model)
        sglang.load(model, given)
        assert same(model, words_of(loaded(versions[-1], tied=tied))) and not same(model, before)
        # The same once more is no step from what is there now.
        after = words_of(model)
        with pytest.raises(ValueError, match=r"tensor `.*`: the package is a step from words with digest"):
            sglang.load(model, given)
        assert same(model, after)
    assert places == {name: param.data_ptr() for name, param in model.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
def test_a_trainer_s_versions_with_both_names_of_a_tied_table(tmp_path, tied):
    """An engine may hold it once, or twice."""
    old = checkpoint(0, tied=True)
    save_file(old, tmp_path / "base.safetensors")
    new = moved(old, 1)
    first, second = ({**words, "lm_head.weight": words["embed_tokens.weight"]} for words in (old, new))
    model = loaded(first, tied=tied)
    mine = load_file(tmp_path / "base.safetensors")
    mine["lm_head.weight"] = mine["embed_tokens.weight"]
    with xorz.Publisher(mine, tmp_path / "run") as publisher:
        state = {name: tensor.float() for name, tensor in new.items()}
        state["lm_head.weight"] = state["embed_tokens.weight"]
        publisher.publish(state)
        publisher.wait()
        sglang.load(model, sglang.named_tensors(publisher.versions.path(1)))
    assert same(model, words_of(loaded(second, tied=tied)))


def test_what_does_not_fit_changes_no_word(tmp_path):
    old = checkpoint(0)
    new = moved(old, 1)
    given = sent(tmp_path / "step.xorz", old, new)
    for name in (
        "layers.1.norm.weight",
        "layers.1.o_proj.weight",
        "layers.0.k_proj.weight",
        "lm_head.weight",
    ):
        other = dict(old)
        other[name] = old[name].clone()
        other[name].view(-1)[7] += 1
        model = loaded(other)
        before = words_of(model)
        with pytest.raises(ValueError, match=f"tensor `{name}`: .*step from words with digest"):
            sglang.load(model, given)
        assert same(model, before), name
    model = loaded(old)
    before = words_of(model)
    [(name, content)] = given
    broken = content.clone()
    broken[len(broken) // 2] ^= 1
    lacking = {k: v for k, v in old.items() if k != "layers.1.norm.weight"}
    part = {k: v for k, v in old.items() if k != "layers.1.v_proj.weight"}
    for wrong, why in (
        ([(name, broken)], "digest|damaged"),
        ([(name, content[:-9])], "file was cut"),
        ([("model.norm.weight", content)], "an update is one tensor called xorz.package"),
        ([], "an update is one tensor"),
        ([(name, content.view(torch.int8))], "are torch.uint8"),
        (
            sent(tmp_path / "lacking.xorz", lacking, {k: new[k] for k in lacking}),
            "makes `layers.1.norm.weight` from row 0",
        ),
        (
            sent(tmp_path / "part.xorz", part, {k: new[k] for k in part}),
            "makes `layers.1.qkv_proj.weight` from row 144",
        ),
        (
            sent(tmp_path / "removed.xorz", old, {k: new[k] for k in lacking}),
            "`layers.1.norm.weight` is not in the fine-tune",
        ),
        (sent(tmp_path / "alone.xorz", lacking, new), "no step from the tensor of that name"),
    ):
        with pytest.raises(ValueError, match=why):
            sglang.load(model, wrong)
        assert same(model, before), why
    sglang.load(model, given)
    assert same(model, words_of(loaded(new)))


class Computing(Model):
    def load_weights(self, weights):
        super().load_weights((n, w * 1 if "layers.0.k_proj.weight" in n else w) for n, w in weights)


def test_what_the_loader_computes_with_is_not_passed_over(tmp_path):
    old = checkpoint(0)
    model = Computing()
    model.load_weights(iter(old.items()))
    before = words_of(model)
    name = "layers.0.k_proj.weight"
    given = sent(tmp_path / "step.xorz", old, {**old, name: old[name] + 1})
    with pytest.raises(ValueError, match=f"tensor `{name}` is changed, and cannot be: .*computes with it"):
        sglang.load(model, given)
    assert same(model, before)


def test_what_fails_midway_is_taken_back(tmp_path, monkeypatch):
    old = checkpoint(0)
    given = sent(tmp_path / "step.xorz", old, moved(old, 1))
    model, plain, calls = loaded(old), _ops.delta_apply_, []
    before = words_of(model)

    def failing(words, delta):
        calls.append(1)
        if len(calls) == 6:
            raise RuntimeError("the device is lost")
        return plain(words, delta)

    monkeypatch.setattr(_ops, "delta_apply_", failing)
    with pytest.raises(RuntimeError, match="the device is lost; all words are as they were"):
        sglang.load(model, given)
    assert len(calls) == 6 + 5 and same(model, before)


def test_parts_of_tensors_and_derived_weights_are_refused(tmp_path):
    old = checkpoint(0)
    given = sent(tmp_path / "step.xorz", old, moved(old, 1))
    model = loaded(old, cut=2)
    before = words_of(model)
    with pytest.raises(
        ValueError, match=r"holds but a part of tensor `layers\.0.*`: tensor parallel is not served"
    ):
        sglang.load(model, given)
    assert same(model, before)
    model = loaded(old)
    model.post_load_weights = lambda: None
    with pytest.raises(ValueError, match="derives weights from others"):
        sglang.load(model, given)
