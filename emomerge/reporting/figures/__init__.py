"""The figures of a report. Each is a function that maps results to a Figure, or to None if the results lack its data.

A new figure is a function in a file of this folder and a line in FIGURES.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from importlib import import_module
from typing import NamedTuple

from emomerge.reporting.figure import Figure
from emomerge.results import Results


class Section(NamedTuple):
    """A section of the page that holds figures."""

    title: str
    """Heading; empty for none."""
    before_table: bool = False
    """Whether the section precedes the table of figures."""
    pairs: bool = False
    """Whether figures are placed side by side if they fit."""


OVERVIEW = Section("", before_table=True)
EVIDENCE = Section("The evidence", before_table=True, pairs=True)
CURVATURE = Section("The curvature")
LANDSCAPE = Section("The landscape")
RUNS = Section("The runs", pairs=True)


class Entry(NamedTuple):
    """A figure of the page."""

    path: str
    """`module:function`; the function takes results and returns a figure, or None if they lack its data."""
    section: Section

    def draw(self, results: Results) -> Figure | None:
        """Import the function and draw the figure."""
        module, _, name = self.path.partition(":")
        function: Callable[[Results], Figure | None] = getattr(import_module(module), name)
        return function(results)


FIGURES: dict[str, Entry] = {
    "loss-sharpness": Entry("emomerge.reporting.figures.scatter:loss_and_sharpness", OVERVIEW),
    "better": Entry("emomerge.reporting.figures.forest:better", EVIDENCE),
    "flatter": Entry("emomerge.reporting.figures.forest:flatter", EVIDENCE),
    "spectral-density": Entry("emomerge.reporting.figures.curvature:spectral_density", CURVATURE),
    "layer-traces": Entry("emomerge.reporting.figures.curvature:layer_traces", CURVATURE),
    "alpha-curves": Entry("emomerge.reporting.figures.lines:alpha_curves", LANDSCAPE),
    "plane": Entry("emomerge.reporting.figures.landscape:plane", LANDSCAPE),
    "surfaces": Entry("emomerge.reporting.figures.landscape:surfaces", LANDSCAPE),
    "training-loss": Entry("emomerge.reporting.figures.lines:training_loss", RUNS),
    "training-rate": Entry("emomerge.reporting.figures.lines:training_rate", RUNS),
    "cosines": Entry("emomerge.reporting.figures.matrix:cosines", RUNS),
    "barriers": Entry("emomerge.reporting.figures.matrix:barriers", RUNS),
}
"""File name → figure. Sections and their figures stand on the page in this order."""


def draw_figures(results: Results) -> dict[str, Figure]:
    """Draw all figures for which the results hold data, in the order of the page."""
    drawn = {name: entry.draw(results) for name, entry in FIGURES.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def sections(names: Collection[str]) -> dict[Section, list[str]]:
    """Return the sections of the page that have figures among `names`, with the names of these."""
    found: dict[Section, list[str]] = {}
    for name, entry in FIGURES.items():
        if name in names:
            found.setdefault(entry.section, []).append(name)
    return found
