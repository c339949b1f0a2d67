"""Training the runs of a recipe: stacked or one by one in this process, or each run in a worker.

A run is trained under the lease of its directory and continues from the files found there. Who starts it, how often and where
therefore makes no difference: it is trained once, to the same bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from emomerge.errors import BadInput, EmomergeError, RunFailed
from emomerge.training.context import Context, Job
from emomerge.training.engines import Engine
from emomerge.training.lease import LeaseLost, leased
from emomerge.training.loop import train_run
from emomerge.training.plan import RunSpec
from emomerge.training.ranks import Ranks, take_steps
from emomerge.training.run import StepHook, ignore_step
from emomerge.training.stacked import StackedPasses, Unstackable, prepare_stack, train_stacked
from emomerge.training.tracking import tracked
from emomerge.training.warm import warmed
from emomerge.training.workers import catch_errors, raise_together, run_in_workers

Say = Callable[[str], None]


class Loaded:
    """Models that stay in memory from one round to the next. The weights of a round are read from the runs' files."""

    def __init__(self) -> None:
        self.model: nn.Module | None = None
        """Adapted model of the last run that was trained alone."""
        self.passes: StackedPasses | None = None
        """The last stack."""

    def prepare(self, context: Context, specs: Sequence[RunSpec], say: Say) -> StackedPasses:
        """Return a stack of the given runs, as `prepare_stack` does."""
        if self.passes is None or not self.passes.give_round(specs):
            self.passes = None  # frees its memory first
            self.passes = prepare_stack(context, specs, say)
        return self.passes


def train_locally(
    context: Context,
    specs: Sequence[RunSpec],
    *,
    ranks: Ranks | None = None,
    on_step: StepHook = ignore_step,
    say: Say = lambda line: None,
    loaded: Loaded | None = None,
) -> None:
    """Train runs in this process, each to the end of its round. Runs that have reached it are skipped.

    Args:
        context: the recipe and its folders.
        specs: the runs.
        ranks: the processes that take the steps together, of which this is the first; None if it is alone.
        on_step: called after every step.
        say: receives one line on how the runs are trained, if the recipe leaves that open.
        loaded: models of an earlier round of the same recipe, kept for the next.

    Raises:
        EmomergeError: a run could not be trained; raised after all others are. With several ranks, errors that the other
            ranks cannot notice are raised at once.
    """
    failures: dict[RunSpec, EmomergeError] = {}
    loaded = loaded or Loaded()
    if ranks is None and context.recipe.runs.parallel != "sequential":
        failures = _train_stacked(context, specs, on_step, say, loaded)
    for spec in [spec for spec in specs if spec not in failures]:
        try:
            _train_leased(context, spec, ranks, on_step, loaded)
        except EmomergeError as error:
            if ranks is not None and not isinstance(error, RunFailed):
                raise
            if isinstance(error, BadInput):
                with contextlib.suppress(BadInput):  # the disk may be full
                    context.run_dir(spec).write_state(state="failed", error=str(error))
            failures[spec] = error
    raise_together(list(failures.values()))


def _train_stacked(
    context: Context, specs: Sequence[RunSpec], on_step: StepHook, say: Say, loaded: Loaded
) -> dict[RunSpec, EmomergeError]:
    """Train all runs that are not done in one stack, holding their leases; return the errors of those that failed.

    A single run is a stack of one, whose layers are faster than PEFT's. Does nothing if they cannot be stacked, or raises
    BadInput if the recipe requires it. The stack includes runs that already wait at the end of their round: its shape decides
    the last bits of the results.
    """
    while True:
        stack = [spec for spec in specs if not context.is_done(spec)]
        if all(context.has_reached(spec) for spec in specs):
            return {}
        try:
            passes = loaded.prepare(context, stack, say)
        except Unstackable as reason:
            if len(stack) == 1:
                return {}
            if context.recipe.runs.parallel == "stacked":
                raise BadInput("the runs cannot share a pass", found=reason, fix="use runs.parallel: auto") from None
            say(f"one run after the other: {reason}")
            return {}
        with contextlib.suppress(LeaseLost), contextlib.ExitStack() as held:
            checks = [held.enter_context(leased(context.run_dir(spec).path)) for spec in stack]
            logs = {spec: held.enter_context(tracked(context.recipe, spec, context.run_dir(spec))) for spec in stack}
            if any(context.is_done(spec) for spec in stack):  # another process finished it in the meantime
                continue

            def checked(spec: RunSpec, row: dict[str, Any], checks: Any = checks, logs: Any = logs) -> None:
                for check in checks:
                    check()
                logs[spec](row)
                on_step(spec, row)

            return train_stacked(passes, on_step=checked)


def _train_leased(context: Context, spec: RunSpec, ranks: Ranks | None, on_step: StepHook, loaded: Loaded) -> None:
    """Train one run while holding its lease. If another process takes the lease over, wait for that one and look again."""
    run = context.run_dir(spec)
    while not context.has_reached(spec):
        lost = contextlib.suppress(LeaseLost) if ranks is None else contextlib.nullcontext()
        with lost, leased(run.path) as check, tracked(context.recipe, spec, run) as log:
            if context.has_reached(spec):  # another process trained it in the meantime
                return

            def checked(spec: RunSpec, row: dict[str, Any]) -> None:
                check()
                log(row)
                on_step(spec, row)

            if ranks is not None:
                job = Job(context, spec)
                ranks.announce(job)
                take_steps(ranks, job, on_step=checked)
            if ranks is not None:  # every rank holds a shard
                train_run(context, spec, checked)
            else:
                model, loaded.model = loaded.model, None  # another loss or a full disk may leave it in any state
                loaded.model = train_run(context, spec, checked, model)


def train_in_workers(engine: Engine, context: Context, specs: Sequence[RunSpec], on_step: StepHook = ignore_step) -> None:
    """Train runs as `train_locally` does, each in a worker. A run whose worker is lost is started again.

    Args:
        engine: starts the workers, at most `engine.max_parallel` at a time.
        context: the recipe and its folders, which the workers share.
        specs: the runs.
        on_step: called with the latest step of each run whenever there is a new one.

    Raises:
        BadInput: the recipe requires stacked runs.
        EmomergeError: a run could not be trained; raised after all others are.
    """
    if context.recipe.runs.parallel == "stacked":
        raise BadInput("runs that share a pass are trained by one process", fix="use runs.parallel: auto, or no executor")
    jobs = {f"run {spec.name}": Job(context, spec) for spec in specs if not context.has_reached(spec)}
    shown: dict[str, int] = {}

    def poll(name: str) -> None:
        spec = jobs[name].spec
        row = context.run_dir(spec).last_metrics()
        if row is not None and row["step"] != shown.get(name):
            shown[name] = row["step"]
            on_step(spec, row)

    run_in_workers(engine, train_job, jobs, poll)


def train_job(job: Job) -> EmomergeError | None:
    """Train one run in a worker. Returns the error if it could not be trained."""
    where = job.context.working_directory
    return catch_errors(f"run {job.spec.name}", where, lambda: train_locally(warmed(job.context), [job.spec]))
