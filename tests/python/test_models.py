"""Promise: whole models of transformers, truly fine-tuned, serve a tenant in each row as that tenant is
served alone.

In mode="deterministic", token for token and bit for bit; in mode="exact", every linear layer gives what the
plain fine-tuned module gives on the same rows, and a tenant alone is the plain fine-tuned model, bit for bit.
"""

import copy
import functools
import re
import subprocess
import sysconfig
from pathlib import Path

import models
import pytest
import safetensors.torch
import torch
import xorz
from conftest import same_bits
from models import Family, generate
from torch import nn
from transformers.pytorch_utils import Conv1D

pytestmark = pytest.mark.usefixtures("one_thread")

COMMAND = Path(sysconfig.get_path("scripts")) / "xorz"
ROWS = ["ann", None, "bob", "cid", "ann", "bob"]
DECODERS = [name for name in models.MODELS if name != "bert"]


@pytest.fixture(scope="module", params=models.MODELS)
def family(request):
    return Family(request.param, torch.bfloat16)


@pytest.fixture(scope="module", params=DECODERS)
def decoder(request):
    return Family(request.param, torch.bfloat16)


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D)) or type(module).__name__ in (
        "MixtralExperts",
        "MixtralTopKRouter",
    )


def left_padded(family, rows):
    """Prompts of several lengths; each has padding, so that a row alone takes the same path as in the batch."""
    ids = family.tokens(rows, 9)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : 1 + row * 2 % 5] = 0
    return torch.where(mask.bool(), ids, 0), mask


# The fine-tunes are what the tests need them to be.


def test_fine_tunes_change_modules_of_every_kind(family):
    base = family.base.state_dict()
    for name in ("ann", "bob"):
        tuned = family.tuned[name].state_dict()
        same = [n for n in base if base[n].is_floating_point() and torch.equal(base[n], tuned[n])]
        assert not same, f"{name} leaves {same} as they are"
    light = family.tuned["cid"].state_dict()
    assert any(not torch.equal(base[n], light[n]) for n in base)


# A tenant in each row is the tenant alone.


@pytest.mark.parametrize("padded", [False, True], ids=["full", "left-padded"])
def test_generate_gives_each_row_what_its_tenant_alone_gives(decoder, padded):
    ids, mask = left_padded(decoder, len(ROWS)) if padded else (decoder.tokens(len(ROWS), 6), None)
    with decoder.attached("deterministic") as (model, tenants):
        with tenants.use(ROWS):
            together = generate(model, ids, mask)
        for row, name in enumerate(ROWS):
            part = None if mask is None else mask[row : row + 1]
            with tenants.use(name):
                alone = generate(model, ids[row : row + 1], part)
            assert torch.equal(together[row : row + 1], alone), f"row {row}, {name}"
        # That could fail: with two rows' tenants swapped both rows are others, and no other row is.
        for one, other in ((0, 2), (1, 3), (4, 1)):
            swapped = list(ROWS)
            swapped[one], swapped[other] = ROWS[other], ROWS[one]
            with tenants.use(swapped):
                wrong = generate(model, ids, mask)
            moved = (wrong != together).any(dim=1).nonzero()[:, 0].tolist()
            assert moved == sorted((one, other)), (swapped, moved)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_generate_gives_the_same_in_float32(name):
    test_generate_gives_each_row_what_its_tenant_alone_gives(Family(name, torch.float32), True)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_logits_in_float32_never_depend_on_the_batch(name):
    test_logits_of_a_row_never_depend_on_the_batch(Family(name, torch.float32))


