"""What to do now: the recommendation, and what would make the findings firmer."""

from __future__ import annotations

from emomerge.reporting.figures.forest import evidence
from emomerge.reporting.text import short, unit
from emomerge.results import Results

FEW_SEEDS = 3
"""Below this many training seeds, intervals say little about another training."""


def next_steps(results: Results) -> list[str]:
    """Return sentences on what these results cannot tell, and what to change in the recipe for that."""
    found = []
    verdict, data = results.verdict, results.data
    unclear = [row for row in evidence(results, "better") if row["outcome"] == "unclear" and row["low"] is not None]
    unclear = [row for row in unclear if row["high"] is not None]
    seeds = len({row.seed for row in results.artefacts if row.role == "run"} - {None})
    if data and unclear:
        widths = [(row["high"] - row["low"]) / 2 for row in unclear]
        known = short(min(widths), 1)
        found.append(
            f"{', '.join(row['against'] for row in unclear)}: the difference is within its interval. With {data.rows.test:,} "
            f"test rows and {seeds or 1} training seed{'s' if seeds > 1 else ''}, a difference of test loss below about "
            f"{known} {unit(results)} cannot be told from chance: hold out more rows (task.eval_fraction)"
            + (", or train with more seeds." if seeds < FEW_SEEDS else ".")
        )
    if 0 < seeds < FEW_SEEDS:
        found.append(
            f"Before you tell others that one is better, train with {FEW_SEEDS} seeds: "
            f"--set runs.seeds=[{','.join(map(str, range(FEW_SEEDS)))}]."
        )
    if verdict and "not measured" in verdict.flatter.note and results.probe and results.probe.preset == "quick":
        found.append("Flatness was measured in part only: --set probe.preset=standard adds the Hessian.")
    return found
