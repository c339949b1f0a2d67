"""Figures of the Hessian: its spectrum, and the trace of each layer."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from emomerge.reporting import labels
from emomerge.reporting.figure import NARROW, WIDE, Axis, Figure, Row, chart_of, painted
from emomerge.reporting.kinds import SYMBOLS, contestants, kind_of
from emomerge.reporting.palette import colour_of
from emomerge.reporting.table import artefacts
from emomerge.reporting.text import percent, short
from emomerge.results import ArtefactRow, Results

FAINTEST = 1e-7
"""Densities below this fraction of the highest are not drawn, since they are dominated by the tails of the smoothing kernel."""
DASHES = {"distance-matched": [5, 3], "loss-matched": [2, 2]}
MOST_LAYERS, MORE_THAN = 24, 20
"""Maximum number of layers drawn, and the ratio of traces above which the axis is logarithmic."""


@dataclass(frozen=True)
class Spectrum:
    """One line in the figure of spectral densities."""

    name: str
    colour: str
    dash: list[int] | None
    points: list[tuple[float, float]]
    """Pairs of eigenvalue and density."""
    largest: float | None
    trace: float | None

    def key(self, *, brief: bool = False) -> str:
        """Return the line's entry in the legend."""
        figures = [("λmax", self.largest)] + ([] if brief else [("trace", self.trace)])
        return ", ".join([self.name, *(f"{word} {short(value)}" for word, value in figures if value is not None)])


def spectral_density(results: Results) -> Figure | None:
    """Draw the spectral density of the Hessian for the merge, the best single run, and the controls matched to either."""
    compared = [row for row in _compared(results) if row.hessian]
    found = [_spectrum(a) for a in compared]
    spectra = [s for s in found if s is not None]
    if not spectra:
        return None
    named = "; ".join(s.key() for s in spectra)
    reach = "at the triangle is λmax. " if any(s.largest is not None for s in spectra) else ""
    caption = (
        "Density of the Hessian's eigenvalues, on a logarithmic axis. Nearly all are close to 0; the few to the right are "
        f"steep directions: the further left a line ends, the flatter; {reach}Right of 0 the loss curves upwards, left of it "
        "downwards. The curves are smoothed estimates from random vectors: their ends are meaningful, their ripples are not."
    )
    diverged = [row.name for row, s in zip(compared, found, strict=True) if s is None]
    if diverged:
        caption += f" Diverged and not drawn: {', '.join(diverged)}."
    return Figure(
        "The spectrum of the Hessian",
        caption,
        f"Line chart, logarithmic axis, of the density of the Hessian's eigenvalues of {len(spectra)} artefacts: {named}.",
        _draw_spectra(spectra, WIDE, 320),
        _draw_spectra(spectra, NARROW, 320),
    )


def layer_traces(results: Results) -> Figure | None:
    """Draw the trace of each layer's block of the Hessian, for the merge and the best single run."""
    pair = [a for a in contestants(results) if a is not None and _layers(a)]
    if len(pair) < 2:
        return None
    merge, single = pair
    of_merge, of_single = _layers(merge), _layers(single)
    every = [name for name in of_merge if name in of_single]
    if not every:
        return None
    kept = set(sorted(every, key=lambda n: -max(abs(of_merge[n]), abs(of_single[n])))[:MOST_LAYERS])
    rows: list[Row] = [
        {
            "row": index, "layer": name, "merge": of_merge[name], "single": of_single[name],
            "outcome": "good" if of_merge[name] < of_single[name] else "bad",
        }
        for index, name in enumerate(name for name in every if name in kept)
    ]  # fmt: skip
    lower = sum(r["outcome"] == "good" for r in rows)
    caption = (
        f"The Hessian's trace, layer by layer in the model's order: {merge.name} (diamond) and the best single run "
        f"{single.name} (circle). The line is green where the merge curves less, red where it curves more. Estimates from "
        "random vectors; small differences mean nothing."
    )
    if len(rows) < len(every):
        whole = sum(abs(of_merge[name]) for name in every)
        share = sum(abs(r["merge"]) for r in rows) / whole if whole else None
        caption += f" The {len(rows)} largest of {len(every)} layers are shown, with {percent(share, 0)} of the merge's trace."
    diverged = len(_layer_names(merge) | _layer_names(single)) - len(every)
    if diverged:
        caption += f" Without a figure for both, because one diverged: {diverged} layers."
    return Figure(
        "Where the curvature lies",
        caption,
        f"Dot plot of the Hessian's trace in {len(rows)} layers: {merge.name} is below {single.name} in {lower}.",
        _draw_layers(rows, (merge, single), WIDE),
        _draw_layers(rows, (merge, single), NARROW),
    )


def _compared(results: Results) -> list[ArtefactRow]:
    """Return the merge, the best single run and the controls that are matched to one of them."""
    pair = [row for row in contestants(results) if row is not None]
    names = {row.name for row in pair}
    return [*pair, *(row for row in artefacts(results) if kind_of(row) in DASHES and row.of in names)]


def _spectrum(row: ArtefactRow) -> Spectrum | None:
    held = row.hessian and row.hessian.density
    pairs = zip(held.at, held.density, strict=False) if held else ()
    points = [(x, y) for x, y in pairs if x is not None and y is not None]
    if len(points) < 2 or max(y for _, y in points) <= 0:
        return None
    return Spectrum(row.name, colour_of(row), DASHES.get(kind_of(row)), points, row.mean("lambda_max"), row.mean("trace"))


def _layers(row: ArtefactRow) -> dict[str, float]:
    """Return layer → trace for the layers whose trace is finite."""
    found = row.hessian.layers if row.hessian else {}
    return {name: trace for name, trace in found.items() if trace is not None}


def _layer_names(row: ArtefactRow) -> set[str]:
    return set(row.hessian.layers) if row.hessian else set()


def _draw_spectra(spectra: Sequence[Spectrum], width: int, height: int) -> Any:
    """Draw the lines below their legend, which occupies the top of the plot."""
    import altair as alt

    highest = max(density for s in spectra for _, density in s.points)
    lowest = FAINTEST * highest
    room = height - 18 * len(spectra) - 8
    axis = Axis(lowest, lowest * (highest / lowest) ** (height / room), log=True)
    ends = [x for s in spectra for x, _ in s.points] + [s.largest for s in spectra if s.largest is not None]
    across = Axis.around(ends, 0.03)
    ticks = 5 if width < 400 else 9
    x = alt.X("x:Q", scale=across.scale(), axis=alt.Axis(title="eigenvalue of the Hessian", grid=False, tickCount=ticks))
    marks = [10.0**k for k in range(math.ceil(math.log10(lowest)), math.floor(math.log10(highest)) + 1, 2)]
    y = alt.Y("y:Q", scale=axis.scale(), axis=alt.Axis(title="density", values=marks, format="~e"))
    zero = chart_of([{"x": 0.0, "y": lowest, "y2": highest}], "muted").mark_rule(strokeDash=[3, 3])
    layers = [zero.encode(x=x, y=y, y2="y2:Q", color=painted())]
    for number, s in enumerate(spectra):
        merged = s.colour == "ink"
        look = {"strokeWidth": 2.4 if merged else 1.7, "strokeDash": s.dash or alt.Undefined}
        curve = chart_of(_above(s.points, lowest), s.colour).mark_line(**look)
        entry, at = chart_of([{"name": s.key(brief=width < 400)}], s.colour), alt.value(18 * number + 9)
        text = entry.mark_text(align="left", baseline="middle", dx=36)
        layers += [
            curve.encode(x=x, y=y, color=painted()),
            entry.mark_rule(**look).encode(x=alt.value(4), x2=alt.value(30), y=at, color=painted()),
            text.encode(x=alt.value(4), y=at, text="name:N", color=painted()),
        ]
        if s.largest is not None:
            spot = chart_of([{"x": s.largest, "y": lowest, "name": s.name}], s.colour)
            tooltip = [alt.Tooltip("name:N", title="artefact"), alt.Tooltip("x:Q", title="λmax", format=".4g")]
            mark = spot.mark_point(shape="triangle-down", filled=not s.dash, size=70, opacity=1, yOffset=-6)
            layers.append(mark.encode(x=x, y=y, color=painted(), tooltip=tooltip))
    return alt.layer(*layers).properties(width=width, height=height)


def _above(points: Sequence[tuple[float, float]], lowest: float) -> list[Row]:
    """Return a line clipped at the lowest density; None interrupts it where it would run along the axis."""
    high = [y > lowest for _, y in points]
    near = [any(high[max(i - 1, 0) : i + 2]) for i in range(len(points))]
    drawn = [max(y, lowest) if seen else None for (_, y), seen in zip(points, near, strict=True)]
    return [
        {"x": float(f"{x:.5g}"), "y": None if y is None else float(f"{y:.4g}")} for (x, _), y in zip(points, drawn, strict=True)
    ]


def _draw_layers(rows: Sequence[Row], pair: Sequence[ArtefactRow], width: int) -> Any:
    import altair as alt

    values = [r[side] for r in rows for side in ("merge", "single")]
    log = min(values) > 0 and max(values) > MORE_THAN * min(values)
    axis = Axis.around(values if log else [*values, 0.0], 0.04, log=log)
    number = alt.Axis(title=["the layer's part of the trace", "← flatter"], tickCount=4 if width < 400 else 8)

    def x(field: str) -> Any:
        return alt.X(f"{field}:Q", scale=axis.scale(), axis=number)

    shown = _brief([r["layer"] for r in rows], 110 if width < 400 else 210)
    look = alt.Axis(
        title=None, labelExpr=f"{json.dumps(shown)}[datum.value]", labelLimit=220, ticks=False, domain=False, grid=True
    )
    y = alt.Y("row:O", axis=look)
    tooltip = [
        alt.Tooltip("layer:N"),
        *(alt.Tooltip(f"{s}:Q", title=a.name, format=".4g") for s, a in zip(("merge", "single"), pair, strict=True)),
    ]
    names = [a.name for a in pair]
    shapes = alt.Scale(domain=names, range=[SYMBOLS[kind_of(a)].shape for a in pair])
    shape = alt.Shape("name:N", scale=shapes, legend=alt.Legend(title=None, orient="top"))
    joins = chart_of(rows).mark_rule(strokeWidth=3, opacity=0.55)
    layers = [joins.encode(x=x("single"), x2="merge:Q", y=y, color=painted("outcome"))]
    for side, artefact, name in zip(("merge", "single"), pair, names, strict=True):
        spots = chart_of([{**r, "name": name} for r in rows], colour_of(artefact))
        mark = spots.mark_point(filled=True, size=SYMBOLS[kind_of(artefact)].area, opacity=1)
        layers.append(mark.encode(x=x(side), y=y, color=painted(), shape=shape, tooltip=tooltip))
    return alt.layer(*layers).properties(width=width, height=alt.Step(19))


def _brief(names: Sequence[str], width: float) -> list[str]:
    """Return names without their common modules, shortened in the middle to a width in pixels."""
    parts = [name.split(".") for name in names]
    shared = next((i for i, level in enumerate(zip(*parts, strict=False)) if len(set(level)) > 1), 0)
    return [_cut(".".join(of_name[shared:]), width) for of_name in parts]


def _cut(name: str, width: float) -> str:
    shown, keep = name, len(name)
    while keep > 2 and labels.text_width(shown) > width:
        keep -= 1
        shown = f"{name[: keep // 3]}…{name[keep // 3 - keep :]}"
    return shown
