"""Training several runs at once with one forward and one backward pass over their frozen base."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from emomerge.errors import BadInput, EmomergeError, RunFailed
from emomerge.numerics.seeds import seed_default_generators, seed_of
from emomerge.tasks import Batch
from emomerge.training.context import Context
from emomerge.training.loop import adapted_model, autocast, batch_order, buffers, micro_batches, order_key, trained
from emomerge.training.plan import RunSpec
from emomerge.training.run import Clock, StepHook, TrainingRun, ignore_step
from emomerge.training.stacked.estimate import estimate
from emomerge.training.stacked.losses import Inputs, check_loss, check_rows_apart, model_inputs, run_loss, stack_inputs
from emomerge.training.stacked.model import StackedModel, Unstackable
from emomerge.training.stacked.randomness import Shape, Streams, Widths, runwise_dropout, slopes

SAMPLE = 2
"""Rows of each run with which a stack is checked before it is used."""


def prepare_stack(context: Context, specs: Sequence[RunSpec], say: Callable[[str], None] = lambda line: None) -> StackedPasses:
    """Build a stack of runs on one base, without writing anything.

    Args:
        context: the recipe and its folders.
        specs: the runs.
        say: receives one line with the expected speed and memory.

    Raises:
        Unstackable: the runs cannot be stacked or, with `parallel: auto`, would not gain from it.
    """
    recipe, task = context.recipe, context.task
    if recipe.adapter.kind != "lora":
        raise Unstackable("full fine-tuning leaves no base to share")
    if len({spec.batch_factor for spec in specs}) > 1:
        raise Unstackable("the runs have batches of different sizes")
    if alone := set(recipe.runs.log_with) - {"tensorboard"}:
        raise Unstackable(f"{', '.join(sorted(alone))} logs one run at a time")
    model, starts = adapted(context, specs)
    stack = StackedModel(model.to(context.device).train(), starts)
    passes = StackedPasses(context, specs, stack)
    with torch.random.fork_rng():
        batches, sample = passes.sample()
        check_rows_apart(stack, sample, SAMPLE)
        check_loss(task, stack, sample, SAMPLE, batches[0])
        passes.streams.start(lambda run: seed_default_generators(run, context.device))
        stacked = runwise_dropout(passes.streams, SAMPLE, Widths([0] * len(passes.streams.leaders)))
        expected = estimate(stack, sample, SAMPLE, recipe.runs.batch_size, stacked)
    if recipe.runs.parallel == "auto":
        expected.check()
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
            stack.share_gradients()
            spent = clock.read(len(active))
            each(active, lambda n, spent=spent: runs[n].take_step(passes.rows_of(n), spent))  # type: ignore[misc]
            stack.drop_gradients()
            each(active, keep_snapshot)
    if any(spec.end == spec.steps for spec in specs):  # then results are written
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
    """Forward and backward passes of all runs together.

    Args:
        context, specs: the runs.
        stack: their weights, on the device.
    """

    def __init__(self, context: Context, specs: Sequence[RunSpec], stack: StackedModel) -> None:
        self.context, self.specs, self.stack = context, specs, stack
        self.task, self.split, self.device, self.runs = context.task, context.data.train, context.device, context.recipe.runs
        self.streams = Streams([order_key(self.runs, spec) for spec in specs], self.device)
        self._orders = [batch_order(self.runs, specs[run], len(self.split)) for run in self.streams.leaders]
        self._rows: list[Tensor] = []
        self._slopes: list[list[Shape]] | None = None
        self._training: list[TrainingRun] = []

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
        return self._rows[self.streams.of_run[run]]

    def backward(self, micro: int, active: Sequence[int]) -> list[Tensor]:
        """Return the losses of the active runs on a micro-batch, and add to the stack's gradients."""
        self._rows = [order.batch(micro) for order in self._orders]
        batches, rows = self._batches(self._rows), len(self._rows[0])
        model, of_run = self.stack.model, self.streams.of_run

        def seed(run: int) -> None:
            seed_default_generators(seed_of("dropout", self.specs[run].seed, micro), self.device)

        widths = self._widths(batches, rows, seed)
        with autocast(self.device, self.runs.precision):
            args, kwargs = self._inputs(batches, rows, seed)
            with runwise_dropout(self.streams, rows, widths):
                output = model(*args, **kwargs)
            losses = []
            for run in active:
                seed(run)  # a task draws again the numbers that it draws before calling the model
                losses.append(run_loss(self.task, model, output, run, rows, batches[of_run[run]]))
        with runwise_dropout(self.streams, rows, widths):
            (torch.stack(losses).sum() / self.specs[0].micro_batches(self.runs)).backward()
        return losses

    def sample(self) -> tuple[list[Batch], Inputs]:
        """Return SAMPLE distinct rows of each run, padded to the longest of the first 64, and the model's inputs for them."""
        count, of_run = SAMPLE * self.stack.runs, self.streams.of_run
        micros = range(-(-max(64, count) // self.runs.batch_size))
        first = self._batches([torch.cat([order.batch(micro) for micro in micros]) for order in self._orders])
        batches = [
            {name: value[begin : begin + SAMPLE] for name, value in first[of_run[run]].items()}
            for run, begin in enumerate(range(0, count, SAMPLE))
        ]
        return batches, stack_inputs([model_inputs(self.task, self.stack.model, batch) for batch in batches], SAMPLE)

    def _inputs(self, batches: Sequence[Batch], rows: int, seed: Callable[[int], None]) -> Inputs:
        """Return the model's inputs for all runs, and advance every stream past the numbers that the task draws."""
        inputs: list[Inputs] = []

        def begin(run: int) -> None:
            seed(run)
            inputs.append(model_inputs(self.task, self.stack.model, batches[len(inputs)]))

        self.streams.start(begin)
        return stack_inputs([inputs[stream] for stream in self.streams.of_run], rows)

    def _batches(self, rows: Sequence[Tensor]) -> list[Batch]:
        """Return the batch of each stream, all padded to the same length."""
        joint = self.split.batch(torch.cat(list(rows)))
        on_device = {name: value.to(self.device, non_blocking=True) for name, value in joint.items()}
        parts = {name: value.chunk(len(rows)) for name, value in on_device.items()}
        return [{name: parts[name][stream] for name in parts} for stream in range(len(rows))]

    def _widths(self, batches: Sequence[Batch], rows: int, seed: Callable[[int], None]) -> Widths:
        """Return how much narrower each stream's batch would be on its own, in which case dropout draws fewer numbers."""
        narrower = [0] * len(batches)
        for stream, batch in enumerate(batches if len(batches) > 1 else ()):
            alone = self.split.batch(self._rows[stream])
            cut = {t.shape[1] - alone[name].shape[1] for name, t in batch.items() if t.dim() > 1} - {0}
            narrower[stream] = cut.pop() if len(cut) == 1 else 0
            if narrower[stream] and self._slopes is None:
                width = {t.shape[1] for name, t in batch.items() if t.dim() > 1 and t.shape[1] != alone[name].shape[1]}
                self._slopes = slopes(*(self._drawn(part, rows, seed) for part in (batches, narrow(batches, *width))))
        return Widths(narrower, self._slopes or ())

    def _drawn(self, batches: Sequence[Batch], rows: int, seed: Callable[[int], None]) -> Sequence[Sequence[Shape]]:
        """Return the shapes of all random draws of a forward pass."""
        args, kwargs = self._inputs(batches, rows, seed)
        with torch.no_grad(), runwise_dropout(self.streams, rows, Widths([0] * len(batches))) as found:
            self.stack.model(*args, **kwargs)
        return found


def whole(spec: RunSpec) -> RunSpec:
    """Return the specification of a run, given that of a round."""
    return replace(spec, start=0, end=spec.steps)


def narrow(batches: Sequence[Batch], width: int) -> list[Batch]:
    """Drop the last column of all tensors that have `width` columns."""
    return [{k: t[:, :-1] if t.dim() > 1 and t.shape[1] == width else t for k, t in batch.items()} for batch in batches]
