"""Promise: what `benches/changes.py` says that a fine-tune changes is what it changes, to the bit, by every
recipe; and docs/changes.md is a table that it printed. On a tiny model; the real one takes minutes (`make
changes`)."""

import copy
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benches"))
import changes  # noqa: E402
import recipes  # noqa: E402
from recipes import Recipe  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    tokens = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **tokens)).bfloat16()


TEXTS = [torch.randint(2, 64, (32,), generator=torch.Generator().manual_seed(i)) for i in range(3)]


def share(old, new):
    words = sum(t.numel() for t in old.values())
    return (
        sum(int((old[k].view(BITS[old[k].dtype]) != new[k].view(BITS[new[k].dtype])).sum()) for k in old)
        / words
    )


def changed(base, *recipe):
    """What the last row of a recipe says."""
    return changes.measure(base, Recipe(*recipe), TEXTS)[-1]["changed"]


@pytest.mark.parametrize("task", ["sft", "dpo", "rl"])
@pytest.mark.parametrize("kept", ["bf16", "fp32"])
def test_shares_are_those_of_the_bits_and_nothing_else_is_compared(base, task, kept):
    recipe = Recipe(task, "adamw", kept, 1e-4, (1, 3))
    found = {(what, step): (a, b) for what, step, a, b in recipes.run(base, recipe, TEXTS)}
    assert set(found) == {("base to tune", 1), ("base to tune", 3)} | (
        {("last sync", 3)} if task == "rl" else set()
    )
    start, after = found["base to tune", 3]
    assert {t.dtype for t in after.values()} == {torch.bfloat16 if kept == "bf16" else torch.float32}
    # The base is the model that was given, to the bit, and is not trained.
    for name, tensor in base.named_parameters():
        assert torch.equal(start[name].bfloat16().view(torch.int16), tensor.detach().view(torch.int16))
    for row in changes.measure(base, recipe, TEXTS):
        if row["steps"] == 3 and row["what"] == "base to tune":
            dtype = changes.DTYPES[row["dtype"]]
            old, new = ({k: v.to(dtype) for k, v in side.items()} for side in (start, after))
            assert row["changed"] == pytest.approx(share(old, new)) and 0 < row["changed"] <= 1
            assert all(0 < row[bits] for bits in ("package", "memory", "speed"))


def test_a_sync_is_the_last_step_alone(base):
    found = {w: (a, b) for w, _, a, b in recipes.run(base, Recipe("rl", "adamw", "fp32", 1e-4, (3,)), TEXTS)}
    assert not share(found["last sync"][1], found["base to tune"][1])
    assert share(found["last sync"][0], found["base to tune"][0]) > 0


def test_larger_steps_change_more_and_masters_keep_what_bf16_drops(base):
    small, large = (changed(base, "sft", "adamw", "bf16", lr, (3,)) for lr in (1e-6, 1e-4))
    assert small < large / 5
    pure = changed(base, "sft", "adamw", "bf16", 1e-6, (6,))
    rows = changes.measure(base, Recipe("sft", "adamw", "fp32", 1e-6, (6,)), TEXTS)
    by_dtype = {row["dtype"]: row["changed"] for row in rows}
    assert pure < by_dtype["bf16"] < by_dtype["f16"] < by_dtype["f32"] and by_dtype["f32"] > 0.9


def test_no_learning_rate_changes_nothing(base):
    for kept in ("bf16", "fp32"):
        assert changed(base, "sft", "adamw", kept, 0.0, (2,)) == 0


def test_lora_changes_the_layers_and_nothing_beside_them(base):
    plain = copy.deepcopy(base)
    ((_, _, old, new),) = recipes.run(base, Recipe("sft", "adamw", "lora", 1e-2, (2,)), TEXTS)
    assert old.keys() == {name for name, _ in plain.named_parameters()}
    for name in old:
        moved = not torch.equal(old[name], new[name])
        assert moved == ("_proj" in name), name
    assert new["model.layers.0.mlp.up_proj.weight"].shape == (48, 32)
    low_rank = (
        new["model.layers.0.self_attn.q_proj.weight"] - old["model.layers.0.self_attn.q_proj.weight"]
    ).double()
    assert torch.linalg.matrix_rank(low_rank, rtol=1e-4) <= 16


def test_runs_that_are_kept_are_not_repeated(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(changes, "QUICK", [Recipe("sft", "sgd", "bf16", 1.0, (2,))])
    monkeypatch.setattr(changes, "load", lambda folder: (base, None))
    monkeypatch.setattr(changes, "texts_of", lambda tokenizer, count: TEXTS)
    monkeypatch.setattr(sys, "argv", ["changes.py", "--quick", "--json", str(tmp_path / "rows.json")])
    changes.main()
    first = capsys.readouterr().out
    (kept,) = json.loads((tmp_path / "rows.json").read_text()).values()
    assert changes.line(kept["rows"][0]) in first
    monkeypatch.setattr(changes, "measure", lambda *_: pytest.fail("trained again"))
    changes.main()
    assert capsys.readouterr().out == first


def test_the_document_shows_lines_of_this_table_for_recipes_of_this_program():
    text = (ROOT / "docs" / "changes.md").read_text()
    head = changes.HEADER
    assert head in text
    lines = text[text.index(head) :].split("\n\n")[0].splitlines()[2:]
    names = {
        "SFT": "sft",
        "DPO": "dpo",
        "RL": "rl",
        "AdamW": "adamw",
        "SGD": "sgd",
        "LoRA, fp32, merged": "lora",
    }
    known = {(r.task, r.optimizer, r.kept, r.lr, step) for r in changes.FULL for step in r.steps}
    shown = set()
    for line in lines:
        cells = [names.get(cell, cell) for cell in re.split(r" *\| *", line.strip("| "))]
        assert len(cells) == head.count("|") - 1, line
        shown.add((*cells[:3], float(cells[3]), int(cells[4])))
    assert shown == known
