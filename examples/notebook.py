# %% [markdown]
# # XOR deltas of a fine-tuned Transformer layer: the notebook, measured
#
# xorz began as a notebook: take a tiny Transformer layer, fine-tune it a little, store the fine-tune as
# zstd-compressed XOR against its base, get it back exactly, and ask **what would be saved if nothing had to be
# decompressed**. It answered with bounds and a `TODO`. Here is the same story with the answers: every stage,
# bound, storage model and plan of the original, each *run* and timed beside the fused path that exists now.
#
#     python examples/notebook.py                    # the notebook's own size
#     python examples/notebook.py --size 4096x4096   # the same at a real layer's size: minutes, 4 GB
#     make notebook                                  # renders notebook.ipynb and notebook_4096.ipynb from this file
#
# At 64x128 a product takes microseconds and *calls* are what is measured; what matters for serving shows at
# 4096x4096.

# %%
import pathlib
import pickle
import tempfile
from copy import deepcopy
from time import perf_counter

import numpy as np
import torch
import torch.nn.functional as F
import xorz
import zstandard as zstd
from notebook_lib import (
    STAGES,
    bars,
    clock,
    compress_state_dict_with_xor_zstd,
    duration,
    e2e_forward_from_pkg,
    mib,
    reconstruct_finetuned_state_dict_with_timing,
    repeat,
    same_bits,
    show,
    size,
    state,
    table,
)
from notebook_storage import MODELS, stored_bytes
from torch import nn
from xorz.bench import plot

torch.manual_seed(42)
torch.set_grad_enabled(False)
D_MODEL, D_HIDDEN = size()
FOLDER = pathlib.Path(tempfile.mkdtemp(prefix="xorz-notebook-"))
print(
    f"torch {torch.__version__}, {torch.get_num_threads()} threads, xorz {xorz.__version__}; {D_MODEL}x{D_HIDDEN}, float32"
)

# %% [markdown]
# ## 1. A tiny Transformer layer


