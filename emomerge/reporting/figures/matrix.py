"""Matrix figures over pairs of models: cosines between task vectors, loss barriers between weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from emomerge.reporting.figure import HALF, Figure, Row, chart_of, filled, painted
from emomerge.reporting.text import decimals, fixed, percent, short, unit
from emomerge.results import Results

ROOMY, READABLE = 8, 14
"""Maximum numbers of runs for two numbers per cell and for one; with more runs, cells show only colour."""
NO_BARRIER = 0.01
"""Barriers far below this many nats stay pale regardless of their ratios: runs with other seeds differ by more."""


def cosines(results: Results) -> Figure | None:
    """Draw the cosine of every pair of task vectors, with the share of coordinates whose signs agree."""
    if results.cosines is None:
        return None
    names, matrix, signs = results.cosines.names, results.cosines.matrix, results.cosines.sign_agreement
    cells = [
        _cell(names[i], names[j], cosine, signs[i][j] if signs and i != j else None)
        for i in range(len(names))
        for j in range(len(names))
        if (cosine := matrix[i][j]) is not None
    ]
    if len(names) < 2 or not cells:
        return None
    apart = [c["cosine"] for c in cells if c["row"] != c["column"]] or [1.0]
    caption = "Cosine between the runs' task vectors: at 1 there is nothing to gain from merging, at 0 the runs are orthogonal."
    if signs and len(names) <= ROOMY:
        caption += " Small numbers: the share of coordinates whose signs agree."
    return Figure(
        "Similarity of the runs",
        caption,
        f"Matrix of cosines between {len(names)} task vectors; the pairs lie between {fixed(min(apart), 2)} and "
        f"{fixed(max(apart), 2)}.",
        _draw(names, cells, {"cosine:Q": "cosine", "signs:N": "equal signs"}, two=bool(signs)),
        half=True,
    )


def barriers(results: Results) -> Figure | None:
    """Draw the loss barrier between every pair of models."""
    if results.barriers is None:
        return None
    names, matrix = results.barriers.names, results.barriers.matrix
    heights = {(i, j): height for i, row in enumerate(matrix) for j, height in enumerate(row)}
    apart = {pair: height for pair, height in heights.items() if pair[0] != pair[1]}
    if not apart:
        return None
    known = [height for height in apart.values() if height is not None]
    places, top = min(decimals(known, 2), 3), max([*known, NO_BARRIER])
    cells = [_barrier(names[i], names[j], height, places, top) for (i, j), height in heights.items()]
    worst = None if len(known) < len(apart) else max(known)
    caption = (
        f"Largest rise of the loss ({unit(results)}) above the linear interpolation of two models' losses, on the straight "
        "path between their weights: at 0 both lie in one basin. A curved path may have a lower barrier."
    )
    if len(known) < len(apart):
        caption += " ∞: the loss diverged on the path."
    return Figure(
        "Loss barriers between the models",
        caption,
        f"Matrix of loss barriers between {len(names)} models; the highest is "
        + ("infinite." if worst is None else f"{short(worst)} {unit(results)}."),
        _draw(names, cells, {"printed:N": "barrier"}, two=False),
        half=True,
    )


def _cell(row: str, column: str, cosine: float, agreement: float | None) -> Row:
    return {
        "row": row, "column": column, "cosine": round(cosine, 3), "printed": fixed(cosine, 2), "strength": 0.85 * abs(cosine),
        "signs": "" if agreement is None else percent(agreement, 0), "fill": "cool" if cosine >= 0 else "warm",
        "text": "paper" if abs(cosine) > 0.7 else "ink",
    }  # fmt: skip


def _barrier(row: str, column: str, height: float | None, places: int, top: float) -> Row:
    share = 1.0 if height is None else max(height, 0.0) / top
    printed = "∞" if height is None else "0" if height == 0 else fixed(height, places)
    return {
        "row": row, "column": column, "printed": printed, "strength": 0.85 * share,
        "fill": "warm", "text": "paper" if share > 0.85 else "ink",
    }  # fmt: skip


def _draw(names: Sequence[str], cells: list[Row], titles: Mapping[str, str], *, two: bool) -> Any:
    """Draw a cell for every pair; `titles` maps fields to their names in the tooltip."""
    import altair as alt

    roomy = len(names) <= ROOMY
    angle = 0 if len(names) * max(len(n) for n in names) <= 36 else -50
    x = alt.X(
        "column:N", sort=list(names), axis=alt.Axis(title=None, orient="top", labelAngle=angle, domain=False, ticks=False)
    )
    y = alt.Y("row:N", sort=list(names), axis=alt.Axis(title=None, domain=False, ticks=False))
    tooltip = [alt.Tooltip(field, title=title) for field, title in {"row:N": "between", "column:N": "and", **titles}.items()]
    strength = alt.FillOpacity("strength:Q", scale=alt.Scale(domain=[0, 1], range=[0, 1]), legend=None)
    chart = chart_of(cells, "grid")
    edge = alt.Stroke(**painted().to_dict())
    layers = [chart.mark_rect().encode(x=x, y=y, fill=filled("fill"), fillOpacity=strength, stroke=edge, tooltip=tooltip)]
    if len(names) <= READABLE:
        cosine = chart.mark_text(fontSize=13 if roomy else 12, dy=-6 if roomy and two else 0)
        layers.append(cosine.encode(x=x, y=y, text="printed:N", color=painted("text")))
    if roomy and two:
        layers.append(chart.mark_text(fontSize=12, dy=9).encode(x=x, y=y, text="signs:N", color=painted("text")))
    return alt.layer(*layers).properties(width=HALF, height=alt.Step(46 if roomy else 26))
