"""The main job on real fine-tunes: pack one against its base, compute on base + delta, give it back exactly.

``make demo`` runs it. Exits with 1 if anything at all is not exact.
"""

from __future__ import annotations

import argparse
import copy
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import xorz
import zstandard
from demo_pairs import Pair, StateDict, bert_pairs, tiny_pair
from torch import Tensor, nn

TENANTS = (1, 4, 16)
ROWS = (1, 8)
MB = 1e6


@dataclass
class Result:
    """What one pair gave: lines of the report by topic, and whether all of it was exact."""

    title: str
    sizes: dict[str, float] = field(default_factory=dict)
    checks: dict[str, bool] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    speed: dict[int, tuple[float, float]] = field(default_factory=dict)
    memory: dict[int, tuple[float, float]] = field(default_factory=dict)


def words(t: Tensor) -> Tensor:
    """Return the bits of a tensor, since NaN and -0.0 must count."""
    return t.contiguous().view({2: torch.int16, 4: torch.int32}[t.element_size()])


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every bit."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(words(a), words(b))


def nbytes(tensors: StateDict) -> int:
    """Bytes of all tensors."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


def notebook_size(pair: Pair) -> int:
    """Bytes of zstd level 10 over each tensor's raw XOR, as the notebook had it; new tensors as they are."""
    zstd, total = zstandard.ZstdCompressor(level=10), 0
    for name, t in pair.fine_tuned.items():
        base = pair.base.get(name)
        delta = words(t) ^ words(base) if base is not None and base.shape == t.shape else words(t)
        total += len(zstd.compress(delta.numpy().tobytes()))
    return total


def pack_and_restore(pair: Pair, folder: pathlib.Path, result: Result) -> pathlib.Path:
    """Write the package, read it back, compare every tensor."""
    package = folder / "tenant.xorz"
    start = time.perf_counter()
    xorz.pack(pair.base, pair.fine_tuned, package, prefer="memory")
    packed = time.perf_counter()
    restored = xorz.restore(pair.base, package)
    done = time.perf_counter()
    result.sizes = {
        "fine-tune": nbytes(pair.fine_tuned),
        "notebook (zstd-10 of the XOR)": notebook_size(pair),
        "xorz package": package.stat().st_size,
    }
    exact = restored.keys() == pair.fine_tuned.keys()
    exact = exact and all(same(restored[k], v) for k, v in pair.fine_tuned.items())
    result.checks[f"restored {len(restored)} tensors bit for bit"] = exact
    result.notes["pack / restore"] = f"{packed - start:.2f} s / {done - packed:.2f} s"
    return package


def swap(module: nn.Module, deltas: StateDict, prefix: str, mode: str) -> int:
    """Put an XorDeltaLinear over the base's own weights in place of every nn.Linear; returns how many."""
    count = 0
    for name, child in list(module.named_children()):
        path = f"{prefix}{name}."
        if isinstance(child, nn.Linear):
            setattr(module, name, xorz.XorDeltaLinear.from_linear(child, deltas[f"{path}weight"], mode=mode))
            count += 1
        else:
            count += swap(child, deltas, path, mode)
    return count


def serve(pair: Pair, restored_small: StateDict, deltas: StateDict, mode: str) -> nn.Sequential:
    """Return the layers on base + delta: base matrices, the fine-tune's biases and norms."""
    matrices = {k: v for k, v in pair.base.items() if v.dim() > 1}
    stack = pair.serve({**matrices, **restored_small})
    for layer, prefix in zip(stack, pair.layers, strict=True):
        swap(layer, deltas, prefix, mode)
    return stack


def check_layers(
    pair: Pair, deltas: StateDict, small: StateDict, prefer: str, result: Result
) -> tuple[nn.Module, nn.Module]:
    """Run the layers, base + delta beside the plain fine-tune."""
    plain = pair.serve(pair.fine_tuned)
    dtype = next(plain.parameters()).dtype
    torch.manual_seed(0)
    x = torch.randn(2, 24, next(plain.parameters()).shape[-1]).to(dtype)
    wanted = plain(x)
    exact = serve(pair, small, deltas, "exact")(x)
    what = f"{len(plain)} layers on base + delta, prefer {prefer}, mode exact: PyTorch's output bit for bit"
    result.checks[what] = same(exact, wanted)
    fast = serve(pair, small, deltas, "fast")
    base = pair.serve({k: v for k, v in pair.base.items() if k in pair.fine_tuned})
    error = (fast(x).double() - wanted.double()).abs().max().item()
    moved = (base(x).double() - wanted.double()).abs().max().item()
    note = f"within {error:.1e} of PyTorch (another order of summing); the fine-tune moved outputs by {moved:.1e}"
    result.notes["mode fast"] = note
    return plain, fast


