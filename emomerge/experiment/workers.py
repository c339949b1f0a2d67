"""The probe in workers: each evaluates a share and remembers it in a ledger of its own, which ours then takes over.

Measuring afterwards finds everything there. So it does not matter who evaluates what, how often, and where.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emomerge.checkpoints import open_checkpoint
from emomerge.errors import EmomergeError
from emomerge.experiment.measure import BY_DIRECTION, Artefact, Measurer
from emomerge.probing.ledger import Ledger
from emomerge.progress import Display
from emomerge.recipe import Recipe
from emomerge.tasks import make_task
from emomerge.training import Engine, catch_errors, choose_device, run_in_workers

DIRECTIONS = 4
"""Of one share."""
METRICS = (*BY_DIRECTION, "basin", "worst-case", "hessian")
"""What workers evaluate; the rest costs a few forward passes of each model."""


@dataclass(frozen=True)
class Share:
    """Some evaluations as plain data, which any worker that sees the same file system can be sent."""

    recipe: Recipe
    base_folder: Path
    base_hash: str
    artefact: Artefact
    metric: str
    numbers: tuple[int, ...]
    known: Path
    """The ledger of what is evaluated already."""
    ledger: Path
    """The share's own."""
    working_directory: Path
    """What paths in the recipe are relative to."""

    def mark(self, measurer: Measurer) -> dict[str, Any]:
        """The ledger's key of the row that says that all of it is evaluated."""
        return {
            "model": self.artefact.hash, "data": measurer.inputs, "metric": f"share of {self.metric}", "radius": 0.0,
            "direction": self.numbers[0] if self.numbers else None, "batch": 0,
        }  # fmt: skip


def spread(engine: Engine, measurer: Measurer, wanted: Sequence[tuple[Artefact, Sequence[str]]], display: Display) -> None:
    """Let workers evaluate the dear metrics of artefacts, and take their ledgers over, also those of an earlier attempt.

    Args:
        engine: starts the workers.
        measurer: whose ledger is to know everything; it lies in a folder that the workers see.
        wanted: artefacts and their metrics.
        display: shows progress.

    Raises:
        EmomergeError: after all other shares were evaluated, if any could not be.
    """
    known = measurer.ledger.path
    if known is None:
        return
    folder = known.with_name(f"{known.stem}-of-workers")
    planned = [share for artefact, metrics in wanted for share in shares_of(measurer, artefact, metrics, known, folder)]
    # Two artefacts may be the same weights: one worker a ledger.
    shares = {s.ledger: s for s in planned if measurer.ledger.get(**s.mark(measurer)) is None}.values()
    line = display.line("probe in workers", len(shares))
    jobs = {f"{share.metric} of {share.artefact.name}, {share.ledger.stem}": share for share in shares}
    try:
        run_in_workers(engine, evaluate, jobs, on_end=lambda name: line.add(1, name.partition(",")[0]))
    finally:
        for file in sorted(folder.glob("*.jsonl")):
            measurer.ledger.take_over(Ledger(file))
            file.unlink()
        with contextlib.suppress(OSError):  # there was nothing to do, or a worker still ends
            folder.rmdir()


def shares_of(measurer: Measurer, artefact: Artefact, metrics: Sequence[str], known: Path, folder: Path) -> list[Share]:
    """The shares of one artefact."""
    count = measurer.recipe.probe.directions
    parts = [tuple(range(begin, min(begin + DIRECTIONS, count))) for begin in range(0, count, DIRECTIONS)]
    return [
        Share(
            measurer.recipe, measurer.base_folder, measurer.base_hash, artefact, metric, numbers, known,
            folder / f"{artefact.hash[:16]}-{metric}-{number}.jsonl", Path.cwd(),
        )
        for metric in METRICS
        if metric in metrics
        for number, numbers in enumerate(parts if metric in BY_DIRECTION else [()])
    ]  # fmt: skip


def evaluate(share: Share) -> EmomergeError | None:
    """What a worker does with a share. Returns why it could not be evaluated, or None."""
    return catch_errors(f"{share.metric} of {share.artefact.name}", share.working_directory, lambda: _evaluate(share))


def _evaluate(share: Share) -> None:
    task = make_task(share.recipe.task)
    measurer = Measurer(
        share.recipe, task, task.load_data(share.recipe.base), open_checkpoint(share.base_folder), share.base_folder,
        share.base_hash, choose_device(share.recipe.device), share.ledger, known=share.known,
    )  # fmt: skip
    measurer.take(share.artefact, share.metric, share.numbers)
    measurer.ledger.ask(dict, **share.mark(measurer))
