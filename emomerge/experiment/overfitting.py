"""Where trunks and long runs overfit, by the validation loss of their snapshots."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from emomerge.adapters import open_run
from emomerge.checkpoints import atomic
from emomerge.errors import EmomergeError
from emomerge.experiment.measure import Artefact, Measurer
from emomerge.experiment.workers import measurer_of, of_workers
from emomerge.merging.vectors import finite_or_inf
from emomerge.numerics.hashing import digest
from emomerge.training import Context, Loaded, RunSpec, catch_errors, train_locally, train_runs
from emomerge.training.ahead import GroupJob
from emomerge.training.warm import warmed

OVERFITTED = 0.25
"""A run has plainly overfitted where its validation loss is above the lowest by such a share of it."""
MEMORIZED = 0.75
"""The training loss of a long run must besides be below the lowest validation loss by such a share: where the rate was too high
for a while, it may recover as the rate falls. That of a trunk does not fall."""
PATIENCE = 2
"""At so many snapshots in a row a long run must have overfitted; a trunk, the steps of whose snapshots double, at one."""


def snapshot_of(context: Context, spec: RunSpec, step: int) -> Artefact:
    """Return a snapshot of a control or a trunk as an artefact, without its cost."""
    folder = context.run_dir(spec).snapshot(step)
    weights = {file.name: atomic.sha256(file) for file in sorted(folder.glob("*.safetensors"))}
    return Artefact(
        f"{spec.name} at step {step}", "control", open_run(context.base, folder), digest([context.base_hash, weights]),
        path=folder, optimizer=spec.optimizer, seed=spec.seed,
    )  # fmt: skip


def snapshot_loss(measurer: Measurer, spec: RunSpec, step: int) -> float:
    """Return the validation loss of a snapshot; infinity if it is not a number."""
    return finite_or_inf(measurer.loss(snapshot_of(measurer.context, spec, step), "validation"))


def overfits(measurer: Measurer, spec: RunSpec, step: int) -> bool:
    """Return whether a trunk or a long run has plainly overfitted at the step of a snapshot."""
    steps = [earlier for earlier in spec.snapshots if earlier <= step]
    losses = [snapshot_loss(measurer, spec, earlier) for earlier in steps]
    if spec.is_trunk:
        return has_risen(losses)
    rows = measurer.context.run_dir(spec).metrics()
    trained = [row["loss"] for row in rows if max([0, *steps[:-1]]) < row["step"] <= step]
    return has_risen(losses, PATIENCE) and has_memorized(sum(trained) / len(trained), losses)


def has_risen(losses: Sequence[float], patience: int = 1) -> bool:
    """Return whether the last `patience` of some validation losses are above the lowest by more than noise: by OVERFITTED."""
    lowest = min(losses)
    return min(losses[-patience:]) > lowest + OVERFITTED * abs(lowest)


def has_memorized(training: float, losses: Sequence[float]) -> bool:
    """Return whether a training loss is below the lowest validation loss by MEMORIZED."""
    lowest = min(losses)
    return training < lowest - MEMORIZED * abs(lowest)


def train_ahead(job: GroupJob, ledger: Path) -> EmomergeError | None:
    """Train the runs of a job in a worker, those that may end early until they have overfitted. Return the error of some.

    Args:
        job: the runs.
        ledger: of the main process. What is evaluated here goes into the file of `ledger_of`.
    """

    def train() -> None:
        context, measured = warmed(job.context), ledger_of(ledger, job.specs[0])
        train_runs(
            context,
            job.specs,
            partial(train_locally, context, loaded=Loaded()),
            overfits=lambda spec, step: overfits(measurer_of(job.context, ledger, measured), spec, step),
        )

    names = ", ".join(spec.name for spec in job.specs)
    return catch_errors(f"runs {names}", job.context.working_directory, train)


def ledger_of(ledger: Path, spec: RunSpec) -> Path:
    """Return the ledger of the worker that trains a group of runs, given the main process's and the first run."""
    return of_workers(ledger) / f"{spec.name}.jsonl"
