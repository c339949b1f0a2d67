"""Running jobs in workers, here or on a cluster: polling, starting lost ones again, and collecting errors."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from emomerge.errors import BadInput, EmomergeError, RunFailed
from emomerge.training.engines import Engine, Local, Submitted

ATTEMPTS = 3
"""How often a job is started whose worker is lost."""
POLL = 0.2
"""Seconds between two polls of the workers."""
PAUSE = 0.02
"""Seconds in which a local worker waits for its next job at most."""


class Stopped(Exception):
    """The jobs are no longer wanted."""


def catch_errors(title: str, working_directory: Path, do: Callable[[], None]) -> EmomergeError | None:
    """Call `do` in a working directory and return its error, if any, instead of raising it.

    Workers return errors because an exception means a lost worker, whose job is started again.
    """
    try:
        with contextlib.chdir(working_directory):
            do()
    except EmomergeError as error:
        return error
    except Exception as error:  # a bug, which another attempt would only repeat
        traceback.print_exc()
        return RunFailed(f"{title} failed: {type(error).__name__}: {error}")
    return None


def run_in_workers(
    engine: Engine,
    function: Callable[[Any], EmomergeError | None],
    jobs: Mapping[str, Any],
    on_poll: Callable[[str], None] = lambda name: None,
    on_end: Callable[[str], None] = lambda name: None,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Run each job in a worker, at most `engine.max_parallel` at a time. A job whose worker is lost is started again.

    Args:
        engine: starts the workers.
        function: module-level function that runs a job and returns its error, if any (see `catch_errors`).
        jobs: the jobs, by the name used in error messages.
        on_poll: called at every poll with the name of each active job.
        on_end: called with the name of each job that has ended, successfully or not.
        stop: returns whether to end all workers.

    Raises:
        Stopped: `stop` says so.
        EmomergeError: a job failed; raised after all others have ended.
    """
    waiting = deque(jobs)
    started, failures = Counter[str](), list[EmomergeError]()
    active: dict[str, Submitted] = {}
    try:
        while waiting or active:
            while waiting and (engine.max_parallel is None or len(active) < engine.max_parallel):
                name = waiting.popleft()
                started[name] += 1
                active[name] = engine.submit(function, jobs[name])
            _wait(active.values(), finely=isinstance(engine, Local))
            if stop():
                raise Stopped
            for name, submitted in list(active.items()):
                done = submitted.done()
                on_poll(name)
                if not done:
                    continue
                del active[name]
                try:
                    failure = submitted.result()
                except Exception as lost:  # every engine has exception types of its own
                    if started[name] < ATTEMPTS:
                        waiting.append(name)
                        continue
                    failure = RunFailed(f"{name} failed: its worker was lost {ATTEMPTS} times, at last by {lost}")
                if failure is not None:
                    failures.append(failure)
                on_end(name)
    finally:
        for submitted in active.values():
            submitted.cancel()
    raise_together(failures)


def _wait(active: Iterable[Submitted], *, finely: bool) -> None:
    """Wait until the next poll, or until a local worker is done."""
    until = time.monotonic() + POLL
    while (left := until - time.monotonic()) > 0:
        if finely and any(submitted.done() for submitted in active):
            return
        time.sleep(min(left, PAUSE) if finely else left)


def raise_together(failures: Sequence[EmomergeError]) -> None:
    """Raise all failures as one error: BadInput if any of them is, else RunFailed."""
    if len(failures) < 2:
        for failure in failures:
            raise failure
        return
    kind = BadInput if any(isinstance(failure, BadInput) for failure in failures) else RunFailed
    raise kind("; ".join(dict.fromkeys(map(str, failures))))
