"""The runs of a stack that share their forward and backward passes: their batches, random numbers and losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from emomerge.numerics.seeds import seed_default_generators, seed_of
from emomerge.tasks import Batch
from emomerge.training.context import Context
from emomerge.training.loop import autocast, batch_order, order_key
from emomerge.training.plan import RunSpec
from emomerge.training.stacked.losses import Inputs, model_inputs, run_loss, stack_inputs
from emomerge.training.stacked.model import StackedModel
from emomerge.training.stacked.randomness import Shape, Streams, Widths, runwise_dropout, slopes

SAMPLE = 2
"""Rows of each run with which a stack is checked before it is used."""


class RunGroup:
    """Forward and backward passes of some consecutive runs of a stack.

    Args:
        context, specs: all runs of the stack.
        stack: their weights, on the device.
        runs: the numbers of the runs of this group.
    """

    def __init__(self, context: Context, specs: Sequence[RunSpec], stack: StackedModel, runs: range) -> None:
        self.runs, self.stack, self._specs = runs, stack, [specs[run] for run in runs]
        self.task, self.split, self.device = context.task, context.data.train, context.device
        self._settings = context.recipe.runs
        self.streams = Streams([order_key(self._settings, spec) for spec in self._specs], self.device)
        self._orders = [batch_order(self._settings, self._specs[run], len(self.split)) for run in self.streams.leaders]
        self._rows: list[Tensor] = []
        self._slopes: list[list[Shape]] | None = None

    def rows_of(self, run: int) -> Tensor:
        """Return the row numbers of a run's last micro-batch."""
        return self._rows[self.streams.of_run[run - self.runs.start]]

    def backward(self, micro: int, active: Sequence[int]) -> list[Tensor]:
        """Return the losses of the active runs of this group on a micro-batch, and add to the stack's gradients."""
        self._rows = [order.batch(micro) for order in self._orders]
        batches, rows = self._batches(self._rows), len(self._rows[0])
        model, of_run, first = self.stack.model, self.streams.of_run, self.runs.start

        def seed(run: int) -> None:
            seed_default_generators(seed_of("dropout", self._specs[run].seed, micro), self.device)

        with self.stack.only(self.runs):
            widths = self._widths(batches, rows, seed)
            with autocast(self.device, self._settings.precision):
                args, kwargs = self._inputs(batches, rows, seed)
                with runwise_dropout(self.streams, rows, widths):
                    output = model(*args, **kwargs)
                losses = []
                for run in (run - first for run in active):
                    seed(run)  # a task draws again the numbers that it draws before calling the model
                    losses.append(run_loss(self.task, model, output, run, rows, batches[of_run[run]]))
            del output
            with runwise_dropout(self.streams, rows, widths):  # checkpointed layers are computed again
                (torch.stack(losses).sum() / self._specs[0].micro_batches(self._settings)).backward()
        return losses

    def sample(self) -> tuple[list[Batch], Inputs]:
        """Return SAMPLE distinct rows of each run, padded to the longest of the first 64, and the model's inputs for them."""
        count, of_run = SAMPLE * len(self.runs), self.streams.of_run
        micros = range(-(-max(64, count) // self._settings.batch_size))
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


def narrow(batches: Sequence[Batch], width: int) -> list[Batch]:
    """Drop the last column of all tensors that have `width` columns."""
    return [{k: t[:, :-1] if t.dim() > 1 and t.shape[1] == width else t for k, t in batch.items()} for batch in batches]
