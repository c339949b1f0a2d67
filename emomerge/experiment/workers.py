"""Run the probe in workers: each worker evaluates one job into its own ledger, which is then added to the main ledger.

The main process then finds all evaluations in its ledger, so that results do not depend on the distribution of the work.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emomerge.errors import EmomergeError
from emomerge.experiment.measure import Artefact, Measurer
from emomerge.numerics.hashing import digest
from emomerge.probing.ledger import Ledger
from emomerge.probing.registry import METRICS, Metric, direction_indices
from emomerge.progress import Display
from emomerge.training import Context, Engine, catch_errors, run_in_workers
from emomerge.training.warm import warmed

DIRECTIONS = 4
"""Number of directions in a job."""
BASICS = "basics"
"""The job that evaluates the figures of every artefact besides metrics: scores and gradient norm."""
VALIDATION = "validation"
"""The job that evaluates the validation loss, by which is chosen."""


@dataclass(frozen=True)
class ProbeJob:
    """Evaluations of one metric for one artefact, as plain data for any worker with access to the same file system.

    Attributes:
        context: recipe, data and base.
        artefact: the artefact to measure.
        metric: the metric's name, `BASICS` or `VALIDATION`.
        directions: indices of its directions; empty if the metric is not split.
        radius: the only one to measure at; 0.0 for all of the recipe's.
        known: ledger of earlier evaluations; read-only.
        ledger: the job's own ledger.
    """

    context: Context
    artefact: Artefact
    metric: str
    directions: tuple[int, ...]
    radius: float
    known: Path
    ledger: Path

    @property
    def options(self) -> dict[str, Any]:
        """The options of the metric in which the job differs from the recipe."""
        given = {"directions": self.directions, "radii": (self.radius,) if self.radius else ()}
        return {name: value for name, value in given.items() if value}

    def mark(self, measurer: Measurer) -> dict[str, Any]:
        """Return the key of the ledger's row that marks the job as done."""
        return {
            "model": self.artefact.hash, "data": measurer.inputs, "metric": f"share of {self.metric}", "radius": self.radius,
            "direction": self.directions[0] if self.directions else None, "batch": 0,
        }  # fmt: skip


def measure_in_workers(
    engine: Engine, measurer: Measurer, wanted: Sequence[tuple[Artefact, Sequence[Metric]]], display: Display
) -> None:
    """Evaluate expensive metrics in workers and add their ledgers, including those of an earlier attempt, to the main one.

    Args:
        engine: starts the workers.
        measurer: its ledger, in a folder that the workers can access, receives all evaluations.
        wanted: artefacts and their metrics.
        display: shows progress.

    Raises:
        EmomergeError: some jobs failed; raised after all others have finished.
    """
    known = measurer.ledger.path
    if known is None:
        return
    folder = of_workers(known)
    planned = [job for artefact, metrics in wanted for job in jobs_of(measurer, artefact, metrics)]
    planned.sort(key=lambda job: -passes_of(measurer, job))  # longest first, so that workers finish at about the same time
    # Artefacts with equal weights share one ledger and one job.
    jobs = {job.ledger: job for job in planned if measurer.ledger.get(**job.mark(measurer)) is None}.values()
    named = {f"{job.metric} of {job.artefact.name}, {job.ledger.stem}": job for job in jobs}
    if not named:
        return
    progress = _Progress(measurer, named, display)
    try:
        run_in_workers(engine, evaluate, named, progress.poll, progress.end)
    finally:
        take_over(measurer.ledger, sorted(folder.glob("*.jsonl")))
        with contextlib.suppress(OSError):  # there were no jobs, or a worker is still running
            folder.rmdir()


def of_workers(ledger: Path) -> Path:
    """Return the folder of the workers' ledgers, given the main process's."""
    return ledger.with_name(f"{ledger.stem}-of-workers")


def take_over(ledger: Ledger, files: Iterable[Path]) -> None:
    """Add ledgers of workers that have ended to another one, and remove their files, if there are any."""
    for file in files:
        ledger.take_over(Ledger(file))
        file.unlink(missing_ok=True)


class _Progress:
    """Shows the progress of jobs in passes; of a job at work, by the rows of its ledger."""

    def __init__(self, measurer: Measurer, jobs: Mapping[str, ProbeJob], display: Display) -> None:
        self._jobs = jobs
        self._passes = {name: passes_of(measurer, job) for name, job in jobs.items()}
        self._per_row: dict[str, float] = {}
        """Metric → passes of a row, as found in finished jobs."""
        self._ended, self._at_work = 0.0, dict[str, float]()
        self._line = display.line("probe in workers", round(sum(self._passes.values())))

    def poll(self, name: str) -> None:
        """Show what a job has evaluated."""
        per_row = self._per_row.get(self._jobs[name].metric, 1.0)
        self._at_work[name] = min(0.95 * self._passes[name], per_row * _rows(self._jobs[name].ledger))
        self._show(name)

    def end(self, name: str) -> None:
        """Show that a job has ended."""
        job = self._jobs[name]
        self._per_row[job.metric] = self._passes[name] / max(1, _rows(job.ledger))
        self._at_work.pop(name, None)
        self._ended += self._passes[name]
        self._show(name)

    def _show(self, name: str) -> None:
        done = self._ended + sum(self._at_work.values())
        self._line.at(round(done), f"passes; {name.partition(',')[0]}")


