"""Small line charts as one self-contained SVG, without a plotting library: panels in a grid, both axes
logarithmic.

Meant to be read on paper too: lines differ in dash and are labelled at their ends, so colour carries nothing
alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 430, 300, 58, 84, 38, 44
STYLES = {
    "xorz": ("#0b6e4f", ""),
    "one": ("#7a7a7a", "2 3"),
    "one32": ("#7a7a7a", "6 3"),
    "each": ("#c1440e", "2 3"),
    "each32": ("#c1440e", "6 3"),
    "determ": ("#0b6e4f", "2 3"),
    "exact": ("#0b6e4f", "6 3"),
    "csr": ("#2f5d8a", "8 2 2 2"),
    "scatter": ("#8a5a9e", "4 4"),
    "notebook": ("#9a7b0c", "1 3"),
}
OTHERS = (
    ("#2f5d8a", "8 2 2 2"),
    ("#c1440e", "6 3"),
    ("#8a5a9e", "4 4"),
    ("#9a7b0c", "1 3"),
    ("#7a7a7a", "2 3"),
)
"""For series of other names, by turns."""


class Panel(NamedTuple):
    """One chart: for each series its points (x, y), both above 0."""

    title: str
    series: dict[str, list[tuple[float, float]]]


def _ticks(low: float, high: float, base: float) -> list[float]:
    """Powers of `base` within the range; 1, 2, 5 steps where a decimal range is short."""
    first, last = math.floor(math.log(low, base)), math.ceil(math.log(high, base))
    steps = (1, 2, 5) if base == 10 and last - first <= 3 else (1,)
    found = [s * base**p for p in range(first, last + 1) for s in steps]
    return [t for t in found if low * 0.999 <= t <= high * 1.001]


def _apart(wanted: list[tuple[float, str]], least: float) -> list[tuple[float, float, str]]:
    """(place wanted, place given, label): neighbours push each other away until none covers another."""
    order = sorted(wanted)
    given = [y for y, _ in order]
    for _ in range(100):
        for i in range(1, len(given)):
            short = least - (given[i] - given[i - 1])
            if short > 0:
                given[i - 1], given[i] = given[i - 1] - short / 2, given[i] + short / 2
    return [(y, at, name) for (y, name), at in zip(order, given, strict=True)]


def _panel(panel: Panel, x_label: str, y_label: str) -> str:
    points = [p for line in panel.series.values() for p in line]
    if not points:
        return f'<text x="{LEFT}" y="{TOP}">{escape(panel.title)}: nothing measured</text>'
    (x0, x1), (y0, y1) = ((min(v), max(v)) for v in zip(*points, strict=True))
    # A single point still has an axis around it.
    x0, x1 = (x0 / 2, x1 * 2) if x0 == x1 else (x0, x1)
    y0, y1 = y0 / 1.3, y1 * 1.3

    def at(x: float, y: float) -> tuple[float, float]:
        across = math.log(x / x0) / math.log(x1 / x0)
        up = math.log(y / y0) / math.log(y1 / y0)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    out = [f'<text x="{LEFT}" y="20" class="title">{escape(panel.title)}</text>']
    for tick in _ticks(y0, y1, 10):
        y = at(x0, tick)[1]
        out.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/>')
        out.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in _ticks(x0, x1, 2):
        x = at(tick, y0)[0]
        out.append(f'<path class="grid" d="M{x:.1f} {TOP}V{bottom}"/>')
        out.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{tick:g}</text>')
    out.append(f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{right}"/>')
    middle = (LEFT + right) / 2
    out.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
    out.append(
        f'<text transform="translate(14 {(TOP + bottom) / 2}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )
    ends = []
    styles = {name: STYLES.get(name, OTHERS[i % len(OTHERS)]) for i, name in enumerate(panel.series)}
    for name, line in panel.series.items():
        colour, dash = styles[name]
        placed = [at(*p) for p in sorted(line)]
        drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        width = 2.6 if name == "xorz" else 1.6
        out.append(
            f'<polyline points="{drawn}" stroke="{colour}" stroke-width="{width}" stroke-dasharray="{dash}"/>'
        )
        out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.4" fill="{colour}"/>' for x, y in placed]
        ends.append((placed[-1][1], name))
    for y, given, name in _apart(ends, 14):
        colour = styles[name][0]
        out.append(f'<path d="M{right + 4} {y:.1f}L{right + 13} {given:.1f}" stroke="{colour}"/>')
        style = f'class="name" style="fill:{colour}"'
        out.append(f'<text x="{right + 16}" y="{given + 4:.1f}" {style}>{escape(name)}</text>')
    return "".join(out)


def svg(panels: Sequence[Panel], x_label: str, y_label: str, note: str = "") -> str:
    """The panels, two in a row, with a note below, as the text of an SVG file."""
    columns = min(2, max(1, len(panels)))
    rows = -(-len(panels) // columns)
    width, height = columns * WIDTH, rows * HEIGHT + (26 if note else 0)
    body = "".join(
        f'<g transform="translate({i % columns * WIDTH} {i // columns * HEIGHT})">{_panel(p, x_label, y_label)}</g>'
        for i, p in enumerate(panels)
    )
    if note:
        body += f'<text x="{LEFT}" y="{height - 10}" class="note">{escape(note)}</text>'
    style = (
        "text{font:12px sans-serif;fill:#222}.title{font-weight:bold;font-size:13px}.name{font-weight:bold}"
        ".note{font-size:11px;fill:#555}.grid{stroke:#e3e3e3;fill:none}.axis{stroke:#222;fill:none}"
        "polyline{fill:none;stroke-linejoin:round}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img"><style>{style}</style><rect width="100%" height="100%" fill="#fff"/>{body}</svg>\n'
    )
