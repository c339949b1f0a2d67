"""Maps of the loss over planes, with a common colour scale for all models."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emomerge.reporting import labels
from emomerge.reporting.figure import HALF, NARROW, WIDE, Figure, Row, chart_of, filled, painted
from emomerge.reporting.kinds import SYMBOLS, kind_of
from emomerge.reporting.palette import STEPS, colour_of
from emomerge.reporting.text import short, unit
from emomerge.results import Point, Results, Surface

Array = NDArray[np.float64]
PIXELS = 4
"""Approximate size in pixels of the rectangles to which the loss is interpolated between measured points."""
DIVERGED = "grid"
"""Palette colour for points where the loss was not finite."""
GAP = 0.06
"""Gap between two maps, as a fraction of a map's size."""


@dataclass(frozen=True)
class Map:
    """A loss over a rectangle: x (columns,) and y (rows,), evenly spaced, ascending; loss (rows, columns), NaN if diverged."""

    x: Array
    y: Array
    loss: Array

    @classmethod
    def of(cls, held: Surface) -> Map | None:
        """Return a measured surface as a map; None if it lacks points."""
        x, y, loss = held.x, held.y, held.loss
        if len(x) < 2 or len(y) < 2 or len(loss) != len(y) or any(len(row) != len(x) for row in loss):
            return None
        made = cls(np.array(x, float), np.array(y, float), np.array(loss, float))  # None becomes NaN
        return made if made.x[0] < made.x[-1] and made.y[0] < made.y[-1] and np.isfinite(made.loss).any() else None

    def bands(self, levels: Sequence[float], width: int) -> list[Row]:
        """Return rectangles of one colour step each, in fractions of the map; they overlap so that no seams show.

        The loss is interpolated linearly to a finer grid, in whose rows neighbours of equal step are joined. `width` is that of
        the map in pixels.
        """
        fine_by = max(1, round(width / PIXELS / (len(self.x) - 1)))
        columns, rows = ((len(axis) - 1) * fine_by for axis in (self.x, self.y))
        across, up = ((np.arange(n) + 0.5) / fine_by for n in (columns, rows))
        wide = np.array([np.interp(across, np.arange(len(self.x)), row) for row in self.loss])
        fine = np.array([np.interp(up, np.arange(len(self.y)), column) for column in wide.T]).T
        steps = np.where(np.isfinite(fine), np.searchsorted(levels, fine), -1)
        found: list[Row] = []
        for j, row in enumerate(steps):
            start = 0
            for step, run in groupby(row.tolist()):
                end = start + len(list(run))
                found.append(
                    {
                        "x": _share(start, columns), "x2": _share(min(end + 1, columns), columns),
                        "y": _share(j, rows), "y2": _share(min(j + 2, rows), rows),
                        "step": DIVERGED if step < 0 else STEPS[step],
                    }
                )  # fmt: skip
                start = end
        return found

    def place(self, row: Row) -> Row:
        """Convert a row's fractions of the map to coordinates, to five digits."""

        def on(axis: Array, share: float) -> float:
            return float(f"{axis[0] + share * np.ptp(axis):.5g}")

        return {k: on(self.x if k[0] == "x" else self.y, v) if k in ("x", "x2", "y", "y2") else v for k, v in row.items()}


def plane(results: Results) -> Figure | None:
    """Draw the loss over the plane through base, merge and best single run."""
    held = results.plane
    found = Map.of(held) if held else None
    if held is None or found is None:
        return None
    points, edges = _points(results, held.points, found), levels([found])
    bands = [found.place(band) for band in found.bands(edges, WIDE)]
    x, y = (float(np.ptp(axis)) for axis in (found.x, found.y))
    at, low = np.unravel_index(int(np.nanargmin(found.loss)), found.loss.shape), float(np.nanmin(found.loss))
    split = results.probe.data if results.probe else "train"
    names = ", ".join(p["name"] for p in points)
    caption = (
        f"The {split} loss over the plane through {names or 'three models'}, measured at {len(found.x)} × {len(found.y)} "
        "points and interpolated between them; fainter is lower. Axes: distance between weights. Each colour step multiplies "
        "the rise above the lowest loss. The map shows nothing outside this plane."
    ) + _about_divergence([found])
    where = f"({short(found.x[at[1]])}, {short(found.y[at[0]])})"
    return Figure(
        "The plane through base, merge and best run",
        caption,
        f"Map of the loss over a plane. The lowest measured loss is {short(low)} {unit(results)}, at {where}.",
        _draw_plane(found, bands, edges, points, unit(results), WIDE, _between(WIDE * y / x, 260, 460)),
        _draw_plane(found, bands, edges, points, unit(results), NARROW, _between(NARROW * y / x, 220, 400)),
    )


