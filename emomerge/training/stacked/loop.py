"""Training several runs at once with one forward and one backward pass over their frozen base."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from emomerge.errors import BadInput, EmomergeError, RunFailed
from emomerge.numerics.seeds import seed_default_generators
from emomerge.training.context import Context
from emomerge.training.loop import adapted_model, buffers, micro_batches, trained
from emomerge.training.plan import RunSpec
from emomerge.training.run import Clock, StepHook, TrainingRun, ignore_step, read_losses
from emomerge.training.stacked.estimate import estimate
from emomerge.training.stacked.group import SAMPLE, RunGroup
from emomerge.training.stacked.losses import check_loss, check_rows_apart
from emomerge.training.stacked.model import StackedModel, Unstackable
from emomerge.training.stacked.randomness import Widths, runwise_dropout


def prepare_stack(context: Context, specs: Sequence[RunSpec], say: Callable[[str], None] = lambda line: None) -> StackedPasses:
    """Build a stack of runs on one base, without writing anything.

    Args:
        context: the recipe and its folders.
        specs: the runs.
        say: receives one line with the expected speed and memory of several runs.

    Raises:
        Unstackable: the runs cannot be stacked or, with `parallel: auto`, would not gain from it. A single run always gains.
    """
    recipe, task = context.recipe, context.task
    if recipe.adapter.kind != "lora":
        raise Unstackable("full fine-tuning leaves no base to share")
    if len({spec.batch_factor for spec in specs}) > 1:
        raise Unstackable("the runs have batches of different sizes")
    alone = set(recipe.runs.log_with) - {"tensorboard"}
    if alone and len(specs) > 1:
        raise Unstackable(f"{', '.join(sorted(alone))} logs one run at a time")
    model, starts = adapted(context, specs)
    stack = StackedModel(model.to(context.device).train(), starts)
    passes = StackedPasses(context, specs, stack)
    (group,) = passes.groups
    with torch.random.fork_rng():
        batches, sample = group.sample()
        check_rows_apart(stack, sample, SAMPLE)
        check_loss(task, stack, sample, SAMPLE, batches[0])
        if len(specs) == 1:
            return passes
        group.streams.start(lambda run: seed_default_generators(run, context.device))
        stacked = runwise_dropout(group.streams, SAMPLE, Widths([0] * len(group.streams.leaders)))
        expected = estimate(stack, sample, SAMPLE, recipe.runs.batch_size, stacked)
    if recipe.runs.parallel == "auto":
        expected.check()
    passes.divide(expected.size)
    say(str(expected))
    return passes


def train_stacked(passes: StackedPasses, on_step: StepHook = ignore_step) -> dict[RunSpec, EmomergeError]:
    """Train all runs of a stack, and return the errors of those that failed.

    Results equal those of `train_run` up to rounding, and checkpoints have the same form. The shapes of all passes depend on
    the stack alone: a run that has failed or waits for others still takes part in the computation. Runs that are killed
    together therefore resume bit-identically.

    Args:
        passes: from `prepare_stack`, or those of the round before, which have been given the next round.
        on_step: called after every step of every run.
    """
    context, specs, stack, model = passes.context, passes.specs, passes.stack, passes.stack.model
    runs = passes.training_runs(on_step)
    failures: dict[RunSpec, EmomergeError] = {}

    def each(numbers: Iterable[int], do: Callable[[int], None]) -> None:
        """Call `do` for every run that has not failed, and record new failures."""
        for number in numbers:
            try:
                if specs[number] not in failures:
                    do(number)
            except (RunFailed, BadInput) as error:
                failures[specs[number]] = error
                if isinstance(error, BadInput):
                    with contextlib.suppress(BadInput):  # the disk may be full
                        runs[number].run.write_state(state="failed", error=str(error))

    def keep_snapshot(number: int) -> None:
        if runs[number].step in specs[number].snapshots:
            with stack.as_run(number):
                runs[number].keep_snapshot(model)

    def finish(number: int) -> None:
        with stack.as_run(number):
            runs[number].finish(model)

    each(range(len(runs)), keep_snapshot)  # in case of a kill between checkpoint and snapshot
    with torch.random.fork_rng():
        while unfinished := [n for n, run in enumerate(runs) if run.unfinished and specs[n] not in failures]:
            step = min(runs[n].step for n in unfinished)
            active = [n for n in unfinished if runs[n].step == step]
            clock = Clock()
            for micro in micro_batches(context.recipe.runs, specs[0], step):
                for n, loss in zip(active, passes.backward(micro, active), strict=True):
                    runs[n].observe(loss)
            read_losses(runs[n] for n in active)
            stack.share_gradients()
            spent = clock.read(len(active))
            each(active, lambda n, spent=spent: runs[n].take_step(passes.rows_of(n), spent))  # type: ignore[misc]
            stack.drop_gradients()
            each(active, keep_snapshot)
    if any(spec.is_last_round for spec in specs):  # then results are written
        model.cpu()
    each(range(len(runs)), finish)
    return failures


def adapted(context: Context, specs: Sequence[RunSpec]) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """Return an adapted model on the CPU, and each run's initial weights, which depend on its training seed."""
    starts: dict[int, dict[str, Tensor]] = {}
    for spec in specs:
        if spec.seed not in starts:
            model = adapted_model(context, spec)
            starts[spec.seed] = {name: p.detach() for name, p in trained(model).items()}
    return model, [starts[spec.seed] for spec in specs]


