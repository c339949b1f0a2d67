"""Runs that workers train while this process does something else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any

from emomerge.errors import EmomergeError
from emomerge.training.context import Context
from emomerge.training.engines import Engine
from emomerge.training.execute import train_locally
from emomerge.training.plan import RunSpec
from emomerge.training.run import StepHook
from emomerge.training.warm import warmed
from emomerge.training.workers import catch_errors, run_in_workers

DONE = object()


@dataclass(frozen=True)
class GroupJob:
    """Runs that are trained together as `train_locally` does, as plain data for a worker."""

    context: Context
    specs: tuple[RunSpec, ...]


def train_group(job: GroupJob) -> EmomergeError | None:
    """Train the runs of a job in a worker. Return the error if some could not be trained."""
    names = ", ".join(spec.name for spec in job.specs)
    return catch_errors(f"runs {names}", job.context.working_directory, lambda: train_locally(warmed(job.context), job.specs))


class Ahead:
    """Groups of runs in workers. Groups that workers have not begun can be taken back.

    Args:
        engine: starts the workers.
        context: returns the recipe and its folders, which the workers share, once there is a base.
        at_once: number of groups at a time.
        on_step: called with the latest step of each run whenever there is a new one, in a thread of its own.
    """

    def __init__(self, engine: Engine, context: Callable[[], Context], at_once: int, on_step: StepHook) -> None:
        self._engine, self._context, self._at_once, self._on_step = engine, context, at_once, on_step
        self._waiting: dict[str, GroupJob] = {}
        self._known: set[str] = set()
        self._threads: dict[str, Thread] = {}
        self._errors: dict[str, BaseException] = {}
        self._stop = Event()

    def add(self, groups: Iterable[Sequence[RunSpec]]) -> None:
        """Add groups that have not been added before, and begin as many as may run at a time."""
        for group in groups:
            name = _name(group)
            if name not in self._known:
                self._known.add(name)
                self._waiting[name] = GroupJob(self._context(), tuple(group))
        self.advance()

    def advance(self) -> None:
        """Begin waiting groups if workers are free."""
        while self._waiting and sum(thread.is_alive() for thread in self._threads.values()) < self._at_once:
            name = next(iter(self._waiting))
            thread = Thread(target=self._train, args=(name, self._waiting.pop(name)), daemon=True)
            self._threads[name] = thread
            thread.start()

    def finish(self, group: Sequence[RunSpec], meanwhile: Iterator[None]) -> bool:
        """Wait for a group, which a free worker begins now. Return False if none is free: then it will not be begun.

        Args:
            group: the runs.
            meanwhile: work for this process, of which pieces are done while the group is not finished.

        Raises:
            EmomergeError: a run of the group could not be trained.
        """
        name = _name(group)
        self.advance()
        self._waiting.pop(name, None)
        thread = self._threads.get(name)
        if thread is None:
            return False
        while thread.is_alive():
            if next(meanwhile, DONE) is DONE:
                thread.join(0.2)
            self.advance()
        if name in self._errors:
            raise self._errors[name]
        return True

    def close(self) -> None:
        """End all workers."""
        self._waiting.clear()
        self._stop.set()
        for thread in self._threads.values():
            thread.join()

    def _train(self, name: str, job: GroupJob) -> None:
        shown: dict[str, int] = {}

        def poll(_: str) -> None:
            for spec in job.specs:
                with contextlib.suppress(EmomergeError):  # a display must not end the training
                    row: dict[str, Any] | None = job.context.run_dir(spec).last_metrics()
                    if row is not None and row["step"] != shown.get(spec.name):
                        shown[spec.name] = row["step"]
                        self._on_step(spec, row)

        try:
            run_in_workers(self._engine, train_group, {name: job}, poll, stop=self._stop.is_set)
        except BaseException as error:
            self._errors[name] = error


def _name(group: Sequence[RunSpec]) -> str:
    return "runs " + ", ".join(spec.name for spec in group)
