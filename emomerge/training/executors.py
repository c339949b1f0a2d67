"""Where runs are trained: in this process, stacked or one by one, or each in a worker of its own, here or on a cluster.

Whoever trains a run holds the lease of its directory, and finds there what an earlier attempt left. So it does not matter
who begins a run, how often, and where: it is trained once, and ends with the same bits.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from emomerge.errors import BadInput, EmomergeError, RunFailed
from emomerge.recipe import Recipe
from emomerge.tasks import Task, TaskData, make_task
from emomerge.training.device import choose_device
from emomerge.training.engines import Engine, Submitted
from emomerge.training.lease import LeaseLost, leased
from emomerge.training.live import StepHook
from emomerge.training.loop import train_run
from emomerge.training.ranks import Announcement, Ranks, take_steps
from emomerge.training.runs import RunDir, RunSpec, run_inputs
from emomerge.training.stacked import Unstackable, prepare_stack, train_stacked
from emomerge.training.tracking import tracked

ATTEMPTS = 3
"""How often a run is begun whose worker is lost."""
POLL = 0.2
"""Seconds between two looks at the workers."""


def train_locally(
    recipe: Recipe,
    specs: Sequence[RunSpec],
    folder: Path,
    base_hash: str,
    *,
    task: Task,
    data: TaskData,
    base_folder: Path,
    device: torch.device,
    ranks: Ranks | None = None,
    on_step: StepHook = lambda spec, row: None,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Train the given runs into `folder/<name>` in this process, each to the end of its round, leaving alone those there.

    Args:
        ranks: this process as the first of several that take the steps together.
        say: told in one line how the runs are trained, where the recipe leaves that open.

    Raises:
        EmomergeError: after all others were trained, if any run could not be. Of several ranks, the first one stops at once
            where the others cannot know that anything is wrong.
    """
    failures: dict[RunSpec, EmomergeError] = {}
    if ranks is None and recipe.runs.parallel != "sequential":
        failures = _train_stacked(
            recipe, specs, folder, base_hash,
            task=task, data=data, base_folder=base_folder, device=device, on_step=on_step, say=say,
        )  # fmt: skip
    for spec in [spec for spec in specs if spec not in failures]:
        run, inputs = RunDir(folder / spec.name), run_inputs(recipe, spec, base_hash)
        try:
            _train_leased(
                recipe, spec, run, inputs,
                task=task, data=data, base_folder=base_folder, device=device, ranks=ranks, on_step=on_step,
            )  # fmt: skip
        except EmomergeError as error:
            if ranks is not None and not isinstance(error, RunFailed):
                raise
            if isinstance(error, BadInput):
                with contextlib.suppress(BadInput):  # the disk may be full
                    run.write_state(state="failed", error=str(error))
            failures[spec] = error
    _raise_all(list(failures.values()))


def _train_stacked(
    recipe: Recipe,
    specs: Sequence[RunSpec],
    folder: Path,
    base_hash: str,
    *,
    task: Task,
    data: TaskData,
    base_folder: Path,
    device: torch.device,
    on_step: StepHook,
    say: Callable[[str], None],
) -> dict[RunSpec, EmomergeError]:
    """Train those runs together that are not done, while their directories are ours; what failed, and why.

    Where they cannot be stacked, nothing happens, or BadInput is raised if the recipe insists. The stack has all runs that are
    not done, though some may wait at the end of their round already: its shape decides the last bits.
    """
    runs = {spec: (RunDir(folder / spec.name), run_inputs(recipe, spec, base_hash)) for spec in specs}
    while True:
        stack = [spec for spec, (run, inputs) in runs.items() if not run.is_done(inputs)]
        if len(stack) < 2 or all(run.has_reached(inputs, spec) for spec, (run, inputs) in runs.items()):
            return {}
        try:
            passes = prepare_stack(recipe, stack, task=task, data=data, base_folder=base_folder, device=device, say=say)
        except Unstackable as reason:
            if recipe.runs.parallel == "stacked":
                raise BadInput("the runs cannot share a pass", found=reason, fix="use runs.parallel: auto") from None
            say(f"one run after the other: {reason}")
            return {}
        with contextlib.suppress(LeaseLost), contextlib.ExitStack() as held:
            checks = [held.enter_context(leased(runs[spec][0].path)) for spec in stack]
            logs = {spec: held.enter_context(tracked(recipe, spec, runs[spec][0])) for spec in stack}
            if any(runs[spec][0].is_done(runs[spec][1]) for spec in stack):  # meanwhile, by whoever had it
                continue

            def checked(spec: RunSpec, row: dict[str, Any], checks: Any = checks, logs: Any = logs) -> None:
                for check in checks:
                    check()
                logs[spec](row)
                on_step(spec, row)

            return train_stacked(passes, [runs[spec] for spec in stack], base_folder=base_folder, on_step=checked)


