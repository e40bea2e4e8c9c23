"""The old place of the arena of deltas; it is `xorz.serve.arena` now."""

from .serve.arena import ALIGN, Arena

__all__ = ["ALIGN", "Arena"]