def surfaces(results: Results) -> Figure | None:
    """Draw filter-normalised loss surfaces around several models, with a common colour scale."""
    maps = {name: found for name, held in results.surfaces.items() if (found := Map.of(held)) is not None}
    if not maps:
        return None
    edges = levels(list(maps.values()))
    bands = {name: found.bands(edges, HALF) for name, found in maps.items()}
    colours = {row.name: colour_of(row) for row in results.artefacts}
    reach = short(max(float(np.abs(m.x).max()) for m in maps.values()))
    caption = (
        f"The loss around {' and '.join(maps)} (at the crosses), on a common scale, along two random directions whose filters "
        f"have the norms of the model's filters, up to {reach} of these norms either way (Li et al. 2018). The wider the faint "
        "centre, the flatter. These are two of very many directions: an illustration, not evidence, and one that favours "
        "models with small weights."
    ) + _about_divergence(list(maps.values()))
    lows = ", ".join(
        f"{name} {short(float(np.nanmin(m.loss)))} to {short(float(np.nanmax(m.loss)))}" for name, m in maps.items()
    )
    return Figure(
        "The surroundings" if len(maps) > 1 else f"The surroundings of {next(iter(maps))}",
        caption,
        f"Maps of the loss around {len(maps)} models, lowest to highest {unit(results)}: {lows}.",
        _draw_surfaces(bands, edges, colours, unit(results), WIDE, 2),
        _draw_surfaces(bands, edges, colours, unit(results), NARROW, 1),
    )


def levels(maps: Sequence[Map]) -> list[float]:
    """Return the boundaries between colour steps: rises above the lowest loss, each a fixed multiple of the previous one.

    They cover the range from the lowest twentieth of all points to the highest tenth, rounded to the digits shown in the
    legend.
    """
    losses = np.concatenate([m.loss[np.isfinite(m.loss)] for m in maps])
    low = float(losses.min())
    first, last = np.quantile(losses - low, [0.05, 0.9])
    if last <= 0:
        return [low]
    edges = low + np.geomspace(max(first, last / 500), last, len(STEPS) - 1)
    digits = next((d for d in range(3, 8) if len({f"{edge:.{d}g}" for edge in edges}) == len(edges)), 8)
    return [float(f"{edge:.{digits}g}") for edge in edges]


def _share(part: int, whole: int) -> float:
    return round(part / whole, 4)


def _between(value: float, low: int, high: int) -> int:
    return round(min(max(value, low), high)) if math.isfinite(value) else high


def _about_divergence(maps: Sequence[Map]) -> str:
    return "" if all(np.isfinite(m.loss).all() for m in maps) else " Grey: the loss diverged."


def _points(results: Results, held: Sequence[Point], found: Map) -> list[Row]:
    """Return the named points in fractions of the map, with their usual symbols and colours."""
    by_name = {row.name: row for row in results.artefacts}
    points = []
    for point in held:
        row = by_name.get(point.name)
        x, y = (float((v - axis[0]) / np.ptp(axis)) for v, axis in ((point.x, found.x), (point.y, found.y)))
        look = {"kind": kind_of(row), "colour": colour_of(row)} if row else {"kind": "control", "colour": "other"}
        points.append({"name": point.name, "x": x, "y": y, **look})
    return points


def _scale(low: float, high: float) -> Any:
    import altair as alt

    return alt.Scale(domain=[low, high], nice=False, zero=False)


def _bands(rows: Sequence[Row], edges: Sequence[float], in_unit: str, x: Any, y: Any, *, narrow: bool) -> Any:
    """Draw the coloured rectangles and a legend of their steps."""
    import altair as alt

    digits = max(len(f"{edge:g}".replace(".", "").lstrip("0")) for edge in edges)
    printed = [f"{edge:#.{digits}g}".rstrip(".") for edge in edges]
    texts = [*(f"≤ {edge}" for edge in printed), f"> {printed[-1]}"]
    named = {**dict(zip(STEPS, texts, strict=False)), DIVERGED: "diverged"}
    present = [step for step in named if any(r["step"] == step for r in rows)]
    legend = alt.Legend(
        title=f"loss ({in_unit})", orient="top" if narrow else "right", columns=3 if narrow else 1, values=present,
        labelExpr=f"({json.dumps(named)})[datum.value]", symbolType="square", symbolSize=180, symbolStrokeWidth=0,
    )  # fmt: skip
    fill = alt.Fill(**{**filled("step").to_dict(), "legend": legend})
    return chart_of(rows).mark_rect().encode(x=x, x2="x2:Q", y=y, y2="y2:Q", fill=fill)


