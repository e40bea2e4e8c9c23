"""A training run for the tests: versions of a model as full checkpoints, saved by nobody of xorz, and as a published chain."""

import hashlib
import json
import re
import shutil
import struct
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


def forged(package: Path, name: str, out: Path) -> Path:
    """The package with the sha256 of another base for the tensor `name`: the digests fit, as those of a made base would."""
    data = package.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    table = start + json.loads(data[8:start])["xorz:table"]["data_offsets"][0]
    [mine] = [bytes.fromhex(e["base_sha256"]) for e in xorz.inspect(package)["entries"] if e["name"] == name]
    assert data.count(mine) == 1
    changed = data[table + 16 :].replace(mine, hashlib.sha256(b"another base").digest())
    out.write_bytes(data[: table + 16] + changed)
    # Who forges computes the table's digest; here the refusal says what it would be.
    try:
        xorz.inspect(out)
    except ValueError as refusal:
        right = re.search(r"its digest is ([0-9a-f]{32})", str(refusal))[1]
    out.write_bytes(data[:table] + bytes.fromhex(right) + changed)
    xorz.inspect(out)
    return out