def _rows(ledger: Path) -> int:
    try:
        with ledger.open("rb") as file:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(2**16), b""))
    except OSError:
        return 0


def passes_of(measurer: Measurer, job: ProbeJob) -> float:
    """Return the cost of a job in forward passes of the recipe's batches."""
    if job.metric == BASICS:
        return measurer.basic_passes
    probe = measurer.recipe.probe
    metric = METRICS[job.metric]
    return metric.passes({**metric.options_of(probe), **job.options}, probe.batches)


def jobs_of(measurer: Measurer, artefact: Artefact, metrics: Sequence[Metric]) -> list[ProbeJob]:
    """Return the jobs that measure one artefact; cheap metrics are left to the main process."""
    parts = [
        (metric, number, directions)
        for metric in metrics
        if metric.split is not None and metric.looks_at(artefact.role)
        for number, directions in enumerate(_parts(measurer, metric))
    ]
    probe = measurer.recipe.probe
    radii = {metric.name: metric.options_of(probe)["radii"][0] if metric.middle else 0.0 for metric in metrics}
    shares = [
        job_of(measurer, artefact, metric.name, number, directions, radii[metric.name]) for metric, number, directions in parts
    ]
    return [*shares, job_of(measurer, artefact, BASICS)]


def job_of(
    measurer: Measurer,
    artefact: Artefact,
    metric: str,
    number: int = 0,
    directions: tuple[int, ...] = (),
    radius: float = 0.0,
) -> ProbeJob:
    """Return one job.

    Args:
        measurer: its ledger is in a folder that the workers can access.
        artefact, metric, directions, radius: as in `ProbeJob`.
        number: tells apart the jobs of an artefact and a metric.
    """
    known = measurer.ledger.path
    assert known is not None, "a ledger in memory cannot be shared"
    ledger = of_workers(known) / f"{artefact.hash[:16]}-{metric}-{number}.jsonl"
    return ProbeJob(measurer.context, artefact, metric, directions, radius, known, ledger)


def _parts(measurer: Measurer, metric: Metric) -> list[tuple[int, ...]]:
    if metric.split == "whole":
        return [()]
    indices = direction_indices(metric.options_of(measurer.recipe.probe)["directions"])
    return [tuple(indices[begin : begin + DIRECTIONS]) for begin in range(0, len(indices), DIRECTIONS)]


def evaluate(job: ProbeJob) -> EmomergeError | None:
    """Evaluate a job in a worker. Return the error if it fails."""
    return catch_errors(f"{job.metric} of {job.artefact.name}", job.context.working_directory, lambda: _evaluate(job))


_MEASURERS: dict[str, Measurer] = {}
"""The measurer of this worker's last job, by what it measures with: its model and its data are loaded."""


def measurer_of(context: Context, known: Path, ledger: Path) -> Measurer:
    """Return this worker's measurer.

    Args:
        context: recipe, data and base.
        known: ledger of earlier evaluations; read-only.
        ledger: receives the new ones.
    """
    key = digest([context.recipe, str(context.base_folder), context.base_hash, str(context.working_directory)])
    if key not in _MEASURERS:
        _MEASURERS.clear()
        _MEASURERS[key] = Measurer(warmed(context), None)
    measurer = _MEASURERS[key]
    measurer.write_to(Ledger(ledger, _known(known)))
    return measurer


_KNOWN: dict[tuple[Path, int, int], Ledger] = {}
"""The main process's ledger as last read, by file, size and time of change: reading it takes longer than a small job."""


def _known(file: Path) -> Ledger | None:
    try:
        status = file.stat()
    except OSError:
        return None
    key = (file, status.st_size, status.st_mtime_ns)
    if key not in _KNOWN:
        _KNOWN.clear()
        _KNOWN[key] = Ledger(None, file)
    return _KNOWN[key]


def _evaluate(job: ProbeJob) -> None:
    _measure(measurer_of(job.context, job.known, job.ledger), job)


def _measure(measurer: Measurer, job: ProbeJob) -> None:
    if job.metric == BASICS:
        measurer.measure_basics(job.artefact)
    elif job.metric == VALIDATION:
        measurer.loss(job.artefact, "validation")
    else:
        measurer.measure(METRICS[job.metric], job.artefact, **job.options)
    measurer.ledger.ask(dict, **job.mark(measurer))


def measure_in_pieces(measurer: Measurer, artefact: Artefact, metrics: Sequence[Metric]) -> Iterator[None]:
    """Do the jobs that measure an artefact in this process, yielding after each; workers then find them done."""
    if measurer.ledger.path is None:
        return
    for job in jobs_of(measurer, artefact, metrics):
        if measurer.ledger.get(**job.mark(measurer)) is None:
            _measure(measurer, job)
            yield
