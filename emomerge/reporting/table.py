"""The columns of the tables, formatted once for the page, the model card and the terminal."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

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
    main: bool = True
    """Whether the page shows it before all columns are asked for: what the terminal shows, of several radii the middle one."""


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
    return [replace(fill(column, rows), main=_is_main(column, results)) for column in chosen]


def _is_main(column: Column, results: Results) -> bool:
    every = radii(results, column.family) if column.radius is not None else []
    return "terminal" in column.views and (not every or column.radius == every[len(every) // 2])


def as_csv(results: Results) -> str:
    """Return every figure of every artefact as CSV: its mean, and its standard error in a column of its own where one is known.

    Numbers have all their digits, so that what is read back equals results.json.
    """
    rows, columns = artefacts(results), measured(results)
    with_error = {c.key for c in columns if any(e and e.stderr is not None for row in rows if (e := row.estimates.get(c.key)))}
    head = [name for c in columns for name in (c.key, f"{c.key}_stderr") if name == c.key or c.key in with_error]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["artefact", "role", "control", "seed", *head])
    for row in rows:
        cells: list[object] = [row.name, row.role, row.control or "", "" if row.seed is None else row.seed]
        for column in columns:
            entry = row.estimates.get(column.key)
            cells.append("" if entry is None or entry.mean is None else repr(entry.mean))
            if column.key in with_error:
                cells.append("" if entry is None or entry.stderr is None else repr(entry.stderr))
        table.writerow(cells)
    return text.getvalue()


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
