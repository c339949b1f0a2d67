"""Charts of the claims about merging."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from evidence_tables import Estimate

Row = dict[str, Any]
PALETTE = ("#d95f02", "#1b6ca8", "#7a7a7a", "#1b9e77", "#8e5ea2")


def dot(name: str, kind: str, panel: str, estimate: Estimate) -> Row:
    """Return a row for `dots`; without an interval if there is one seed."""
    low, high = estimate.interval or (estimate.mean, estimate.mean)
    return {"name": name, "kind": kind, "panel": panel, "mean": estimate.mean, "low": low, "high": high}


def dots(
    rows: Sequence[Row], title: Sequence[str], x: str, *, columns: int = 3, width: int = 210, log: bool = False,
    zero_rule: bool = False, step: int = 17, shared_x: bool = False,
) -> Any:  # fmt: skip
    """Return means with intervals: a line for each `name`, a colour for each `kind`, a chart for each `panel`.

    Args:
        rows: from `dot`, in the order of the lines; rows whose mean is not finite are left out.
        title: lines of the title, the finding first.
        x: title of the horizontal axis.
        columns: charts beside each other.
        width: of one chart, in pixels.
        log: whether the axis is logarithmic.
        zero_rule: whether to draw a line at 0.
        step: height of a line, in pixels.
        shared_x: whether all charts have one scale.
    """
    import altair as alt

    rows = [row for row in rows if row["mean"] < float("inf")]
    kinds, names = (list(dict.fromkeys(row[key] for row in rows)) for key in ("kind", "name"))
    panels = []
    for panel in dict.fromkeys(row["panel"] for row in rows):
        values = [row for row in rows if row["panel"] == panel]
        if log:
            values = [{**row, "low": max(row["low"], row["mean"] / 2)} for row in values]
        here = [name for name in names if any(row["name"] == name for row in values)]
        scale = alt.Scale(type="log" if log else "linear", zero=False, nice=not log)
        axis = alt.Axis(tickCount=4, labelOverlap="greedy")
        encode = {
            "y": alt.Y("name:N", title=None, sort=here, axis=alt.Axis(labelLimit=260)),
            "color": alt.Color(
                "kind:N", title=None, scale=alt.Scale(domain=kinds, range=list(PALETTE[: len(kinds)])),
                legend=alt.Legend(orient="bottom", columns=len(kinds), labelLimit=400) if len(kinds) > 1 else None,
            ),
        }  # fmt: skip
        data = alt.Chart(alt.InlineData(values=values))
        line = data.mark_rule(strokeWidth=2, clip=True).encode(
            x=alt.X("low:Q", title=x, scale=scale, axis=axis), x2="high:Q", **encode
        )
        chart = line + data.mark_point(filled=True, size=55, opacity=1).encode(
            x=alt.X("mean:Q", title=x, scale=scale, axis=axis), **encode
        )
        if zero_rule:
            chart = chart + alt.Chart(alt.InlineData(values=[{"x": 0}])).mark_rule(color="#999999").encode(x="x:Q")
        panels.append(chart.properties(title=panel, width=width, height=alt.Step(step)))
    scales = {"color": "shared", "x": "shared" if shared_x else "independent", "y": "independent"}
    return alt.concat(*panels, columns=columns).resolve_scale(**scales).properties(
        title=alt.TitleParams(list(title), anchor="start", fontSize=13), background="white"
    )  # fmt: skip


def heat(
    rows: Sequence[Row], title: Sequence[str], *, x: str, y: str, columns: Sequence[str],
    panels: Sequence[tuple[str, str, str]], labels: Sequence[str] = (),
) -> Any:  # fmt: skip
    """Return heat maps: one row of charts for each of `panels`, one column for each `column` of the rows.

    Args:
        rows: each with `x`, `y`, `column` and the figures of the panels.
        title: lines of the title, the finding first.
        x: title of the horizontal axis.
        y: title of the vertical axis.
        columns: the columns, in order.
        panels: figure (without dots), its name, and the scheme of colours.
        labels: figures that are differences, and are also printed into their cells.
    """
    import altair as alt

    lines = []
    for figure, name, scheme in panels:
        charts = []
        values = [row[figure] for row in rows if math.isfinite(row[figure])]
        domain = [min(values), max(values)]
        if figure in labels:  # differences: white at 0, clamped where the labels tell more
            limit = statistics.median(map(abs, values)) or 1.0
            domain = [-limit, limit]
        for column in columns:
            data = alt.Chart(alt.InlineData(values=[row for row in rows if row["column"] == column]))
            encode = {"x": alt.X("x:O", title=x, axis=alt.Axis(labelAngle=0)), "y": alt.Y("y:O", title=y)}
            scale = alt.Scale(scheme=scheme, domain=domain, clamp=True)
            colour = alt.Color(f"{figure}:Q", title=name, scale=scale)
            chart = data.mark_rect(opacity=0.7 if figure in labels else 1.0).encode(color=colour, **encode)
            if figure in labels:
                chart = chart + data.mark_text(fontSize=8).encode(text=alt.Text(f"{figure}:Q", format="+.2f"), **encode)
            charts.append(chart.properties(title=column, width=250, height=120))
        lines.append(alt.hconcat(*charts).resolve_scale(color="shared"))
    return alt.vconcat(*lines).resolve_scale(color="independent").properties(
        title=alt.TitleParams(list(title), anchor="start", fontSize=13), background="white"
    )  # fmt: skip
