"""The rivals that are Python, and what a synthetic checkpoint looks like. Run by ``checkpoint.py``, one job a process.

Each job reads its files, does its work, writes and syncs its result, and prints one JSON line with the seconds
and CPU seconds from after the imports to the end: a rival is not charged for the start of Python and torch.
"""

from __future__ import annotations

import json
import os
import pathlib
import pickle
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Words of the same width that numpy has: the notebook's `.numpy()` refuses bf16.
INTS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def shapes(gigabytes: float) -> dict[str, tuple[int, ...]]:
    """A Llama of about that size in bf16: TinyLlama-1.1B's own shapes from 0.6 GB, else smaller ones."""
    hidden, heads, inner, vocab = (2048, 256, 5632, 32000) if gigabytes >= 0.6 else (512, 128, 1408, 8192)
    layer = 2 * hidden * hidden + 2 * heads * hidden + 3 * inner * hidden + 2 * hidden
    count = max(1, round((gigabytes * 5e8 - 2 * vocab * hidden) / layer))
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(count):
        at = f"model.layers.{i}."
        for name, rows in (("q", hidden), ("k", heads), ("v", heads), ("o", hidden)):
            out[f"{at}self_attn.{name}_proj.weight"] = (rows, hidden)
        out[f"{at}mlp.gate_proj.weight"] = out[f"{at}mlp.up_proj.weight"] = (inner, hidden)
        out[f"{at}mlp.down_proj.weight"] = (hidden, inner)
        out[f"{at}input_layernorm.weight"] = out[f"{at}post_attention_layernorm.weight"] = (hidden,)
    return out | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def moves(shape: tuple[int, ...], size: float, wide: bool, generator: torch.Generator) -> Tensor:
    """What training adds to the weights.

    AdamW moves each weight by nearly the same amount, whatever its size. A short run that keeps bf16 weights shows one
    such step of either sign: 0.3 is the spread of its logarithm that fits what fine-tunes of small models show, share
    changed by the base's exponent. A long run that keeps fp32 masters (`wide`) sums many: normal.
    """
    normal = torch.randn(shape, generator=generator)
    if wide:
        return normal.mul_(size)
    return torch.randn(shape, generator=generator).mul_(0.3).exp_().mul_(size).copysign_(normal)


def step_size(share: float, wide: bool) -> float:
    """The step that changes this share of bf16 words of deviation 0.02: by bisection on a sample."""
    generator = torch.Generator().manual_seed(7)
    base = (torch.randn(1 << 20, generator=generator) * 0.02).bfloat16()
    low, high = 1e-9, 1.0
    for _ in range(40):
        middle = (low * high) ** 0.5
        moved = (base.float() + moves((1 << 20,), middle, wide, generator.manual_seed(8))).bfloat16()
        if (moved != base).float().mean().item() < share:
            low = middle
        else:
            high = middle
    return high


