"""Peak memory of loading and serving a tenant: ``python benches/memory.py``.

Two fresh processes hold the same synthetic base (layers of 4096x4096 bf16, 3 % changed), then add a tenant: a second
dense model, or a package loaded and served by xorz. Reported is how far the process's resident memory rose above
the base's at its highest (VmHWM, reset before the tenant comes).
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


def status(key: str) -> int:
    """Bytes of a line of this process's status: VmRSS now, VmHWM at the highest."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def reset_peak() -> int:
    """Let the peak start anew; returns what is resident now."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


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
    """Load and serve one way; print the peaks after loading and after serving, and the bytes of the tenant."""
    import xorz

    base = {k: v.clone() for k, v in load_file(folder / "base.safetensors").items()}
    x = torch.randn(8, SIZE).bfloat16()
    for w in base.values():  # both libraries warm, so that only the tenant is counted
        F.linear(x, w)
    start = reset_peak()
    if what == "dense":
        tenant = load_file(folder / "fine_tuned.safetensors")
    else:
        tenant = xorz.load_deltas(base, folder / "tenant.xorz", prefer="speed")
    loaded = status("VmHWM") - start
    for name, w in base.items():
        if what == "dense":
            F.linear(x, tenant[name])
        else:
            torch.ops.xorz.delta_linear(x, w, None, tenant[name])
    print(loaded, status("VmHWM") - start, sum(t.numel() * t.element_size() for t in tenant.values()))


def main() -> None:
    """Run the processes and print the differences."""
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
        mib = 1 << 20
        package = (pathlib.Path(folder) / "tenant.xorz").stat().st_size
        print(
            f"base: {args.layers} layers of {SIZE}x{SIZE} bf16, {args.layers * SIZE * SIZE * 2 / mib:.0f} MiB"
        )
        print(f"package: {package / mib:.1f} MiB")
        for what in ("dense", "xorz"):
            command = [sys.executable, __file__, "--child", what, folder]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            loaded, served, size = (int(v) / mib for v in done.stdout.split())
            print(
                f"{what:>6}: tenant {size:.1f} MiB; peak above the base: loading {loaded:.1f}, serving {served:.1f} MiB"
            )


if __name__ == "__main__":
    main()
