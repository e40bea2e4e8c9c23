"""Promise: transformers' own doors lead to tenants: `from_pretrained` with a config, `generate(tenants=)`, pipelines,
`Trainer`; what they compute is what the plain fine-tuned model computes, and what is saved is the plain base.
"""

import importlib
import json
import subprocess
import sys

import models
import pytest
import torch
import transformers
import xorz
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, pipeline

XorzConfig = xorz.XorzConfig


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base's folder, two full fine-tunes and their packages, as users have them."""
    root = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(3)
    base = models.MODELS["llama"]().bfloat16().eval()
    base.generation_config.pad_token_id = 0
    base.save_pretrained(root / "base")
    for seed, name in enumerate(("alice", "bob")):
        tuned = models.train(base, 1e-2, seed)
        tuned.save_pretrained(root / name)
        xorz.pack(root / "base", root / name, root / f"{name}.xorz")
    return root


def prompts(rows=2, length=6):
    return torch.randint(1, models.VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(9))


def plain(folders, name):
    return AutoModelForCausalLM.from_pretrained(folders / name)


def sequences(model, ids, **options):
    with torch.inference_mode():
        return model.generate(ids, max_new_tokens=6, do_sample=False, **options)


def padded(parts):
    width = max(p.size(1) for p in parts)
    return torch.cat([torch.nn.functional.pad(p, (0, width - p.size(1))) for p in parts])


def served(folders, **options):
    tenants = {name: str(folders / f"{name}.xorz") for name in ("alice", "bob")}
    config = XorzConfig(tenants=tenants, mode="exact", **options)
    return AutoModelForCausalLM.from_pretrained(folders / "base", quantization_config=config)


def test_from_pretrained_attaches_and_generate_takes_a_name_for_each_prompt(folders):
    model = served(folders)
    ids = prompts(3)
    want = padded(
        [sequences(plain(folders, name), ids[i : i + 1]) for i, name in enumerate(("alice", "bob", "base"))]
    )
    assert not torch.equal(want[0, 6:], sequences(plain(folders, "base"), ids[:1])[0, 6:])
    got = sequences(model, ids, tenants=["alice", "bob", None])
    assert torch.equal(got, want)
    assert torch.equal(
        sequences(model, ids[:1], tenants="alice"), sequences(plain(folders, "alice"), ids[:1])
    )
    assert torch.equal(sequences(model, ids), sequences(plain(folders, "base"), ids))
    assert model.xorz.names() == ["alice", "bob"]
    assert model.xorz.detach() is model and not hasattr(model, "xorz")
    assert torch.equal(sequences(model, ids), sequences(plain(folders, "base"), ids))
    with pytest.raises(ValueError, match="not used by the model: \\['tenants'\\]"):
        sequences(model, ids, tenants="alice")


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_beams_and_returned_sequences_keep_their_prompts_tenant(folders, options):
    model, ids = served(folders), prompts(2)
    got = sequences(model, ids, tenants=["bob", "alice"], **options)
    want = [
        sequences(plain(folders, name), ids[i : i + 1], **options) for i, name in enumerate(("bob", "alice"))
    ]
    assert torch.equal(got, padded(want))


def test_what_is_saved_is_the_plain_base(folders, tmp_path):
    model = served(folders)
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "quantization_config" not in saved and not hasattr(model.config, "quantization_config")
    again, base = plain(tmp_path, "saved"), plain(folders, "base")
    assert type(again) is type(base)
    for (name, a), (other, b) in zip(again.state_dict().items(), base.state_dict().items(), strict=True):
        assert name == other and torch.equal(a.view(torch.int16), b.view(torch.int16))


def test_a_folder_with_a_package_is_a_model(folders, tmp_path):
    folder = xorz.save_folder(folders / "alice.xorz", tmp_path / "alice", str(folders / "base"))
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "adapter_config.json", "alice.xorz"]
    model, ids = xorz.from_pretrained(folder, mode="exact"), prompts(2)
    tuned = plain(folders, "alice")
    assert type(tuned).__name__ == type(model).__name__ and model.dtype is torch.bfloat16
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, tuned(ids).logits)
    assert torch.equal(sequences(model, ids), sequences(tuned, ids))
    assert torch.equal(sequences(model, ids, tenants=None), sequences(plain(folders, "base"), ids))
    with torch.inference_mode(), model.xorz.use(None):
        assert torch.equal(model(ids).logits, plain(folders, "base")(ids).logits)
    # What is not the model itself would not know whose it is.
    with pytest.raises(
        RuntimeError, match="no tenant is active here \\(only the model itself runs as 'alice'"
    ):
        model.model(ids)
    # A package alone says no base.
    with pytest.raises(ValueError, match=r"does not say what its base is .*pass base="):
        xorz.from_pretrained(folders / "alice.xorz")
    again = xorz.from_pretrained(
        folders / "alice.xorz", folders / "base", cls=AutoModelForCausalLM, mode="exact"
    )
    assert torch.equal(sequences(again, ids), sequences(tuned, ids))