def test_logits_of_a_row_never_depend_on_the_batch(family):
    # Long enough that kernels treat a row's tokens otherwise than a batch's, where they may.
    inputs = family.inputs(family.tokens(len(ROWS), 24))
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if family.name in ("bert", "t5"):
        # Encoders see padding on the right.
        inputs["attention_mask"][:, 20:] = 0
    with family.attached("deterministic") as (model, tenants), torch.no_grad():
        with tenants.use(ROWS):
            together = model(**inputs).logits
        for row, name in enumerate(ROWS):
            with tenants.use(name):
                alone = model(**{k: v[row : row + 1] for k, v in inputs.items()}).logits
            assert same_bits(together[row : row + 1], alone), f"row {row}, {name}"
            others = [n for n in dict.fromkeys(ROWS) if n != name]
            for other in others:
                with tenants.use(other):
                    wrong = model(**{k: v[row : row + 1] for k, v in inputs.items()}).logits
                assert not same_bits(wrong, alone), f"{name} and {other} cannot be told apart"


# Exact: the plain fine-tuned model.


def test_exact_linear_layers_give_what_the_plain_fine_tuned_ones_give(family):
    """Inputs and outputs of every linear layer of the attached model, and the plain modules on the same rows."""
    inputs = family.inputs(family.tokens(len(ROWS), 7))
    linear = {name for name, module in family.base.named_modules() if is_linear(module)}
    seen = {name: [] for name in linear}
    with family.attached("exact") as (model, tenants), torch.no_grad():
        for name in linear:
            module = model.get_submodule(name)
            module.register_forward_hook(lambda _, args, out, name=name: seen[name].append((args, out)))
        with tenants.use(ROWS):
            model(**inputs)
            # The first one has found out where rows are, by runs that hooks see, too.
            for calls in seen.values():
                calls.clear()
            model(**inputs)
        for name, calls in seen.items():
            for tenant, args, out in by_tenant(calls):
                want = family.tuned[tenant].get_submodule(name)(*args)
                assert all(map(torch.equal, tuple_of(out), tuple_of(want))), f"{name}, {tenant}"
                if tenant is not None:
                    base = family.base.get_submodule(name)(*args)
                    same = map(torch.equal, tuple_of(base), tuple_of(want))
                    assert not all(same), f"{name} of {tenant} is the base's"


def tuple_of(out):
    return out if isinstance(out, tuple) else (out,)


def by_tenant(calls):
    """(tenant, inputs, outputs) of each tenant's rows, from one call for the whole batch, or one for each tenant in turn."""
    names = list(dict.fromkeys(ROWS))
    if len(calls) > 1:
        # Inside of a module that is run once per tenant.
        assert len(calls) == len(names)
        return [(name, *call) for name, call in zip(names, calls, strict=True)]
    args, out = calls[0]
    rows = {name: [i for i, other in enumerate(ROWS) if other == name] for name in names}
    return [
        (name, [of_rows(a, rows[name]) for a in args], tuple(of_rows(o, rows[name]) for o in tuple_of(out)))
        for name in names
    ]


def of_rows(tensor: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """These batch rows of a tensor whose first dimension is the batch, or its tokens, batch first."""
    each = tensor.size(0) // len(ROWS)
    assert each * len(ROWS) == tensor.size(0)
    return tensor.unflatten(0, (len(ROWS), each))[rows].flatten(0, 1)


def test_exact_alone_is_the_plain_fine_tuned_model(family):
    inputs = family.inputs(family.tokens(3, 7))
    with family.attached("exact") as (model, tenants), torch.no_grad():
        for name, plain in family.tuned.items():
            with tenants.use(name):
                got = model(**inputs).logits
            want = plain(**inputs).logits
            assert torch.equal(got, want), name
            assert name is None or not torch.equal(want, family.base(**inputs).logits)


def test_exact_generation_alone_is_the_plain_fine_tuned_models(decoder):
    """Through the KV cache, logits included."""
    ids, mask = left_padded(decoder, 3)
    options = {"return_dict_in_generate": True, "output_logits": True}
    with decoder.attached("exact") as (model, tenants):
        for name, plain in decoder.tuned.items():
            with tenants.use(name):
                got = generate(model, ids, mask, new=4, **options)
            want = generate(plain, ids, mask, new=4, **options)
            assert torch.equal(got.sequences, want.sequences), name
            for step, (mine, theirs) in enumerate(zip(got.logits, want.logits, strict=True)):
                assert torch.equal(mine, theirs), f"{name}, step {step}"


def test_detached_models_are_the_plain_base(family):
    inputs = family.inputs(family.tokens(2, 7))
    with family.attached("fast") as (model, tenants), torch.no_grad():
        with tenants.use(["ann", "bob"]):
            model(**inputs)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, family.base(**inputs).logits)
    assert [type(m) for m in model.modules()] == [type(m) for m in family.base.modules()]


