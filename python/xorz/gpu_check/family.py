"""A small random language model, its full fine-tunes and their packages, and what each says, computed in float64.

Needs transformers, which is there wherever vLLM is.
"""

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import pack

BASE = "base"
TUNES = ("sparse", "all", "vectors")
"""What the fine-tunes have changed: 1 % of every matrix; nearly every word; the table of embeddings and the head, but no other
matrix. Of norms and biases all have changed half.
"""

_EVERY = (0.01, 1.0, 0.3)
"""Of `TUNES`, the share of the words that a matrix which is changed has changed."""

_FAR = (3.0, 0.25, 1.0)
"""Of `TUNES`, how far those words move, in deviations of their matrix."""

_GAINS = {"q_proj": 1.5, "k_proj": 1.5, "o_proj": 2.0, "down_proj": 2.0, "lm_head": 2.5, "gate": 5.0}
"""How much wider than its input a product's result is, 1 where nothing is said: attention looks at some tokens and not at all
alike, each layer adds as much as the one before, and what follows is no draw. So each tensor counts, and can be tried. Routers
weigh few experts for much.
"""

_EXPERTS, _CHOSEN = 4, 3
"""Of a mixture. All but one are chosen, so that where rounding has a router choose another one, both weigh little: a token that
goes elsewhere would be further off than any rounding, in plain engines, too, and nothing else would be noticed.
"""