def _draw_plane(
    found: Map, bands: Sequence[Row], edges: Sequence[float], points: Sequence[Row], in_unit: str, width: int, height: int
) -> Any:
    import altair as alt

    narrow = width < 400
    ticks = alt.Axis(title="distance along the line from base to merge", grid=False, tickCount=4 if narrow else 8)
    x = alt.X("x:Q", scale=_scale(found.x[0], found.x[-1]), axis=ticks)
    y = alt.Y("y:Q", scale=_scale(found.y[0], found.y[-1]), axis=alt.Axis(title="distance from it", grid=False, tickCount=5))
    layers = [_bands(bands, edges, in_unit, x, y, narrow=narrow)]
    if points:
        layers += _named([found.place(p) for p in _labelled(points, width, height)], x, y)
    return alt.layer(*layers).properties(width=width, height=height)


def _labelled(points: Sequence[Row], width: int, height: int) -> list[Row]:
    """Return the points with positions for their names."""
    spots = [(p["x"] * width, (1 - p["y"]) * height) for p in points]
    places = labels.place(spots, [p["name"] for p in points], width, height)
    return [
        {**p, "shown": o is not None} | ({} if o is None else {"dx": o.dx, "dy": o.dy, "align": o.align})
        for p, o in zip(points, places, strict=True)
    ]


def _named(points: Sequence[Row], x: Any, y: Any) -> list[Any]:
    import altair as alt

    base = next((p for p in points if p["kind"] == "base"), None)
    vectors = [] if base is None else [{"x": base["x"], "y": base["y"], "x2": p["x"], "y2": p["y"]} for p in points]
    joins = chart_of(vectors, "ink").mark_rule(strokeDash=[2, 3], opacity=0.6)
    layers = [joins.encode(x=x, y=y, x2="x2:Q", y2="y2:Q", color=painted())]
    tooltip = [alt.Tooltip("name:N", title="model"), *(alt.Tooltip(f"{c}:Q", format=".4g") for c in "xy")]
    for point in points:
        kind = SYMBOLS[point["kind"]]
        mark = chart_of([point]).mark_point(filled=True, shape=kind.shape, size=kind.area, opacity=1)
        layers.append(mark.encode(x=x, y=y, color=painted(), tooltip=tooltip))
    look = {
        "dx": alt.ExprRef("datum.dx"),
        "dy": alt.ExprRef("datum.dy"),
        "align": alt.ExprRef("datum.align"),
        "baseline": "middle",
    }
    halo = chart_of(points, "paper").transform_filter("datum.shown")
    halo = halo.mark_text(**look, strokeWidth=4, strokeJoin="round", fillOpacity=0, strokeOpacity=0.85)
    names = chart_of(points, "ink").transform_filter("datum.shown").mark_text(**look)
    paint = alt.Stroke(**painted().to_dict())
    return [*layers, halo.encode(x=x, y=y, text="name:N", stroke=paint), names.encode(x=x, y=y, text="name:N", color=painted())]


def _draw_surfaces(
    maps: Mapping[str, Sequence[Row]],
    edges: Sequence[float],
    colours: Mapping[str, str],
    in_unit: str,
    width: int,
    columns: int,
) -> Any:
    """Draw maps side by side in one plot, because charts of several plots do not adapt to the page's width."""
    import altair as alt

    columns = min(columns, len(maps))
    lines = math.ceil(len(maps) / columns)
    title = 0.1  # room above each map for its name, as a fraction of the map
    right, top = columns * (1 + GAP) - GAP, lines * (1 + title)
    x = alt.X("x:Q", scale=_scale(0, right), axis=None)
    y = alt.Y("y:Q", scale=_scale(0, top), axis=None)
    layers, names = [], []
    for number, (name, rows) in enumerate(maps.items()):
        left, below = (number % columns) * (1 + GAP), top - (number // columns + 1) * (1 + title)
        bands = _bands(rows, edges, in_unit, x, y, narrow=width < 400)
        moved = {k: f"datum.{k} + {left if k[0] == 'x' else below}" for k in ("x", "x2", "y", "y2")}
        layers.append(bands.transform_calculate(**moved))
        middle = {"x": left + 0.5, "y": below + 0.5}
        names.append({"name": name, "left": left, "top": below + 1, "colour": colours.get(name, "ink"), **middle})
    text = chart_of(names).mark_text(align="left", baseline="bottom", dy=-5, fontSize=13)
    layers += [
        chart_of(names, "ink").mark_point(shape="cross", filled=True, size=45, opacity=0.8).encode(x=x, y=y, color=painted()),
        text.encode(
            x=alt.X("left:Q", scale=_scale(0, right)), y=alt.Y("top:Q", scale=_scale(0, top)), text="name:N", color=painted()
        ),
    ]
    return alt.layer(*layers).properties(width=width, height=round(width * top / right))
