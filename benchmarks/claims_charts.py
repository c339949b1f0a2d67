"""Charts of the claims about training, in one style: points with their 95 % intervals, and lines over steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from claims_core import Units
from claims_training import NAMES
from evidence_tables import Estimate

from emomerge.optim import OPTIMIZERS

Rows = list[dict[str, Any]]
COLORS = {
    "EmoSens": "#1b6ca8", "EmoAiry": "#2a9d5c", "EmoCats": "#c77700", "EmoTion": "#8e44ad", "EmoVoid": "#c0392b",
    "AdamW": "#222222", "Lion": "#777777", "Prodigy": "#a0522d", "schedule-free AdamW": "#7a9a01", "L-BFGS": "#0aa5a5",
}  # fmt: skip
"""Optimizer → its color in every figure."""


def point(estimate: Estimate, **labels: Any) -> dict[str, Any]:
    """Return a row for `points`: the mean, and its interval if there is one."""
    low, high = estimate.interval or (estimate.mean, estimate.mean)
    return {"mean": estimate.mean, "low": low, "high": high, **labels}


def estimate_row(rule: str, estimate: Estimate, **labels: Any) -> dict[str, Any]:
    """Return a row for `points` of a rule such as `sens/v3.8` or `adamw`."""
    name, _, preset = rule.partition("/")
    series = OPTIMIZERS[name].class_name if preset else NAMES[name]
    return point(estimate, series=series, name=f"{series} {preset}".strip(), **labels)


def curves(units: Units, figure: str, grid: Iterable[int] = (), **labels: Any) -> Rows:
    """Return rows for `lines`: a list of [step, value] stored in each unit, averaged over units.

    With `grid`, at these steps; what ended before a step counts with its last value.
    """
    sums: dict[float, list[float]] = {}
    for unit in units.all:
        curve = unit.figures[figure]
        points = [(step, [y for x, y in curve if x <= step][-1]) for step in grid] or curve
        for step, value in points:
            sums.setdefault(step, []).append(value)
    return [{"x": step, "y": sum(values) / len(values), **labels} for step, values in sums.items()]


def lines(
    rows: Rows, title: str, x: str, y: str, *, facet: str | None = None, columns: int = 3, rule: float | None = None,
    log_x: bool = False, log_y: bool = False, width: int = 260, height: int = 220, order: Sequence[str] = (),
    limits: tuple[float, float] | None = None, dash: str | None = None,
) -> Any:  # fmt: skip
    """Return lines over x, one for each `series`, in a panel for each value of `facet`; `rule` is a horizontal line."""
    import altair as alt

    names = [name for name in COLORS if any(row["series"] == name for row in rows)]
    scale: dict[str, Any] = {"domain": list(limits)} if limits else {"zero": False}
    if log_y:
        scale["type"] = "log"
    encode: dict[str, Any] = {
        "x": alt.X("x:Q", title=x, scale=alt.Scale(type="log") if log_x else alt.Undefined, axis=alt.Axis(tickCount=5)),
        "y": alt.Y("y:Q", title=y, scale=alt.Scale(**scale)),
        "color": alt.Color("series:N", title=None, scale=alt.Scale(domain=names, range=[COLORS[name] for name in names])),
    }
    if dash:
        encode["strokeDash"] = alt.StrokeDash(f"{dash}:N", title=None)
    chart = alt.Chart().mark_line(strokeWidth=1.8, clip=True, point=log_x).encode(**encode)
    if rule is not None:
        chart = chart + alt.Chart().mark_rule(strokeDash=[4, 3], color="#999999").encode(y=alt.datum(rule))
    chart = chart.properties(width=width, height=height)
    return _finish(chart, rows, title, facet, columns, order)


def points(
    rows: Rows, title: str, x: str, *, facet: str | None = None, columns: int = 2, rule: float | None = None,
    log_x: bool = False, width: int = 300, sort: Sequence[str] = (), color: str = "series", order: Sequence[str] = (),
    limits: tuple[float, float] | None = None, colors: Mapping[str, str] = COLORS,
) -> Any:  # fmt: skip
    """Return means with their intervals, a line of the chart for each `name`; `rule` is a vertical line."""
    import altair as alt

    names = [name for name in colors if any(row[color] == name for row in rows)]
    scale: dict[str, Any] = {"domain": list(limits), "zero": False, "nice": False} if limits else {"zero": False}
    axis = alt.X("mean:Q", title=x, scale=alt.Scale(type="log") if log_x else alt.Scale(**scale))
    encode: dict[str, Any] = {
        "y": alt.Y("name:N", title=None, sort=list(sort) or None, axis=alt.Axis(labelLimit=260)),
        "color": alt.Color(
            f"{color}:N", title=None, scale=alt.Scale(domain=names, range=[colors[name] for name in names]),
            legend=None if color == "series" else alt.Legend(),
        ),
        "yOffset": alt.YOffset(f"{color}:N") if color != "series" else alt.Undefined,
    }  # fmt: skip
    chart = alt.Chart().mark_rule(strokeWidth=2, clip=True).encode(x=alt.X("low:Q", title=x), x2="high:Q", **encode)
    chart = chart + alt.Chart().mark_point(filled=True, size=60, opacity=1, clip=True).encode(x=axis, **encode)
    if rule is not None:
        chart = chart + alt.Chart().mark_rule(strokeDash=[4, 3], color="#999999").encode(x=alt.datum(rule))
    chart = chart.properties(width=width, height=alt.Step(18 if color == "series" else 14))
    return _finish(chart, rows, title, facet, columns, order)


def _finish(chart: Any, rows: Rows, title: str, facet: str | None, columns: int, order: Sequence[str]) -> Any:
    import altair as alt

    data = alt.InlineData(values=rows)
    if facet is None:
        chart = chart.properties(data=data)
    else:
        header = alt.Header(title=None, labelFontSize=12, labelFontWeight="bold")
        panel = alt.Facet(f"{facet}:N", title=None, header=header, sort=list(order) or None)
        chart = chart.facet(data=data, facet=panel, columns=columns)
    heading = alt.TitleParams(title.split("\n"), anchor="start", fontSize=14, offset=12)
    return (
        chart.properties(title=heading, background="white")
        .configure_axis(labelFontSize=11, titleFontSize=12, gridColor="#eeeeee")
        .configure_legend(labelFontSize=12, orient="bottom", columns=7, labelLimit=220)
        .configure_view(stroke="#dddddd")
    )
