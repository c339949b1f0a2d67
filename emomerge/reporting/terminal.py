"""The table that ends `emomerge run`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from emomerge.reporting.table import Column, artefacts, columns, middle_radius


def figures_table(results: Mapping[str, Any], width: int = 80) -> Table:
    """Losses, accuracy, sharpness at the middle radius, curvature and distance of every artefact: base, runs, merges, controls.

    The best run or merge of a column is bold. Columns that find no room in `width` characters are left out, the least
    important ones first.
    """
    rows = artefacts(results)
    chosen = _fitting(_wanted(results), width - 4 - max((cell_len(str(a["name"])) for a in rows), default=0))
    table = Table(title=str(results.get("name", "")))
    table.add_column("", no_wrap=True)
    for column in chosen:
        table.add_column("\n".join(_title(column)), justify="right", no_wrap=True)
    role = None
    for i, artefact in enumerate(rows):
        if role not in (None, artefact.get("role")):
            table.add_section()
        role = artefact.get("role")
        cells = [Text(_cell(c, i), style="bold green" if i in c.best else "") for c in chosen]
        table.add_row(Text(str(artefact["name"])), *cells)
    return table


def _wanted(results: Mapping[str, Any]) -> list[Column]:
    """The columns worth a place, the first ones most."""
    radius = middle_radius(results)
    sharpness = [] if radius is None else [f"sharpness_{radius:g}"]
    keys = ["validation_loss", "test_loss", "test_accuracy", *sharpness, "distance", "lambda_max", "trace", "basin"]
    known = {column.key: column for column in columns(results)}
    return [known[key] for key in keys if key in known]


def _fitting(wanted: Sequence[Column], room: int) -> list[Column]:
    """As many of the first columns as fit, each with two spaces and a line."""
    fitting = []
    for column in wanted:
        room -= 3 + max(map(cell_len, [*_title(column), *(_cell(column, i) for i in range(len(column.cells)))]))
        if room < 0:
            break
        fitting.append(column)
    return fitting


def _title(column: Column) -> list[str]:
    """The heading, a line a word."""
    return column.title.replace("validation", "valid.").replace("sharpness", "sharp.").split()


def _cell(column: Column, row: int) -> str:
    return column.cells[row].partition(" ± ")[0]
