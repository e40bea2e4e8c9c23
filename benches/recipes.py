"""Short fine-tunes of a causal language model by the recipes people use, for ``changes.py``: what each writes into the weights.

A `Recipe` says what is optimised, by what, and in which dtype the weights are kept:

  bf16     weights, gradients and the optimizer's moments are bf16, and so is every update of them ("pure bf16")
  fp32     fp32 master weights that start at the bf16 base; bf16 or f16 is what they are cast to for serving

Forward and backward are fp32 in both, on a copy of the weights, since few CPUs have fast bf16 products; what is kept is not
touched by that, but gradients are less noisy than in bf16. Gradients are clipped to a norm of 1, weight decay is 0, and the
learning rate is constant: the numbers of steps of one run can be compared.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

Snapshot = tuple[str, int, dict[str, Tensor], dict[str, Tensor]]
"""What is compared, the number of steps, the state_dict before, and the one after."""

PROMPT, ANSWER, GROUP = 16, 16, 4


@dataclass(frozen=True)
class Recipe:
    """One run; `steps` are the moments at which its weights are looked at, the last one its end."""

    task: str  # sft, dpo, rl
    optimizer: str  # adamw, sgd
    kept: str  # bf16, fp32, lora
    lr: float
    steps: tuple[int, ...]

    @property
    def name(self) -> str:
        """A word for tables and progress."""
        return f"{self.task} {self.optimizer} {self.kept} lr {self.lr:g}"


class LowRank(nn.Module):
    """LoRA (Hu et al., 2021): W + (alpha / r) B A, with B zero at first; r = 16, alpha = 32."""

    def __init__(self, weight: Tensor, rank: int = 16, alpha: float = 32.0) -> None:
        """Factors for `weight` [n, k]."""
        super().__init__()
        self.scale = alpha / rank
        self.down = nn.Parameter(torch.randn(rank, weight.size(1)) / weight.size(1) ** 0.5)
        self.up = nn.Parameter(torch.zeros(weight.size(0), rank))

    def forward(self, weight: Tensor) -> Tensor:
        """The merged weight."""
        return weight + self.scale * (self.up @ self.down)


class Run:
    """One fine-tune in progress: the fp32 model that computes, and the parameters that are kept."""

    def __init__(self, base: nn.Module, recipe: Recipe) -> None:
        """`base` holds bf16 words; it is copied."""
        self.recipe = recipe
        self.model = copy.deepcopy(base).float().train()
        # What DPO compares with: one pass more a step is less than keeping everybody's answers.
        self.reference = copy.deepcopy(base).float().eval() if recipe.task == "dpo" else None
        if recipe.kept == "lora":
            self.model.requires_grad_(False)
            layers = [m for m in self.model.modules() if isinstance(m, nn.Linear)]
            # The head is tied to the embedding in small models; LoRA is put on the layers' own projections.
            self.lora = [m for m in layers if m is not self.model.get_output_embeddings()]
            for layer in self.lora:
                parametrize.register_parametrization(layer, "weight", LowRank(layer.weight))
        self.computing = [p for p in self.model.parameters() if p.requires_grad]
        self.kept = self.computing
        if recipe.kept == "bf16":
            self.kept = [nn.Parameter(p.detach().bfloat16()) for p in self.computing]
        if recipe.optimizer == "adamw":
            self.optimizer: Any = torch.optim.AdamW(self.kept, lr=recipe.lr, weight_decay=0.0, fused=True)
        else:
            self.optimizer = torch.optim.SGD(self.kept, lr=recipe.lr, momentum=0.9)

    def step(self, loss: Tensor) -> None:
        """Backward, clip, update, and bring the kept words to the model that computes."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.computing, 1.0)
        if self.kept is not self.computing:
            for kept, own in zip(self.kept, self.computing, strict=True):
                kept.grad, own.grad = own.grad.bfloat16(), None
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.kept is not self.computing:
            with torch.no_grad():
                for kept, own in zip(self.kept, self.computing, strict=True):
                    own.copy_(kept)

    def weights(self) -> dict[str, Tensor]:
        """A copy of the state_dict in the dtype that is kept, by the plain model's names; tied tensors once."""
        dtype = torch.bfloat16 if self.recipe.kept == "bf16" else torch.float32
        out = {}
        for name, parameter in self.model.named_parameters():
            place, _, rest = name.partition(".parametrizations.weight.")
            if rest == "original":
                merged = self.model.get_submodule(place).weight
                out[f"{place}.weight"] = merged.detach().to(dtype)
            elif not rest:
                out[name] = parameter.detach().to(dtype, copy=True)
        return out