# From folders on disk, by way of packages.


def folders(family, folder, **options):
    """`base/` and one folder for each fine-tune, as transformers saves them."""
    for name, model in family.tuned.items():
        model.save_pretrained(folder / (name or "base"), **options)


def check_served_from(family, folder):
    """Loads `<name>.xorz` of `folder` into the model that transformers reads from `base/`, and compares with the plain ones."""
    options = {"experts_implementation": "eager"} if family.name == "mixtral" else {}
    model = type(family.base).from_pretrained(folder / "base", **options).eval()
    inputs = family.inputs(family.tokens(2, 7))
    tenants = xorz.attach(model, mode="exact")
    with torch.no_grad():
        for name in models.TENANTS:
            plain = type(family.base).from_pretrained(folder / name, **options).eval()
            tenants.load(name, folder / f"{name}.xorz")
            with tenants.use(name):
                got = model(**inputs).logits
            assert torch.equal(got, plain(**inputs).logits)
            assert torch.equal(got, family.tuned[name](**inputs).logits)
    tenants.detach()


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_folders_packed_by_the_command_are_served(name, tmp_path):
    """Sharded, or with a tied head that no file has."""
    family = Family(name, torch.bfloat16)
    folders(family, tmp_path, **({"max_shard_size": "60KB"} if name == "llama" else {}))
    shards = sorted(tmp_path.glob("base/*.safetensors"))
    if name == "llama":
        assert len(shards) > 2
    else:
        weights = safetensors.torch.load_file(shards[0])
        assert "model.embed_tokens.weight" in weights and "lm_head.weight" not in weights
    for tenant in models.TENANTS:
        subprocess.run([COMMAND, "pack", "base", tenant, "-o", f"{tenant}.xorz"], cwd=tmp_path, check=True)
    check_served_from(family, tmp_path)


def test_folders_packed_from_python_are_served(family, tmp_path):
    folders(family, tmp_path)
    for tenant in models.TENANTS:
        xorz.pack(tmp_path / "base", tmp_path / tenant, tmp_path / f"{tenant}.xorz")
    check_served_from(family, tmp_path)


@pytest.fixture(scope="module")
def mixtral():
    return Family("mixtral", torch.bfloat16)


def test_folders_with_stacks_of_experts_are_served(mixtral, tmp_path):
    """Under the model's own names; by default transformers writes one matrix an expert."""
    folders(mixtral, tmp_path, save_original_format=False)
    names = safetensors.torch.load_file(tmp_path / "base" / "model.safetensors").keys()
    assert any(name.endswith("experts.gate_up_proj") for name in names)
    for tenant in models.TENANTS:
        xorz.pack(tmp_path / "base", tmp_path / tenant, tmp_path / f"{tenant}.xorz")
    check_served_from(mixtral, tmp_path)


def experts_one_by_one(mixtral, folder):
    """A package of files that hold each expert alone, in which only one half of one expert's stack changes; its name."""
    folders(mixtral, folder)
    path = folder / "ann" / "model.safetensors"
    tuned, base = safetensors.torch.load_file(path), safetensors.torch.load_file(folder / "base" / path.name)
    (name,) = (n for n in tuned if n.endswith("layers.1.block_sparse_moe.experts.2.w3.weight"))
    safetensors.torch.save_file(
        {n: tuned[n] if n == name else t for n, t in base.items()}, path, {"format": "pt"}
    )
    xorz.pack(folder / "base", folder / "ann", folder / "ann.xorz")
    return name