# %%
class TinyTransformerLayer(nn.Module):
    """Small block with multi-head attention and a feed-forward network, as in the notebook."""

    def __init__(self, d_model: int = D_MODEL, nhead: int = 4, dim_feedforward: int = D_HIDDEN):
        """Take the sizes of the layer."""
        super().__init__()
        self.ln1 = nn.LayerNorm(d_model)
        self.self_attn = nn.MultiheadAttention(d_model, nhead, batch_first=True)
        self.ln2 = nn.LayerNorm(d_model)
        self.ff = nn.Sequential(
            nn.Linear(d_model, dim_feedforward), nn.GELU(), nn.Linear(dim_feedforward, d_model)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, d_model] to the same."""
        h = self.ln1(x)
        x = x + self.self_attn(h, h, h)[0]
        return x + self.ff(self.ln2(x))


def fresh_layer() -> nn.Module:
    """A new layer to fill: its random initial weights are part of what `t_state_load` pays for."""
    return TinyTransformerLayer().eval()


base_layer = fresh_layer()
base_sd = state(base_layer)
WORDS = sum(t.numel() for t in base_sd.values())
print(f"{WORDS:,} parameters, {mib(4 * WORDS)}")


# %% [markdown]
# ## 2. Simulated fine-tuning: a small subset of the parameters moves


# %%
def perturb_subset_(module: nn.Module, frac: float, magnitude: float = 1e-2, seed: int = 0) -> nn.Module:
    """In place: move a random `frac` of the elements of each parameter, so that base XOR fine-tuned is mostly zeros."""
    g = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        k = max(1, int(p.numel() * frac))
        at = torch.randperm(p.numel(), generator=g)[:k]
        p.view(-1)[at] += magnitude * torch.randn(k, generator=g)
    return module


TENANTS = {"ft1": (0.03, 123), "ft2": (0.05, 456)}
tuned = {n: perturb_subset_(deepcopy(base_layer), frac, seed=seed) for n, (frac, seed) in TENANTS.items()}
tuned_sd = {name: state(layer) for name, layer in tuned.items()}
changed = {
    name: sum(int((sd[k].view(torch.int32) != base_sd[k].view(torch.int32)).sum()) for k in sd)
    for name, sd in tuned_sd.items()
}
for name in tuned:
    print(f"[{name}] changed elements: {changed[name]:,} of {WORDS:,} ({100 * changed[name] / WORDS:.2f} %)")

# %% [markdown]
# ## 3. Pack: zstd-10 of the XOR, and xorz
#
# The notebook stores each tensor's XOR through zstd level 10. xorz picks an encoding for each tensor
# (`xorz.pack`; the packages are files, so that *load* below reads files). Random positions are the worst case
# for xorz: real fine-tunes change small weights first, which its encodings know (docs/changes.md).

# %%
notebook_file = {name: FOLDER / f"{name}.pickle" for name in tuned}
package = {name: FOLDER / f"{name}.xorz" for name in tuned}
packed = {}
for name, sd in tuned_sd.items():
    packed[name] = compress_state_dict_with_xor_zstd(base_sd, sd)
    notebook_file[name].write_bytes(pickle.dumps(packed[name]))
    xorz.pack(base_sd, sd, package[name])

entries = {e["name"]: e for e in xorz.inspect(package["ft1"])["entries"]}
rows = []
for name, blob in packed["ft1"]["deltas"].items():
    entry, raw = entries[name], base_sd[name].nbytes
    share = 100 * entry["changed"] / base_sd[name].numel()
    rows.append([name, raw, f"{share:.2f} %", len(blob), f"{len(blob) / raw:.4f}", entry["stored_bytes"]])
    rows[-1] += [f"{entry['stored_bytes'] / raw:.4f}", entry["encoding"]]
table(["tensor of ft1", "bytes", "changed", "zstd-10", "ratio", "xorz", "ratio", "encoding"], rows)
for name in tuned:
    zstd_bytes, xorz_bytes = notebook_file[name].stat().st_size, package[name].stat().st_size
    print(
        f"[{name}] files: notebook {mib(zstd_bytes)}, ratio {zstd_bytes / (4 * WORDS):.4f}; "
        f"xorz {mib(xorz_bytes)}, ratio {xorz_bytes / (4 * WORDS):.4f}"
    )

# %% [markdown]
# ## 4. Restore exactly

# %%
x_bench = torch.randn(4, 16, D_MODEL)
for name, sd in tuned_sd.items():
    by_notebook, _ = reconstruct_finetuned_state_dict_with_timing(base_sd, packed[name])
    by_xorz = xorz.restore(base_sd, package[name])
    assert same_bits(by_notebook, sd) and same_bits(by_xorz, sd)
print("both give back every bit of both fine-tunes")
del by_notebook, by_xorz

# %% [markdown]
# ## 5. Where the time goes, stage by stage
#
# The notebook's way to run a fine-tune once: load the package, decompress, apply the XOR, fill a new layer,
# forward.

# %%
REPEATS = 7
stats = repeat(lambda: e2e_forward_from_pkg(base_sd, notebook_file["ft1"], fresh_layer, x_bench)[0], REPEATS)
y_tuned = tuned["ft1"](x_bench)
assert torch.equal(e2e_forward_from_pkg(base_sd, notebook_file["ft1"], fresh_layer, x_bench)[1], y_tuned)
table(["stage", "mean", "std", "median"], [[k, *(duration(v) for v in stats[k])] for k in STAGES])

# %% [markdown]
# ## 6. The what-if bounds, beside the path that now exists
#
# The notebook computed two bounds from those times: **A**, no XOR pass (compute on the decompressed XOR), and
# **B**, neither XOR nor decompression, "not realistic today". xorz does the second: the file's delta is brought
# into its *resident* form, which is still small, and every linear layer computes on base + delta. No fine-tuned
# matrix exists at any time.


# %%
def fused_once(x: torch.Tensor, file: pathlib.Path, expected: torch.Tensor) -> dict[str, float]:
    """Load a package as a tenant of the base that is there anyway, one forward, and forget it."""
    t0 = perf_counter()
    served.load("visitor", file)
    t1 = perf_counter()
    with served.use("visitor"):
        y = base_layer(x)
    t2 = perf_counter()
    served.unload("visitor")
    assert torch.allclose(y, expected, rtol=1e-4, atol=1e-4)
    return {"t_load": t1 - t0, "t_forward": t2 - t1, "t_end_to_end": t2 - t0}


t_dense = clock(lambda: tuned["ft1"](x_bench), REPEATS)
served = xorz.attach(base_layer, default="base", prefer=None)
fused = repeat(lambda: fused_once(x_bench, package["ft1"], y_tuned), REPEATS)
served.load("ft1", package["ft1"])
with served.use("ft1"):
    t_fused_warm = clock(lambda: base_layer(x_bench), REPEATS)

median = {k: stats[k][2] for k in STAGES}
e2e = median["t_end_to_end"]
answers = {
    "notebook, end to end": e2e,
    "bound A: no XOR pass": e2e - median["t_xor_apply"],
    "bound B: no XOR, no decompression": e2e - median["t_xor_apply"] - median["t_decompress"],
    "xorz, load and forward: MEASURED": fused["t_end_to_end"][2],
    "xorz, forward of a loaded tenant: MEASURED": t_fused_warm,
    "(a dense fine-tuned layer's forward)": t_dense,
}
table(
    ["path", "seconds", "faster than the notebook"],
    [[k, duration(v), f"{e2e / v:.2f}x"] for k, v in answers.items()],
)

# %% [markdown]
# Bound B still fills a new layer; the fused path has no layer to fill, which is how it can be faster than the
# bound. Against the dense layer's forward, once loaded, it pays for the memory that it saves; how much depends
# on rows and sizes (docs/results.md), and at the notebook's size on the cost of a call.

# %% [markdown]
# ## 7. Hotspots by parameter

# %%
decompressor = zstd.ZstdDecompressor()
resident = xorz.load_deltas(base_sd, package["ft1"], prefer="speed")
records = []
for name, blob in packed["ft1"]["deltas"].items():
    xor = np.frombuffer(decompressor.decompress(blob), dtype=np.uint8)
    base_bytes = base_sd[name].numpy().reshape(-1).view(np.uint8)
    t_de = clock(lambda blob=blob: decompressor.decompress(blob), 3)
    t_x = clock(lambda a=base_bytes, b=xor: np.bitwise_xor(a, b), 3)
    t_restore = clock(lambda name=name: xorz.delta_restore(base_sd[name], resident[name]), 3)
    records.append((t_x, [name, xor.size, duration(t_de), duration(t_x), duration(t_restore)]))
records.sort(key=lambda r: -r[0])
table(["top 5 by XOR", "bytes", "decompress", "xor", "xorz delta_restore"], [row for _, row in records[:5]])

# %% [markdown]
# ## 8. How sparse the XOR is, and the ways to store it
#
# The notebook estimated one model (index and byte) and named others. Here each is written, read back, compared,
# and weighed, with zstd-10 and with xorz: as a file, and as the deltas in memory that products are computed on.

# %%
xors = [
    (base_sd[k].view(torch.int32) ^ sd.view(torch.int32)).reshape(-1, sd.shape[-1]).numpy().view(np.uint32)
    for k, sd in tuned_sd["ft1"].items()
]
nonzero = sum(np.count_nonzero(x.view(np.uint8)) for x in xors)
print(
    f"bytes of the XOR that are not zero: {nonzero:,} of {4 * WORDS:,} ({nonzero / WORDS / 4:.4f}); "
    f"words: {changed['ft1'] / WORDS:.4f}"
)
stored = {"the XOR itself (dense)": 4.0 * WORDS}
stored |= {name: sum(stored_bytes(name, xor) for xor in xors) for name in MODELS}
stored["zstd-10 of the XOR (notebook)"] = sum(map(len, packed["ft1"]["deltas"].values()))
stored["xorz, in memory, for speed"] = sum(d.numel() for d in resident.values())
stored["xorz, in memory, small"] = sum(
    d.numel() for d in xorz.load_deltas(base_sd, package["ft1"], prefer="memory").values()
)
stored["xorz, package"] = package["ft1"].stat().st_size
bits = {name: 8 * n / WORDS for name, n in stored.items()}
table(
    ["store", "bytes", "bits per weight"], [[k, f"{int(n):,}", f"{bits[k]:.3f}"] for k, n in stored.items()]
)
show(
    bars(f"Bits per weight, {100 * changed['ft1'] / WORDS:.1f} % of float32 words changed", bits, "bits"),
    "storage",
)

# %% [markdown]
# At the notebook's size the fixed parts (headers, 64-byte sections, tiles that are mostly padding) outweigh the
# changes; at 4096x4096 they vanish.

# %% [markdown]
# ## 9. The TODO: tile by tile, without full reconstruction
#
# The notebook's stub wanted: for each tile, decode only the bytes needed, patch a small buffer, multiply, and
# time `t_partial_decompress`, `t_tile_xor_patch`, `t_forward_tile`. A whole tensor in one zstd frame cannot be
# read in part, so there are two prototypes: a zstd frame for each tile, and xorz's resident delta, of which
# `delta_restore(rows=, columns=)` decodes only what a tile needs, and patches it on the way: the first two
# timers are one. The third row is what became of the idea: `delta_linear`, which does all three in one pass
# over the base.


# %%
WEIGHT = "ff.0.weight"
w_base, w_tuned = base_sd[WEIGHT], tuned_sd["ft1"][WEIGHT]


def frames(tile_rows: int, tile_cols: int) -> dict[tuple[int, int], bytes]:
    """The XOR of `WEIGHT`, a zstd frame for each tile."""
    xor, compressor = w_base.view(torch.int32) ^ w_tuned.view(torch.int32), zstd.ZstdCompressor(level=10)
    return {
        (r, c): compressor.compress(xor[r : r + tile_rows, c : c + tile_cols].contiguous().numpy().tobytes())
        for r in range(0, xor.size(0), tile_rows)
        for c in range(0, xor.size(1), tile_cols)
    }


@torch.inference_mode()
def e2e_forward_on_delta_no_full_reconstruct(
    x: torch.Tensor, tiles: dict[tuple[int, int], bytes] | torch.Tensor, tile_rows: int, tile_cols: int
) -> tuple[dict[str, float], torch.Tensor]:
    """`F.linear(x, w_tuned)` of which only a tile exists at a time; `tiles`: zstd frames, or a resident delta."""
    n, k = w_base.shape
    y, clocks = x.new_zeros(*x.shape[:-1], n), [0.0, 0.0, 0.0]
    for r in range(0, n, tile_rows):
        for c in range(0, k, tile_cols):
            base_tile = w_base[r : r + tile_rows, c : c + tile_cols].contiguous()
            t0 = perf_counter()
            if isinstance(tiles, torch.Tensor):
                r1, c1 = min(r + tile_rows, n), min(c + tile_cols, k)
                buffer = xorz.delta_restore(w_base, tiles, rows=(r, r1), columns=(c, c1))
                t1 = t2 = perf_counter()
            else:
                part = torch.frombuffer(bytearray(decompressor.decompress(tiles[r, c])), dtype=torch.int32)
                t1 = perf_counter()
                buffer = (base_tile.view(torch.int32) ^ part.view(base_tile.shape)).view(torch.float32)
                t2 = perf_counter()
            y[..., r : r + tile_rows] += F.linear(x[..., c : c + tile_cols], buffer)
            t3 = perf_counter()
            clocks = [t + dt for t, dt in zip(clocks, (t1 - t0, t2 - t1, t3 - t2), strict=True)]
    names = ("t_partial_decompress", "t_tile_xor_patch", "t_forward_tile")
    return {**dict(zip(names, clocks, strict=True)), "t_total": sum(clocks)}, y


want = F.linear(x_bench, w_tuned)
rows = []
for tile in [(64, 64), (64, D_MODEL)] if D_MODEL > 64 else [(64, 64), (16, 64)]:
    ways = {"zstd frame per tile": frames(*tile), "xorz, delta_restore": resident[WEIGHT]}
    for way, tiles in ways.items():
        _, y = e2e_forward_on_delta_no_full_reconstruct(x_bench, tiles, *tile)
        assert torch.allclose(y, want, rtol=1e-4, atol=1e-4)
        found = repeat(lambda t=tiles, s=tile: e2e_forward_on_delta_no_full_reconstruct(x_bench, t, *s)[0], 3)
        rows.append(
            [
                f"{way}, {tile[0]}x{tile[1]}",
                *(duration(t) for _, _, t in found.values()),
                mib(4 * tile[0] * tile[1]),
            ]
        )

y = xorz.delta_linear(x_bench, w_base, resident[WEIGHT])
assert torch.allclose(y, want, rtol=1e-4, atol=1e-4)
one_pass = clock(lambda: xorz.delta_linear(x_bench, w_base, resident[WEIGHT]), REPEATS)
rows.append(["xorz, delta_linear: one pass", "", "", "", duration(one_pass), "in the kernel"])


def rebuild_all() -> torch.Tensor:
    """Decompress and patch the whole matrix, then multiply."""
    xor = torch.frombuffer(
        bytearray(decompressor.decompress(packed["ft1"]["deltas"][WEIGHT])), dtype=torch.int32
    )
    return F.linear(x_bench, (w_base.view(torch.int32) ^ xor.view(w_base.shape)).view(torch.float32))


rows.append(
    ["notebook: the whole matrix", "", "", "", duration(clock(rebuild_all, REPEATS)), mib(w_base.nbytes)]
)
rows.append(
    [
        "(dense fine-tuned matrix)",
        "",
        "",
        "",
        duration(clock(lambda: F.linear(x_bench, w_tuned), REPEATS)),
        "-",
    ]
)
table([f"{WEIGHT}, 64 rows of x", "decompress", "patch", "forward", "total", "buffer"], rows)

# %% [markdown]
# ## 10. Two tenants in one batch
#
# The notebook shared the base's forward between tenants and added a sparse product for `ff.0.weight` alone, so
# that what came out was neither tenant's answer: attention, `ff.2` and the norms stayed the base's. xorz serves
# *every* weight of each row's own tenant.


# %%
def multitenant_forward_ff0_xor(x: torch.Tensor, names: list[str]) -> list[torch.Tensor]:
    """The notebook's prototype: the base's forward once, `ff.0.weight` as base + sparse difference, one output per tenant."""
    ln1, attention, ln2, ff = dense_base.ln1, dense_base.self_attn, dense_base.ln2, dense_base.ff
    h = ln1(x)
    x1 = x + attention(h, h, h)[0]
    h2 = ln2(x1)
    shared = ff[0](h2)
    flat = h2.reshape(-1, D_MODEL)
    extras = [(differences[n] @ flat.T).T.reshape(shared.shape) for n in names]
    return [x1 + ff[2](ff[1](shared + extra)) for extra in extras]


dense_base = fresh_layer()
dense_base.load_state_dict(base_sd)
# The prototype builds its sparse matrices for every request; here that is not even counted.
differences = {n: (sd[WEIGHT] - w_base).to_sparse_coo().coalesce() for n, sd in tuned_sd.items()}
served.load("ft2", package["ft2"])
x_demo = torch.randn(2, 16, D_MODEL)
names = list(tuned)
truth = torch.cat([tuned[name](x_demo[i : i + 1]) for i, name in enumerate(names)])


def by_rebuilding() -> torch.Tensor:
    """Every tenant rebuilt the notebook's way, for its own row."""
    parts = [(x_demo[i : i + 1], notebook_file[name]) for i, name in enumerate(names)]
    return torch.cat([e2e_forward_from_pkg(base_sd, file, fresh_layer, part)[1] for part, file in parts])


