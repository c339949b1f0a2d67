"""Place labels so that they overlap neither each other nor the points they name. Pure geometry, in pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

POINT = 7.0
"""Half the side of the square that is kept free around a point."""
LINE = 14.0
"""Height of a line of text in the figures' 11-pixel type."""


Line = tuple[float, float, float, float]
"""A line segment: x and y of one end, x and y of the other."""


class Offset(NamedTuple):
    """The position of a label relative to its point; `align` is the edge of the text that is positioned."""

    dx: float
    dy: float
    align: str

    @property
    def far(self) -> bool:
        """Whether the label needs a leader line to its point."""
        return math.hypot(self.dx, self.dy) > 20


class Box(NamedTuple):
    """A rectangle; y grows downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        """Return whether two rectangles overlap."""
        return self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom


def text_width(text: str) -> float:
    """Return the approximate width of 11-pixel sans-serif text."""
    return sum(3.4 if c in "iljtfr|.,'-() " else 9.2 if c in "mwMW@" else 6.4 for c in text) + 2


def place(
    points: Sequence[tuple[float, float]],
    texts: Sequence[str],
    width: float,
    height: float,
    bars: Sequence[Box] = (),
    lines: Sequence[Line] = (),
) -> list[Offset | None]:
    """Return an offset for each label, with priority to earlier ones; None if no position is free.

    Each label takes the cheapest free candidate around its point; then every label chooses again with the others in place.
    Labels stay within width × height, never cover a point or another label, and avoid error bars and lines where
    possible.
    """
    keep = [Box(x - POINT, y - POINT, x + POINT, y + POINT) for x, y in points]
    chosen: list[Offset | None] = [None] * len(points)
    for _ in range(3):
        for i, (point, text) in enumerate(zip(points, texts, strict=True)):
            others = [(j, o) for j, o in enumerate(chosen) if o is not None and j != i]
            boxes = [_box(points[j], texts[j], o) for j, o in others]
            leads = [_leader(points[j], o) for j, o in others if o.far]
            best: tuple[float, Offset] | None = None
            for cost, offset in CANDIDATES:
                if best is not None and cost >= best[0]:
                    break
                box = _box(point, text, offset)
                inside = box.left >= 0 and box.right <= width and box.top >= 0 and box.bottom <= height
                if not inside or any(box.meets(b) for b in boxes) or any(box.meets(k) for k in keep):
                    continue
                lead = _leader(point, offset)
                cost += 25 * (sum(box.meets(b) for b in bars) + sum(_crosses(line, box) for line in lines))
                cost += 40 * sum(_crosses(line, box) for line in leads)
                if offset.far:
                    cost += 40 * sum(_crosses(lead, k) for j, k in enumerate(keep) if j != i)
                    cost += 40 * sum(_crosses(lead, b) for b in boxes)
                if best is None or cost < best[0]:
                    best = (cost, offset)
            chosen[i] = best[1] if best else None
    return chosen


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return positions moved as little as needed to lie at least `gap` apart within low…high, in the same order.

    If there is too little room, the gap shrinks as needed.
    """
    if not positions:
        return []
    order = sorted(range(len(positions)), key=lambda i: (positions[i], i))
    gap = min(gap, (high - low) / max(len(order) - 1, 1))
    clusters: list[tuple[float, int]] = []  # (middle, size): neighbours that touch move as one
    for i in order:
        middle, size = positions[i], 1
        while True:
            middle = min(max(middle, low + gap * (size - 1) / 2), high - gap * (size - 1) / 2)
            if not clusters or middle - clusters[-1][0] >= gap * (size + clusters[-1][1]) / 2 - 1e-9:
                break
            before, count = clusters.pop()
            middle, size = (before * count + middle * size) / (count + size), size + count
        clusters.append((middle, size))
    placed = [middle + gap * (k - (size - 1) / 2) for middle, size in clusters for k in range(size)]
    return [y for _, y in sorted(zip(order, placed, strict=True))]


def _candidates() -> list[tuple[float, Offset]]:
    """Return (cost, offset) candidates around a point, cheapest first: near before far, right before left."""
    sides = (
        (1, 0, 0.0),
        (-1, 0, 2.0),
        (0, -1, 3.0),
        (0, 1, 3.5),
        (0.8, -0.8, 1.0),
        (0.8, 0.8, 1.5),
        (-0.8, -0.8, 3.0),
        (-0.8, 0.8, 3.5),
    )
    found = []
    for radius in (10, 15, 22, 30, 40, 52, 66, 82, 100):
        for ux, uy, preference in sides:
            align = "left" if ux > 0 else "right" if ux < 0 else "center"
            found.append((preference + 1.2 * (radius - 10), Offset(ux * radius, uy * (radius + (2 if ux == 0 else 0)), align)))
    return sorted(found)


CANDIDATES = _candidates()


def _box(point: tuple[float, float], text: str, offset: Offset) -> Box:
    x, y, width = point[0] + offset.dx, point[1] + offset.dy, text_width(text)
    left = x - {"left": 0.0, "center": width / 2, "right": width}[offset.align]
    return Box(left, y - LINE / 2, left + width, y + LINE / 2)


def _leader(point: tuple[float, float], offset: Offset) -> Line:
    return (*point, point[0] + offset.dx, point[1] + offset.dy)


def _crosses(line: Line, box: Box) -> bool:
    """Return whether a segment passes through a box, tested at sixteen of its points."""
    x0, y0, x1, y1 = line
    steps = [k / 16 for k in range(17)]
    return any(box.left < x0 + t * (x1 - x0) < box.right and box.top < y0 + t * (y1 - y0) < box.bottom for t in steps)
