"""The figures of a report, each defined once: one Altair chart becomes the page's graphic and the PNG file."""

from __future__ import annotations

from collections.abc import Callable

from emomerge.reporting.curvature import layer_traces, spectral_density
from emomerge.reporting.figure import Figure, Results
from emomerge.reporting.forest import better, flatter
from emomerge.reporting.landscape import plane, surfaces
from emomerge.reporting.lines import alpha_curves, training_loss, training_rate
from emomerge.reporting.matrix import barriers, cosines
from emomerge.reporting.scatter import loss_and_sharpness

FIGURES: dict[str, Callable[[Results], Figure | None]] = {
    "loss-sharpness": loss_and_sharpness,
    "better": better,
    "flatter": flatter,
    "spectral-density": spectral_density,
    "layer-traces": layer_traces,
    "alpha-curves": alpha_curves,
    "plane": plane,
    "surfaces": surfaces,
    "training-loss": training_loss,
    "training-rate": training_rate,
    "cosines": cosines,
    "barriers": barriers,
}
"""File name → the function that draws it, or returns None where the results lack its data. A new figure is a new line."""


def figures(results: Results) -> dict[str, Figure]:
    """All figures that the results hold data for, in the order of the page."""
    made = {name: draw(results) for name, draw in FIGURES.items()}
    return {name: figure for name, figure in made.items() if figure is not None}
