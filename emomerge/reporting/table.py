"""The columns of the tables, formatted once for the page, the model card and the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from emomerge.reporting.text import decimals, fixed, percent
from emomerge.results import ArtefactRow, Column, Estimate, Results, View, sort_rows


@dataclass(frozen=True)
class FilledColumn:
    """One figure of all artefacts, in the order of the rows."""

    column: Column
    meaning: str
    """Meaning of the column, with remarks on single measurements."""
    values: tuple[float | None, ...]
    """Values to sort by; infinitely bad if a measurement diverged."""
    cells: tuple[str, ...]
    best: frozenset[int] = frozenset()
    """Rows with the best value among runs and merges, compared by the printed digits."""


def artefacts(results: Results) -> list[ArtefactRow]:
    """Return the artefacts in the order of reports: base, runs, merges, controls."""
    return sort_rows(results.artefacts)


def measured(results: Results) -> list[Column]:
    """Return the columns for which at least one artefact has a figure."""
    return [column for column in results.columns if any(column.key in row.estimates for row in results.artefacts)]


def radii(results: Results, family: str) -> list[float]:
    """Return the radii at which a family of figures was measured, ascending."""
    return sorted(c.radius for c in measured(results) if c.family == family and c.radius is not None)


def middle_radius(results: Results) -> float | None:
    """Return the radius of the average sharpness to show where only one radius is shown."""
    every = radii(results, "sharpness")
    return every[len(every) // 2] if every else None


def filled_columns(results: Results, view: View) -> list[FilledColumn]:
    """Return the columns of a view; among secondary measures, those at several radii come first."""
    chosen = [column for column in measured(results) if view in column.views]
    if view == "details":
        chosen.sort(key=lambda column: column.radius is None)
    rows = artefacts(results)
    return [fill(column, rows) for column in chosen]


def fill(column: Column, rows: Sequence[ArtefactRow]) -> FilledColumn:
    """Format one figure of every row. A measurement without a mean diverged; remarks are appended to the meaning."""
    entries = [row.estimates.get(column.key) for row in rows]
    means = [entry.mean if entry else None for entry in entries]
    places = decimals(means, column.digits) if column.decimals is None else column.decimals
    printed = [percent(mean) if column.percent else fixed(mean, places) for mean in means]
    worst = -math.inf if column.better == "higher" else math.inf
    findings = [
        f"{row.name}: {entry.finding}"
        for row, entry in zip(rows, entries, strict=True)
        if entry and entry.mean is not None and entry.finding
    ]
    return FilledColumn(
        column,
        "; ".join([column.meaning, *findings]),
        tuple(worst if entry and mean is None else mean for entry, mean in zip(entries, means, strict=True)),
        tuple(_cell(entry, text, places) for entry, text in zip(entries, printed, strict=True)),
        _best(column, rows, means, printed),
    )


def _cell(entry: Estimate | None, mean: str, places: int) -> str:
    if entry is None or entry.mean is not None:
        return mean if entry is None or entry.stderr is None else f"{mean} ± {fixed(entry.stderr, places)}"
    return "diverged"


def _best(column: Column, rows: Sequence[ArtefactRow], means: Sequence[float | None], printed: Sequence[str]) -> frozenset[int]:
    """Return the best runs or merges; the base and rescaled task vectors look flat merely because they are near the base."""
    competing = {i: mean for i, mean in enumerate(means) if mean is not None and rows[i].role in ("run", "merge")}
    if column.better is None or len(competing) < 2:
        return frozenset()
    winner = (min if column.better == "lower" else max)(competing, key=lambda i: competing[i])
    return frozenset(i for i in competing if printed[i] == printed[winner])