def cross_entropy(model: nn.Module, ids: Tensor) -> Tensor:
    """Of the next token; ids [rows, tokens]."""
    logits = model(input_ids=ids).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def log_probability(model: nn.Module, ids: Tensor, start: int) -> Tensor:
    """Of the tokens from `start` on, summed, one number a row."""
    logits = model(input_ids=ids).logits[:, start - 1 : -1].log_softmax(-1)
    return logits.gather(-1, ids[:, start:, None]).sum((1, 2))


def supervised(run: Run, batches: list[Tensor]) -> Iterator[None]:
    """SFT: one batch a step."""
    for ids in batches:
        run.step(cross_entropy(run.model, ids))
        yield


def preferences(run: Run, batches: list[Tensor]) -> Iterator[None]:
    """DPO (Rafailov et al., 2023), beta 0.1: a text's own continuation is preferred to that of the next text."""
    beta, pairs = 0.1, []
    for ids, other in zip(batches, batches[1:] + batches[:1], strict=True):
        ids, other = ids[:1], other[:1]
        pairs.append(torch.cat([ids, torch.cat([ids[:, :PROMPT], other[:, PROMPT:]], 1)]))
    for both in pairs:
        with torch.no_grad():
            reference = log_probability(run.reference, both, PROMPT)
        margin = log_probability(run.model, both, PROMPT) - reference
        run.step(-F.logsigmoid(beta * (margin[0] - margin[1])))
        yield


def reinforced(run: Run, batches: list[Tensor]) -> Iterator[None]:
    """RL in the manner of GRPO (Shao et al., 2024): samples of a group against their own mean, one update a group.

    The reward is a toy, the share of different tokens: what is looked at is how small-lr updates land in the weights.
    """
    for ids in batches:
        prompts = ids[:1, :PROMPT].expand(GROUP, -1)
        with torch.no_grad():
            sampled = run.model.generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                max_new_tokens=ANSWER,
                min_new_tokens=ANSWER,
                pad_token_id=0,
            )
        reward = torch.tensor([len(set(row.tolist())) / ANSWER for row in sampled[:, PROMPT:]])
        advantage = (reward - reward.mean()) / (reward.std() + 1e-4)
        run.step(-(advantage * log_probability(run.model, sampled, PROMPT)).mean() / ANSWER)
        yield


TASKS = {"sft": supervised, "dpo": preferences, "rl": reinforced}


def run(base: nn.Module, recipe: Recipe, texts: list[Tensor]) -> Iterator[Snapshot]:
    """Train, and give what there is to compare: base against each snapshot, and for RL the last step's own change.

    Args:
        base: a causal language model of transformers whose weights are bf16 words.
        recipe: what to do.
        texts: token ids, [tokens] each; step i takes the i-th, beginning again at the end.
    """
    torch.manual_seed(0)
    batches = [texts[i % len(texts)][None] for i in range(recipe.steps[-1])]
    going = Run(base, recipe)
    start = before = going.weights()
    for step, _ in enumerate(TASKS[recipe.task](going, batches), 1):
        last = step == recipe.steps[-1]
        if step in recipe.steps:
            after = going.weights()
            yield "base to tune", step, start, after
            if recipe.task == "rl" and last:
                yield "last sync", step, before, after
        if recipe.task == "rl" and step == recipe.steps[-1] - 1:
            before = going.weights()
