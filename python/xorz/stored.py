"""The old place of names in checkpoints; it is `xorz.serve.stored` now."""

from .serve.stored import Experts, Stored, stored

__all__ = ["Experts", "Stored", "stored"]
