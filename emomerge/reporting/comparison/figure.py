"""The differences between the models of several experiments, with their intervals."""

from __future__ import annotations

from typing import Any

from emomerge.reporting.comparison.compared import Contender, Group
from emomerge.reporting.comparison.terminal import difference_of
from emomerge.reporting.figure import NARROW, WIDE, Axis, Figure, Row, chart_of, painted
from emomerge.reporting.text import decimals

MOST = 20
"""Models in a figure; the table has all."""


def differences(group: Group) -> Figure | None:
    """Draw the loss of every model minus that of the first; None if there is nothing to compare."""
    ranked = [found for found in group.models if found.rank is not None and found.role != "base"][:MOST]
    if len(ranked) < 2:
        return None
    places = decimals([found.test_loss for found in ranked], 4)
    rows = [_row(number, found, places) for number, found in enumerate(ranked)]
    undecided = sum(found.rank_low == 1 for found in ranked)
    caption = (
        f"Test loss minus that of {ranked[0].model} of {ranked[0].run}, with intervals that hold for all pairs together. "
        "Circle: may be the best; square: some other model is lower beyond doubt. In bold: what each experiment recommends."
    )
    if len(ranked) == MOST:
        caption += f" The best {MOST} are shown."
    summary = f"Differences in test loss of {len(rows)} models; {undecided} of them may be the best."
    title = "Which model is best?"
    return Figure(title, caption, summary, _draw(rows, WIDE, group.unit), _draw(rows, NARROW, group.unit))


def _row(number: int, found: Contender, places: int) -> Row:
    return {
        "row": number, "label": f"{found.run} · {found.model}", "figures": difference_of(found, places),
        "estimate": found.difference, "low": found.difference_low, "high": found.difference_high,
        "outcome": "good" if found.rank_low == 1 else "unclear", "weight": "bold" if found.recommended else "normal",
    }  # fmt: skip


def _draw(rows: list[Row], width: int, unit: str) -> Any:
    import altair as alt

    known = [row[key] for row in rows for key in ("estimate", "low", "high") if row[key] is not None]
    axis = Axis.around([*known, 0.0])
    ticks = alt.Axis(title=f"difference in test loss ({unit})", grid=True, tickCount=5, format="~g")
    y = alt.Y("row:O", axis=None)

    def x(field: str) -> Any:
        return alt.X(f"{field}:Q", scale=axis.scale(), axis=ticks)

    shape = alt.Shape("outcome:N", scale=alt.Scale(domain=["good", "unclear"], range=["circle", "square"]), legend=None)
    tooltip = [alt.Tooltip("label:N", title="model"), alt.Tooltip("figures:N", title="difference")]
    chart, drop = chart_of(rows), 8
    layers = [
        chart_of([{"neutral": 0.0}], "muted").mark_rule(strokeWidth=1.3).encode(x=x("neutral"), color=painted()),
        chart.mark_rule(strokeWidth=3, yOffset=drop, y2Offset=drop).encode(
            x=x("low"), x2="high:Q", y=y, color=painted("outcome")
        ),
        chart.mark_point(filled=True, size=80, opacity=1, yOffset=drop).encode(
            x=x("estimate"), y=y, color=painted("outcome"), shape=shape, tooltip=tooltip
        ),
    ]
    halo = {"strokeWidth": 5, "strokeJoin": "round", "fillOpacity": 0}
    room = width - (180 if width == WIDE else 0)
    for colour, look in (("paper", halo), ("ink", {})):
        paint = {"stroke": alt.Stroke(**painted().to_dict())} if look else {"color": painted()}
        for weight in ("normal", "bold"):
            some = chart_of([row for row in rows if row["weight"] == weight], colour)
            text = some.mark_text(align="left", baseline="middle", dy=-8, fontWeight=weight, limit=room, **look)
            layers.append(text.encode(x=alt.value(0), y=y, text="label:N", **paint))
    figures = chart_of(rows, "muted").mark_text(align="right", baseline="middle", dy=-8)
    if width == WIDE:
        layers.append(figures.encode(x=alt.value("width"), y=y, text="figures:N", color=painted()))
    return alt.layer(*layers).properties(width=width, height=alt.Step(40))
