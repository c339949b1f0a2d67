"""Line charts with labels at the right ends: α-curves and training traces."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from emomerge.reporting import labels
from emomerge.reporting.figure import HALF, WIDE, Axis, Figure, Row, chart_of, painted
from emomerge.reporting.palette import colour_of, optimizer_colour
from emomerge.reporting.table import artefacts
from emomerge.reporting.text import short, unit
from emomerge.results import Results

TRACE_POINTS = 200
"""Approximate maximum number of points per trace; more than the figure has pixels would only enlarge the page."""
DASHES = (None, [7, 3], [2, 2], [8, 3, 2, 3], [4, 4])
"""Dash patterns that distinguish merges, which all have the same colour."""

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """One line of a figure."""

    name: str
    colour: str
    points: Points
    raw: Points | None = None
    """Raw values behind the smoothed `points`, drawn faintly."""
    dash: list[int] | None = None
    width: float = 1.7


def alpha_curves(results: Results) -> Figure | None:
    """Draw the loss along θ₀ + α·τ, one line per artefact."""
    lines: list[Line] = []
    merges = 0
    for artefact in artefacts(results):
        curve = results.curves.get(artefact.name)
        points = _pairs(curve.alpha, curve.loss) if curve else []
        if not points:
            continue
        role = artefact.role
        dash = DASHES[merges % len(DASHES)] if role == "merge" else DASHES[1] if role == "control" else None
        merges += role == "merge"
        lines.append(Line(artefact.name, colour_of(artefact), points, dash=dash, width=2.4 if role == "merge" else 1.7))
    if not lines:
        return None
    split = results.probe.data if results.probe else "train"
    loss, name, alpha = min((loss, line.name, alpha) for line in lines for alpha, loss in line.points)
    return Figure(
        "From the base through every artefact",
        "The loss along θ₀ + α·τ: α = 0 is the base, α = 1 the artefact; beyond 1 the task vector is stretched. A flat minimum "
        "appears as a wide valley along its task vector; a valley to the right of α = 1 means that the artefact stopped short "
        "of it.",
        f"Line chart of the loss along the task vector of {len(lines)} artefacts. The lowest point is {short(loss)} "
        f"{unit(results)}, on {name} at α = {short(alpha)}.",
        _draw(lines, "α, the multiple of the task vector", f"{split} loss ({unit(results)})", WIDE, 340, mark=1.0),
    )


def training_loss(results: Results) -> Figure | None:
    """Draw the smoothed loss of every step of every run, with the raw values behind."""
    lines = _traces(results, "loss")
    if not lines:
        return None
    ends = sorted((line.points[-1][1], line.name) for line in lines)
    return Figure(
        "Training loss",
        "Loss at each step, smoothed over about 3 % of the run, with the raw values behind.",
        f"Line chart of the training loss of {len(lines)} runs. The lowest end is {short(ends[0][0])} {unit(results)} "
        f"({ends[0][1]}), the highest {short(ends[-1][0])} ({ends[-1][1]}).",
        _draw(lines, "step", f"loss of the step ({unit(results)})", HALF, 260),
        half=True,
    )


def training_rate(results: Results) -> Figure | None:
    """Draw the learning rate from emoPulse at every step."""
    lines = _traces(results, "rate")
    if not lines:
        return None
    rates = [rate for line in lines for _, rate in line.raw or []]
    return Figure(
        "Learning rate",
        "Learning rate at each step, which emoPulse derives from the loss alone, without a schedule. Logarithmic axis, with "
        "the same smoothing.",
        f"Line chart, logarithmic axis, of the learning rate of {len(lines)} runs, between {short(min(rates), 2)} and "
        f"{short(max(rates), 2)}.",
        _draw(lines, "step", "learning rate", HALF, 260, log=True),
        half=True,
    )


def _traces(results: Results, field: Literal["loss", "rate"]) -> list[Line]:
    """Return smoothed lines of one column of the traces; rates are smoothed on a logarithmic scale."""
    controls = {row.name for row in results.artefacts if row.role == "control"}
    logarithmic = field == "rate"
    lines = []
    for name, trace in results.traces.items():
        values = trace.rate if logarithmic else trace.loss
        raw = [(step, value) for step, value in _pairs(trace.step, values) if value > 0 or not logarithmic]
        if not raw:
            continue
        smooth = _smooth([math.log(value) if logarithmic else value for _, value in raw])
        kept = sorted({*range(0, len(raw), -(-len(raw) // TRACE_POINTS)), len(raw) - 1})
        points = [(raw[k][0], math.exp(smooth[k]) if logarithmic else smooth[k]) for k in kept]
        dash = DASHES[1] if name in controls else None
        lines.append(Line(name, optimizer_colour(trace.optimizer), points, raw=[raw[k] for k in kept], dash=dash))
    return lines


def _pairs(xs: Sequence[float], ys: Sequence[float | None]) -> Points:
    """Return the points whose ordinate is finite."""
    return [(float(x), y) for x, y in zip(xs, ys, strict=False) if y is not None]


def _smooth(values: Sequence[float]) -> list[float]:
    """Return the bias-corrected exponential moving average over about 3 % of the series."""
    keep = 1 - 1 / max(0.03 * len(values), 1)
    average, weight, smoothed = 0.0, 0.0, []
    for value in values:
        average, weight = keep * average + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(average / weight)
    return smoothed


def _draw(
    lines: Sequence[Line],
    x_title: str,
    y_title: str,
    width: int,
    height: int,
    *,
    mark: float | None = None,
    log: bool | None = None,
) -> Any:
    """Draw lines labelled at their right ends, on a logarithmic axis if they span a factor of 4, with dots at x = `mark`."""
    import altair as alt

    axis = _value_axis(lines, log)
    steps = [x for line in lines for x, _ in line.points]
    first, last = (min(steps), max(steps)) if min(steps) < max(steps) else (steps[0] - 0.5, steps[0] + 0.5)
    number = "~e" if axis.log and axis.high < 0.01 else "~g"
    x = alt.X(
        "x:Q",
        scale=alt.Scale(domain=[first, last], nice=False, zero=False),
        axis=alt.Axis(title=x_title, grid=False, tickCount=6),
    )
    y = alt.Y("y:Q", scale=axis.scale(), axis=alt.Axis(title=y_title, tickCount=6, format=number))

    def stroke(line: Line, points: Points, width: float, opacity: float) -> Any:
        chart = chart_of([{"x": px, "y": axis.clamp(py)} for px, py in points], line.colour)
        drawn = chart.mark_line(strokeWidth=width, strokeDash=line.dash or alt.Undefined, opacity=opacity)
        return drawn.encode(x=x, y=y, color=painted())

    layers = [stroke(line, line.raw, 0.7, 0.22) for line in lines if line.raw]
    layers += [stroke(line, line.points, line.width, 1) for line in lines]
    if mark is not None:
        layers.insert(0, chart_of([{"x": mark}], "muted").mark_rule(strokeDash=[3, 3]).encode(x=x, color=painted()))
        spots = [{"x": px, "y": py, "colour": ln.colour, "name": ln.name} for ln in lines for px, py in ln.points if px == mark]
        tooltip = [alt.Tooltip("name:N", title="artefact"), alt.Tooltip("y:Q", title="loss at α = 1", format=".4f")]
        layers.append(
            chart_of(spots).mark_point(filled=True, size=34, opacity=1).encode(x=x, y=y, color=painted(), tooltip=tooltip)
        )
    ends, dy = _ends(lines, axis, height), alt.ExprRef("datum.dy")
    leads = chart_of(ends).mark_rule(x2Offset=14, y2Offset=dy, strokeWidth=0.7, opacity=0.8)
    names = chart_of(ends).mark_text(align="left", baseline="middle", dx=17, dy=dy)
    layers += [leads.encode(x=x, x2="x", y=y, y2="y", color=painted()), names.encode(x=x, y=y, text="label:N", color=painted())]
    return alt.layer(*layers).properties(width=width, height=height)


def _value_axis(lines: Sequence[Line], log: bool | None) -> Axis:
    """Return an axis around all lines and around the raw values except for their outermost percentiles."""
    values = [value for line in lines for _, value in line.points]
    raw = sorted(value for line in lines for _, value in line.raw or [])
    trimmed = raw[len(raw) // 100 : len(raw) - len(raw) // 100]
    every = [*values, *trimmed]
    if log is None:
        log = min(every) > 0 and max(values) > 4 * min(values)
    return Axis.around(every, 0.04, log=log)


def _ends(lines: Sequence[Line], axis: Axis, height: int) -> list[Row]:
    """Return a label for the end of each line, moved apart; with many runs, one label for all of the same colour."""
    groups: dict[str, list[Line]] = {}
    for line in lines:
        shared = len(lines) > 12 and line.colour not in ("ink", "muted")
        groups.setdefault(line.colour if shared else line.name, []).append(line)
    ends: list[Row] = [
        {
            "label": name, "colour": members[0].colour, "x": max(m.points[-1][0] for m in members),
            "y": statistics.median(axis.clamp(m.points[-1][1]) for m in members),
        }
        for name, members in groups.items()
    ]  # fmt: skip
    wanted = [(1 - axis.share(end["y"])) * height for end in ends]
    for end, old, new in zip(ends, wanted, labels.spread(wanted, labels.LINE, 0, height), strict=True):
        end["dy"] = round(new - old, 2)
    return ends