def by_sharing() -> torch.Tensor:
    """The notebook's prototype, each tenant's own row of its output."""
    return torch.cat([y[i : i + 1] for i, y in enumerate(multitenant_forward_ff0_xor(x_demo, names))])


def by_xorz() -> torch.Tensor:
    """One forward, a tenant in each row."""
    with served.use(names):
        return base_layer(x_demo)


def by_dense() -> torch.Tensor:
    """As many dense layers as there are tenants, in memory."""
    return torch.cat([tuned[name](x_demo[i : i + 1]) for i, name in enumerate(names)])


ways = {
    "notebook: rebuild each": by_rebuilding,
    "notebook: shared base, sparse ff.0": by_sharing,
    "xorz: one batch, every weight": by_xorz,
    "(a dense layer each)": by_dense,
}
apart = {way: float((call() - truth).abs().max()) for way, call in ways.items()}
table(
    ["two tenants, 16 tokens each", "seconds", "furthest from the tenant's own answer"],
    [[way, duration(clock(call, 3)), f"{apart[way]:.1e}"] for way, call in ways.items()],
)
assert apart["notebook: rebuild each"] < 1e-4 and apart["xorz: one batch, every weight"] < 1e-4
assert apart["notebook: shared base, sparse ff.0"] > 10 * apart["xorz: one batch, every weight"]

