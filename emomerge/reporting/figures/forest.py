"""The evidence behind the verdict: forest plots of estimates with their intervals."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias

from emomerge.reporting.figure import HALF, Axis, Figure, Row, chart_of, painted
from emomerge.reporting.labels import text_width
from emomerge.reporting.text import fixed, unit
from emomerge.results import Results

ClaimName: TypeAlias = Literal["better", "flatter"]
SHAPES = {"good": "circle", "bad": "square", "unclear": "diamond"}


def better(results: Results) -> Figure | None:
    """Draw the differences in held-out loss to every rival."""
    return _forest(results, "better", "Is it better?", f"held-out loss of the merge − that of the rival ({unit(results)})")


def flatter(results: Results) -> Figure | None:
    """Draw the ratios of sharpness and curvature to every rival, at every radius."""
    curved = any("σ" not in row["what"] for row in evidence(results, "flatter"))
    measure = "sharpness or curvature" if curved else "sharpness"
    return _forest(results, "flatter", "Is it flatter?", f"{measure} of the merge ÷ that of the rival")


def evidence(results: Results, claim: ClaimName) -> list[Row]:
    """Return every comparison behind a claim: rival, measure, estimate, low, high, and which side the interval favours.

    Losses remain differences; log-ratios of sharpness become ratios. Undefined numbers are None.
    """
    if results.verdict is None:
        return []
    found = []
    for item in getattr(results.verdict, claim).evidence:
        bounds = {"estimate": item.estimate, "low": item.low, "high": item.high}
        if claim == "flatter":
            bounds = {key: None if v is None else math.exp(min(max(v, -50.0), 50.0)) for key, v in bounds.items()}
        row: Row = {
            "against": item.against, "what": item.what.removeprefix("gaussian "),
            "outcome": {-1: "good", 0: "unclear", 1: "bad"}[item.sign], **bounds,
        }  # fmt: skip
        found.append(row | {"figures": interval(row, claim)})
    return found


def interval(row: Row, claim: ClaimName) -> str:
    """Format an estimate with its interval: `−0.0153 [−0.0240, −0.0068]`, `×0.63 [0.55, 0.72]`, `×0.63 [0, 0.72]`."""
    places, mark, signed = (2, "×", False) if claim == "flatter" else (4, "", True)
    if row["estimate"] is None:
        return "not comparable"
    estimate, low, high = (fixed(row[key], places, signed=signed) for key in ("estimate", "low", "high"))
    if row["low"] is None and row["high"] is None:
        return f"{mark}{estimate} (no interval)"
    bottom = ("0" if claim == "flatter" else "−∞") if row["low"] is None else low
    return f"{mark}{estimate} [{bottom}, {'∞' if row['high'] is None else high}]"


def _forest(results: Results, claim: ClaimName, title: str, x_title: str) -> Figure | None:
    found = evidence(results, claim)
    plain = claim == "better" and len({r["what"] for r in found}) == 1  # the axis title already names the measure
    rows = [{**r, "row": i, "label": r["against"] if plain else f"{r['against']} · {r['what']}"} for i, r in enumerate(found)]
    known = [v for r in rows for v in (r["estimate"], r["low"], r["high"]) if v is not None]
    verdict = results.verdict
    if verdict is None or not known:
        return None
    for row in rows:  # an interval open to one side is drawn to the end of the axis
        if (row["low"] is None) != (row["high"] is None):
            row |= {
                "low": min(known) if row["low"] is None else row["low"],
                "high": max(known) if row["high"] is None else row["high"],
            }
    merge = verdict.merge or "the merge"
    wins, losses = (sum(r["outcome"] == outcome for r in rows) for outcome in ("good", "bad"))
    single = ", ".join(verdict.best_single)
    caption = (
        f"{merge} against each rival, with 95 % intervals. Green circle: the whole interval favours the merge; red square: the "
        f"rival; grey diamond: the interval holds {'1' if claim == 'flatter' else '0'} and decides nothing."
        + (f" The best single run is {single}." if single else "")
    )
    summary = (
        f"Forest plot of {len(rows)} comparisons: {wins} favour {merge}, {losses} favour the rival, "
        f"{len(rows) - wins - losses} are undecided."
    )
    return Figure(title, caption, summary, _draw(rows, known, claim, x_title), half=True)


def _draw(rows: list[Row], known: list[float], claim: ClaimName, x_title: str) -> Any:
    import altair as alt

    log = claim == "flatter"
    neutral = 1.0 if log else 0.0
    # A rival's name and the figures share a line if both fit.
    roomy = all(text_width(r["label"]) + text_width(r["figures"]) < HALF - 30 for r in rows)
    drop = 8 if roomy else 12
    axis = Axis.around([*known, neutral], log=log)
    ticks = alt.Axis(title=[x_title, "← the merge wins\u2003|\u2003the rival wins →"], grid=True, tickCount=5, format="~g")

    def x(field: str) -> Any:
        return alt.X(f"{field}:Q", scale=axis.scale(), axis=ticks)

    y = alt.Y("row:O", axis=None)
    shape = alt.Shape("outcome:N", scale=alt.Scale(domain=list(SHAPES), range=list(SHAPES.values())), legend=None)
    tooltip = [alt.Tooltip("label:N", title="against"), alt.Tooltip("figures:N", title="estimate")]
    chart, ink, paper = chart_of(rows), chart_of(rows, "ink"), chart_of(rows, "paper")

    def text(chart: Any, field: str, colour: str, place: str, **look: Any) -> Any:
        dy = -8 if roomy else -18 if place == "left" else -4
        where = {"x": alt.value(0)} if place == "left" else {"x": alt.value("width")}
        mark = chart.mark_text(align=place, baseline="middle", dy=dy, **look)
        paint = {"stroke": alt.Stroke(**painted(colour).to_dict())} if look else {"color": painted(colour)}
        return mark.encode(y=y, text=f"{field}:N", **where, **paint)

    halo = {"strokeWidth": 5, "strokeJoin": "round", "fillOpacity": 0}
    layers = [
        chart_of([{"neutral": neutral}], "muted").mark_rule(strokeWidth=1.3).encode(x=x("neutral"), color=painted()),
        chart.mark_rule(strokeWidth=3, yOffset=drop, y2Offset=drop).encode(
            x=x("low"), x2="high:Q", y=y, color=painted("outcome")
        ),
        chart.mark_point(filled=True, size=90, opacity=1, yOffset=drop).encode(
            x=x("estimate"), y=y, color=painted("outcome"), shape=shape, tooltip=tooltip
        ),
        *(text(paper, field, "colour", place, **halo) for field, place in (("label", "left"), ("figures", "right"))),
        text(ink, "label", "colour", "left"),
        text(chart, "figures", "outcome", "right"),
    ]
    return alt.layer(*layers).properties(width=HALF, height=alt.Step(40 if roomy else 52))
