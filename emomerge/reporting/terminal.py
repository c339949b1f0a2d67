"""The table that ends `emomerge run`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from emomerge.reporting.table import artefacts, columns, middle_radius


def figures_table(results: Mapping[str, Any]) -> Table:
    """Losses, accuracy, sharpness at the middle radius and distance of every artefact: base, runs, merges, controls.

    The best run or merge of a column is bold.
    """
    radius = middle_radius(results)
    wanted = ["validation_loss", "test_loss", "test_accuracy", "distance"]
    if radius is not None:
        wanted.insert(3, f"sharpness_{radius:g}")
    shown = {column.key: column for column in columns(results)}
    chosen = [shown[key] for key in wanted if key in shown]
    table = Table(title=str(results.get("name", "")))
    table.add_column("", no_wrap=True)
    for column in chosen:
        table.add_column(column.title.replace("validation", "valid.").replace("sharpness", "sharp."), justify="right")
    role = None
    for i, artefact in enumerate(artefacts(results)):
        if role not in (None, artefact.get("role")):
            table.add_section()
        role = artefact.get("role")
        cells = [Text(c.cells[i].partition(" ± ")[0], style="bold green" if i in c.best else "") for c in chosen]
        table.add_row(Text(str(artefact["name"])), *cells)
    return table
