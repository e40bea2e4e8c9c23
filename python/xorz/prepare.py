"""The old place of what a tenant needs; it is `xorz.serve.prepare` now."""

from .serve.prepare import LARGEST_COPY, SMALL, Prepared, prepare

__all__ = ["LARGEST_COPY", "SMALL", "Prepared", "prepare"]
