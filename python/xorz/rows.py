"""The old place of maps of rows; it is `xorz.serve.rows` now."""

from .serve.rows import BASE, Active, RowMap, lasting

__all__ = ["BASE", "Active", "RowMap", "lasting"]