def linears(module: nn.Module) -> list[nn.Module]:
    """Every linear layer, in order."""
    return [m for m in module.modules() if isinstance(m, nn.Linear | xorz.XorDeltaLinear)]


def median_ms(run: dict[str, Callable[[], object]], repeats: int = 15) -> dict[str, float]:
    """Median milliseconds of each, the runs taken in turn so that noise meets all alike."""
    times: dict[str, list[float]] = {name: [] for name in run}
    for _ in range(repeats):
        for name, f in run.items():
            start = time.perf_counter()
            f()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(t[2:]) for name, t in times.items()}


def speed(plain: nn.Module, served: nn.Module, result: Result) -> None:
    """Time all linear layers one after another, dense beside base + delta."""
    layers = list(zip(linears(plain), linears(served), strict=True))

    def go(which: int, inputs: list[Tensor]) -> None:
        for pair, x in zip(layers, inputs, strict=True):
            pair[which](x)

    for m in ROWS:
        inputs = [torch.randn(m, dense.in_features).to(dense.weight.dtype) for dense, _ in layers]
        times = median_ms({"dense": partial(go, 0, inputs), "xorz": partial(go, 1, inputs)})
        result.speed[m] = (times["dense"], times["xorz"])


def memory(pair: Pair, deltas: StateDict, small: StateDict, result: Result) -> None:
    """Bytes of one base and t tenants, beside t + 1 whole models."""
    own = nbytes(deltas) + nbytes(small)
    for t in TENANTS:
        copies = nbytes(pair.base) + t * nbytes(pair.fine_tuned)
        result.memory[t] = (copies, nbytes(pair.base) + t * own)


def run(pair: Pair) -> Result:
    """Do the whole job on one pair."""
    result = Result(pair.title)
    known = {k: v for k, v in pair.fine_tuned.items() if k in pair.base and pair.base[k].shape == v.shape}
    changed = sum(int((words(v) != words(pair.base[k])).sum()) for k, v in known.items())
    total = sum(v.numel() for v in known.values())
    result.notes["weights"] = f"{total / 1e6:.1f} M, {100 * changed / total:.0f} % of them changed"
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        package = pack_and_restore(pair, pathlib.Path(folder), result)
        # Matrices are served from their deltas; vectors and tensors that the base lacks are small copies.
        small = {k: v for k, v in xorz.restore(pair.base, package).items() if v.dim() < 2 or k not in known}
        deltas = {}
        for prefer in ("memory", "speed"):
            loaded = xorz.load_deltas(pair.base, package, prefer=prefer)
            deltas[prefer] = {k: v for k, v in loaded.items() if k not in small}
            result.sizes[f"in memory, prefer {prefer}"] = nbytes(deltas[prefer]) + nbytes(small)
            plain, served = check_layers(pair, deltas[prefer], small, prefer, result)
        speed(plain, served, result)
        memory(pair, deltas["memory"], small, result)
    return result


def report(results: list[Result]) -> None:
    """Print all of it, for someone who has read nothing yet."""
    for r in results:
        print(f"\n{r.title}: {r.notes.pop('weights')}")
        whole = r.sizes["fine-tune"]
        for what, size in r.sizes.items():
            print(f"  {what:<32}{size / MB:>9.2f} MB {100 * size / whole:>6.1f} %")
        for what, good in r.checks.items():
            print(f"  {'exact ' if good else 'WRONG '} {what}")
        for what, text in r.notes.items():
            print(f"  {what}: {text}")
        for m, (dense, delta) in r.speed.items():
            times = f"dense {dense:.2f} ms, base + delta {delta:.2f} ms ({dense / delta:.2f}x)"
            print(f"  all linear layers, {m} row{'s' * (m > 1)}: {times}")
        for t, (copies, shared) in r.memory.items():
            sizes = f"{copies / MB:>7.1f} MB as copies, {shared / MB:>7.1f} MB with xorz"
            print(f"  base and {t:>2} tenants: {sizes}")


def main() -> int:
    """Run the demo; the exit code says whether everything was exact."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", default="build/demo", help="folder where the package is kept")
    cache = pathlib.Path(parser.parse_args().cache)
    print(
        "xorz keeps one base model and, for each fine-tune, a lossless delta that layers compute on directly."
    )
    results = [run(p) for p in [*bert_pairs(cache), tiny_pair()]]
    report(copy.deepcopy(results))
    wrong = [f"{r.title}: {what}" for r in results for what, good in r.checks.items() if not good]
    print("\neverything exact" if not wrong else "\nNOT EXACT: " + "; ".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
