"""Promise: what the README shows first comes early and runs as it stands, from two folders to answers; it stays short."""

import pathlib
import re
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = pathlib.Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()
PROMPT = "The moon is"
WORDS = ["<pad>", *PROMPT.split(), *(f"word{i}" for i in range(36))]


def save_folder(folder: pathlib.Path, change: float) -> LlamaForCausalLM:
    """A tiny language model with its tokenizer, as transformers saves them; `change` is added to some of its weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    # No word ends a text, so that every answer has its full length.
    names = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), **sizes, **names)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += change * torch.randn(weight.shape) * (torch.rand(weight.shape) < 0.2)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(folder)
    return model


@pytest.fixture
def block() -> str:
    """The first Python that the README shows."""
    found = re.search(r"^```python\n(.*?)^```", TEXT, re.S | re.M)
    assert found, "no Python in the README"
    assert TEXT[: found.start()].count("\n") < 30
    return found[1]


def test_the_first_code_runs_from_two_folders_to_answers(block, tmp_path):
    plain = {
        name: save_folder(tmp_path / name, change) for name, change in {"base": 0.0, "alice": 0.5}.items()
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", block], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    ids = torch.tensor([[1, 2, 3]])
    wanted = [plain[name].generate(ids, max_new_tokens=20)[0].tolist() for name in ("alice", "base")]
    assert wanted[0] != wanted[1]
    answers = [" ".join(WORDS[i] for i in row) for row in wanted]
    assert done.stdout.strip().splitlines()[-1] == repr(answers)


def test_it_is_short():
    assert TEXT.count("\n") <= 150


def test_paths_that_the_readme_links_exist():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT)
    assert len(links) > 3
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing
