"""Write docs/robustness.md from benchmarks/results/hostile.json, where `hostile_inputs.py` leaves what it counted.

python benchmarks/hostile_tables.py
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks/results/hostile.json", ROOT / "docs/robustness.md"
KINDS = {
    "weights": ("one file", "sharded folder", "folder of parts"),
    "files beside weights": ("configuration and tokenizer", "model of a configuration"),
    "adapters": ("adapter", "adapter configuration"),
    "recipes and mergekit configurations": ("recipe", "settings of a recipe", "mergekit configuration"),
    "records, masks and results": ("record of a merge", "masks", "output folder", "results", "page"),
    "data": ("data tables", "image data"),
    "whole commands": tuple(f"command line {number}" for number in range(1, 7)),
    "merge methods on odd tensors": ("merge methods",),
    "killed and competing processes": ("train-all killed", "two train-all in one folder", "two run in one folder"),
    "hash seeds and threads": ("hash seeds and threads",),
}
"""What a row of the table sums up, by the parts of the campaign."""
INTRODUCTION = """# Damaged inputs

All of this page is written by `benchmarks/hostile_tables.py` from `benchmarks/results/hostile.json`.

A campaign damages valid files of every kind that emomerge reads, and reads them (`benchmarks/hostile_inputs.py`). A trial fails
if it raises anything but an error in one line, hangs for 20 seconds, shows escape sequences, leaves a temporary, writes NaN, or
ends in other bytes than a run that was left alone. A short form of the campaign runs among the tests.
"""


def page(results: dict[str, Any]) -> str:
    """Return the page."""
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for campaign in results["campaigns"]:
        for kind, parts in KINDS.items():
            for part in parts:
                for figure in ("trials", "accepted", "refused"):
                    counts[kind][figure] += campaign["parts"].get(part, {}).get(figure, 0)
                counts[kind]["left"] += sum(campaign["parts"].get(part, {}).get("failures", {}).values())
    for fault in results["mended"]:
        counts[fault["kind"]]["found"] += fault["trials"]
    columns = ("trials", "accepted", "refused", "found", "left")
    lines = [
        INTRODUCTION,
        "| inputs | trials | read | refused in one line | failures found | left |",
        "| --- |" + " ---: |" * 5,
    ]
    lines += [f"| {kind} | {' | '.join(str(counts[kind][column]) for column in columns)} |" for kind in KINDS]
    total = [sum(counts[kind][column] for kind in KINDS) for column in columns]
    lines += [f"| **all** | {' | '.join(f'**{each}**' for each in total)} |", "", "## What was found and mended", ""]
    lines += [f"- {fault['kind']}: {fault['what']}" for fault in results["mended"]]
    lines += ["", "## Inputs grown by coverage", "", results["coverage"], ""]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(json.loads(RESULTS.read_text())))
