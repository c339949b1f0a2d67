"""Work that workers do while this process does something else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from threading import Event, Lock, Thread
from typing import Any

from emomerge.errors import EmomergeError
from emomerge.training.context import Context
from emomerge.training.engines import Engine
from emomerge.training.plan import RunSpec
from emomerge.training.run import StepHook
from emomerge.training.workers import run_in_workers

DONE = object()


@dataclass(frozen=True)
class GroupJob:
    """Runs that are trained together, as plain data for a worker."""

    context: Context
    specs: tuple[RunSpec, ...]


@dataclass
class _Piece:
    """A group or a job, and whether it has ended."""

    do: Callable[[], None]
    on_end: Callable[[], None] = lambda: None
    ended: Event = field(default_factory=Event)
    error: BaseException | None = None


class Ahead:
    """Work that workers do before its turn: groups of runs, and jobs for which there is time besides.

    What no worker has begun can be taken back. All methods are for one thread, which is told what has ended when it calls one.

    Args:
        engine: starts the workers.
        context: returns the recipe and its folders, which the workers share, once there is a base.
        train: trains the runs of a job in a worker and returns the error if some could not be trained; picklable.
        at_once: number of workers.
        on_step: called with the latest step of each run whenever there is a new one, in a thread of its own.
    """

    def __init__(
        self,
        engine: Engine,
        context: Callable[[], Context],
        train: Callable[[GroupJob], EmomergeError | None],
        at_once: int,
        on_step: StepHook,
    ) -> None:
        self._engine, self._context, self._train, self._on_step = engine, context, train, on_step
        self._known: set[str] = set()
        self._begun: dict[str, _Piece] = {}
        """Groups and jobs that a worker has begun."""
        self._groups: dict[str, _Piece] = {}
        """Groups that wait for a worker."""
        self._jobs: dict[str, _Piece] = {}
        """Jobs that wait for a worker."""
        self._idle = at_once
        """Number of workers for which no thread is taking pieces."""
        self._threads: list[Thread] = []
        self._lock = Lock()
        """Held to change the attributes above."""
        self._stop = Event()

    def add(self, groups: Iterable[Sequence[RunSpec]]) -> None:
        """Add groups that have not been added before, and begin as many as may run at a time."""
        new = {_name(group): GroupJob(self._context(), tuple(group)) for group in groups}
        self._add(self._groups, {name: _Piece(partial(self._train_group, name, job)) for name, job in new.items()})

    def add_jobs(
        self, function: Callable[[Any], EmomergeError | None], jobs: Mapping[str, Any], on_end: Callable[[str], None]
    ) -> None:
        """Add jobs, which workers do while no group waits. A job that fails is left to those who come for its result.

        Args:
            function: module-level function that does a job.
            jobs: the jobs by name; those with names that have been added before are left out.
            on_end: called with the name of each job that has ended.
        """
        pieces = {name: _Piece(partial(self._run, function, name, job), partial(on_end, name)) for name, job in jobs.items()}
        self._add(self._jobs, pieces)

    def settle(self) -> None:
        """Take back the jobs that no worker has begun, and wait for the others."""
        with self._lock:
            self._jobs.clear()
            begun = [*self._begun.values()]
        for piece in begun:
            piece.ended.wait()
        self._tell()

    def finish(self, group: Sequence[RunSpec], meanwhile: Iterator[None]) -> bool:
        """Wait for a group. Return False if no worker has begun it: then none will.

        Args:
            group: the runs.
            meanwhile: work for this process, of which pieces are done while the group is not finished.

        Raises:
            EmomergeError: a run of the group could not be trained.
        """
        name = _name(group)
        with self._lock:
            self._groups.pop(name, None)
            piece = self._begun.get(name)
        if piece is None:
            return False
        while not piece.ended.is_set():
            if next(meanwhile, DONE) is DONE:
                piece.ended.wait(0.2)
            self._tell()
        if piece.error is not None:
            raise piece.error
        return True

    def close(self) -> None:
        """End all workers."""
        self._stop.set()
        with self._lock:
            self._groups.clear()
            self._jobs.clear()
        for thread in self._threads:
            thread.join()

    def _add(self, waiting: dict[str, _Piece], pieces: Mapping[str, _Piece]) -> None:
        self._tell()
        with self._lock:
            waiting |= {name: piece for name, piece in pieces.items() if name not in self._known}
            self._known |= pieces.keys()
            for _ in range(min(self._idle, len(waiting))):
                self._idle -= 1
                self._threads.append(Thread(target=self._work, daemon=True))
                self._threads[-1].start()

    def _work(self) -> None:
        """Let a worker do what waits, groups first."""
        while (piece := self._take()) is not None:
            try:
                piece.do()
            except BaseException as error:
                piece.error = error
            piece.ended.set()

    def _take(self) -> _Piece | None:
        with self._lock:
            waiting = self._groups or self._jobs
            if not waiting:
                self._idle += 1
                return None
            name = next(iter(waiting))
            self._begun[name] = waiting.pop(name)
            return self._begun[name]

    def _tell(self) -> None:
        """Call `on_end` of the jobs that have ended."""
        with self._lock:
            ended = [piece for piece in self._begun.values() if piece.ended.is_set()]
        for piece in ended:
            piece.on_end()
            piece.on_end = lambda: None

    def _train_group(self, name: str, job: GroupJob) -> None:
        shown: dict[str, int] = {}

        def poll(_: str) -> None:
            for spec in job.specs:
                with contextlib.suppress(EmomergeError):  # a display must not end the training
                    row: dict[str, Any] | None = job.context.run_dir(spec).last_metrics()
                    if row is not None and row["step"] != shown.get(spec.name):
                        shown[spec.name] = row["step"]
                        self._on_step(spec, row)

        self._run(self._train, name, job, poll)

    def _run(
        self,
        function: Callable[[Any], EmomergeError | None],
        name: str,
        job: Any,
        poll: Callable[[str], None] = lambda name: None,
    ) -> None:
        run_in_workers(self._engine, function, {name: job}, poll, stop=self._stop.is_set)


def _name(group: Sequence[RunSpec]) -> str:
    return "runs " + ", ".join(spec.name for spec in group)
