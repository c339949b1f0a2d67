"""The runs of a stack that share their forward and backward passes: their batches, random numbers and losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from emomerge.numerics.seeds import seed_default_generators, seed_of
from emomerge.tasks import Batch
from emomerge.tasks.padding import narrow_alike, partition
from emomerge.training.context import Context
from emomerge.training.loop import autocast, batch_order, order_key
from emomerge.training.plan import RunSpec
from emomerge.training.stacked.losses import Inputs, model_inputs, run_loss, stack_inputs
from emomerge.training.stacked.model import StackedModel
from emomerge.training.stacked.randomness import Noise, Shape, Streams, Widths, runwise_dropout, slopes

SAMPLE = 2
"""Rows of each run with which a stack is checked before it is used."""
PASS, CALLS = 64, 4e8
"""What a forward and backward pass costs besides its tokens: tokens, and tokens times parameters (see `tasks.padding`)."""


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
        self._in_parts: bool | None = None
        """Whether batches may be passed in parts; None if that is not known yet."""
        self._parameters = sum(p.numel() for p in stack.model.parameters() if not p.requires_grad)

    def rows_of(self, run: int) -> Tensor:
        """Return the row numbers of a run's last micro-batch."""
        return self._rows[self.streams.of_run[run - self.runs.start]]

    def backward(self, micro: int, active: Sequence[int]) -> list[Tensor]:
        """Return the losses of the active runs of this group on a micro-batch, and add to the stack's gradients."""
        self._rows = [order.batch(micro) for order in self._orders]
        batches, rows = self._batches(self._rows), len(self._rows[0])

        def seed(run: int) -> None:
            seed_default_generators(seed_of("dropout", self._specs[run].seed, micro), self.device)

        with self.stack.only(self.runs):
            parts = self._parts(batches, rows, seed)
            if len(parts) == 1:
                return self._pass(batches, rows, self._widths(batches, rows, seed), active, seed)
            losses: list[Tensor] = [torch.zeros(()) for _ in active]
            noise: Noise = {}  # of the whole batch, drawn in the first pass
            widest = [int(batch["attention_mask"].sum(dim=1).max()) for batch in batches]
            for picks in parts:
                some, count = narrow_alike(batches, picks), len(picks[0])
                width = some[0]["attention_mask"].shape[1]
                widths = Widths([width - alone for alone in widest], self._slopes or (), picks, rows, noise)
                found = self._pass(some, count, widths, active, seed, share=count / rows)
                losses = [loss + one.detach() * (count / rows) for loss, one in zip(losses, found, strict=True)]
        return losses

    def _pass(
        self, batches: Sequence[Batch], rows: int, widths: Widths, active: Sequence[int], seed: Callable[[int], None],
        share: float = 1.0,
    ) -> list[Tensor]:  # fmt: skip
        """Return the losses of the active runs on batches, and add `share` of their gradients."""
        model, of_run, first = self.stack.model, self.streams.of_run, self.runs.start
        with autocast(self.device, self._settings.precision):
            args, kwargs = self._inputs(batches, rows, seed)
            with runwise_dropout(self.streams, rows, widths):
                output = model(*args, **kwargs)
            losses = []
            for run in (run - first for run in active):
                seed(run)  # a task draws again the numbers that it draws before calling the model
                losses.append(run_loss(self.task, model, output, run, rows, batches[of_run[run]]))
        del output
        total = torch.stack(losses).sum()
        with runwise_dropout(self.streams, rows, widths):  # checkpointed layers are computed again
            ((total if share == 1 else total * share) / self._specs[0].micro_batches(self._settings)).backward()
        return losses

    def _parts(self, batches: Sequence[Batch], rows: int, seed: Callable[[int], None]) -> list[list[Tensor]]:
        """Return, for each pass, the numbers of its rows in the batch of each stream: rows of similar length share a pass."""
        everything = [torch.arange(rows)] * len(batches)
        if not self.task.is_mean_of_padded_rows or self.device.type != "cpu" or self._in_parts is False:
            return [everything]
        sorted_by_stream = [batch["attention_mask"].sum(dim=1).sort(stable=True) for batch in batches]
        longest = torch.stack([lengths for lengths, _ in sorted_by_stream]).amax(dim=0)
        sizes = partition(tuple(longest.tolist()), PASS + CALLS / self._parameters)
        if len(sizes) > 1 and self._in_parts is None:
            self._in_parts = self._can_be_parted(batches, rows, seed)
        if len(sizes) == 1 or not self._in_parts:
            return [everything]
        return [list(part) for part in zip(*(order.split(sizes) for _, order in sorted_by_stream), strict=True)]

    def _can_be_parted(self, batches: Sequence[Batch], rows: int, seed: Callable[[int], None]) -> bool:
        """Return whether all random draws of a pass are of tensors with a batch's rows on dimension 0, and learn their slopes.

        Dropout then multiplies a row by the numbers that it would get in the whole batch. Checkpointed layers draw again, in
        another order.
        """
        if any(getattr(module, "gradient_checkpointing", False) for module in self.stack.model.modules()):
            return False
        width = batches[0]["attention_mask"].shape[1]
        widths = Widths([0] * len(batches))
        drawn = [self._drawn(part, rows, seed, widths) for part in (batches, narrow(batches, width))]
        self._slopes = slopes(*drawn)
        plain = not widths.strided and all(len(shapes) == 1 and shapes[0][:1] == (rows,) for shapes in drawn[0])
        return plain and len(self._slopes) == len(drawn[0]) and not any(of[0][0] for of in self._slopes)

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

    def _drawn(
        self, batches: Sequence[Batch], rows: int, seed: Callable[[int], None], widths: Widths | None = None
    ) -> Sequence[Sequence[Shape]]:
        """Return the shapes of all random draws of a forward pass."""
        args, kwargs = self._inputs(batches, rows, seed)
        with torch.no_grad(), runwise_dropout(self.streams, rows, widths or Widths([0] * len(batches))) as found:
            self.stack.model(*args, **kwargs)
        return found


def narrow(batches: Sequence[Batch], width: int) -> list[Batch]:
    """Drop the last column of all tensors that have `width` columns."""
    return [{k: t[:, :-1] if t.dim() > 1 and t.shape[1] == width else t for k, t in batch.items()} for batch in batches]
