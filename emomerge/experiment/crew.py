"""The threads and workers of `emomerge run`, and what workers do ahead of their stage."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from emomerge.experiment.ahead import groups_ahead, jobs_ahead, ledger_of, train_ahead
from emomerge.experiment.experiment import Experiment
from emomerge.experiment.measure import Measurer
from emomerge.experiment.workers import evaluate, take_over
from emomerge.numerics.threads import threads
from emomerge.progress import Display, Line
from emomerge.training import Context, RunSpec, warm
from emomerge.training.ahead import Ahead
from emomerge.training.engines import Local
from emomerge.training.work import Hands, Work, choose_hands, measure_work, usable_cores


class Crew:
    """Threads and workers for one experiment.

    Args:
        experiment: the experiment.
        work: returns what its passes cost.
        seconds: returns an estimate of how long it takes one worker.
        workers: number of workers, this process included; None leaves it to the work.
    """

    def __init__(
        self, experiment: Experiment, work: Callable[[], Work], seconds: Callable[[], float], workers: int | None
    ) -> None:
        self._experiment, self._work, self._seconds, self._workers = experiment, work, seconds, workers
        self._cores = usable_cores()
        self._chosen: Hands | None = None
        self._ahead: Ahead | None = None
        self._lines: dict[str, Line] = {}
        self._offered: set[str] = set()
        """Names of the artefacts that workers may have measured ahead."""
        self.engine: Local | None = None
        """Starts workers; None if this process does everything."""

    @contextlib.contextmanager
    def at_work(self, stages: Sequence[str]) -> Iterator[None]:
        """Set the number of threads for the block, and start workers for some stages if there are to be any."""
        hands = self._hands()
        with contextlib.ExitStack() as held:
            if hands is not None:
                held.enter_context(threads(hands.threads))
            if hands is not None and hands.workers > 1 and "probe" in stages:
                held.callback(self._close)
                self._begin(hands)
            yield

    def look_ahead(self, stage: str) -> None:
        """Let workers begin what comes later, when a stage is about to begin: controls, and measuring what there is."""
        if self._ahead is None or stage in ("base", "report"):
            return
        if stage == "probe":
            self._ahead.settle()
            return
        if stage != "controls":
            self._ahead.add(groups_ahead(self._experiment, runs_are_done=stage != "runs"))
        if stage != "runs":
            self._measure_ahead()

    def _measure_ahead(self) -> None:
        """Let workers that train nothing measure what has been made."""
        assert self._ahead is not None
        ledger, jobs = self._experiment.measurer.ledger, jobs_ahead(self._experiment, self._offered)
        self._ahead.add_jobs(evaluate, jobs, lambda name: take_over(ledger, [jobs[name].ledger]))

    def finish(self, group: Sequence[RunSpec], meanwhile: Iterator[None]) -> bool:
        """Wait for a group of runs. Return False if no worker has begun it.

        Args:
            group: the runs.
            meanwhile: work for this process, of which pieces are done while the group is not finished.

        Raises:
            EmomergeError: a run of the group could not be trained.
        """
        if self._ahead is None or not self._ahead.finish(group, meanwhile):
            return False
        for spec in group:
            if spec.name in self._lines:
                self._lines[spec.name].end()
        take_over(self._experiment.measurer.ledger, [ledger_of(self._experiment.space.ledger, group[0])])
        return True

    def choose(self) -> Hands:
        """Return how many workers and threads there are to be."""
        if self._chosen is None:
            hands = choose_hands(self._work(), self._cores, self._seconds())
            self._chosen = hands if self._workers is None else Hands(self._workers, hands.threads)
        return self._chosen

    def _hands(self) -> Hands | None:
        """Return how many workers and threads there are; None if something else decides."""
        if self._experiment.device.type != "cpu":
            return None
        hands = self.choose()
        self._experiment.display.say(f"{hands}, by the size of the model's products")
        return hands

    def _begin(self, hands: Hands) -> None:
        experiment = self._experiment
        before = Context(experiment.recipe, experiment.space.base, "")  # the base is not needed
        warm.keep(before.using(experiment.task, experiment.data))
        self.engine = Local(hands.workers, hands.threads)
        self.engine.begin(closing=experiment.space.let_go)
        train = partial(train_ahead, ledger=experiment.space.ledger)
        self._ahead = Ahead(self.engine, lambda: experiment.context, train, hands.workers - 1, self._show)

    def _show(self, spec: RunSpec, row: dict[str, Any]) -> None:
        if spec.name not in self._lines:
            self._lines[spec.name] = self._experiment.display.line(spec.name, spec.steps)
        self._lines[spec.name].at(row["step"], f"loss {row['loss']:.4f}  emoPulse {row['rate']:.2e}")

    def _close(self) -> None:
        warm.forget()
        if self._ahead is not None:
            self._ahead.close()
        if self.engine is not None:
            self.engine.close()
        self._ahead = self.engine = None


@contextlib.contextmanager
def probing(measurer: Measurer, passes: float, workers: int | None, display: Display) -> Iterator[Local | None]:
    """Set the number of threads for a probe, and yield what starts its workers; None if this process does everything.

    Args:
        measurer: measures the models.
        passes: forward passes of the probe's batches.
        workers: number of workers; None leaves it to the work.
        display: shows what is chosen.
    """
    if measurer.context.device.type != "cpu":
        yield None
        return
    size, split = measurer.recipe.runs.batch_size, measurer.data.train
    work = measure_work(measurer.task, measurer.model, split.batch(range(min(size, len(split)))))
    scale = measurer.recipe.probe.batch_size / size
    hands = choose_hands(work, usable_cores(), passes * work.forward * scale)
    hands = hands if workers is None else Hands(workers, hands.threads)
    display.say(f"{hands}, by the size of the model's products")
    with threads(hands.threads):
        if hands.workers == 1:
            yield None
            return
        warm.keep(measurer.context)
        engine = Local(hands.workers, hands.threads)
        try:
            engine.begin()
            yield engine
        finally:
            warm.forget()
            engine.close()
