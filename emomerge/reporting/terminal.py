"""The table of figures that `emomerge run` prints at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.cells import cell_len

from emomerge.reporting.table import FilledColumn, artefacts, filled_columns, middle_radius
from emomerge.results import Column, Results

if TYPE_CHECKING:
    from rich.table import Table

FIRST = ("validation_loss", "test_loss", "test_accuracy", "sharpness", "cpu_seconds", "examples", "distance")
"""Columns or families in order of importance: shown first, left out last."""


def figures_table(results: Results, width: int = 80) -> Table:
    """Return a table of losses, accuracy, sharpness at the middle radius, curvature and distance of every artefact.

    The best run or merge of a column is bold. Columns that do not fit in `width` characters are left out, the least
    important ones first.
    """
    from rich.table import Table
    from rich.text import Text

    rows = artefacts(results)
    chosen = _fitting(_wanted(results), width - 4 - max((cell_len(row.name) for row in rows), default=0))
    table = Table(title=results.name)
    table.add_column("", no_wrap=True)
    for filled in chosen:
        table.add_column("\n".join(_title(filled.column)), justify="right", no_wrap=True)
    role = None
    for i, row in enumerate(rows):
        if role not in (None, row.role):
            table.add_section()
        role = row.role
        cells = [Text(_cell(filled, i), style="bold green" if i in filled.best else "") for filled in chosen]
        table.add_row(Text(row.name), *cells)
    return table


def _wanted(results: Results) -> list[FilledColumn]:
    """Return the columns in order of importance; sharpness at the middle radius."""
    radius = middle_radius(results)
    shown = [
        filled
        for filled in filled_columns(results, "terminal")
        if filled.column.family != "sharpness" or filled.column.radius == radius
    ]
    return sorted(shown, key=lambda filled: _rank(filled.column))


def _rank(column: Column) -> int:
    name = column.family or column.key
    return FIRST.index(name) if name in FIRST else len(FIRST)


def _fitting(wanted: Sequence[FilledColumn], room: int) -> list[FilledColumn]:
    """Return the leading columns that fit; each takes two spaces and a rule in addition."""
    fitting = []
    for filled in wanted:
        texts = [*_title(filled.column), *(_cell(filled, i) for i in range(len(filled.cells)))]
        room -= 3 + max(map(cell_len, texts))
        if room < 0:
            break
        fitting.append(filled)
    return fitting


def _title(column: Column) -> list[str]:
    """Return the heading, one word per line."""
    return column.title.replace("validation", "valid.").replace("sharpness", "sharp.").split()


def _cell(filled: FilledColumn, row: int) -> str:
    return filled.cells[row].partition(" ± ")[0]
