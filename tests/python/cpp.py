"""The C++ program that serves saved modules (examples/serve.cpp), as `make` builds it. No promise is tested here."""

import functools
import os
import pathlib
import subprocess

import xorz

ROOT = pathlib.Path(__file__).parents[2]


@functools.cache
def program() -> pathlib.Path:
    """The program, built now if its source is newer: half a minute."""
    subprocess.run(["make", "--silent", "build/serve/serve"], cwd=ROOT, check=True, timeout=600)
    return ROOT / "build/serve/serve"


def serve(module, inputs, outputs, *, library=xorz.library_path, env=None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [program(), library, module, inputs, outputs],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **(env or {})},
    )
