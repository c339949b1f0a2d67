"""How much work a recipe's model is: measured on one batch, and the threads and workers that suit it.

Matrix products of small models gain nothing from a second thread and burn it, and their sums differ with the number of threads.
They therefore get one thread, and other cores do other things beside them. The choice depends on sizes, not on times, so that
every machine makes the same one and finds the same bits; how many workers there are has no effect on results.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from emomerge.numerics.memory import free_memory
from emomerge.tasks import Batch, Task

FLOP_PER_THREAD = 2e9
"""Floating-point operations of a matrix product for which one more thread pays: some 40 ms of a core."""
SMALLEST_WORK = 15.0
"""Seconds of work below which starting workers costs more than they save."""
MOST_WORKERS = 8
LARGEST_TRIED = 2**30
"""Bytes of a model of which a backward pass is tried."""
BACKWARD = 2
"""Duration of a backward pass, in forward passes."""
PROCESS = 700 * 2**20
"""Bytes of a worker besides its model: torch, transformers, peft."""


@dataclass(frozen=True)
class Work:
    """What passes of one batch of the runs cost on a model.

    Attributes:
        product: floating-point operations of a matrix product, averaged over those of a forward pass by their operations.
        flop: floating-point operations of a forward pass.
        weights: bytes of the model.
        kept: bytes that a forward pass keeps for the backward pass.
        seconds: duration of a forward and a backward pass, as measured on this machine.
        forward: duration of a forward pass.
    """

    product: float
    flop: float
    weights: int
    kept: int
    seconds: float
    forward: float
    per_rank: int = 0
    """Bytes of a LoRA of rank 1 of all matrices."""


@dataclass(frozen=True)
class Hands:
    """Workers and the threads of each."""

    workers: int
    threads: int

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{self.workers} workers of {threads}" if self.workers > 1 else f"one process, {threads}"


def choose_hands(work: Work, cores: int, seconds: float, memory: int | None = None) -> Hands:
    """Return how many workers suit a work and how many threads each of them.

    Args:
        work: the work.
        cores: the cores that may be used.
        seconds: an estimate of all that is to be done.
        memory: free bytes; by default as found.
    """
    threads = max(1, min(cores, round(work.product / FLOP_PER_THREAD)))
    # A stack of five runs keeps the activations of five. A worker also has a model to measure, and the base's weights.
    each = PROCESS + 4 * work.weights + 6 * work.kept
    free = free_memory() if memory is None else memory
    fitting = max(1, int(0.7 * free / each))
    workers = min(cores // threads, fitting, MOST_WORKERS) if seconds >= SMALLEST_WORK else 1
    return Hands(max(1, workers), threads)


def usable_cores() -> int:
    """Return the number of cores that this process may use: those it may run on, and no more than torch has threads.

    torch takes the number from OMP_NUM_THREADS or `torch.set_num_threads`, if given.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, torch.get_num_threads()))


def measure_work(task: Task, model: nn.Module, batch: Batch) -> Work:
    """Measure one forward and one backward pass of a batch on a model, whose state is not changed.

    Of a model above `LARGEST_TRIED` a forward pass is made without gradients, which would need the memory of the model again.
    """
    was_training, parameters = model.training, [p for p in model.parameters() if p.requires_grad]
    weights = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    total = sum(weights.values())
    model.eval()  # no statistics are updated and nothing is drawn
    try:
        with torch.random.fork_rng():
            if total > LARGEST_TRIED or not parameters:
                products, forward = _forward(task, model, batch)
                seconds, kept = (1 + BACKWARD) * forward, products.made
            else:
                products, kept = _counted(task, model, batch, weights)
                forward, seconds = min(_timed(task, model, batch, parameters) for _ in range(2))  # the first one allocates
    finally:
        model.train(was_training)
    per_rank = sum(4 * (p.shape[0] + p[0].numel()) for p in model.parameters() if p.ndim > 1)
    return Work(products.mean, products.total, total, kept, seconds, forward, per_rank)


def _forward(task: Task, model: nn.Module, batch: Batch) -> tuple[_Products, float]:
    """Return what a forward pass without gradients consists of, and its duration."""
    started = time.perf_counter()
    with torch.no_grad(), _Products() as products:
        task.loss(model, batch)
    return products, time.perf_counter() - started


def _counted(task: Task, model: nn.Module, batch: Batch, weights: Mapping[int, int]) -> tuple[_Products, int]:
    """Return what a forward pass consists of, and the bytes that it keeps for the backward pass besides the weights."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with _Products() as products, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        task.loss(model, batch)
    return products, sum(size for place, size in kept.items() if place not in weights)


def _timed(task: Task, model: nn.Module, batch: Batch, parameters: list[nn.Parameter]) -> tuple[float, float]:
    """Return the duration of a forward pass, and of a forward and a backward pass."""
    started = time.perf_counter()
    loss = task.loss(model, batch)
    forward = time.perf_counter() - started
    torch.autograd.grad(loss, parameters, allow_unused=True)
    return forward, time.perf_counter() - started


class _Products(TorchDispatchMode):
    """Counts the floating-point operations of matrix products and convolutions."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: list[float] = []
        self.made = 0
        """Bytes of their results."""

    @property
    def total(self) -> float:
        return math.fsum(self.counts)

    @property
    def mean(self) -> float:
        """The mean over all operations of the size of the product that they belong to."""
        return math.fsum(count * count for count in self.counts) / self.total if self.total else 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        count = _COUNTS.get(func._schema.name.removeprefix("aten::"))
        if count is not None:
            self.counts.append(2.0 * count(args, found))
            self.made += found.numel() * found.element_size()
        return found


_COUNTS: Mapping[str, Any] = {
    "mm": lambda args, found: found.numel() * args[0].shape[-1],
    "addmm": lambda args, found: found.numel() * args[1].shape[-1],
    "bmm": lambda args, found: found[0].numel() * args[0].shape[-1],  # one product of the batch
    "convolution": lambda args, found: found.numel() * args[1][0].numel(),
}
"""Operation → multiplications and additions of two, given its arguments and its result."""