def test_half_of_one_expert_is_served_from_the_files_of_single_experts(mixtral, tmp_path):
    experts_one_by_one(mixtral, tmp_path)
    load = functools.partial(type(mixtral.base).from_pretrained, experts_implementation="eager")
    plain, model = load(tmp_path / "ann").eval(), load(tmp_path / "base").eval()
    stacks = zip(plain.state_dict().items(), model.state_dict().values(), strict=True)
    assert [n for (n, a), b in stacks if not torch.equal(a, b)] == ["model.layers.1.mlp.experts.gate_up_proj"]
    inputs = mixtral.inputs(mixtral.tokens(2, 7))
    tenants = xorz.attach(model, mode="exact")
    tenants.load("ann", tmp_path / "ann.xorz")
    assert tenants.summary().count(" ann") == 1
    deltas = xorz.load_deltas(tmp_path / "base", tmp_path / "ann.xorz")
    tenants.load("by name", deltas)
    with torch.no_grad():
        want = plain(**inputs).logits
        for name in ("ann", "by name"):
            with tenants.use(name):
                assert torch.equal(model(**inputs).logits, want)
        with tenants.use(None):
            assert not torch.equal(model(**inputs).logits, want)


def test_experts_of_another_base_are_refused_by_the_name_that_the_file_has(mixtral, tmp_path):
    name = experts_one_by_one(mixtral, tmp_path)
    model = type(mixtral.base).from_pretrained(tmp_path / "base").eval()
    with torch.no_grad():
        model.model.layers[1].mlp.experts.gate_up_proj[2, -1, -1] += 1
    tenants = xorz.attach(model)
    with pytest.raises(ValueError, match=re.escape(name) + ".*digest"):
        tenants.load("ann", tmp_path / "ann.xorz")
    assert tenants.names() == []


def test_an_expert_of_another_shape_is_refused_with_its_rows(mixtral, tmp_path):
    name = experts_one_by_one(mixtral, tmp_path)
    path = tmp_path / "ann" / "model.safetensors"
    tuned = safetensors.torch.load_file(path)
    tuned[name] = tuned[name][1:].clone()
    safetensors.torch.save_file(tuned, path, {"format": "pt"})
    xorz.pack(tmp_path / "base", tmp_path / "ann", tmp_path / "ann.xorz")
    tenants = xorz.attach(type(mixtral.base).from_pretrained(tmp_path / "base").eval())
    with pytest.raises(ValueError, match=re.escape(name) + ".*rows 480 to 576.*gate_up_proj"):
        tenants.load("ann", tmp_path / "ann.xorz")


def test_packed_state_dicts_are_served(family, tmp_path):
    for tenant in models.TENANTS:
        xorz.pack(family.base.state_dict(), family.tuned[tenant].state_dict(), tmp_path / f"{tenant}.xorz")
    family.base.save_pretrained(tmp_path / "base")
    for tenant in models.TENANTS:
        family.tuned[tenant].save_pretrained(tmp_path / tenant)
    check_served_from(family, tmp_path)


