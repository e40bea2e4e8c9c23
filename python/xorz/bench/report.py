"""What the benchmark prints: one line of text per measured product."""

from __future__ import annotations

from typing import Any

from .products import RATIOS

HEADER = (
    f"{'shape':>11} {'dtype':>8} {'changed':>14} {'encoding':>9} {'bits':>6} {'T':>3} {'m':>5} {'xorz ms':>8} {'roof%':>5} "
    + " ".join(f"{name:>8}" for name in RATIOS)
)


def _ratios(row: dict[str, Any]) -> str:
    return " ".join(f"{row[name]:>8.2f}" if name in row else f"{'-':>8}" for name in RATIOS)


def line(row: dict[str, Any]) -> str:
    """The line of one measured product."""
    return (
        f"{row['shape']:>11} {row['dtype']:>8} {row['what']:>14} {row['encoding']:>9} {row['bits']:>6.2f} {row['T']:>3} "
        f"{row['m']:>5} {row['ms']['xorz']:>8.2f} {100 * row['roof']:>5.0f} {_ratios(row)}"
    )


def total(row: dict[str, Any]) -> str:
    """All linear layers of a model, one row of x per tenant."""
    return f"{'all layers':>11} {'':>40} {row['T']:>3} {row['T']:>5} {row['ms']['xorz']:>8.2f} {'':>5} {_ratios(row)}"