def _train_leased(
    recipe: Recipe,
    spec: RunSpec,
    run: RunDir,
    inputs: str,
    *,
    task: Task,
    data: TaskData,
    base_folder: Path,
    device: torch.device,
    ranks: Ranks | None,
    on_step: StepHook,
) -> None:
    """Train one run while its directory is ours; if another process takes it over, wait for that one and look again."""
    while not run.has_reached(inputs, spec):
        lost = contextlib.suppress(LeaseLost) if ranks is None else contextlib.nullcontext()
        with lost, leased(run.path) as check, tracked(recipe, spec, run) as log:
            if run.has_reached(inputs, spec):  # meanwhile, by whoever had it
                return

            def checked(spec: RunSpec, row: dict[str, Any]) -> None:
                check()
                log(row)
                on_step(spec, row)

            if ranks is not None:
                announcement = Announcement(spec, run.path, inputs, base_folder)
                ranks.announce(announcement)
                take_steps(ranks, recipe, announcement, task=task, data=data, device=device, on_step=checked)
            train_run(
                recipe, spec, run, inputs,
                task=task, data=data, base_folder=base_folder, device=device, on_step=checked,
            )  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A run as plain data, which any worker that sees the same file system can be sent."""

    recipe: Recipe
    spec: RunSpec
    folder: Path
    base_hash: str
    base_folder: Path
    working_directory: Path
    """What paths in the recipe are relative to."""


def work(job: Job) -> EmomergeError | None:
    """What a worker does with a job. Returns why the run could not be trained, or None."""
    return attempt(f"run {job.spec.name}", job.working_directory, lambda: _work(job))


def _work(job: Job) -> None:
    task = make_task(job.recipe.task)
    train_locally(
        job.recipe, [job.spec], job.folder, job.base_hash,
        task=task, data=task.load_data(job.recipe.base), base_folder=job.base_folder,
        device=choose_device(job.recipe.device),
    )  # fmt: skip


def attempt(what: str, working_directory: Path, do: Callable[[], None]) -> EmomergeError | None:
    """Do something in a worker, in the directory that paths are relative to; returns why it could not be done, or None."""
    try:
        with contextlib.chdir(working_directory):
            do()
    except EmomergeError as error:
        return error
    except Exception as error:  # a mistake of ours: no reason to try again, as for a worker that is lost
        traceback.print_exc()
        return RunFailed(f"{what} failed: {type(error).__name__}: {error}")
    return None


def train_in_workers(
    engine: Engine,
    recipe: Recipe,
    specs: Sequence[RunSpec],
    folder: Path,
    base_hash: str,
    *,
    base_folder: Path,
    on_step: StepHook = lambda spec, row: None,
) -> None:
    """Train the given runs into `folder/<name>`, each in a worker of its own; a run whose worker is lost is begun again.

    Args:
        engine: what starts workers; at most `engine.max_parallel` at a time.
        recipe, specs, folder, base_hash, base_folder: as for `train_locally`; folders are shared with the workers.
        on_step: called for the latest step of each run, as often as there is news.

    Raises:
        BadInput: the recipe insists on runs that share a pass.
        EmomergeError: after all others were trained, if any run could not be.
    """
    if recipe.runs.parallel == "stacked":
        raise BadInput("runs that share a pass are trained by one process", fix="use runs.parallel: auto, or no executor")
    reached = [RunDir(folder / spec.name).has_reached(run_inputs(recipe, spec, base_hash), spec) for spec in specs]
    waiting = {f"run {spec.name}": spec for spec, there in zip(specs, reached, strict=True) if not there}
    shown: dict[str, int] = {}

    def look(name: str) -> None:
        row = RunDir(folder / waiting[name].name).last_metrics()
        if row is not None and row["step"] != shown.get(name):
            shown[name] = row["step"]
            on_step(waiting[name], row)

    jobs = {name: Job(recipe, spec, folder, base_hash, base_folder, Path.cwd()) for name, spec in waiting.items()}
    do_in_workers(engine, work, jobs, look)


def do_in_workers(
    engine: Engine,
    function: Callable[[Any], EmomergeError | None],
    jobs: Mapping[str, Any],
    look: Callable[[str], None] = lambda name: None,
    over: Callable[[str], None] = lambda name: None,
) -> None:
    """Call a function with each job in a worker of its own, at most `engine.max_parallel` at a time; a lost one begins again.

    Args:
        engine: what starts workers.
        function: of a module; returns what is wrong with the job, if anything is.
        jobs: what to call it with, by the name that an error says.
        look: called every now and then with the name of each job that a worker has.
        over: called with the name of each job that is over, well or not.

    Raises:
        EmomergeError: after all others were done, if any could not be.
    """
    waiting = deque(jobs)
    begun, failures = Counter[str](), list[EmomergeError]()
    active: dict[str, Submitted] = {}
    try:
        while waiting or active:
            while waiting and (engine.max_parallel is None or len(active) < engine.max_parallel):
                name = waiting.popleft()
                begun[name] += 1
                active[name] = engine.submit(function, jobs[name])
            time.sleep(POLL)
            for name, submitted in list(active.items()):
                done = submitted.done()
                look(name)
                if not done:
                    continue
                del active[name]
                try:
                    failure = submitted.result()
                except Exception as lost:  # each engine has its own types for it
                    if begun[name] < ATTEMPTS:
                        waiting.append(name)
                        continue
                    failure = RunFailed(f"{name} failed: its worker was lost {ATTEMPTS} times, at last by {lost}")
                if failure is not None:
                    failures.append(failure)
                over(name)
    finally:
        for submitted in active.values():
            submitted.cancel()
    _raise_all(failures)


def _raise_all(failures: Sequence[EmomergeError]) -> None:
    """Raise what went wrong, as one line; what is bad input stays so."""
    if len(failures) < 2:
        for failure in failures:
            raise failure
        return
    kind = BadInput if any(isinstance(failure, BadInput) for failure in failures) else RunFailed
    raise kind("; ".join(dict.fromkeys(map(str, failures))))
