"""The pictures of a report: one Altair definition gives the interactive chart of the page and the PNG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from emomerge.reporting.labels import Box, place
from emomerge.reporting.table import artefacts, middle_radius, sharpness_at
from emomerge.reporting.text import finite, short

Results = Mapping[str, Any]

# Okabe and Ito's palette, which colour-blind readers can tell apart; grey for what is not a run.
COLOURS = {"sens": "#0072B2", "airy": "#56B4E9", "cats": "#D55E00", "tion": "#009E73", "void": "#CC79A7"}
MERGE_COLOURS = ("#E69F00", "#8F5FBF", "#8B5A00", "#A8A400", "#C2185B")
NEUTRAL = "#7A7F87"
SHAPES = {"base": "diamond", "run": "circle", "merge": "square", "control": "cross"}
WIDTH, HEIGHT = 800, 440


@dataclass(frozen=True)
class Figure:
    """A chart with what a reader and a screen reader need beside it."""

    title: str
    caption: str
    alt: str
    chart: Any


def figures(results: Results) -> dict[str, Figure]:
    """Every figure whose data are there, in the order of the page."""
    made = {
        "tradeoff": _tradeoff(results),
        "evidence": _evidence(results),
        "curves": _curves(results),
        "traces": _traces(results),
        "cosines": _cosines(results),
    }
    return {name: figure for name, figure in made.items() if figure is not None}


def colour_of(results: Results, name: str) -> str:
    """One colour an artefact, the same in every figure: runs by optimizer, merges in colours of their own, the rest grey."""
    merges = [a["name"] for a in artefacts(results) if a.get("role") == "merge"]
    if name in merges:
        return MERGE_COLOURS[merges.index(name) % len(MERGE_COLOURS)]
    found = next((a for a in artefacts(results) if a.get("name") == name), {})
    return NEUTRAL if found.get("role") == "base" else COLOURS.get(str(found.get("optimizer")), NEUTRAL)


def _tradeoff(results: Results) -> Figure | None:
    import altair as alt

    radius = middle_radius(results)
    rows = []
    for artefact in artefacts(results):
        loss, entry = finite(artefact.get("test_loss")), sharpness_at(artefact, radius)
        mean = finite(entry.get("mean")) if entry else None
        if loss is not None and mean is not None:
            error = finite((entry or {}).get("stderr")) or 0.0
            rows.append(
                {
                    "name": artefact["name"],
                    "role": artefact["role"],
                    "loss": loss,
                    "sharpness": mean,
                    "low": mean - error,
                    "high": mean + error,
                    "colour": colour_of(results, artefact["name"]),
                }
            )
    if len(rows) < 2:
        return None
    rows, left_out = _without_distant_base(rows)
    x = _domain([row["loss"] for row in rows])
    y = _domain([value for row in rows for value in (row["low"], row["high"])])
    _label(rows, x, y)
    encode_x = alt.X("loss:Q", title="test loss (nats)", scale=alt.Scale(domain=x, nice=False, zero=False))
    title = f"sharpness at σ = {radius:g} (nats)"
    encode_y = alt.Y("sharpness:Q", title=title, scale=alt.Scale(domain=y, nice=False, zero=False))
    base = alt.Chart(alt.Data(values=rows))
    tooltip = [alt.Tooltip("name:N"), alt.Tooltip("loss:Q", format=".4f"), alt.Tooltip("sharpness:Q", format=".3g")]
    bars = base.mark_rule(opacity=0.5).encode(
        encode_x, alt.Y("low:Q", title=title), alt.Y2("high:Q"), alt.Color("colour:N", scale=None)
    )
    points = base.mark_point(filled=True, size=110, opacity=0.95).encode(
        encode_x,
        encode_y,
        alt.Color("colour:N", scale=None),
        alt.Shape(
            "role:N",
            scale=alt.Scale(domain=list(SHAPES), range=list(SHAPES.values())),
            legend=alt.Legend(title=None, orient="top", symbolFillColor=NEUTRAL, symbolStrokeColor=NEUTRAL),
        ),
        tooltip=tooltip,
    )
    named = [row for row in rows if "label_x" in row]
    texts = [
        alt.Chart(alt.Data(values=[row for row in named if row["align"] == align]))
        .mark_text(align=align, fontSize=11, baseline="middle")
        .encode(
            alt.X("label_x:Q", scale=alt.Scale(domain=x, nice=False, zero=False), title="test loss (nats)"),
            alt.Y("label_y:Q", scale=alt.Scale(domain=y, nice=False, zero=False), title=title),
            alt.Text("name:N"),
        )
        for align in ("left", "right", "center")
        if any(row["align"] == align for row in named)
    ]
    leads = (
        alt.Chart(alt.Data(values=[row for row in named if row["far"]]))
        .mark_rule(color=NEUTRAL, opacity=0.5, strokeWidth=0.7)
        .encode(alt.X("loss:Q"), alt.Y("sharpness:Q"), alt.X2("label_x:Q"), alt.Y2("label_y:Q"))
    )
    return Figure(
        "Loss against sharpness",
        f"Held-out loss and average-case sharpness (σ = {radius:g} of the base's RMS per tensor; bars: standard error over "
        "directions). Lower left is better and flatter. A control named “x at ‖m‖” is run x with its task vector rescaled "
        "to the length of merge m: a merge must lie below it to be flat and not merely near the base." + left_out,
        "Scatter plot of test loss against sharpness for base, runs, merges and controls.",
        alt.layer(bars, leads, points, *texts).properties(width=WIDTH, height=HEIGHT),
    )


def _without_distant_base(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """Leave the base out where it would squeeze everything else into a corner, and say where it is."""
    others = [row for row in rows if row["role"] != "base"]
    base = next((row for row in rows if row["role"] == "base"), None)
    if base is None or len(others) < 2:
        return rows, ""
    for axis in ("loss", "sharpness"):
        low, high = min(row[axis] for row in others), max(row[axis] for row in others)
        reach = 0.6 * (high - low)
        if not low - reach <= base[axis] <= high + reach:
            return others, f" Not shown: the base, at loss {short(base['loss'])} and sharpness {short(base['sharpness'])}."
    return rows, ""


def _domain(values: Sequence[float]) -> list[float]:
    low, high = min(values), max(values)
    margin = max(0.08 * (high - low), 0.01 * max(abs(low), abs(high))) or 1.0
    return [low - margin, high + margin]


def _label(rows: list[dict[str, Any]], x: Sequence[float], y: Sequence[float]) -> None:
    """Give each row that has room for its name the place of the label, in data coordinates."""

    def pixels(row: Mapping[str, Any]) -> tuple[float, float]:
        return (
            (row["loss"] - x[0]) / (x[1] - x[0]) * WIDTH,
            HEIGHT - (row["sharpness"] - y[0]) / (y[1] - y[0]) * HEIGHT,
        )

    order = sorted(rows, key=lambda row: ("merge", "run", "base", "control").index(row["role"]))
    points = [pixels(row) for row in order]
    bars = [
        Box(px - 1, HEIGHT - (row["high"] - y[0]) / (y[1] - y[0]) * HEIGHT, px + 1, py + 1)
        for row, (px, py) in zip(order, points, strict=True)
    ]
    offsets = place(points, [row["name"] for row in order], WIDTH, HEIGHT, bars)
    for row, (px, py), offset in zip(order, points, offsets, strict=True):
        if offset is not None:
            row["label_x"] = x[0] + (px + offset.dx) / WIDTH * (x[1] - x[0])
            row["label_y"] = y[0] + (HEIGHT - py - offset.dy) / HEIGHT * (y[1] - y[0])
            row["align"], row["far"] = offset.align, offset.far


def _evidence(results: Results) -> Figure | None:
    import altair as alt

    verdict = results.get("verdict") or {}
    panels = []
    for claim, axis in (
        ("better", "difference of test loss (nats), merge − rival"),
        ("flatter", "log ratio of sharpness, merge / rival"),
    ):
        rows = []
        for item in (verdict.get(claim) or {}).get("evidence") or []:
            value, low, high = (finite(item.get(k)) for k in ("estimate", "low", "high"))
            if value is None or low is None or high is None:
                continue
            colour = "#009E73" if high < 0 else "#D55E00" if low > 0 else NEUTRAL
            name = item["against"] if claim == "better" else f"{item['against']}, {item['what'].removeprefix('gaussian ')}"
            rows.append({"against": name, "value": value, "low": low, "high": high, "colour": colour})
        if not rows:
            continue
        base = alt.Chart(alt.Data(values=rows)).encode(
            alt.Y("against:N", sort=[row["against"] for row in rows], title=None, axis=alt.Axis(labelLimit=260)),
            alt.Color("colour:N", scale=None),
        )
        zero = alt.Chart(alt.Data(values=[{"zero": 0}])).mark_rule(color=NEUTRAL, strokeDash=[4, 3]).encode(x="zero:Q")
        bars = base.mark_rule(strokeWidth=2.5).encode(alt.X("low:Q", title=axis), alt.X2("high:Q"))
        dots = base.mark_point(filled=True, size=80, opacity=1).encode(
            alt.X("value:Q", title=axis), tooltip=[alt.Tooltip(f"{k}:Q", format=".3g") for k in ("value", "low", "high")]
        )
        panels.append(alt.layer(zero, bars, dots).properties(width=WIDTH - 220, height=alt.Step(26), title=f"Is it {claim}?"))
    if not panels:
        return None
    return Figure(
        "The evidence",
        f"The merge {verdict.get('merge', '')} against its rivals, with 95 % bootstrap intervals over what both share "
        "(directions, batches). Left of the dashed line the merge wins; an interval that touches it decides nothing.",
        "Forest plot of differences between the merge and each rival, with intervals around zero.",
        alt.vconcat(*panels).resolve_scale(color="independent"),
    )


def _curves(results: Results) -> Figure | None:
    import altair as alt

    curves = results.get("curves") or {}
    rows = [
        {"name": name, "alpha": alpha, "loss": loss}
        for name, curve in curves.items()
        for alpha, loss in zip(curve["alpha"], curve["loss"], strict=True)
        if finite(loss) is not None
    ]
    if not rows:
        return None
    names = list(curves)
    merges = {a["name"] for a in artefacts(results) if a.get("role") == "merge"}
    chart = (
        alt.Chart(alt.Data(values=rows))
        .mark_line(point=alt.OverlayMarkDef(size=18))
        .encode(
            alt.X("alpha:Q", title="α (0: base, 1: the artefact)"),
            alt.Y("loss:Q", title="loss at θ₀ + α·τ (nats)", scale=alt.Scale(zero=False)),
            alt.Color(
                "name:N",
                scale=alt.Scale(domain=names, range=[colour_of(results, name) for name in names]),
                legend=alt.Legend(title=None, symbolType="stroke", symbolStrokeWidth=3),
            ),
            alt.StrokeDash(
                "name:N", scale=alt.Scale(domain=names, range=[[1, 0] if n in merges else [4, 2] for n in names]), legend=None
            ),
            tooltip=[alt.Tooltip("name:N"), alt.Tooltip("alpha:Q"), alt.Tooltip("loss:Q", format=".4f")],
        )
        .properties(width=WIDTH - 110, height=300)
    )
    return Figure(
        "Along each task vector",
        "Loss on the probed data from the base (α = 0) through each artefact (α = 1) and beyond. Solid: merges. A minimum "
        "beyond 1 says that the artefact stopped short.",
        "Line chart of the loss along the line from the base through each run and merge.",
        chart,
    )


def _traces(results: Results) -> Figure | None:
    import altair as alt

    traces = results.get("traces") or {}
    rows: list[dict[str, Any]] = []
    for name, trace in traces.items():
        every = max(1, len(trace["step"]) // 200)
        smooth, weight = None, 0.9
        for i, (step, loss, rate) in enumerate(zip(trace["step"], trace["loss"], trace["rate"], strict=True)):
            smooth = loss if smooth is None else weight * smooth + (1 - weight) * loss
            if i % every == 0 and math.isfinite(loss):
                rows.append({"name": name, "step": step, "loss": loss, "smooth": smooth, "rate": rate})
    if not rows:
        return None
    names = list(traces)
    colours = [COLOURS.get(str(traces[name].get("optimizer")), NEUTRAL) for name in names]
    colour = alt.Color(
        "name:N",
        scale=alt.Scale(domain=names, range=colours),
        legend=alt.Legend(title=None, symbolOpacity=1, symbolStrokeWidth=3),
    )
    base = alt.Chart(alt.Data(values=rows)).encode(alt.X("step:Q", title="step"), colour)
    raw = base.mark_line(opacity=0.18, strokeWidth=1).encode(alt.Y("loss:Q", title="training loss (nats)"))
    smooth_line = base.mark_line(strokeWidth=2).encode(alt.Y("smooth:Q", title="training loss (nats)"))
    rate_line = base.mark_line(strokeWidth=1.6).encode(
        alt.Y("rate:Q", title="emoPulse", scale=alt.Scale(type="log"), axis=alt.Axis(format=".0e"))
    )
    width = (WIDTH - 150) // 2
    return Figure(
        "The runs",
        "Training loss (smoothed, the raw values behind) and the learning rate each optimizer gave itself, emoPulse. "
        "All runs saw the same rows in the same order; only the optimizer differs.",
        "Two line charts over training steps: the loss of every run, and its learning rate on a logarithmic axis.",
        alt.hconcat(
            alt.layer(raw, smooth_line).properties(width=width, height=260),
            rate_line.properties(width=width, height=260),
        ),
    )


def _cosines(results: Results) -> Figure | None:
    import altair as alt

    cosines = results.get("cosines") or {}
    names = list(cosines.get("names") or [])
    if len(names) < 2:
        return None
    rows = [
        {"a": a, "b": b, "cosine": finite(value)}
        for a, line in zip(names, cosines["matrix"], strict=True)
        for b, value in zip(names, line, strict=True)
    ]
    base = alt.Chart(alt.Data(values=rows)).encode(
        alt.X("b:N", sort=names, title=None, axis=alt.Axis(labelAngle=0)), alt.Y("a:N", sort=names, title=None)
    )
    cells = base.mark_rect().encode(
        alt.Color("cosine:Q", scale=alt.Scale(scheme="blues", domain=[0, 1], clamp=True), legend=None)
    )
    text = base.mark_text(fontSize=12, fontWeight="bold").encode(
        alt.Text("cosine:Q", format=".2f"),
        alt.Color(condition={"test": "datum.cosine > 0.55", "value": "#ffffff"}, value="#10243a"),
    )
    side = max(60, min(90, 450 // len(names)))
    return Figure(
        "How alike the runs are",
        "Cosine between the task vectors of the runs. At 1 the merge can add nothing; at 0 the runs went independent ways.",
        "Matrix of cosines between the task vectors of the runs.",
        (cells + text).properties(width=side * len(names), height=int(side * 0.55) * len(names)),
    )