def test_pipelines_take_a_tenant_and_run_inside_of_use(folders):
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(models.VOCABULARY)}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="w0", unk_token="w0", eos_token="w1")
    options = {"max_new_tokens": 5, "do_sample": False}
    model, text = served(folders), ["w5 w9 w17 w3", "w4 w8 w44 w2"]
    ours = pipeline("text-generation", model=model, tokenizer=tokenizer)
    for name in ("alice", "bob"):
        want = pipeline("text-generation", model=plain(folders, name), tokenizer=tokenizer)(text, **options)
        assert ours(text, tenants=name, **options) == want
        with model.xorz.use(name):
            assert ours(text, **options) == want


def test_dtype_and_device_map_work_or_say_why_not(folders):
    config = XorzConfig(tenants={"alice": folders / "alice.xorz"})
    for options in (
        {"dtype": "auto"},
        {"device_map": "cpu"},
        {"device_map": {"": "cpu"}},
        {"dtype": torch.bfloat16},
    ):
        model = AutoModelForCausalLM.from_pretrained(folders / "base", quantization_config=config, **options)
        assert model.xorz.names() == ["alice"] and model.dtype is torch.bfloat16
    for place, why in (
        ("cuda:0", "on 'cuda:0', whose memory is taken for tenants at once: .* budget"),
        ({"": 0}, "on '0', whose memory is taken"),
        ({"model": "cpu", "lm_head": "disk"}, "on 'disk', but xorz serves models whole on the CPU, or"),
        ({"model": "cpu", "lm_head": 1}, "on '1', but xorz serves models whole on the CPU, or"),
        ("mps", "on 'mps', but xorz"),
    ):
        with pytest.raises(ValueError, match=f"device_map places something {why}"):
            AutoModelForCausalLM.from_pretrained(
                folders / "base", quantization_config=config, device_map=place
            )
    # Another dtype than the package's are other words, which their digests show.
    with pytest.raises(ValueError, match=r"lm_head|embed_tokens|layers"):
        AutoModelForCausalLM.from_pretrained(
            folders / "base", quantization_config=config, dtype=torch.float32
        )


def test_trust_is_as_strict_here_as_where_a_model_is_attached(folders, tmp_path):
    trusted, other = tmp_path / "alice.xorz", folders / "alice.xorz"
    xorz.pack(folders / "base", folders / "alice", trusted, trust="sha256")
    config = XorzConfig(tenants={"alice": trusted}, trust="sha256")
    written = json.loads(config.to_json_string(use_diff=False))
    assert written["trust"] == "sha256"
    for given in (config, written):
        model = AutoModelForCausalLM.from_pretrained(folders / "base", quantization_config=given)
        assert model.xorz.names() == ["alice"] and model.xorz.trust == "sha256"
        # It holds for those that come later.
        with pytest.raises(ValueError, match="--trust sha256"):
            model.xorz.load("other", other)
    with pytest.raises(ValueError, match="--trust sha256"):
        AutoModelForCausalLM.from_pretrained(
            folders / "base", quantization_config=XorzConfig(tenants={"alice": other}, trust="sha256")
        )
    assert xorz.from_pretrained(trusted, folders / "base", trust="sha256").xorz.trust == "sha256"
    with pytest.raises(ValueError, match="--trust sha256"):
        xorz.from_pretrained(other, folders / "base", trust="sha256")
    with pytest.raises(ValueError, match='trust must be "digest" or "sha256", but is \'md5\''):
        XorzConfig(trust="md5")


