"""Peak memory of loading and serving a tenant: ``python benches/memory.py``.

Three fresh processes over the same synthetic model (layers of 4096x4096 bf16, 3 % changed): the base alone, a
second dense model beside it, and base + delta by xorz. Reported is the process's peak resident memory (VmHWM)
beyond the base's own.
"""

from __future__ import annotations

import argparse
import pathlib
import subprocess
import sys
import tempfile

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

SIZE = 4096


def peak() -> int:
    """Peak resident bytes of this process."""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def make(folder: pathlib.Path, layers: int) -> None:
    """Write base, fine-tune and package."""
    import xorz

    generator = torch.Generator().manual_seed(0)
    base, fine_tuned = {}, {}
    for i in range(layers):
        w = (torch.randn(SIZE, SIZE, generator=generator) * 0.02).bfloat16()
        move = (torch.rand(w.shape, generator=generator) < 0.03).short()
        base[f"layers.{i}.weight"], fine_tuned[f"layers.{i}.weight"] = (
            w,
            (w.view(torch.int16) + move).view(w.dtype),
        )
    save_file(base, folder / "base.safetensors")
    save_file(fine_tuned, folder / "fine_tuned.safetensors")
    xorz.pack(base, fine_tuned, folder / "tenant.xorz")


def child(what: str, folder: pathlib.Path) -> None:
    """Load and serve one way, and print the peak."""
    base = {k: v.clone() for k, v in load_file(folder / "base.safetensors").items()}
    x = torch.randn(8, SIZE).bfloat16()
    if what == "dense":
        tenant = {k: v.clone() for k, v in load_file(folder / "fine_tuned.safetensors").items()}
        for w in tenant.values():
            F.linear(x, w)
    if what == "xorz":
        import xorz

        deltas = xorz.load_deltas(base, folder / "tenant.xorz", prefer="speed")
        loaded = peak()
        for name, w in base.items():
            torch.ops.xorz.delta_linear(x, w, None, deltas[name])
        print(loaded, sum(d.numel() for d in deltas.values()), end=" ")
    if what == "base":
        for w in base.values():
            F.linear(x, w)
    print(peak())


def main() -> None:
    """Run the three processes and print the differences."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--child", nargs=2)
    args = parser.parse_args()
    if args.child:
        with torch.inference_mode():
            child(args.child[0], pathlib.Path(args.child[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        make(pathlib.Path(folder), args.layers)
        got = {}
        for what in ("base", "dense", "xorz"):
            command = [sys.executable, __file__, "--child", what, folder]
            got[what] = [
                int(v)
                for v in subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            ]
        loaded, deltas, served = got["xorz"]
        base = got["base"][0]
        package = (pathlib.Path(folder) / "tenant.xorz").stat().st_size
        mib = 1 << 20
        print(
            f"{args.layers} layers of {SIZE}x{SIZE} bf16: base {args.layers * SIZE * SIZE * 2 / mib:.0f} MiB"
        )
        print(f"  a second dense model: peak {(got['dense'][0] - base) / mib:+.0f} MiB")
        print(f"  xorz: package {package / mib:.1f} MiB, resident deltas {deltas / mib:.1f} MiB")
        print(f"  xorz: peak after loading {(loaded - base) / mib:+.0f} MiB")
        print(f"  xorz: peak after serving {(served - base) / mib:+.0f} MiB")


if __name__ == "__main__":
    main()
