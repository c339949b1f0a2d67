"""Estimates of the speed and memory of a stack. Apart from free memory they are the same on every start, so that a resumed
run decides as before."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from emomerge.training.stacked.losses import Inputs
from emomerge.training.stacked.model import StackedModel, Unstackable


class Machine(NamedTuple):
    """Cost model of a forward and backward pass."""

    call: float
    """Seconds for a trained layer and its surroundings, independent of the number of rows."""
    weights: float
    """Bytes of weights read per second."""
    flops: float
    """Floating-point operations per second of large matrix products."""
    activations: float
    """Bytes of stored activations per second: normalization, attention, activation functions."""
    update: float
    """Seconds for the optimizer step of a trained layer."""


CPU = Machine(2.2e-4, 4.8e9, 1.9e11, 8.5e8, 4e-5)
"""Fitted to one core of a server, BERT of 6 layers, hidden 64 to 384, 16 to 256 tokens per run."""
ACCELERATOR = Machine(2.2e-4, 5e11, 2e13, 2e11, 4e-5)
"""Not measured."""
IN_PIECES = 1.2
"""How much longer matrix products take on the rows of a single run."""
WORTHWHILE = 1.15
"""The speedup required: the memory of several runs has its price, and the estimate is accurate to about 10 %."""
MARGIN = 2.3
"""Memory of training over that of a pass's activations: intermediate results, and fragmentation as batches change their width.
Measured with MiniLM on movie reviews: 1.7 GB for 0.75 GB of activations, and 0.49 GB for 0.19 GB of one run."""
PROCESS = 4.5e8
"""Bytes of a process on the CPU before the first pass, without the weights."""
LIMIT = 1.5
"""Peak memory of a process that trains several runs, over that of one that trains a single run."""


@dataclass(frozen=True)
class Estimate:
    """Training some runs in one pass, compared to one by one.

    Attributes:
        runs: number of runs.
        size: the number of runs that share a pass.
        faster: the speedup.
        activations: bytes stored for the backward pass of `size` runs.
        alone: bytes stored for that of one run.
        free: bytes of free memory.
    """

    runs: int
    size: int
    faster: float
    activations: float
    alone: float
    free: float

    def __str__(self) -> str:
        return (
            f"{self._what}: {self.faster:.1f} times faster than one by one, "
            f"{_size(self.memory)} of memory for activations instead of {_size(self.alone * MARGIN)}, "
            f"of {_size(self.free)} free (estimates)"
        )

    @property
    def _what(self) -> str:
        return f"{self.runs} runs in one pass" if self.size == self.runs else f"{self.runs} runs, {self.size} in one pass"

    @property
    def memory(self) -> float:
        """Bytes that training needs in addition to the weights."""
        return self.activations * MARGIN

    def check(self) -> None:
        """Raise Unstackable if the stack would not fit into memory or would not be faster."""
        if self.memory > self.free:
            need, free = _size(self.memory), _size(self.free)
            raise Unstackable(f"{self._what} need an estimated {need}, and {free} are free")
        if self.faster < WORTHWHILE:
            raise Unstackable(f"{self._what} are expected to be hardly faster ({self.faster:.2f} times)")


def estimate(
    stack: StackedModel, sample: Inputs, sample_rows: int, batch_rows: int, stacked: AbstractContextManager[object]
) -> Estimate:
    """Estimate speed and memory from two forward passes.

    Args:
        stack: the runs, in training mode.
        sample: inputs of the model.
        sample_rows: rows of each run in the sample.
        batch_rows: rows of each run in a micro-batch.
        stacked: context in which dropout draws as in training, where runs may share numbers.
    """
    device = next(iter(stack.stacks.values())).device
    share = batch_rows / (stack.runs * sample_rows)
    with FlopCounterMode(display=False) as flops:
        alone = activation_bytes(stack.model, sample) * share
    with stacked:
        together = activation_bytes(stack.model, sample) * share * stack.runs
    machine = CPU if device.type == "cpu" else ACCELERATOR
    layers = (layer for layer in stack.model.modules() if not isinstance(layer, nn.Embedding))
    size = stack.runs
    if device.type == "cpu":
        size = share_of(stack.runs, alone, together, sum(p.nbytes for p in stack.model.parameters()))
    passes = -(-stack.runs // size)
    weights = sum(p.numel() * p.element_size() for layer in layers for p in layer.parameters(recurse=False))
    once = stack.layers * machine.call + 2 * weights / machine.weights
    products = 2 * flops.get_total_flops() * share / machine.flops  # frozen weights need no gradient
    update = stack.layers * machine.update
    one_by_one = stack.runs * (once + IN_PIECES * products + alone / machine.activations + update)
    at_once = passes * once + stack.runs * (products + update) + together / machine.activations
    return Estimate(stack.runs, size, one_by_one / at_once, together * size / stack.runs, alone, free_memory(device))


def share_of(runs: int, alone: float, together: float, weights: float) -> int:
    """Return how many runs may share a pass so that the process stays below LIMIT times the memory of a single run.

    Args:
        runs: number of runs.
        alone, together: bytes stored for the backward pass of one run, and of all.
        weights: bytes of the model.
    """
    one = PROCESS + weights + MARGIN * alone
    most = int((LIMIT * one - PROCESS - weights) / (MARGIN * together / runs))
    passes = -(-runs // max(1, min(most, runs)))
    return -(-runs // passes)


def activation_bytes(model: nn.Module, inputs: Inputs) -> int:
    """Return the bytes that a forward pass stores for the backward pass, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with saved_tensors_hooks(note, lambda t: t):
        output = model(*inputs[0], **inputs[1])  # kept alive, so that no address is reused
    del output
    return sum(kept.values())


def free_memory(device: torch.device) -> int:
    """Return the free memory of a device in bytes."""
    from accelerate.utils import get_max_memory

    key = device.type if device.type in ("cpu", "mps") else device.index or 0
    return int(get_max_memory()[key])


def _size(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"
