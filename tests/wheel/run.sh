#!/bin/sh
# Promise: the source archive alone, outside any git tree, becomes a working install: `pip install .` with build isolation in
# a clean environment gives the ops, the library with the CUDA kernels and the command, and the same files as the wheel that
# the tree builds. Minutes, and 15 GB of disk for a while: pip fetches torch twice (for the build and for the environment; its cache is used).
# XORZ_WHEEL_PYTHON: another interpreter for the clean environment.
set -eu
cd "$(dirname "$0")/../.."
PY=$PWD/${PY:-.venv/bin/python}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
pip_options="--disable-pip-version-check --quiet"

check() {
  ( cd "$tmp"
    version=$(venv/bin/xorz --version)
    echo "$1: $version"
    # torch without numpy, which xorz does not need, says so.
    venv/bin/python -W error -W "ignore:Failed to initialize NumPy" - "$version" << 'CHECK'
import subprocess, sys, sysconfig
from importlib import metadata
from pathlib import Path

import torch
import xorz

assert Path(xorz.__file__).is_relative_to(sys.prefix), xorz.__file__
assert sys.argv[1] == f"xorz {xorz.__version__}" == f"xorz {metadata.version('xorz')}", sys.argv
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    base, x = torch.randn(64, 96).to(dtype), torch.randn(5, 96).to(dtype)
    tuned = torch.where(torch.rand(64, 96) < 0.05, base * 1.01, base)
    delta = xorz.delta_encode(base, tuned)
    assert torch.equal(xorz.delta_restore(base, delta), tuned)
    y = xorz.delta_linear(x, base, delta, mode="exact")
    assert torch.equal(y, torch.nn.functional.linear(x, tuned))
    xorz.pack({"w": base}, {"w": tuned}, "a.xorz")
    assert torch.equal(xorz.restore({"w": base}, "a.xorz")["w"], tuned)
command = Path(sysconfig.get_path("scripts")) / "xorz"
assert "w" in subprocess.run([command, "inspect", "a.xorz"], capture_output=True, text=True, check=True).stdout
print(f"torch {torch.__version__}, Python {sys.version.split()[0]}: ops, package and command work")
CHECK
  )
}

files() {  # what an installed xorz consists of
  "$tmp/venv/bin/python" -c "
from importlib import metadata
names = {str(f) for f in metadata.files('xorz')}
print(*sorted(n for n in names if '__pycache__' not in n and not n.endswith(('direct_url.json', 'REQUESTED'))), sep='\n')"
}

"$PY" -c 'import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])' "$tmp/sdist" > /dev/null
mkdir "$tmp/source"
tar -xzf "$tmp"/sdist/xorz-*.tar.gz -C "$tmp/source" --strip-components=1
"${XORZ_WHEEL_PYTHON:-python3}" -m venv "$tmp/venv"
began=$(date +%s)
( cd "$tmp/source" && "$tmp/venv/bin/python" -m pip install $pip_options . )
echo "pip install . with build isolation: $(($(date +%s) - began)) s"
check "from the source archive"
# nvcc was fetched, if none was there, and the kernels are in it.
"$PY" tests/wheel/fatbin_images.py "$("$tmp/venv/bin/python" -c 'import xorz; print(xorz.library_path)')"
"$tmp/venv/bin/python" -m pip check
files > "$tmp/from-sdist"

PATH="$(dirname "$PY"):$PATH" "$PY" -m pip wheel $pip_options --no-build-isolation --no-deps -w "$tmp/wheel" .
case $(ls "$tmp/wheel") in
  xorz-*-py3-none-linux_x86_64.whl) ;;
  *) echo "test-wheel: the wheel is called $(ls "$tmp/wheel")" >&2; exit 1 ;;
esac
"$PY" tests/wheel/fatbin_images.py "$tmp"/wheel/*.whl
"$tmp/venv/bin/python" -m pip install $pip_options --no-deps --force-reinstall "$tmp"/wheel/*.whl
check "from the wheel"
files > "$tmp/from-wheel"
diff "$tmp/from-sdist" "$tmp/from-wheel"
echo "test-wheel: $(wc -l < "$tmp/from-wheel") files from both, $(ls "$tmp/wheel") of $(($(cat "$tmp"/wheel/*.whl | wc -c) / 1024)) KiB"
