"""Colours of the light and dark schemes, shared by the page's style sheet, the charts in the page and the PNG files.

Optimizers have the colour-blind-safe hues of Okabe and Ito (2008), the same in every figure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emomerge.results import ArtefactRow


def mix(first: str, second: str, share: float) -> str:
    """Interpolate from the first colour (`share` 0) to the second (1)."""
    pairs = [(int(first[i : i + 2], 16), int(second[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in pairs)


LIGHT = {
    "paper": "#ffffff", "ink": "#1c1e21", "muted": "#5f6670", "grid": "#e4e6ea", "panel": "#f5f6f8",
    "sens": "#0072b2", "airy": "#d98b00", "cats": "#009e73", "tion": "#b8568f", "void": "#d55e00",
    "adamw": "#8a6239", "other": "#3d8fc4",
    "good": "#0b7a4b", "bad": "#b3261e", "unclear": "#6b7280", "warm": "#d55e00", "cool": "#0072b2",
}  # fmt: skip
DARK = {
    "paper": "#14161a", "ink": "#eceef1", "muted": "#a2a9b4", "grid": "#31353c", "panel": "#1e2127",
    "sens": "#56b4e9", "airy": "#f0b13c", "cats": "#2fc79a", "tion": "#e29bc6", "void": "#f4803d",
    "adamw": "#c9a27a", "other": "#9ecbf0",
    "good": "#4ccb8f", "bad": "#ff7b72", "unclear": "#a2a9b4", "warm": "#f4803d", "cool": "#4d9fd6",
}  # fmt: skip
STEPS = tuple(f"step-{k}" for k in range(9))
"""From pale to saturated, for maps of a loss: low losses are close to the background."""
for scheme in (LIGHT, DARK):
    scheme.update({step: mix(scheme["paper"], scheme["cool"], 0.06 + 0.11 * k) for k, step in enumerate(STEPS)})

VARIABLES = {name: f"var(--{name})" for name in LIGHT}
"""The same names as CSS variables: charts drawn with them follow the page's scheme, also in print."""

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
OPTIMIZERS = ("sens", "airy", "cats", "tion", "void", "adamw")


def colour_of(row: ArtefactRow) -> str:
    """Return the palette's name for an artefact: its optimizer's hue, ink for merges, grey for the base."""
    if row.role in ("base", "merge"):
        return "muted" if row.role == "base" else "ink"
    return optimizer_colour(row.optimizer)


def optimizer_colour(optimizer: str | None) -> str:
    """Return the palette's name for an optimizer."""
    name = (optimizer or "").removeprefix("emo")
    return name if name in OPTIMIZERS else "other"


def chart_config(colours: Mapping[str, str]) -> dict[str, Any]:
    """Return the Vega-Lite configuration that applies a palette to a chart."""
    quiet = {"font": FONT, "labelColor": colours["muted"], "titleColor": colours["ink"]}
    return {
        "background": None,
        "aria": False,  # the page describes each figure as a whole
        "mark": {"aria": False}, "rule": {"aria": False},
        "font": FONT,
        "view": {"stroke": None},
        "range": {"category": list(colours.values())},
        "axis": {
            **{f"{part}Font": FONT for part in ("label", "title")},
            "labelColor": colours["muted"], "labelFontSize": 12, "labelFlush": False,
            "titleColor": colours["ink"], "titleFontSize": 12, "titleFontWeight": "normal", "titlePadding": 8,
            "gridColor": colours["grid"], "domainColor": colours["muted"], "tickColor": colours["muted"],
        },
        "legend": {
            "labelFont": quiet["font"], "labelColor": colours["ink"], "labelFontSize": 12, "symbolSize": 90,
            "titleFont": FONT, "titleColor": colours["ink"], "titleFontSize": 12, "titleFontWeight": "normal",
            "symbolStrokeColor": colours["ink"], "symbolFillColor": colours["paper"],
        },
        "title": {"font": FONT, "color": colours["ink"], "fontSize": 14, "anchor": "start", "offset": 12},
        "text": {"fontSize": 12, "font": FONT},
    }  # fmt: skip
