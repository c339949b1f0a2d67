"""Run command lines in this process, trainings cut short."""

from __future__ import annotations

import shlex
from pathlib import Path

import yaml
from click.testing import CliRunner, Result

from emomerge.cli import main

ROOT = Path(__file__).parents[2]
SHORT = {
    "runs.steps": 4, "runs.batch_size": 4, "task.limit": 60, "probe.preset": "quick", "probe.batches": 1,
    "probe.batch_size": 8, "probe.directions": 2, "controls": "[best-single]",
}  # fmt: skip
"""Fields of a recipe that make its trainings and measurements take a second or two."""


def shortened(args: list[str], tiny_bert: Path) -> list[str]:
    """A command, cut short if it trains or measures, on a small model instead of one of the Hub."""
    if args[0] not in ("run", "train-all", "probe"):
        return args
    file = Path(args[1]) if Path(args[1]).is_file() else ROOT / "recipes" / f"{args[1]}.yaml"
    base = yaml.safe_load(file.read_text(encoding="utf-8"))["base"]
    hub = {"base.model": tiny_bert, "task.max_length": 16}
    fields = SHORT | ({"base.prepare.steps": 2} if "prepare" in base else hub)
    return args + [part for key, value in fields.items() for part in ("--set", f"{key}={value}")]


def invoke(line: str, tiny_bert: Path) -> Result:
    """Run a command line in this process."""
    return CliRunner().invoke(main, shortened(shlex.split(line)[1:], tiny_bert))