def test_names_that_no_conversion_explains_are_refused(mixtral, tmp_path, monkeypatch):
    import transformers.core_model_loading as loading

    experts_one_by_one(mixtral, tmp_path)
    tenants = xorz.attach(type(mixtral.base).from_pretrained(tmp_path / "base").eval())
    expert = r"`model\.layers\.\d\.block_sparse_moe\.experts\.\d\.w\d\.weight`"

    def broken(model, tensors):
        raise RuntimeError("shape '[8, 2, 4]' is invalid for input of size 1")

    def shuffled(model, tensors):
        return {n: t.flip(0) for n, t in original(model, tensors).items()}

    def halved(model, tensors):
        found = original(model, tensors)
        return {n: t for n, t in found.items() if not n.endswith("experts.2.w1.weight")}

    original = loading.revert_weight_conversion
    monkeypatch.setattr(loading, "revert_weight_conversion", halved)
    deltas = xorz.load_deltas(tmp_path / "base", tmp_path / "ann.xorz")
    held = {n: d for n, d in deltas.items() if not n.endswith("experts.2.w1.weight")}
    with pytest.raises(ValueError, match=r"does not hold every row of 384 to 576 once"):
        tenants.load("ann", held)
    for conversion in (broken, shuffled, lambda model, tensors: tensors):
        monkeypatch.setattr(loading, "revert_weight_conversion", conversion)
        with pytest.raises(KeyError, match=expert if conversion is not shuffled else "has no tensor `"):
            tenants.load("ann", tmp_path / "ann.xorz")
    assert tenants.names() == []


# The layer of the notebook that xorz began as, and its fine-tunes.


class TinyTransformerLayer(nn.Module):
    """The notebook's."""

    def __init__(self, d_model=64, nhead=4, dim_feedforward=128, dropout=0.0):
        super().__init__()
        self.ln1 = nn.LayerNorm(d_model)
        self.self_attn = nn.MultiheadAttention(d_model, nhead, batch_first=True, dropout=dropout)
        self.ln2 = nn.LayerNorm(d_model)
        self.ff = nn.Sequential(
            nn.Linear(d_model, dim_feedforward),
            nn.GELU(),
            nn.Linear(dim_feedforward, d_model),
        )

    def forward(self, x, attn_mask=None):
        h = self.ln1(x)
        a, _ = self.self_attn(h, h, h, attn_mask=attn_mask)
        x = x + a
        h2 = self.ln2(x)
        y = self.ff(h2)
        return x + y


def perturb_subset_(module, frac=0.03, magnitude=1e-2, seed=0):
    """The notebook's: noise on a share of the elements of each parameter."""
    g = torch.Generator(device="cpu").manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            k = max(1, int(p.numel() * frac))
            idx = torch.randperm(p.numel(), generator=g)[:k]
            p.view(-1)[idx] += magnitude * torch.randn(k, generator=g, dtype=p.dtype)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "causal"])
@pytest.mark.parametrize("mode", ["fast", "deterministic", "exact"])
def test_the_notebooks_layer_serves_its_fine_tunes(mode, masked, tmp_path):
    torch.manual_seed(42)
    base = TinyTransformerLayer().eval()
    tuned = {None: base}
    layer = copy.deepcopy(base)
    tenants = xorz.attach(layer, mode=mode)
    for i in range(3):
        fine = tuned[f"t{i}"] = copy.deepcopy(base)
        perturb_subset_(fine, seed=123 + i)
        xorz.pack(base.state_dict(), fine.state_dict(), tmp_path / f"t{i}.xorz")
        tenants.load(f"t{i}", tmp_path / f"t{i}.xorz")
    rows = ["t2", None, "t0", "t1", "t2"]
    x = torch.randn(len(rows), 16, 64)
    mask = torch.triu(torch.full((16, 16), float("-inf")), 1) if masked else None
    with torch.no_grad():
        with tenants.use(rows):
            together = layer(x, mask)
        for row, name in enumerate(rows):
            one = x[row : row + 1]
            with tenants.use(name):
                alone = layer(one, mask)
            want = tuned[name](one, mask)
            torch.testing.assert_close(together[row : row + 1], want, rtol=1e-5, atol=1e-5)
            if mode == "deterministic":
                assert same_bits(together[row : row + 1], alone), f"row {row}"
            if mode == "exact":
                assert same_bits(alone, want), f"row {row}"
            if name is not None:
                # The fine-tunes are far enough from the base, and from each other, for that to mean
                # something.
                far = [(tuned[n](one, mask) - want).abs().max() for n in tuned if n != name]
                assert min(far) > 1e-3
    assert torch.equal(tenants.detach()(x, mask), base(x, mask))
