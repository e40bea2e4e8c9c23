"""The old place of `Tenants`; it is `xorz.serve.tenants` now."""

from .serve.tenants import Tenants

__all__ = ["Tenants"]
