"""Where the native library and its header are, and loading it once. Knows nothing of the ops it brings."""

import ctypes
from pathlib import Path

import torch

library_path = Path(__file__).with_name("libxorz_torch.so")
"""The library with the ops and the C ABI; pass it to `torch.ops.load_library` where this package is not imported."""

include_path = Path(__file__).with_name("include")
"""The folder with the header of the C ABI, `xorz.h`."""


def load() -> ctypes.CDLL:
    """Register the ops in torch, unless this process has them already, and give the C ABI."""
    if not library_path.is_file():
        raise ImportError(
            f"xorz: {library_path} is missing; install the package, or run `make build` in its source tree"
        )
    if not hasattr(torch.ops.xorz, "delta_linear"):
        try:
            torch.ops.load_library(library_path)
        except OSError as error:
            # torch's own message stops at the path; the linker's, which says why, is the cause.
            raise ImportError(
                f"xorz: torch {torch.__version__} cannot load {library_path}: {error.__cause__ or error}; "
                "build xorz anew on this machine (`make build` or `pip install .` in its source tree)"
            ) from error
    return ctypes.CDLL(str(library_path))
