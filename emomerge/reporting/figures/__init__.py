"""The figures of a report: one function each, results → Figure, or None where the results lack its data.

A new figure is a function in a file of this folder and a line in FIGURES.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

from emomerge.reporting.figure import Figure
from emomerge.reporting.figures.curvature import layer_traces, spectral_density
from emomerge.reporting.figures.forest import better, flatter
from emomerge.reporting.figures.landscape import plane, surfaces
from emomerge.reporting.figures.lines import alpha_curves, training_loss, training_rate
from emomerge.reporting.figures.matrix import barriers, cosines
from emomerge.reporting.figures.scatter import loss_and_sharpness
from emomerge.results import Results


class Section(NamedTuple):
    """A section of the page that holds figures."""

    title: str
    """Empty: no heading."""
    before_table: bool = False
    """Whether it stands before the table of figures."""
    pairs: bool = False
    """Whether figures stand side by side where they fit."""


OVERVIEW = Section("", before_table=True)
EVIDENCE = Section("The evidence", before_table=True, pairs=True)
CURVATURE = Section("The curvature")
LANDSCAPE = Section("The landscape")
RUNS = Section("The runs", pairs=True)


class Entry(NamedTuple):
    """A figure of the page."""

    draw: Callable[[Results], Figure | None]
    section: Section


FIGURES: dict[str, Entry] = {
    "loss-sharpness": Entry(loss_and_sharpness, OVERVIEW),
    "better": Entry(better, EVIDENCE),
    "flatter": Entry(flatter, EVIDENCE),
    "spectral-density": Entry(spectral_density, CURVATURE),
    "layer-traces": Entry(layer_traces, CURVATURE),
    "alpha-curves": Entry(alpha_curves, LANDSCAPE),
    "plane": Entry(plane, LANDSCAPE),
    "surfaces": Entry(surfaces, LANDSCAPE),
    "training-loss": Entry(training_loss, RUNS),
    "training-rate": Entry(training_rate, RUNS),
    "cosines": Entry(cosines, RUNS),
    "barriers": Entry(barriers, RUNS),
}
"""File name → figure. Sections and their figures stand on the page in this order."""


def draw_figures(results: Results) -> dict[str, Figure]:
    """Draw all figures that the results hold data for, in the order of the page."""
    drawn = {name: entry.draw(results) for name, entry in FIGURES.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def sections(names: Collection[str]) -> dict[Section, list[str]]:
    """Return the sections of the page with the names of their figures, of those drawn."""
    found: dict[Section, list[str]] = {}
    for name, entry in FIGURES.items():
        if name in names:
            found.setdefault(entry.section, []).append(name)
    return found
