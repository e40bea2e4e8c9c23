"""What a fine-tune changes, bit by bit, by recipe, learning rate, steps and dtype: ``make changes``, or ``--help``.

Fine-tunes a real language model (SmolLM2-135M-Instruct, as `make test-smollm` fetches it; or any folder of transformers) on
texts that every Python has (`pydoc_data.topics`), compares the words of all weights with the base's, and packs them. Columns:

  changed    share of the words that are not the base's, to the bit
  package    bits per word of the package on disk (`xorz.pack`)
  memory     bits per word of the resident deltas, `prefer="memory"`; speed: `prefer="speed"`

Minutes on two cores; `--quick` takes a fifth of it. docs/changes.md is what it printed, and says what it means.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import pydoc_data.topics
import sys
import tempfile
import time
from typing import Any

os.environ.setdefault("XORZ_CACHE_DIR", "")

import torch
import xorz
from recipes import Recipe, run
from torch import Tensor, nn

TOKENS = 64
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}

FULL = [
    Recipe("sft", "adamw", "bf16", 1e-5, (1, 5, 10, 20)),
    Recipe("sft", "adamw", "fp32", 1e-5, (1, 5, 10, 20)),
    Recipe("sft", "adamw", "bf16", 1e-6, (10,)),
    Recipe("sft", "adamw", "fp32", 1e-6, (10,)),
    Recipe("sft", "adamw", "bf16", 1e-4, (10,)),
    Recipe("sft", "adamw", "fp32", 1e-4, (10,)),
    Recipe("rl", "adamw", "bf16", 1e-6, (8,)),
    Recipe("rl", "adamw", "fp32", 1e-6, (8,)),
    Recipe("dpo", "adamw", "bf16", 1e-6, (10,)),
    Recipe("dpo", "adamw", "fp32", 1e-6, (10,)),
    Recipe("sft", "adamw", "lora", 2e-4, (10, 20)),
    Recipe("sft", "sgd", "bf16", 1e-1, (10,)),
    Recipe("sft", "sgd", "fp32", 1e-1, (10,)),
    Recipe("sft", "adamw", "bf16", 5e-6, (10,)),
    Recipe("sft", "adamw", "bf16", 2e-5, (10,)),
    Recipe("sft", "adamw", "bf16", 5e-5, (10,)),
    Recipe("sft", "adamw", "fp32", 2e-5, (10,)),
]
QUICK = [
    Recipe("sft", "adamw", "bf16", 1e-5, (5,)),
    Recipe("sft", "adamw", "fp32", 1e-5, (5,)),
    Recipe("rl", "adamw", "bf16", 1e-6, (3,)),
    Recipe("dpo", "adamw", "fp32", 1e-6, (3,)),
    Recipe("sft", "adamw", "lora", 2e-4, (5,)),
    Recipe("sft", "sgd", "bf16", 1e-1, (5,)),
]


def compare(base: dict[str, Tensor], tuned: dict[str, Tensor]) -> dict[str, float]:
    """Changed share and bits per word of two state_dicts of one dtype, by xorz's own tools."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "tune.xorz"
        totals = xorz.pack(base, tuned, path)
        words = totals["words"]
        out = {"changed": totals["changed"] / words, "package": 8 * totals["package_bytes"] / words}
        for prefer in ("memory", "speed"):
            out[prefer] = (
                8 * sum(d.numel() for d in xorz.load_deltas(base, path, prefer=prefer).values()) / words
            )
    return out


def views(recipe: Recipe, last: bool) -> list[str]:
    """The dtypes to look at: what was trained, and what fp32 weights are cast to; the large ones at the end only."""
    if recipe.kept == "bf16":
        return ["bf16"]
    return list(DTYPES) if last and recipe.task == "sft" and recipe.optimizer == "adamw" else ["bf16"]


def measure(base: nn.Module, recipe: Recipe, texts: list[Tensor]) -> list[dict[str, Any]]:
    """Rows of the table: every snapshot of one run in every dtype."""
    rows = []
    for what, step, before, after in run(base, recipe, texts):
        for name in views(recipe, step == recipe.steps[-1]):
            dtype = DTYPES[name]
            old, new = ({k: v.to(dtype) for k, v in side.items()} for side in (before, after))
            row = {"task": recipe.task, "optimizer": recipe.optimizer, "kept": recipe.kept, "lr": recipe.lr}
            rows.append(row | {"steps": step, "what": what, "dtype": name} | compare(old, new))
    return rows


HEADER = "| run | optimizer | weights kept in | lr | steps | compared | dtype | changed % | package | memory | speed |"


def line(row: dict[str, Any]) -> str:
    """One row as Markdown."""
    kept = {"lora": "LoRA, fp32, merged"}.get(row["kept"], row["kept"])
    optimizer = {"adamw": "AdamW", "sgd": "SGD"}[row["optimizer"]]
    return (
        f"| {row['task'].upper()} | {optimizer} | {kept} | {row['lr']:.0e} | {row['steps']} | {row['what']} | {row['dtype']} "
        f"| {100 * row['changed']:.2f} | {row['package']:.3f} | {row['memory']:.3f} | {row['speed']:.3f} |"
    )


def texts_of(tokenizer: Any, count: int, tokens: int = TOKENS) -> list[Tensor]:
    """Token ids of the beginnings of Python's help topics."""
    topics = sorted(pydoc_data.topics.topics.items())
    found = (tokenizer(text, return_tensors="pt").input_ids[0, :tokens] for _, text in topics)
    return [ids for ids in found if len(ids) == tokens][:count]


def load(folder: str | None) -> tuple[nn.Module, Any]:
    """The model in bf16 and its tokenizer."""
    if folder is None:
        sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests" / "smollm"))
        import smollm

        return smollm.plain(), smollm.tokenizer()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), AutoTokenizer.from_pretrained(
        folder
    )


def main() -> None:
    """Run the recipes and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder of a causal language model (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--quick", action="store_true", help="a few recipes, few steps")
    parser.add_argument(
        "--json", type=pathlib.Path, help="write the rows here; runs that are there are not repeated"
    )
    args = parser.parse_args()
    base, tokenizer = load(args.model)
    recipes = QUICK if args.quick else FULL
    texts = texts_of(tokenizer, max(r.steps[-1] for r in recipes))
    words = sum(p.numel() for p in base.parameters())
    print(
        f"{words / 1e6:.1f} M weights, {len(texts)} texts of {TOKENS} tokens, torch {torch.__version__}\n\n{HEADER}"
    )
    print("|" + "---|" * (HEADER.count("|") - 1), flush=True)
    done: dict[str, Any] = {}
    if args.json and args.json.exists():
        done = json.loads(args.json.read_text())
    for recipe in recipes:
        key = f"{recipe.name} steps {recipe.steps}"
        if key not in done:
            start = time.perf_counter()
            done[key] = {"rows": measure(base, recipe, texts), "seconds": time.perf_counter() - start}
            if args.json:
                args.json.write_text(json.dumps(done, indent=1) + "\n")
        for row in done[key]["rows"]:
            print(line(row), flush=True)


if __name__ == "__main__":
    main()
