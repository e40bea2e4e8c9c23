"""A training run for the tests: versions of a model as full checkpoints, saved by nobody of xorz, and as a published chain."""

import shutil
from pathlib import Path

import models
import torch
import xorz
from safetensors.torch import load_file, save_file


def run(kind: str, folder: Path, count: int = 4, share: float = 0.03) -> tuple[list[Path], Path]:
    """The folders of versions 0 (the base) to `count`, and the folder of the chain. In each `share` of all words has moved."""
    base = models.base(kind, folder)
    paths, chain = [base], folder / kind / "run"
    generator = torch.Generator().manual_seed(7)
    words = load_file(base / "model.safetensors")
    made = chain / "versions.json"
    for number in range(1, count + 1):
        path = folder / kind / f"v{number}"
        for key, word in words.items():
            wide = word.float()
            size = 0.3 if word.dim() == 1 else 1.5 * wide.std()
            moved = torch.rand(wide.shape, generator=generator) < share
            words[key] = (wide + size * moved * torch.randn(wide.shape, generator=generator)).to(word.dtype)
        if not (path / "model.safetensors").exists():
            path.mkdir(parents=True, exist_ok=True)
            for file in base.iterdir():
                if file.name not in ("model.safetensors", "done"):
                    shutil.copy(file, path / file.name)
            save_file(words, path / "model.safetensors", metadata={"format": "pt"})
        paths.append(path)
    if not made.exists():
        with xorz.Publisher(base, chain, keyframe=2) as publisher:
            for path in paths[1:]:
                publisher.publish({k: v.float() for k, v in load_file(path / "model.safetensors").items()})
    return paths, chain