class StackedPasses:
    """All runs of a stack, in groups that each share their forward and backward passes.

    Args:
        context, specs: the runs.
        stack: their weights, on the device.
    """

    def __init__(self, context: Context, specs: Sequence[RunSpec], stack: StackedModel) -> None:
        self.context, self.specs, self.stack = context, specs, stack
        self.groups = [RunGroup(context, specs, stack, range(len(specs)))]
        self._training: list[TrainingRun] = []

    def divide(self, size: int) -> None:
        """Let at most `size` runs at a time share a pass, which bounds the memory."""
        runs = range(len(self.specs))
        parts = [runs[first : first + size] for first in runs[::size]]
        self.groups = [RunGroup(self.context, self.specs, self.stack, part) for part in parts]

    def give_round(self, specs: Sequence[RunSpec]) -> bool:
        """Take a later round of the same runs, whose weights the runs' files hold; return False if it is none."""
        is_later = bool(self._training) and all(spec.start > 0 for spec in specs)
        if not is_later or list(map(whole, specs)) != list(map(whole, self.specs)):
            return False
        self.specs = specs
        return True

    def training_runs(self, on_step: StepHook) -> list[TrainingRun]:
        """Return the runs at the first step of their round."""
        if self._training:
            for run, spec in zip(self._training, self.specs, strict=True):
                run.begin_round(spec, on_step)
        else:
            kept, weights = buffers(self.stack.model), self.stack.parameters_of
            self._training = [
                TrainingRun(self.context, spec, trained=weights(number), buffers=kept, on_step=on_step)
                for number, spec in enumerate(self.specs)
            ]
        return self._training

    def rows_of(self, run: int) -> Tensor:
        """Return the row numbers of a run's last micro-batch."""
        return next(group.rows_of(run) for group in self.groups if run in group.runs)

    def backward(self, micro: int, active: Sequence[int]) -> list[Tensor]:
        """Return the losses of the active runs on a micro-batch, and add to the stack's gradients."""
        losses: list[Tensor] = []
        for group in self.groups:
            if here := [run for run in active if run in group.runs]:
                losses += group.backward(micro, here)
        return losses


def whole(spec: RunSpec) -> RunSpec:
    """Return the specification of a run, given that of a round."""
    return replace(spec, start=0, end=spec.steps, is_stopped=False)
