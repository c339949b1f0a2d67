"""docs/claims.md, the table of verdicts in docs/evidence.md, and the figures, all from benchmarks/results/claims/."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from claims_core import CLAIMS, Claim, Store
from evidence_tables import ROOT, Cells, markdown
from rich.table import Table

PAGE = ROOT / "docs" / "claims.md"
FIGURES = ROOT / "docs" / "claims"
START, END = "<!-- written by benchmarks/claims.py -->", "<!-- end -->"
INTRODUCTION = """\
All of this page is written by `python benchmarks/claims.py --tables` from `benchmarks/results/claims/`. Each claim is one
function of `benchmarks/claims_*.py`, with the rule by which its verdict was read; `python benchmarks/claims.py NAME` measures
it. The claims are those of muooon's emo v3.8 paper and of its README. “Holds” means: under the conditions of the text, on tasks
small enough for a CPU. We do not claim more. Unless said otherwise, ± is the standard error over seeds, and intervals are 95 %
intervals by Student's t."""


def verdict_rows(results: Path) -> Cells:
    """Return the table of verdicts: a row for each claim; the first row is the head."""
    rows = [["claim", "verdict", "found", "command", "CPU minutes"]]
    for name, claim in CLAIMS.items():
        store = Store(results / f"{name}.jsonl")
        command = f"`python benchmarks/claims.py {name}`"
        missing = store.missing(claim)
        if missing:
            rows.append([claim.says, "not measured yet", f"{missing} units are missing", command, ""])
            continue
        verdict = claim.judge(store.units(claim))
        minutes = max(store.seconds(claim) / 60, 0.1)
        rows.append([f"[{claim.says}]({PAGE.name}#{name})", f"**{verdict.word}**", verdict.text, command, f"{minutes:.1f}"])
    return rows


def summary(results: Path) -> str:
    """Return the table of verdicts in Markdown, for docs/evidence.md."""
    return markdown(verdict_rows(results))


def page(results: Path) -> str:
    """Return docs/claims.md."""
    parts = ["# The paper's claims, one by one", f"{START}\n\n{INTRODUCTION}"]
    parts += [section(claim, Store(results / f"{name}.jsonl")) for name, claim in CLAIMS.items()]
    return "\n\n".join([*parts, END]) + "\n"


def section(claim: Claim, store: Store) -> str:
    """Return the part of one claim."""
    head = f"## {claim.name} {{#{claim.name}}}\n\n*{claim.says}* ({claim.source})"
    control = f"**Control.** {claim.control}"
    if store.missing(claim):
        return "\n\n".join([head, control, f"*Not measured yet: `python benchmarks/claims.py {claim.name}`.*"])
    verdict = claim.judge(store.units(claim))
    parts = [head, f"**{verdict.word[0].upper()}{verdict.word[1:]}.** {verdict.text}", markdown(verdict.table)]
    if claim.figure is not None:
        parts.append(f"![{claim.says}](claims/{claim.name}.png)")
    parts.append(" ".join(filter(None, [verdict.notes, f"({store.conditions(claim)}.)"])))
    return "\n\n".join([*parts, control, f"**What follows.** {claim.taught}"])


def draw(chart: Any, file: Path) -> None:
    """Write an altair chart as PNG."""
    data = io.BytesIO()
    chart.save(data, format="png", scale_factor=1.5)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data.getvalue())


def summary_table(results: Path) -> Table:
    """Return the table of verdicts for the terminal."""
    table = Table("claim", "verdict", "found", "CPU min", show_lines=True)
    for name, (_, word, found, _, minutes) in zip(CLAIMS, verdict_rows(results)[1:], strict=True):
        table.add_row(name, word.strip("*"), found, minutes)
    return table