def test_a_config_says_what_is_wrong_with_it(folders, tmp_path):
    with pytest.raises(TypeError, match="no option 'tenant'"):
        XorzConfig(tenant={})
    with pytest.raises(TypeError, match="tenants must be a dict"):
        XorzConfig(tenants=["alice.xorz"])
    with pytest.raises(ValueError, match="default is 'carol', but no tenant is called so; loaded: 'alice'"):
        AutoModelForCausalLM.from_pretrained(
            folders / "base",
            quantization_config=XorzConfig(tenants={"alice": folders / "alice.xorz"}, default="carol"),
        )
    with pytest.raises(FileNotFoundError):
        AutoModelForCausalLM.from_pretrained(
            folders / "base", quantization_config=XorzConfig(tenants={"alice": tmp_path / "none.xorz"})
        )
    # As a dict, as configs are written.
    written = json.loads(XorzConfig(tenants={"alice": folders / "alice.xorz"}).to_json_string(use_diff=False))
    model = AutoModelForCausalLM.from_pretrained(folders / "base", quantization_config=written)
    assert model.xorz.names() == ["alice"]
    # Another base: named by tensor and digests, and nothing stays attached.
    other = models.MODELS["llama"]().bfloat16()
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="digest"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "other", quantization_config=XorzConfig(tenants={"alice": folders / "alice.xorz"})
        )


def test_models_of_other_heads_are_found_by_their_architecture(tmp_path):
    torch.manual_seed(0)
    base = models.MODELS["bert"]().eval()
    base.save_pretrained(tmp_path / "base")
    tuned = {
        n: w + 0.01 * torch.randn_like(w) if w.is_floating_point() else w
        for n, w in base.state_dict().items()
    }
    base.load_state_dict(tuned)
    base.save_pretrained(tmp_path / "tuned")
    xorz.pack(tmp_path / "base", tmp_path / "tuned", tmp_path / "carol.xorz")
    model = xorz.from_pretrained(tmp_path / "carol.xorz", str(tmp_path / "base"), mode="exact")
    want, ids = AutoModelForMaskedLM.from_pretrained(tmp_path / "tuned"), prompts(2)
    assert type(want).__name__ == type(model).__name__ == "BertForMaskedLM"
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, want(ids).logits)


def test_a_trainer_publishes_versions_that_are_the_models_it_had(tmp_path):
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(1)
    model = models.MODELS["llama"]()
    base = {n: w.clone() for n, w in model.state_dict().items()}
    run = xorz.Versions(base, tmp_path / "run")
    rows = [{"input_ids": row, "labels": row} for row in prompts(12, 8)]
    seen = {}

    class Keep(xorz.PublishVersions.__base__):
        """The weights after each step, kept whole by another callback."""

        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen[state.global_step] = {n: w.detach().clone() for n, w in model.state_dict().items()}

    args = TrainingArguments(
        tmp_path / "out", max_steps=5, per_device_train_batch_size=2, report_to=[], save_strategy="no",
        learning_rate=1e-3, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    callbacks = [Keep(), xorz.PublishVersions(run, every=2)]
    Trainer(model, args, train_dataset=rows, callbacks=callbacks).train()
    assert run.head == 3
    for number, step in enumerate((2, 4, 5), 1):
        got = run.state_dict(number)
        assert got.keys() == seen[step].keys()
        for name, tensor in got.items():
            assert torch.equal(tensor.view(torch.int32), seen[step][name].view(torch.int32)), (number, name)
    assert not torch.equal(seen[2]["lm_head.weight"], seen[4]["lm_head.weight"])
    for every in (0, True, "2"):
        with pytest.raises(ValueError, match="every must be"):
            xorz.PublishVersions(run, every=every)


def test_xorz_itself_needs_none_of_it():
    code = "import sys, xorz; print([m for m in ('transformers', 'huggingface_hub', 'fsspec') if m in sys.modules])"
    # torch itself may import some of them; what xorz adds is nothing.
    plain = code.replace(", xorz", ", torch")
    got = [
        subprocess.run([sys.executable, "-c", c], capture_output=True, text=True).stdout
        for c in (code, plain)
    ]
    assert got[0] == got[1] != ""
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        xorz.nothing  # noqa: B018


def test_an_older_transformers_is_refused_by_its_version(monkeypatch):
    monkeypatch.setattr(transformers, "__version__", "4.57.6")
    monkeypatch.delitem(sys.modules, "xorz.pretrained", raising=False)
    with pytest.raises(ImportError, match=r"need transformers 5 or newer, but this is 4\.57\.6"):
        importlib.import_module("xorz.pretrained")


def test_the_config_that_a_model_was_loaded_with_is_the_bases(folders):
    model, base = served(folders), AutoConfig.from_pretrained(folders / "base")
    ours, theirs = model.config.to_dict(), base.to_dict()
    assert {k for k in ours if ours[k] != theirs.get(k)} <= {"_name_or_path", "dtype", "_attn_implementation"}