def sizes(quick: bool) -> dict[str, Any]:
    """Of the models: heads that vLLM's attention takes on a GPU, and so wide that matrices are many tiles."""
    small = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 2, "vocab_size": 1003}
    large = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "vocab_size": 2003}
    return (small if quick else large) | {
        "max_position_embeddings": 2048,
        "num_key_value_heads": 2,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def _config(kind: str, quick: bool) -> Any:
    from transformers import LlamaConfig, MixtralConfig, Qwen3Config

    given = sizes(quick)
    width = given["hidden_size"]
    if kind == "qwen3":
        # Norms of heads, and a head of its own.
        heads = {"num_attention_heads": max(2, width // 128), "head_dim": 128}
        return Qwen3Config(**given, **heads, tie_word_embeddings=False)
    if kind == "mixtral":
        heads = {"num_attention_heads": width // 64, "head_dim": 64, "tie_word_embeddings": False}
        given |= {"intermediate_size": given["intermediate_size"] // 2}
        return MixtralConfig(**given, **heads, num_local_experts=_EXPERTS, num_experts_per_tok=_CHOSEN)
    # Biases, and the table of embeddings is the head, too.
    return LlamaConfig(
        **given, num_attention_heads=width // 64, head_dim=64, attention_bias=True, tie_word_embeddings=True
    )


def _made(config: Any, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        *_, of, last = name.split(".")
        if parameter.dim() == 1:
            around = 1.5 if of in ("q_norm", "k_norm") else float(name.endswith("norm.weight"))
            parameter.copy_(around + 0.2 * torch.randn(parameter.shape, generator=generator))
        elif of == "embed_tokens":
            parameter.normal_(0, 0.1 if config.tie_word_embeddings else 1.0, generator=generator)
        else:
            # Of experts, which are stacked, the name comes last.
            gain = _GAINS.get(last if parameter.dim() == 3 else of, 1.0)
            deviation = gain / math.sqrt(parameter.shape[-1])
            parameter.normal_(0, deviation, generator=generator)
    model.to(torch.bfloat16).save_pretrained(folder)


def _moved(name: str, words: Tensor, tune: int, generator: torch.Generator) -> Tensor:
    if TUNES[tune] == "vectors" and words.dim() > 1 and not name.startswith(("model.embed", "lm_head")):
        return words
    wide = words.float()
    share, size = (0.5, 0.5) if words.dim() == 1 else (_EVERY[tune], _FAR[tune] * float(wide.std()))
    some = torch.rand(wide.shape, generator=generator) < share
    return (wide + size * some * torch.randn(wide.shape, generator=generator)).to(words.dtype)


def _said(model: nn.Module, tokens: list[int]) -> tuple[Tensor, Tensor]:
    """Of each token but the first, its log-probability and that of the likeliest one."""
    logits = model(torch.tensor([tokens])).logits[0, :-1].double().log_softmax(-1)
    return logits.gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0], logits.max(-1).values


class Family:
    """A base and its fine-tunes, as folders that engines read, with a package for each fine-tune.

    Attributes:
        folders: of whole models, by `BASE` and the names of `TUNES`.
        packages: by the names of `TUNES`.
        is_mixture: whether it has experts.
    """

    def __init__(self, kind: str, folder: Path, quick: bool) -> None:
        """Made in `folder` from fixed seeds; `kind` is qwen3, llama or mixtral."""
        from safetensors.torch import load_file, save_file
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.kind, self.folder, self.is_mixture = kind, folder, kind == "mixtral"
        self.vocabulary = sizes(quick)["vocab_size"]
        self.folders = {BASE: folder / BASE}
        self.packages: dict[str, Path] = {}
        self._models: dict[str, nn.Module] = {}
        self._known: dict[tuple[str, tuple[int, ...]], tuple[Tensor, Tensor]] = {}
        _made(_config(kind, quick), folder / BASE)
        words = load_file(folder / BASE / "model.safetensors")
        for tune, name in enumerate(TUNES):
            generator = torch.Generator().manual_seed(1 + tune)
            path = self.folders[name] = folder / name
            path.mkdir()
            shutil.copy(folder / BASE / "config.json", path)
            tuned = {key: _moved(key, value, tune, generator) for key, value in words.items()}
            save_file(tuned, path / "model.safetensors", metadata={"format": "pt"})
            self.packages[name] = self.packed(path, f"{name}.xorz")

    def packed(self, tuned: Path, name: str) -> Path:
        """The package of that name, of a fine-tune's folder."""
        out = self.folder / name
        pack(self.folders[BASE], tuned, out)
        return out

    def prompts(self, lengths: tuple[int, ...]) -> list[list[int]]:
        """Token ids, from a fixed seed."""
        generator = torch.Generator().manual_seed(9)
        return [torch.randint(2, self.vocabulary, (n,), generator=generator).tolist() for n in lengths]

    def exact(self, name: str, tokens: list[int]) -> tuple[Tensor, Tensor]:
        """Of each token but the first: its log-probability given those before it, and that of the likeliest one in its place.

        By transformers, on the CPU, every product in float64; norms and the softmax are in float32, as transformers has them.
        """
        key = name, tuple(tokens)
        if key not in self._known:
            self._known[key] = _said(self._model(name), tokens)
        return self._known[key]

    def left_out(self, name: str, tokens: list[int]) -> Iterator[tuple[str, Tensor]]:
        """By tensor that a fine-tune has changed, each expert's own: by how much `exact` is off if that alone is the base's."""
        model, base = self._model(name), dict(self._model(BASE).named_parameters())
        want, _ = self.exact(name, tokens)
        for tensor, parameter in model.named_parameters():
            is_stack = parameter.dim() == 3
            stacks = [t.data if is_stack else t.data[None] for t in (parameter, base[tensor])]
            for i, (own, its) in enumerate(zip(*stacks, strict=True)):
                if not torch.equal(own, its):
                    kept = own.clone()
                    own.copy_(its)
                    got, _ = _said(model, tokens)
                    own.copy_(kept)
                    yield f"{tensor}[{i}]" if is_stack else tensor, got - want

    def _model(self, name: str) -> nn.Module:
        from transformers import AutoModelForCausalLM

        if name not in self._models:
            # The other ways to run experts have no float64.
            more = {"experts_implementation": "eager"} if self.is_mixture else {}
            found = AutoModelForCausalLM.from_pretrained(self.folders[name], dtype=torch.float64, **more)
            self._models[name] = found.eval()
        return self._models[name]
