"""Promise: a fine-tune is served under whatever names it was saved, where transformers itself would know
them, and heads that are new for each tenant are mixed like everything else; what nobody knows is refused by
name.
"""

import copy

import pytest
import torch
import xorz
from cases import tuned_of
from torch import nn


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = BertConfig(**sizes, num_attention_heads=2, num_labels=3)
    return BertForSequenceClassification(config).eval()


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


WAYS = {
    "torch.compile": lambda n: f"_orig_mod.{n}",
    "DataParallel": lambda n: f"module.{n}",
    "both": lambda n: f"module._orig_mod.{n}",
    "checkpoint wrapper": lambda n: n.replace("layer.0.", "layer.0._checkpoint_wrapped_module."),
    "PEFT": lambda n: "base_model.model." + n.replace("dense.weight", "dense.base_layer.weight"),
    "without prefix": lambda n: n.removeprefix("bert."),
    "old norms": lambda n: n.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
        "LayerNorm.bias", "LayerNorm.beta"
    ),
}


@pytest.mark.parametrize("file", [False, True], ids=["memory", "file"])
@pytest.mark.parametrize("way", WAYS)
def test_names_are_matched_as_transformers_would(way, file, tmp_path):
    base, ids = bert(), torch.randint(1, 40, (3, 5))
    tuned = {n: tuned_of(base, i + 1) for i, n in enumerate("ab")}
    tenants = xorz.attach(copy.deepcopy(base))
    for name, model in tuned.items():
        old, new = ({WAYS[way](k): v for k, v in m.state_dict().items()} for m in (base, model))
        assert way == "without prefix" or old.keys() != base.state_dict().keys()
        if file:
            xorz.pack(old, new, tmp_path / name)
        tenants.load(name, tmp_path / name if file else xorz.diff(old, new))
    with tenants.use(["a", None, "b"]):
        got = logits(tenants.model, ids)
    for row, model in enumerate((tuned["a"], base, tuned["b"])):
        torch.testing.assert_close(got[row], logits(model, ids)[row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("file", [False, True], ids=["memory", "file"])
def test_what_the_model_has_no_use_for_is_left_out_and_said(file, tmp_path):
    base, ids = bert(), torch.randint(1, 40, (3, 5))
    tuned = tuned_of(base, 1)
    more = {"bert.embeddings.position_ids": torch.arange(4.0), "v_head.summary.weight": torch.ones(2, 2)}
    old, new = base.state_dict() | more, tuned.state_dict() | {n: t + 1 for n, t in more.items()}
    tenants = xorz.attach(copy.deepcopy(base))
    if file:
        xorz.pack(old, new, tmp_path / "a")
    with pytest.warns(UserWarning, match=r"no use for 2 tensors of the fine-tune.*(position_ids|v_head)"):
        tenants.load("a", tmp_path / "a" if file else xorz.diff(old, new))
    with tenants.use("a"):
        torch.testing.assert_close(logits(tenants.model, ids), logits(tuned, ids), rtol=1e-4, atol=1e-5)


def test_names_that_nothing_explains_are_refused():
    base = bert()
    tenants = xorz.attach(copy.deepcopy(base))
    old = {f"bert.encoder.other.{n}": t for n, t in base.state_dict().items()}
    with pytest.raises(KeyError, match=r"no tensor `bert.encoder.other"):
        tenants.load("a", xorz.diff(old, {n: t + 1 for n, t in old.items() if t.is_floating_point()}))
    plain = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(KeyError, match=r"no tensor `v_head\.weight`"):
        xorz.attach(plain).load(
            "a", {"v_head.weight": xorz.delta_encode(torch.zeros(2, 2), torch.ones(2, 2))}
        )


@pytest.mark.parametrize("wrapper", ["language_model.", "policy.actor.", "bert.bert.", "student.bert."])
def test_a_model_under_a_wrapper_that_nobody_knows_is_refused_and_never_left_out(wrapper):
    """Though a head that is the model's own is beside it: the rest would be the base's."""
    base, tuned = bert(), tuned_of(bert(), 1)

    def wrapped(model):
        state = model.state_dict()
        return {n if n.startswith("classifier") else wrapper + n: t for n, t in state.items()}

    tenants = xorz.attach(copy.deepcopy(base))
    with pytest.raises(KeyError, match=f"no tensor `{wrapper}"):
        tenants.load("a", xorz.diff(wrapped(base), wrapped(tuned)))
    assert tenants.names() == []


def test_a_fine_tune_of_another_model_is_refused_and_never_left_out():
    old = {"transducer.one.kernel": torch.zeros(4, 4), "v_head.summary.scale": torch.zeros(2)}
    with pytest.raises(KeyError, match=r"no tensor `(transducer|v_head)\."):
        xorz.attach(bert()).load("a", xorz.diff(old, {n: t + 1 for n, t in old.items()}))


def test_heads_that_are_new_for_each_tenant_are_mixed():
    """`score.weight` is in no base that they were packed against."""
    base, ids = bert(), torch.randint(1, 40, (4, 5))
    tuned = {n: tuned_of(base, i + 1) for i, n in enumerate("ab")}
    body = {n: t for n, t in base.state_dict().items() if not n.startswith("classifier")}
    tenants = xorz.attach(copy.deepcopy(base))
    for name, model in tuned.items():
        delta = xorz.diff(body, model.state_dict())
        assert set(delta.alone) == {"classifier.weight", "classifier.bias"}
        tenants.load(name, delta)
    names = ["a", None, "b", "a"]
    with tenants.use(names):
        got = logits(tenants.model, ids)
    for row, name in enumerate(names):
        model = base if name is None else tuned[name]
        torch.testing.assert_close(got[row], logits(model, ids)[row], rtol=1e-4, atol=1e-5)


# What PEFT asks of transformers.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("order", ["attach first", "PEFT first"])
def test_models_that_peft_wraps_are_served(order):
    peft = pytest.importorskip("peft")
    base, ids = bert(), torch.randint(1, 40, (3, 5))
    tuned = tuned_of(base, 1)
    config = peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=True)
    model = copy.deepcopy(base)
    delta = xorz.diff(base, tuned)
    if order == "attach first":
        tenants = xorz.attach(model)
        wrapped = peft.get_peft_model(model, config).eval()
    else:
        wrapped = peft.get_peft_model(model, config).eval()
        tenants = xorz.attach(wrapped)
    tenants.load("a", delta)
    with tenants.use("a"):
        torch.testing.assert_close(logits(wrapped, ids), logits(tuned, ids), rtol=1e-4, atol=1e-5)
    with tenants.use([None, "a", "a"]):
        got = logits(wrapped, ids)
    torch.testing.assert_close(got[0], logits(base, ids)[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[1:], logits(tuned, ids)[1:], rtol=1e-4, atol=1e-5)
