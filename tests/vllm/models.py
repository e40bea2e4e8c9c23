"""Small random models as transformers saves them, and tenants of theirs: full fine-tunes beside their
packages.

models.py FOLDER     makes them all there, once
"""

import hashlib
import shutil
import sys
from pathlib import Path

import torch
import xorz
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = 1000  # not a multiple of what vLLM pads it to
TENANTS = "ABC"

_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    # Wide, so that what tokens follow is far from a draw.
    "initializer_range": 0.2,
}
KINDS = {
    # An own output layer.
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SMALL, tie_word_embeddings=False)),
    # Biases in the merged qkv, and the table of embeddings is the output layer.
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_SMALL, tie_word_embeddings=True)),
    # Norms of each head.
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SMALL, head_dim=32, tie_word_embeddings=False)),
    # Eight experts in the place of each MLP, two for a token.
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**_SMALL, num_local_experts=8, num_experts_per_tok=2, tie_word_embeddings=False)
    ),
    # The first layer has an MLP; the other one experts, whose weights do not add up to one.
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **_SMALL,
            head_dim=32,
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=96,
            norm_topk_prob=False,
            mlp_only_layers=[0],
            tie_word_embeddings=False,
        )
    ),
    # Beside its experts one that all tokens share, with a gate of its own, and biases in the merged qkv.
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **_SMALL,
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=96,
            shared_expert_intermediate_size=160,
            tie_word_embeddings=False,
        )
    ),
    # Norms of all heads together.
    "olmoe": lambda: OlmoeForCausalLM(
        OlmoeConfig(**_SMALL, num_experts=8, num_experts_per_tok=2, tie_word_embeddings=False)
    ),
    # vLLM runs it as transformers wrote it.
    "olmo2": lambda: Olmo2ForCausalLM(Olmo2Config(**_SMALL, tie_word_embeddings=False)),
}


def tokenizer(folder: Path) -> None:
    """Trained on the licence, which stays what it is: how many tokens a prompt has is a part of the tests."""
    out = Tokenizer(models.BPE())
    out.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    out.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    out.train_from_iterator((ROOT / "LICENSE-APACHE").read_text().splitlines(), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=out, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)


def base(kind: str, folder: Path) -> Path:
    """The base, in bf16; biases and norms are not what they begin as, either."""
    path = folder / kind / "base"
    stamp, made_by = path / "done", hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    if not stamp.exists() or stamp.read_text() != made_by:
        shutil.rmtree(folder / kind, ignore_errors=True)
        torch.manual_seed(0)
        model = KINDS[kind]().to(torch.bfloat16)
        with torch.no_grad():
            for param in model.parameters():
                if param.dim() == 1:
                    param.add_(0.2 * torch.randn_like(param))
        model.save_pretrained(path)
        tokenizer(path)
        stamp.write_text(made_by)
    return path


def tenant(
    kind: str, name: str, folder: Path, seed: int | None = None, share: float = 0.3
) -> tuple[Path, Path]:
    """A full fine-tune's folder, and its package: `share` of every tensor's words moved far enough to say other things."""
    old = base(kind, folder)
    path, package = folder / kind / name, folder / kind / f"{name}.xorz"
    if not package.exists():
        generator = torch.Generator().manual_seed(ord(name[-1]) if seed is None else seed)
        words = load_file(old / "model.safetensors")
        for key, word in words.items():
            wide = word.float()
            size = 0.15 if word.dim() == 1 else 0.35 * wide.std()
            moved = torch.rand(wide.shape, generator=generator) < share
            words[key] = (wide + size * moved * torch.randn(wide.shape, generator=generator)).to(word.dtype)
        path.mkdir(parents=True, exist_ok=True)
        for file in old.iterdir():
            if file.name not in ("model.safetensors", "done"):
                (path / file.name).write_bytes(file.read_bytes())
        save_file(words, path / "model.safetensors", metadata={"format": "pt"})
        xorz.pack(old, path, package)
    return path, package


if __name__ == "__main__":
    for each in KINDS:
        for letter in TENANTS:
            print(*tenant(each, letter, Path(sys.argv[1])))
