"""What `notebook.py` measures with: the notebook's own pipeline, ways to store an XOR, and small pictures.

The names are the notebook's wherever it had one, so that the two can be read side by side.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import pickle
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from time import perf_counter
from typing import Any

import numpy as np
import torch
import zstandard as zstd
from torch import Tensor, nn

StateDict = dict[str, Tensor]
Timings = dict[str, float]
STAGES = ("t_load_pkg", "t_decompress", "t_xor_apply", "t_state_load", "t_forward", "t_end_to_end")


def size() -> tuple[int, int]:
    """d_model and dim_feedforward: `--size 64x128`, or XORZ_NOTEBOOK_SIZE where a notebook has no arguments."""
    parser = argparse.ArgumentParser(description="The XOR notebook, measured.")
    default = os.environ.get("XORZ_NOTEBOOK_SIZE", "64x128")
    parser.add_argument("--size", default=default, help="d_model x dim_feedforward (default 64x128)")
    # A kernel has arguments of its own, which are not ours.
    text = parser.parse_args([] if "ipykernel" in sys.modules else None).size
    d_model, _, hidden = text.partition("x")
    return int(d_model), int(hidden)


def state(module: nn.Module) -> StateDict:
    """The module's parameters on the CPU, contiguous."""
    return {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}


def same_bits(a: StateDict, b: StateDict) -> bool:
    """Whether two state_dicts agree in every bit: NaN payloads and signed zeros count."""
    return a.keys() == b.keys() and all(
        torch.equal(a[k].reshape(-1).view(torch.uint8), b[k].reshape(-1).view(torch.uint8)) for k in a
    )


# -- The notebook's pipeline -----------------------------------------------------------------------


def tensor_to_uint8_view(t: Tensor) -> np.ndarray[Any, Any]:
    """A NumPy uint8 view over a tensor's bytes."""
    return t.detach().cpu().numpy().reshape(-1).view(np.uint8)


def compress_state_dict_with_xor_zstd(
    base_sd: StateDict, tuned_sd: StateDict, level: int = 10
) -> dict[str, Any]:
    """The notebook's package: per tensor, zstd of base XOR fine-tuned."""
    compressor = zstd.ZstdCompressor(level=level)
    meta, deltas = {}, {}
    for name, base in base_sd.items():
        tuned = tuned_sd[name]
        xor = np.bitwise_xor(tensor_to_uint8_view(base), tensor_to_uint8_view(tuned))
        deltas[name] = compressor.compress(xor.tobytes())
        meta[name] = {
            "shape": list(tuned.shape),
            "dtype_str": tuned.numpy().dtype.str,
            "param_bytes": tuned.nbytes,
        }
    return {"meta": meta, "deltas": deltas, "zstd_level": level}


def reconstruct_finetuned_state_dict_with_timing(
    base_sd: StateDict, pkg: dict[str, Any]
) -> tuple[StateDict, Timings]:
    """Decompress and apply the XOR, every tensor, with a clock on each half."""
    decompressor, rec, t_decompress, t_xor = zstd.ZstdDecompressor(), {}, 0.0, 0.0
    for name, meta in pkg["meta"].items():
        t0 = perf_counter()
        xor = np.frombuffer(decompressor.decompress(pkg["deltas"][name]), dtype=np.uint8)
        t1 = perf_counter()
        words = np.bitwise_xor(tensor_to_uint8_view(base_sd[name]), xor)
        t2 = perf_counter()
        t_decompress, t_xor = t_decompress + t1 - t0, t_xor + t2 - t1
        rec[name] = torch.from_numpy(words.view(np.dtype(meta["dtype_str"])).reshape(meta["shape"]))
    return rec, {"t_decompress": t_decompress, "t_xor_apply": t_xor}


def e2e_forward_from_pkg(
    base_sd: StateDict, path: pathlib.Path, fresh: Callable[[], nn.Module], x: Tensor
) -> tuple[Timings, Tensor]:
    """Load the file, decompress, apply the XOR, fill a new layer, run it once: what the notebook does per tenant."""
    t0 = perf_counter()
    pkg = pickle.loads(path.read_bytes())  # our own file of a moment ago: never do this with anybody else's
    t1 = perf_counter()
    rec_sd, parts = reconstruct_finetuned_state_dict_with_timing(base_sd, pkg)
    t2 = perf_counter()
    layer = fresh()
    layer.load_state_dict(rec_sd)
    t3 = perf_counter()
    y = layer(x)
    t4 = perf_counter()
    out = {"t_load_pkg": t1 - t0, **parts, "t_state_load": t3 - t2, "t_forward": t4 - t3}
    return {**out, "t_end_to_end": sum(out.values())}, y


# -- Clocks and tables -----------------------------------------------------------------------------


def repeat(measure: Callable[[], Timings], repeats: int = 7) -> dict[str, tuple[float, float, float]]:
    """Mean, standard deviation and median of every timer over `repeats` runs, after one that warms up."""
    measure()
    runs = [measure() for _ in range(repeats)]
    out = {}
    for key in runs[0]:
        times = [run[key] for run in runs]
        out[key] = (statistics.mean(times), statistics.pstdev(times), statistics.median(times))
    return out


def clock(call: Callable[[], object], repeats: int = 7) -> float:
    """Median seconds of a call."""
    return repeat(lambda: {"t": _seconds(call)}, repeats)["t"][2]


def _seconds(call: Callable[[], object]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


def duration(seconds: float) -> str:
    """1.23 s, 4.56 ms, 7.8 us."""
    for unit, scale in (("s", 1), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 1 or unit == "us":
            return f"{seconds * scale:.3g} {unit}"
    raise AssertionError


def mib(n: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.4g} {unit}"
        n /= 1024
    return f"{n:.4g} GiB"


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print rows in columns, the first to the left, the others to the right."""
    lines = [[str(cell) for cell in line] for line in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        cells = [first.ljust(widths[0]), *(t.rjust(w) for t, w in zip(others, widths[1:], strict=True))]
        print("  ".join(cells).rstrip())


# -- Pictures --------------------------------------------------------------------------------------


def bars(title: str, values: Mapping[str, float], unit: str) -> str:
    """Horizontal bars as SVG."""
    row, left, width, most = 24, 210, 440, max(values.values())
    out = [f'<text x="10" y="20" font-weight="bold">{title}</text>']
    for i, (name, value) in enumerate(values.items()):
        y, long = 38 + i * row, value / most * width
        colour = "#0b6e4f" if name.startswith("xorz") else "#9aa5b1"
        out.append(f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{name}</text>')
        out.append(
            f'<rect x="{left}" y="{y}" width="{max(long, 1):.1f}" height="{row - 8}" fill="{colour}"/>'
        )
        out.append(f'<text x="{left + long + 6:.1f}" y="{y + 13}">{value:.3g} {unit}</text>')
    height = 48 + row * len(values)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {height}" width="760" height="{height}" role="img" '
        f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="#fff"/>{"".join(out)}</svg>'
    )


def show(svg: str, name: str) -> None:
    """In a notebook, below the cell; from a shell, a file under build/notebook/."""
    if "ipykernel" in sys.modules:
        from IPython.display import SVG, display

        display(SVG(svg))
        return
    path = pathlib.Path(__file__).parents[1] / "build" / "notebook" / f"{name}.svg"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(svg)
    print(f"picture: build/notebook/{name}.svg")
