"""Scatter plot of loss against sharpness, with every artefact as a labelled point."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from emomerge.reporting import labels
from emomerge.reporting.figure import NARROW, WIDE, Axis, Figure, Row, chart_of, filled, painted
from emomerge.reporting.kinds import SYMBOLS, kind_of
from emomerge.reporting.palette import colour_of
from emomerge.reporting.table import artefacts, middle_radius
from emomerge.reporting.text import short, unit
from emomerge.results import Results, Split

if TYPE_CHECKING:
    import altair as alt

ARROWS = {
    (-1, 0): "←", (1, 0): "→", (0, 1): "↑", (0, -1): "↓", (-1, 1): "↖", (1, 1): "↗", (-1, -1): "↙", (1, -1): "↘",
}  # fmt: skip


def loss_and_sharpness(results: Results) -> Figure | None:
    """Draw every artefact that has both figures: flatter to the left, better at the bottom."""
    radius = middle_radius(results)
    splits: tuple[Split, ...] = ("test", "validation", "train")
    split = next((s for s in splits if any(row.loss(s) for row in results.artefacts)), None)
    if radius is None or split is None:
        return None
    rows, diverged = _points(results, split, radius)
    if not rows:
        return None
    x = _frame([r["sharpness"] for r in rows], [v for r in rows for v in (r["low"], r["high"])])
    y = _frame([r["loss"] for r in rows])
    titles = (
        [f"sharpness at σ = {radius:g} (rise of the loss, {unit(results)})", "← flatter"],
        [f"{split} loss ({unit(results)})", "lower is better"],
    )
    best = min((r for r in rows if r["role"] in ("run", "merge")), key=lambda r: r["loss"], default=rows[0])
    return Figure(
        "Loss against sharpness",
        _caption(rows, diverged, x, y, split, radius),
        f"Scatter plot of {split} loss against sharpness for {len(rows)} artefacts. Lowest loss among runs and merges: "
        f"{best['name']} at {short(best['loss'])} {unit(results)} with sharpness {short(best['sharpness'])}.",
        _draw(rows, x, y, titles, WIDE, 430),
        _draw(rows, x, y, titles, NARROW, 480),
    )


def _points(results: Results, split: Split, radius: float) -> tuple[list[Row], list[str]]:
    """Return the points, and the names of artefacts whose loss under noise was not finite."""
    rows, diverged = [], []
    for artefact in artefacts(results):
        loss, estimate = artefact.loss(split), artefact.estimates.get(f"sharpness_{radius:g}")
        if estimate is None:
            continue
        if estimate.mean is None:
            diverged.append(artefact.name)
        elif loss is not None:
            mean, error = estimate.mean, 1.96 * (estimate.stderr or 0.0)
            rows.append(
                {
                    "name": artefact.name, "role": artefact.role, "kind": kind_of(artefact), "of": artefact.of,
                    "colour": colour_of(artefact), "loss": loss, "sharpness": mean, "low": mean - error, "high": mean + error,
                    "distance": artefact.mean("distance"),
                }
            )  # fmt: skip
    return rows, diverged


def _caption(rows: Sequence[Row], diverged: Sequence[str], x: Axis, y: Axis, split: Split, radius: float) -> str:
    roles = {r["role"] for r in rows}
    parts = [
        f"Each artefact by its {split} loss and by how much Gaussian noise of σ = {radius:g} times the base's RMS raises its "
        "loss; lower left is better. Bars: 1.96 standard errors over directions."
    ]
    matched = {r["kind"] for r in rows if r["of"]}
    if "distance-matched" in matched:
        parts.append(
            "A dotted line joins a run to its control, the same task vector rescaled to the merge's length: the merge must lie "
            "left of it to be flat, and not merely near the base."
        )
    if "loss-matched" in matched:
        parts.append("Another joins the merge to a snapshot of the long run with a similar training loss, for the same reason.")
    if matched != {r["kind"] for r in rows if r["role"] == "control"}:
        parts.append("The controls are explained below the table.")
    if "base" in roles:
        parts.append("The base has not learnt the task, so its flatness means little.")
    away = [r["name"] for r in rows if x.outside(r["sharpness"]) or y.outside(r["loss"])]
    if away:
        parts.append(f"Far outside the frame and drawn at its edge, with their figures: {', '.join(away)}.")
    if diverged:
        parts.append(f"Diverged at this radius and not drawn: {', '.join(diverged)}.")
    return " ".join(parts)


def _frame(values: Sequence[float], bars: Sequence[float] = ()) -> Axis:
    """Return an axis around the bulk of the values (Tukey's outer fences), so that an outlier does not squeeze the rest.

    The scale is logarithmic if the bulk spans a factor of 20.
    """
    log = False
    low, high = _fences(values)
    bulk = [v for v in values if low <= v <= high]
    if min(bulk) > 0 and max(bulk) > 20 * min(bulk):
        log = True
        low, high = (math.exp(f) for f in _fences([math.log(v) for v in values if v > 0]))
        bulk = [v for v in values if low <= v <= high]
    reach = max(bulk) - min(bulk)
    bulk += [v for v in bars if max(low, min(bulk) - reach / 4) <= v <= min(high, max(bulk) + reach / 4) and (v > 0 or not log)]
    return Axis.around(bulk, 0.08, log=log)


def _fences(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 4:
        return min(values), max(values)
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first - 3 * (third - first), third + 3 * (third - first)


def _draw(
    rows: Sequence[Row], x: Axis, y: Axis, titles: tuple[list[str], list[str]], width: int, height: int
) -> alt.LayerChart:
    import altair as alt

    points, pairs = _layout(rows, x, y, width, height)

    def at(channel: type[Any], field: str, axis: Axis, title: list[str]) -> Any:
        ticks = 5 if width < 400 else 8
        return channel(f"{field}:Q", scale=axis.scale(), axis=alt.Axis(title=title, grid=True, tickCount=ticks))

    across, up = at(alt.X, "x", x, titles[0]), at(alt.Y, "y", y, titles[1])
    dx, dy = alt.ExprRef("datum.dx"), alt.ExprRef("datum.dy")

    def by_kind(channel: type[Any], look: dict[str, Any], **more: Any) -> Any:
        return channel("kind:N", scale=alt.Scale(type="ordinal", domain=list(look), range=list(look.values())), **more)

    present = [kind for kind in SYMBOLS if any(p["kind"] == kind for p in points)]
    legend = alt.Legend(title=None, orient="top", values=present, columns=2 if width < 400 else 5)
    tooltip = [
        alt.Tooltip("name:N", title="artefact"), alt.Tooltip("kind:N"), alt.Tooltip("loss:Q", format=".4f"),
        alt.Tooltip("sharpness:Q", format=".3g"), alt.Tooltip("distance:Q", title="‖θ−θ₀‖", format=".3g"),
    ]  # fmt: skip
    chart = chart_of(points)
    joins = chart_of(pairs).mark_rule(strokeDash=[2, 3], opacity=0.55)
    bars = chart.mark_rule(opacity=0.75)
    leads = chart.transform_filter("datum.far").mark_rule(x2Offset=dx, y2Offset=dy, strokeWidth=0.7, opacity=0.8)
    marks = chart.mark_point(strokeWidth=1.8, opacity=1)
    names = chart.transform_filter("datum.shown").mark_text(dx=dx, dy=dy, align=alt.ExprRef("datum.align"), baseline="middle")
    layers = [
        bars.encode(x=at(alt.X, "from", x, titles[0]), x2="to:Q", y=up, color=painted()),
        leads.encode(x=across, x2="x", y=up, y2="y", color=painted()),
        marks.encode(
            x=across, y=up, color=painted(), fill=filled("inside"), tooltip=tooltip,
            shape=by_kind(alt.Shape, {name: kind.shape for name, kind in SYMBOLS.items()}, legend=legend),
            size=by_kind(alt.Size, {name: kind.area for name, kind in SYMBOLS.items()}),
        ),
        names.encode(x=across, y=up, text="label:N", color=painted()),
    ]  # fmt: skip
    if pairs:
        layers.insert(0, joins.encode(x=across, y=up, x2="x2:Q", y2="y2:Q", color=painted()))
    return alt.layer(*layers).properties(width=width, height=height)


def _layout(rows: Sequence[Row], x: Axis, y: Axis, width: int, height: int) -> tuple[list[Row], list[Row]]:
    """Return the points with positions for their labels, important ones first, and the lines from runs to their controls."""
    rank = {"merge": 0, "base": 1, "run": 2}
    points = [
        {
            **row, "x": x.clamp(row["sharpness"]), "y": y.clamp(row["loss"]),
            "from": x.clamp(row["low"]), "to": x.clamp(row["high"]), "label": _label(row, x, y, brief=width < 400),
            "inside": "paper" if row["role"] == "control" else row["colour"],
        }
        for row in sorted(rows, key=lambda r: rank.get(r["role"], 3))
    ]  # fmt: skip
    by_name = {p["name"]: p for p in points}
    joined = [(by_name[p["of"]], p) for p in points if p["of"] in by_name]

    def pixel(px: float, py: float) -> tuple[float, float]:
        return x.share(px) * width, (1 - y.share(py)) * height

    spots = [pixel(p["x"], p["y"]) for p in points]
    bars = [
        labels.Box(pixel(p["from"], p["y"])[0], spot[1] - 2, pixel(p["to"], p["y"])[0], spot[1] + 2)
        for p, spot in zip(points, spots, strict=True)
    ]
    lines = [(*pixel(a["x"], a["y"]), *pixel(b["x"], b["y"])) for a, b in joined]
    places = labels.place(spots, [p["label"] for p in points], width, height, bars, lines)
    for point, place in zip(points, places, strict=True):
        point["shown"] = place is not None
        if place is not None:
            point |= {"dx": place.dx, "dy": place.dy, "align": place.align, "far": place.far}
    pairs = [{"x": a["x"], "y": a["y"], "x2": b["x"], "y2": b["y"], "colour": b["colour"]} for a, b in joined]
    return points, pairs


def _label(row: Row, x: Axis, y: Axis, *, brief: bool) -> str:
    """Return the name of a point; if it is outside the frame, with its direction and figures.

    A rescaled run is named by the run alone, to which a dotted line leads.
    """
    away = x.outside(row["sharpness"]), y.outside(row["loss"])
    name = f"{row['of']} rescaled" if row["kind"] == "distance-matched" and row["of"] else str(row["name"])
    if not any(away):
        return name
    figures = (
        f"{short(row['sharpness'])}; {short(row['loss'])}"
        if brief
        else f"sharpness {short(row['sharpness'])}, loss {short(row['loss'])}"
    )
    return f"{name} {ARROWS[away]} {figures}"
