"""Several runs at once: one forward and one backward pass over the frozen base serves all of them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from emomerge.errors import BadInput, EmomergeError, RunFailed
from emomerge.numerics.seeds import seed_default_generators, seed_of
from emomerge.recipe import Recipe
from emomerge.tasks import Batch, Task, TaskData
from emomerge.training.live import StepHook, TrainingRun
from emomerge.training.loop import adapted_model, autocast, batch_order, buffers, micro_batches, order_key, trained
from emomerge.training.runs import RunDir, RunSpec
from emomerge.training.stacked.estimate import estimate
from emomerge.training.stacked.losses import Inputs, check_loss, check_rows_apart, model_inputs, run_loss, stack_inputs
from emomerge.training.stacked.model import StackedModel, Unstackable
from emomerge.training.stacked.randomness import Shape, Streams, Widths, runwise_dropout, slopes

SAMPLE = 2
"""Rows of each run on which a stack is tried before it is used."""


def prepare_stack(
    recipe: Recipe,
    specs: Sequence[RunSpec],
    *,
    task: Task,
    data: TaskData,
    base_folder: Path,
    device: torch.device,
    say: Callable[[str], None] = lambda line: None,
) -> StackedPasses:
    """The runs of a recipe on one base. Writes nothing.

    Args:
        recipe, specs, task, data, base_folder, device: as for `train_locally`.
        say: told in one line what stacking is expected to bring.

    Raises:
        Unstackable: the runs cannot be stacked, or with `parallel: auto` should not.
    """
    if recipe.adapter.kind != "lora":
        raise Unstackable("full fine-tuning leaves no base to share")
    if alone := set(recipe.runs.log_with) - {"tensorboard"}:
        raise Unstackable(f"{', '.join(sorted(alone))} logs one run at a time")
    model, starts = adapted(recipe, specs, task, base_folder)
    stack = StackedModel(model.to(device).train(), starts)
    passes = StackedPasses(recipe, specs, stack, task, data, device)
    with torch.random.fork_rng():
        batches, sample = passes.sample()
        check_rows_apart(stack, sample, SAMPLE)
        check_loss(task, stack, sample, SAMPLE, batches[0])
        passes.streams.start(lambda run: seed_default_generators(run, device))
        stacked = runwise_dropout(passes.streams, SAMPLE, Widths([0] * len(passes.streams.leaders)))
        expected = estimate(stack, sample, SAMPLE, recipe.runs.batch_size, stacked)
    if recipe.runs.parallel == "auto":
        expected.check()
    say(str(expected))
    return passes


def train_stacked(
    passes: StackedPasses, runs: Sequence[tuple[RunDir, str]], *, base_folder: Path, on_step: StepHook = lambda spec, row: None
) -> dict[RunSpec, EmomergeError]:
    """Train runs as `train_run` does one by one, equal up to rounding; what failed, and why. Checkpoints are the same.

    The shapes of all passes depend on the stack alone: a run that has failed, or waits for others to catch up, is computed
    along. So runs that are killed together resume with the same bits.

    Args:
        passes: of the runs; used up.
        runs: directory and inputs of each, in their order.
        base_folder: where the base is.
        on_step: called after every step of every run.
    """
    recipe, specs, stack, model = passes.recipe, passes.specs, passes.stack, passes.stack.model
    lives = [
        TrainingRun(
            recipe, spec, run, inputs, trained=stack.parameters_of(number), buffers=buffers(model), on_step=on_step
        )
        for number, (spec, (run, inputs)) in enumerate(zip(specs, runs, strict=True))
    ]  # fmt: skip
    failures: dict[RunSpec, EmomergeError] = {}

    def each(numbers: Iterable[int], do: Callable[[int], None]) -> None:
        """For each run that has not failed yet; where it does, the others go on."""
        for number in numbers:
            try:
                if specs[number] not in failures:
                    do(number)
            except (RunFailed, BadInput) as error:
                failures[specs[number]] = error
                if isinstance(error, BadInput):
                    with contextlib.suppress(BadInput):  # the disk may be full
                        lives[number].run.write_state(state="failed", error=str(error))

    def keep_snapshot(number: int) -> None:
        if lives[number].step in specs[number].snapshots:
            with stack.as_run(number):
                lives[number].keep_snapshot(model, base_folder)

    def finish(number: int) -> None:
        with stack.as_run(number):
            lives[number].finish(model, base_folder)

    each(range(len(lives)), keep_snapshot)  # a kill may have come between checkpoint and snapshot
    with torch.random.fork_rng():
        while going := [n for n, live in enumerate(lives) if live.unfinished and specs[n] not in failures]:
            step = min(lives[n].step for n in going)
            active = [n for n in going if lives[n].step == step]
            started = time.perf_counter()
            for micro in micro_batches(recipe.runs, step):
                for n, loss in zip(active, passes.backward(micro, active), strict=True):
                    lives[n].observe(loss)
            stack.share_gradients()
            seconds = (time.perf_counter() - started) / len(active)
            each(active, lambda n, seconds=seconds: lives[n].take_step(passes.rows_of(n), seconds))  # type: ignore[misc]
            stack.drop_gradients()
            each(active, keep_snapshot)
    model.cpu()
    each(range(len(lives)), finish)
    return failures


def adapted(
    recipe: Recipe, specs: Sequence[RunSpec], task: Task, base_folder: Path
) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """An adapted model on the CPU, and the weights that each run starts from: those of its training seed."""
    starts: dict[int, dict[str, Tensor]] = {}
    for spec in specs:
        if spec.seed not in starts:
            model = adapted_model(recipe, spec, task, base_folder)
            starts[spec.seed] = {name: p.detach() for name, p in trained(model).items()}
    return model, [starts[spec.seed] for spec in specs]


class StackedPasses:
    """Forward and backward passes of all runs together.

    Args:
        recipe, specs, task, data, device: as for `prepare_stack`.
        stack: the runs' weights, on the device.
    """

    def __init__(
        self, recipe: Recipe, specs: Sequence[RunSpec], stack: StackedModel, task: Task, data: TaskData, device: torch.device
    ) -> None:
        self.recipe, self.specs, self.stack, self.task, self.data, self.device = recipe, specs, stack, task, data, device
        self.runs = recipe.runs
        self.streams = Streams([order_key(recipe.runs, spec) for spec in specs], device)
        self._orders = [batch_order(recipe.runs, specs[run], len(data.train)) for run in self.streams.leaders]
        self._rows: list[Tensor] = []
        self._slopes: list[list[Shape]] | None = None

    def rows_of(self, run: int) -> Tensor:
        """Row numbers of a run's last micro-batch."""
        return self._rows[self.streams.of_run[run]]

    def backward(self, micro: int, active: Sequence[int]) -> list[Tensor]:
        """The losses of the active runs on a micro-batch; adds to the stack's gradients."""
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
                seed(run)  # what a task draws before it calls the model, it draws again
                losses.append(run_loss(self.task, model, output, run, rows, batches[of_run[run]]))
        with runwise_dropout(self.streams, rows, widths):
            (torch.stack(losses).sum() / self.runs.accumulation).backward()
        return losses

    def sample(self) -> tuple[list[Batch], Inputs]:
        """SAMPLE rows of each run, of every run others, padded as the longest of the first 64; and the model's inputs."""
        count, of_run = SAMPLE * self.stack.runs, self.streams.of_run
        micros = range(-(-max(64, count) // self.runs.batch_size))
        first = self._batches([torch.cat([order.batch(micro) for micro in micros]) for order in self._orders])
        batches = [
            {name: value[begin : begin + SAMPLE] for name, value in first[of_run[run]].items()}
            for run, begin in enumerate(range(0, count, SAMPLE))
        ]
        return batches, stack_inputs([model_inputs(self.task, self.stack.model, batch) for batch in batches], SAMPLE)

    def _inputs(self, batches: Sequence[Batch], rows: int, seed: Callable[[int], None]) -> Inputs:
        """What the model is called with for all runs; every stream has then drawn what the task draws before."""
        inputs: list[Inputs] = []

        def begin(run: int) -> None:
            seed(run)
            inputs.append(model_inputs(self.task, self.stack.model, batches[len(inputs)]))

        self.streams.start(begin)
        return stack_inputs([inputs[stream] for stream in self.streams.of_run], rows)

    def _batches(self, rows: Sequence[Tensor]) -> list[Batch]:
        """The batch of each stream, all padded to the longest row of any."""
        joint = self.data.train.batch(torch.cat(list(rows)))
        on_device = {name: value.to(self.device, non_blocking=True) for name, value in joint.items()}
        parts = {name: value.chunk(len(rows)) for name, value in on_device.items()}
        return [{name: parts[name][stream] for name in parts} for stream in range(len(rows))]

    def _widths(self, batches: Sequence[Batch], rows: int, seed: Callable[[int], None]) -> Widths:
        """How much narrower each stream's batch would be alone: then it would draw less."""
        narrower = [0] * len(batches)
        for stream, batch in enumerate(batches if len(batches) > 1 else ()):
            alone = self.data.train.batch(self._rows[stream])
            cut = {t.shape[1] - alone[name].shape[1] for name, t in batch.items() if t.dim() > 1} - {0}
            narrower[stream] = cut.pop() if len(cut) == 1 else 0
            if narrower[stream] and self._slopes is None:
                width = {t.shape[1] for name, t in batch.items() if t.dim() > 1 and t.shape[1] != alone[name].shape[1]}
                self._slopes = slopes(*(self._drawn(part, rows, seed) for part in (batches, narrow(batches, *width))))
        return Widths(narrower, self._slopes or ())

    def _drawn(self, batches: Sequence[Batch], rows: int, seed: Callable[[int], None]) -> Sequence[Sequence[Shape]]:
        """The shapes of what is drawn in a forward pass."""
        args, kwargs = self._inputs(batches, rows, seed)
        with torch.no_grad(), runwise_dropout(self.streams, rows, Widths([0] * len(batches))) as found:
            self.stack.model(*args, **kwargs)
        return found


def narrow(batches: Sequence[Batch], width: int) -> list[Batch]:
    """Without the last of so many columns."""
    return [{k: t[:, :-1] if t.dim() > 1 and t.shape[1] == width else t for k, t in batch.items()} for batch in batches]
