"""Results in a notebook: what to do, and the table of the terminal."""

from __future__ import annotations

from emomerge import notebook
from emomerge.reporting.advice import next_steps
from emomerge.reporting.table import artefacts, filled_columns, middle_radius
from emomerge.results import Results


def results_html(results: Results) -> str:
    """Return the recommendation, the verdict, what would make them firmer, and the main figures of every artefact."""
    parts = [notebook.paragraph(results.name, strong=True)]
    if results.selected:
        parts.append(notebook.paragraph(results.selected.sentence, strong=True))
    if results.verdict:
        parts.append(notebook.paragraph(results.verdict.sentence))
    parts += [notebook.paragraph(step, quiet=True) for step in next_steps(results)]
    radius = middle_radius(results)
    columns = [
        filled for filled in filled_columns(results, "terminal")
        if filled.column.family != "sharpness" or filled.column.radius == radius
    ]  # fmt: skip
    rows = [(row.name, [(filled.cells[i], i in filled.best) for filled in columns]) for i, row in enumerate(artefacts(results))]
    parts.append(notebook.figures_table(["", *(filled.column.title for filled in columns)], rows))
    return "".join(parts)
