"""The page that compares experiments: self-contained, like that of one experiment."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from emomerge.extras import needed_by
from emomerge.reporting.comparison.compared import Comparison, Contender
from emomerge.reporting.comparison.figure import differences
from emomerge.reporting.comparison.terminal import difference_of, rank_of
from emomerge.reporting.palette import DARK, LIGHT
from emomerge.reporting.report import as_link, drawn_parts, environment
from emomerge.reporting.text import decimals, fixed, percent, short

FIELDS = [name for name in Contender.model_fields if name != "path"]


def write_comparison(comparison: Comparison, out: str | Path) -> Path:
    """Write the page.

    Raises:
        MissingExtra: the extra `report` is not installed.
    """
    from emomerge.checkpoints import atomic  # imports torch

    with needed_by("the report"):
        drawn = {f"differences-{number}": differences(group) for number, group in enumerate(comparison.groups)}
        figures = {name: figure for name, figure in drawn.items() if figure is not None}
        page = environment().get_template("comparison/comparison.html.j2").render(
            comparison=comparison,
            title=" · ".join(name for group in comparison.groups for name in group.runs),
            tables=[(group, [_cells(found, group.models) for found in group.models]) for group in comparison.groups],
            chosen=[[_cells(found, group.recommended) for found in group.recommended] for group in comparison.groups],
            downloads={
                "csv": as_link("text/csv", as_csv(comparison)),
                "json": as_link("application/json", comparison.model_dump_json()),
            },
            light=LIGHT, dark=DARK, **drawn_parts(figures),
        )  # fmt: skip
        atomic.write_text(out, page)
    return Path(out)


def as_csv(comparison: Comparison) -> str:
    """Return every model of every group as CSV, with all digits; the recommended ones' ranks are those among all models."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["group", *FIELDS])
    for number, group in enumerate(comparison.groups, 1):
        for found in group.models:
            values = found.model_dump(mode="json", include=set(FIELDS))
            table.writerow([number, *("" if values[name] is None else values[name] for name in FIELDS)])
    return text.getvalue()


def _cells(found: Contender, among: tuple[Contender, ...]) -> dict[str, tuple[str, float | None]]:
    """Return the cells of a row: heading → text, and the value to sort by."""
    places = decimals([other.test_loss for other in among], 4)
    sharp = decimals([other.sharpness for other in among], 3)
    cells: dict[str, tuple[str, float | None]] = {
        "rank": (rank_of(found), found.rank),
        "test loss": (fixed(found.test_loss, places), found.test_loss),
        "− the first": (difference_of(found, places), found.difference),
    }
    if any(other.accuracy is not None for other in among):
        cells["test acc."] = (percent(found.accuracy), found.accuracy)
    if any(other.sharpness is not None for other in among):
        cells["sharpness"] = (fixed(found.sharpness, sharp), found.sharpness)
    if any(other.cpu_seconds is not None for other in among):
        cells["CPU s"] = (short(found.cpu_seconds), found.cpu_seconds)
    return cells
