"""Losses of several runs from one forward pass: the task's own loss on each run's rows of the output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from emomerge.tasks import Batch, Task
from emomerge.training.stacked.model import StackedModel, Unstackable

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def model_inputs(task: Task, model: nn.Module, batch: Batch) -> Inputs:
    """Return the arguments with which `task.loss` calls the model on a batch.

    Raises:
        Unstackable: the loss does not call the model.
    """
    try:
        task.loss(_Recorder(model), batch)  # type: ignore[arg-type]
    except _Called as call:
        return call.inputs
    raise Unstackable("the task's loss does not call the model")


def stack_inputs(inputs: Sequence[Inputs], rows: int) -> Inputs:
    """Join the arguments of all runs: tensors of rows are concatenated, others come from the first run."""

    def join(first: Any, *others: Any) -> Any:
        if isinstance(first, Tensor) and first.dim() and first.shape[0] == rows:
            return torch.cat((first, *others))
        return first

    args, kwargs = tree_map(join, inputs[0], *inputs[1:])
    return args, kwargs


def run_loss(task: Task, model: nn.Module, output: Any, run: int, rows: int, batch: Batch) -> Tensor:
    """Return the task's scalar loss of one run.

    Args:
        task: the task.
        model: the stacked model.
        output: the model's output for the rows of all runs.
        run: index of the run.
        rows: rows per run.
        batch: this run's batch.

    Raises:
        Unstackable: the task reads a scalar that the model computed over the rows of all runs, or calls the model twice.
    """

    def part(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x[run * rows : (run + 1) * rows] if x.dim() else None

    loss = task.loss(_Replay(model, tree_map(part, output)), batch)  # type: ignore[arg-type]
    if loss is None:
        raise Unstackable("the task takes its loss from the model's output, which is over the rows of all runs")
    return loss


@torch.no_grad()
def check_rows_apart(stack: StackedModel, inputs: Inputs, rows: int) -> None:
    """Compare the stack, with randomly perturbed weights, to its first and last run computed on their own.

    Args:
        stack: restored afterwards, and left in training mode.
        inputs: the model's inputs for all runs.
        rows: rows per run.

    Raises:
        Unstackable: the results differ, so the model mixes rows or does not have them on dimension 0.
    """
    model, total = stack.model, stack.runs * rows

    def part(x: Any, run: int) -> Any:
        return x[run * rows : (run + 1) * rows] if isinstance(x, Tensor) and x.dim() and len(x) == total else x

    model.eval()
    with stack.shaken():
        together = model(*inputs[0], **inputs[1])
        for run in (0, stack.runs - 1):
            with stack.as_run(run):
                args, kwargs = tree_map(lambda x, run=run: part(x, run), inputs)
                alone = model(*args, **kwargs)
            pairs = zip(tree_leaves(tree_map(lambda x, run=run: part(x, run), together)), tree_leaves(alone), strict=True)
            if not all(_alike(a, b) for a, b in pairs):
                raise Unstackable("the model gives different results for the rows of all runs than for those of each run")
    model.train()


@torch.no_grad()
def check_loss(task: Task, stack: StackedModel, inputs: Inputs, rows: int, batch: Batch) -> None:
    """Compute the first run's loss from the stack once. Raises Unstackable as `run_loss` does."""
    run_loss(task, stack.model, stack.model(*inputs[0], **inputs[1]), 0, rows, batch)


def _alike(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not a.dim() or not a.is_floating_point():
        return True
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-3 * b.abs().max())


class _Called(BaseException):
    """Raised where a task's loss calls the model; a BaseException, so that tasks do not catch it."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs


class _Recorder:
    """Stands in for a model to capture the arguments it is called with."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise _Called((args, kwargs))


class _Replay(_Recorder):
    """Stands in for a model that has already been called."""

    def __init__(self, model: nn.Module, output: Any) -> None:
        super().__init__(model)
        self._outputs = [output]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._outputs:
            raise Unstackable("the task's loss calls the model more than once")
        return self._outputs.pop()
