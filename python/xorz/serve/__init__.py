"""Whole models that serve many tenants: `xorz.attach` and what it is made of."""
