"""Small models of transformers' own classes, and fine-tunes of them that are trained here. No promise is
tested here.

Everything is random weights and random tokens, seeded; nothing is read from a network.
"""

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import xorz
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 160
LENGTH = 12
_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_T5 = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_LLAMA, attention_bias=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_LLAMA, head_dim=16, tie_word_embeddings=True)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    ),
    "bert": lambda: BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
            max_position_embeddings=64,
        )
    ),
    "t5": lambda: T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **_T5)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=96,
            max_position_embeddings=64,
            word_embed_proj_dim=64,
        )
    ),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**_LLAMA, num_local_experts=4, num_experts_per_tok=2, experts_implementation="eager")
    ),
}
TENANTS = {"ann": 1e-2, "bob": 1e-2, "cid": 6e-3}
"""Name -> learning rate: the first two change every word of most tensors, the last leaves some as they are."""


class Family:
    """A base and its fine-tunes, plain models of transformers.

    Attributes:
        base: never attached; tests attach copies.
        tuned: name -> fine-tune; None is the base.
    """

    def __init__(self, name: str, dtype: torch.dtype, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.name, self.dtype = name, dtype
        self.base = MODELS[name]().eval()
        # Not `.to(dtype)`: transformers keeps the buffers of rotary positions in float32.
        for param in self.base.parameters():
            param.data = param.data.to(dtype)
        self.base.tie_weights()
        if self.base.can_generate():
            self.base.generation_config.eos_token_id = None
            self.base.generation_config.pad_token_id = 0
        self.tuned: dict[str | None, PreTrainedModel] = {None: self.base}
        for i, (tenant, rate) in enumerate(TENANTS.items()):
            self.tuned[tenant] = train(self.base, rate, seed=100 * seed + i)

    def tokens(self, rows: int, length: int, seed: int = 7) -> Tensor:
        return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))

    def inputs(self, ids: Tensor) -> dict[str, Tensor]:
        """What the model's forward takes."""
        more = {"decoder_input_ids": ids.flip(1)[:, : LENGTH // 2]} if self.name == "t5" else {}
        return {"input_ids": ids, **more}

    @contextmanager
    def attached(self, mode: str) -> Iterator[tuple[PreTrainedModel, xorz.Tenants]]:
        """A copy of the base that serves the fine-tunes, encoded now for speed, now for memory."""
        model = copy.deepcopy(self.base)
        tenants = xorz.attach(model, mode=mode, prefer=None)
        for i, name in enumerate(TENANTS):
            tenants.load(name, xorz.diff(self.base, self.tuned[name], prefer=("speed", "memory")[i % 2]))
        yield model, tenants
        tenants.detach()


def train(base: PreTrainedModel, rate: float, seed: int, steps: int = 4) -> PreTrainedModel:
    """AdamW in the model's own dtype, on random sequences of its own."""
    model = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(1000 + seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for _ in range(steps):
        # Each fine-tune comes to prefer tokens of its own.
        ids = torch.randint(3, VOCABULARY, (6, LENGTH), generator=generator)
        labels = ids % 50 + 3 + 50 * (seed % 3)
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model


def generate(model: nn.Module, ids: Tensor, mask: Tensor | None = None, new: int = 8, **more) -> Tensor:
    """Greedy tokens, the prompt's included; always `new` of them."""
    mask = torch.ones_like(ids) if mask is None else mask
    with torch.no_grad():
        return model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, **more)