# %% [markdown]
# ## 11. Memory for N tenants
#
# What must be resident for N tenants beside one base: **A** the decompressed XOR, **B** the zstd packages (which
# nobody can compute on), **C** sparse COO with 32- or 64-bit indices, a dense copy each, and xorz. A, B and C are the
# mean of the two tenants times N, as in the notebook; xorz is measured with N tenants loaded, the two by turns, each in
# memory of its own.

# %%
N = 10
for i in range(N - len(names)):
    served.load(f"another{i}", package[names[i % len(names)]])
memory = served.memory()
base_bytes, average = 4 * WORDS, sum(changed.values()) / len(changed)
per_tenant = {
    "a dense copy each": base_bytes,
    "A: decompressed XOR": base_bytes,
    "B: zstd-10 packages": sum(f.stat().st_size for f in notebook_file.values()) / 2,
    "C32: sparse COO": 12 * average,
    "C64: sparse COO": 20 * average,
    "xorz": (memory["deltas"] + memory["copies"]) / N,
}
table(
    ["strategy", "a tenant", f"base + {N} tenants", "computes on it"],
    [
        [name, mib(each), mib(base_bytes + N * each), {"A": "tile by tile", "B": "no"}.get(name[0], "yes")]
        for name, each in per_tenant.items()
    ],
)
counts = (1, 2, 5, 10, 20, 50, 100)
lines = {
    n: [(c, (base_bytes + c * each) / 2**20) for c in counts] for n, each in per_tenant.items() if n[0] != "A"
}
lines = {n.split(":")[0].replace("a dense copy each", "dense, A"): points for n, points in lines.items()}
show(plot.svg([plot.Panel("Weights in memory, base and N tenants", lines)], "tenants", "MiB"), "memory")

# %% [markdown]
# ## Takeaways

# %%
small, large, coo = per_tenant["xorz"], per_tenant["a dense copy each"], per_tenant["C32: sparse COO"]
load_and_forward = fused["t_end_to_end"][2]
bound_a, bound_b = (e2e / t for name, t in answers.items() if name.startswith("bound"))
print("- exact: every bit of both fine-tunes came back, from both packages.")
print(
    f"- a tenant is resident in {mib(small)}, {100 * small / large:.1f} % of a copy; COO takes {coo / small:.1f} times that."
)
print(
    f"- load and forward take {load_and_forward / e2e:.2f} of the notebook's time; the bounds promised {1 / bound_a:.2f} (A)"
)
print(f"  and {1 / bound_b:.2f} (B).")
print(
    f"- a loaded tenant's forward takes {t_fused_warm / t_dense:.2f} times as long as a dense layer's: 64 rows, float32."
)
