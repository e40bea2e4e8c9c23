"""The old place of `xorz.attach`; it is `xorz.serve.attach` now."""

from .serve.attach import FLATTENING, attach

__all__ = ["FLATTENING", "attach"]
