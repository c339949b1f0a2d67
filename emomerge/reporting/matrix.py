"""How alike the runs' task vectors are: a matrix of cosines."""

from __future__ import annotations

from typing import Any

from emomerge.reporting.figure import HALF, Figure, Results, Row, chart_of, filled, painted
from emomerge.reporting.text import finite, fixed, percent

ROOMY, READABLE = 8, 14
"""Up to so many runs a cell holds two numbers, or one; with more, colour alone."""


def cosines(results: Results) -> Figure | None:
    """The cosine of every pair of task vectors, with the share of coordinates whose signs agree."""
    held = results.get("cosines") or {}
    names, matrix, signs = [str(n) for n in held.get("names") or []], held.get("matrix") or [], held.get("sign_agreement") or []
    cells = [
        _cell(names[i], names[j], cosine, _at(signs, i, j) if i != j else None)
        for i in range(len(names))
        for j in range(len(names))
        if (cosine := _at(matrix, i, j)) is not None
    ]
    if len(names) < 2 or not cells:
        return None
    apart = [c["cosine"] for c in cells if c["row"] != c["column"]] or [1.0]
    caption = "Cosine between the runs' task vectors: at 1 merging can add nothing, at 0 the runs went independent ways."
    if signs and len(names) <= ROOMY:
        caption += " Small figures: the share of coordinates whose signs agree."
    return Figure(
        "How alike the runs are",
        caption,
        f"Matrix of cosines between {len(names)} task vectors; the pairs lie between {fixed(min(apart), 2)} and "
        f"{fixed(max(apart), 2)}.",
        _draw(names, cells, two=bool(signs)),
        half=True,
    )


def _cell(row: str, column: str, cosine: float, agreement: float | None) -> Row:
    return {
        "row": row, "column": column, "cosine": cosine, "printed": fixed(cosine, 2), "strength": 0.85 * abs(cosine),
        "signs": "" if agreement is None else percent(agreement, 0), "fill": "cool" if cosine >= 0 else "warm",
        "text": "paper" if abs(cosine) > 0.7 else "ink", "edge": "paper",
    }  # fmt: skip


def _at(matrix: Any, i: int, j: int) -> float | None:
    return finite(matrix[i][j]) if i < len(matrix) and j < len(matrix[i]) else None


def _draw(names: list[str], cells: list[Row], *, two: bool) -> Any:
    import altair as alt

    roomy = len(names) <= ROOMY
    angle = 0 if len(names) * max(len(n) for n in names) <= 36 else -50
    x = alt.X("column:N", sort=names, axis=alt.Axis(title=None, orient="top", labelAngle=angle, domain=False, ticks=False))
    y = alt.Y("row:N", sort=names, axis=alt.Axis(title=None, domain=False, ticks=False))
    tooltip = [
        alt.Tooltip("row:N", title="task vector"), alt.Tooltip("column:N", title="and"),
        alt.Tooltip("cosine:Q", format=".3f"), alt.Tooltip("signs:N", title="equal signs"),
    ]  # fmt: skip
    strength = alt.FillOpacity("strength:Q", scale=alt.Scale(domain=[0, 1], range=[0, 1]), legend=None)
    chart = chart_of(cells)
    layers = [chart.mark_rect().encode(x=x, y=y, fill=filled("fill"), fillOpacity=strength, tooltip=tooltip)]
    if len(names) <= READABLE:
        cosine = chart.mark_text(fontSize=13 if roomy else 10, dy=-6 if roomy and two else 0)
        layers.append(cosine.encode(x=x, y=y, text="printed:N", color=painted("text")))
    if roomy and two:
        layers.append(chart.mark_text(fontSize=10, dy=9).encode(x=x, y=y, text="signs:N", color=painted("text")))
    return alt.layer(*layers).properties(width=HALF, height=alt.Step(46 if roomy else 26))
