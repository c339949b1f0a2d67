"""The figure of a report, and building blocks shared by all figures."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

from emomerge.reporting.palette import LIGHT, VARIABLES, chart_config

if TYPE_CHECKING:
    from altair import Color, Fill, LayerChart, Scale

Row: TypeAlias = dict[str, Any]
"""A row of a chart's data: field → number, text or None."""

WIDE, HALF, NARROW = 700, 335, 290
"""Width in pixels of the plotting area of a full-width figure, of one of two side by side, and on a phone."""


@dataclass(frozen=True)
class Figure:
    """A chart with title, caption and alternative text."""

    title: str
    caption: str
    alt: str
    chart: LayerChart
    narrow: LayerChart | None = None
    """The same chart laid out for a phone, for charts that cannot simply be narrowed."""
    half: bool = False
    """Whether two of these figures fit side by side."""

    @cached_property
    def _spec(self) -> dict[str, Any]:
        return _plain(self.chart)

    def spec(self, *, narrow: bool = False) -> dict[str, Any]:
        """Return Vega-Lite JSON for the page, as wide as its container and coloured by the page's CSS variables."""
        plain = _plain(self.narrow) if narrow and self.narrow is not None else self._spec
        return {
            **plain,
            "width": "container",
            "autosize": {"type": "fit-x", "contains": "padding"},
            "config": chart_config(VARIABLES),
        }

    def svg(self) -> str:
        """Return a static image for readers without JavaScript, coloured by the page's CSS variables."""
        import vl_convert

        return str(vl_convert.vegalite_to_svg({**self._spec, "config": chart_config(VARIABLES)}))

    def png(self, scale: float = 2) -> bytes:
        """Return the figure with its title on a white background, with `scale` pixels per point."""
        import vl_convert

        config = {**chart_config(LIGHT), "background": LIGHT["paper"]}
        spec = {"padding": 14, **self._spec, "title": self.title, "config": config}
        return bytes(vl_convert.vegalite_to_png(spec, scale=scale))


def _plain(chart: LayerChart) -> dict[str, Any]:
    """Return Vega-Lite JSON without the schema's URL, since a self-contained page should refer to no address."""
    spec: dict[str, Any] = chart.to_dict(validate=False)  # what is drawn is tested
    spec.pop("$schema", None)
    spec.pop("config", None)
    return spec


def chart_of(rows: Sequence[Row], colour: str | None = None) -> Any:
    """Return a chart of rows, in a single colour of the palette if one is given."""
    import altair as alt
    from altair.utils.schemapi import debug_mode

    with debug_mode(False):  # Altair would validate every row
        chart = alt.Chart(alt.InlineData(values=list(rows)))
    return chart if colour is None else chart.transform_calculate(colour=json.dumps(colour))


def painted(field: str = "colour") -> Color:
    """Return a colour channel whose data are names of palette colours, which the configuration maps to colours."""
    import altair as alt

    return alt.Color(f"{field}:N", scale=alt.Scale(domain=list(LIGHT)), legend=None)


def filled(field: str = "colour") -> Fill:
    """Return the same channel as `painted` for the fill of a shape."""
    import altair as alt

    return alt.Fill(f"{field}:N", scale=alt.Scale(domain=list(LIGHT)), legend=None)


@dataclass(frozen=True)
class Axis:
    """The range of an axis and its type."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def around(cls, values: Sequence[float], margin: float = 0.06, *, log: bool = False) -> Axis:
        """Return an axis that contains all values, with a margin (a share of their range) on both sides."""
        low, high = min(values), max(values)
        if log:
            stretch = max((high / low) ** margin, 1.02)
            return cls(low / stretch, high * stretch, True)
        room = max(margin * (high - low), 0.01 * max(abs(low), abs(high))) or 1.0
        return cls(low - room, high + room)

    def share(self, value: float) -> float:
        """Return the position of a value: 0 at the low end, 1 at the high end."""
        warp = math.log if self.log else float
        return (warp(value) - warp(self.low)) / (warp(self.high) - warp(self.low))

    def outside(self, value: float) -> int:
        """Return −1 below the range, +1 above it, 0 inside."""
        return -1 if value < self.low else 1 if value > self.high else 0

    def clamp(self, value: float) -> float:
        """Return the nearest value in the range."""
        return min(max(value, self.low), self.high)

    def scale(self) -> Scale:
        """Return the axis as an Altair scale."""
        import altair as alt

        return alt.Scale(domain=[self.low, self.high], nice=False, **({"type": "log"} if self.log else {"zero": False}))