def make(base: pathlib.Path, fine_tuned: dict[pathlib.Path, float], gigabytes: float, shards: int) -> None:
    """Write the base and, for each share of changed words, a fine-tune: directories of safetensors shards."""
    from safetensors.torch import save_file

    items = list(shapes(gigabytes).items())
    steps = {path: (step_size(share, share > 0.2), share > 0.2) for path, share in fine_tuned.items()}
    for path in (base, *fine_tuned):
        path.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        name = "model.safetensors" if shards == 1 else f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = items[shard * len(items) // shards : (shard + 1) * len(items) // shards]
        generator = torch.Generator().manual_seed(shard)
        tensors = {}
        for key, shape in part:
            normal = torch.randn(shape, generator=generator) * 0.02
            tensors[key] = (normal + 1 if len(shape) == 1 else normal).bfloat16()
        save_file(tensors, base / name, metadata={"format": "pt"})
        for i, (path, (size, wide)) in enumerate(steps.items()):
            generator.manual_seed(1000 * (i + 1) + shard)
            tuned = {
                key: (w.float() + moves(tuple(w.shape), size, wide, generator)).bfloat16()
                for key, w in tensors.items()
            }
            save_file(tuned, path / name, metadata={"format": "pt"})
    if shards > 1:
        places = {
            key: f"model-{s + 1:05}-of-{shards:05}.safetensors"
            for s in range(shards)
            for key, _ in items[s * len(items) // shards : (s + 1) * len(items) // shards]
        }
        index = json.dumps({"metadata": {}, "weight_map": places}, indent=2)
        for path in (base, *fine_tuned):
            (path / "model.safetensors.index.json").write_text(index)


def words(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The notebook's `tensor_to_uint8_view`, for bf16 too."""
    return tensor.detach().cpu().view(INTS.get(tensor.dtype, tensor.dtype)).numpy().view(np.uint8)


def write(path: str, data: bytes | bytearray | memoryview) -> None:
    """Write and sync, as xorz does."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def notebook_pack(base: str, fine_tuned: str, out: str, threads: int) -> None:
    """`compress_state_dict_with_xor_zstd` of the notebook, level 10, and its pickle."""
    import zstandard
    from safetensors.torch import load_file

    base_sd, tuned_sd = load_file(base), load_file(fine_tuned)
    compressor = zstandard.ZstdCompressor(level=10, threads=threads if threads > 1 else 0)
    meta, deltas = {}, {}
    for name, tuned in tuned_sd.items():
        raw = np.bitwise_xor(words(base_sd[name]), words(tuned)).tobytes()
        deltas[name] = compressor.compress(raw)
        meta[name] = {"shape": list(tuned.shape), "dtype": str(tuned.dtype).removeprefix("torch.")}
    write(out, pickle.dumps({"meta": meta, "deltas": deltas, "zstd_level": 10}))


def notebook_unpack(base: str, package: str, out: str, threads: int) -> None:
    """`reconstruct_finetuned_state_dict_with_timing` of the notebook, saved as safetensors."""
    import zstandard
    from safetensors.torch import load_file, save_file

    base_sd = load_file(base)
    # Our own file of a moment ago: a pickle from elsewhere must never be loaded like this.
    pkg = pickle.loads(pathlib.Path(package).read_bytes())
    decompressor, rec = zstandard.ZstdDecompressor(), {}
    for name, meta in pkg["meta"].items():
        raw = np.frombuffer(decompressor.decompress(pkg["deltas"][name]), dtype=np.uint8)
        bits = np.bitwise_xor(words(base_sd[name]).reshape(-1), raw)
        dtype = getattr(torch, meta["dtype"])
        rec[name] = torch.from_numpy(bits.copy()).view(dtype).reshape(meta["shape"])
    save_file(rec, out, metadata={"format": "pt"})
    with open(out, "rb") as file:
        os.fsync(file.fileno())


def zipnn(threads: int) -> Any:
    """ZipNN in its delta mode; `threads` is what its README calls for."""
    import zipnn as module

    return module.ZipNN(
        input_format="byte", bytearray_dtype="bfloat16", delta_compressed_type="byte", threads=threads
    )


def zipnn_pack(base: str, fine_tuned: str, out: str, threads: int) -> None:
    """Whole file against whole file, which is ZipNN's delta."""
    tuned, second = pathlib.Path(fine_tuned).read_bytes(), pathlib.Path(base).read_bytes()
    write(out, zipnn(threads).compress(tuned, delta_second_data=second))


def zipnn_unpack(base: str, package: str, out: str, threads: int) -> None:
    """The way back."""
    packed, second = pathlib.Path(package).read_bytes(), pathlib.Path(base).read_bytes()
    write(out, zipnn(threads).decompress(packed, delta_second_data=second))


JOBS: dict[str, Callable[[str, str, str, int], None]] = {
    "notebook-pack": notebook_pack,
    "notebook-unpack": notebook_unpack,
    "zipnn-pack": zipnn_pack,
    "zipnn-unpack": zipnn_unpack,
}


def main() -> None:
    """`rivals.py JOB BASE INPUT OUT THREADS`."""
    job, base, given, out, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    # Imports are not the job's: bring them in before the clock starts.
    import safetensors.torch  # noqa: F401
    import zstandard  # noqa: F401

    if job.startswith("zipnn"):
        import zipnn  # noqa: F401
    wall, cpu = time.perf_counter(), time.process_time()
    JOBS[job](base, given, out, int(threads))
    print(json.dumps({"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}))


if __name__ == "__main__":
    main()
