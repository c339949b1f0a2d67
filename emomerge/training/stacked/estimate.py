"""What stacking is expected to bring and to cost: the same on every start but for the free memory, so that resuming decides
as before."""

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
    """What passes cost, forward and backward together."""

    call: float
    """Seconds for a trained layer, with what stands around it, however few its rows."""
    weights: float
    """Bytes of weights a second that a pass reads."""
    flops: float
    """Floating-point operations a second of large matrix products."""
    activations: float
    """Bytes a second of what is kept in between: normalisation, attention, activation functions."""
    update: float
    """Seconds for the optimizer's part of a trained layer."""


CPU = Machine(2.2e-4, 4.8e9, 1.9e11, 8.5e8, 4e-5)
"""Fitted to one core of a server, BERT of 6 layers, hidden 64 to 384, 16 to 256 tokens a run."""
ACCELERATOR = Machine(2.2e-4, 5e11, 2e13, 2e11, 4e-5)
"""A guess."""
IN_PIECES = 1.2
"""How much longer matrix products take in the pieces of one run."""
WORTHWHILE = 1.15
"""How many times faster it must be: the memory of several runs is not free, and the estimate is no better than a tenth."""
MARGIN = 2.3
"""Memory of training over that of a pass's activations: intermediate results, and what the allocator cannot use again while
batches change their width. Measured with MiniLM on movie reviews: 1.7 GB for .75, and .49 for .19 of one run."""


@dataclass(frozen=True)
class Estimate:
    """Of training some runs in one pass, against one by one.

    Attributes:
        runs: how many.
        faster: how many times less time it takes.
        activations: bytes that the backward pass of all runs needs.
        alone: bytes that it needs of one run.
        free: bytes that are free.
    """

    runs: int
    faster: float
    activations: float
    alone: float
    free: float

    def __str__(self) -> str:
        return (
            f"{self.runs} runs in one pass: {self.faster:.1f} times faster than one by one, "
            f"{_size(self.memory)} of memory for activations instead of {_size(self.alone * MARGIN)}, "
            f"of {_size(self.free)} free (estimates)"
        )

    @property
    def memory(self) -> float:
        """Bytes that training needs beside the weights."""
        return self.activations * MARGIN

    def check(self) -> None:
        """Raises Unstackable where it would not fit into memory, or not be faster."""
        if self.memory > self.free:
            need, free = _size(self.memory), _size(self.free)
            raise Unstackable(f"{self.runs} runs in one pass need an estimated {need}, and {free} are free")
        if self.faster < WORTHWHILE:
            raise Unstackable(f"{self.runs} runs in one pass are expected to be hardly faster ({self.faster:.2f} times)")


def estimate(
    stack: StackedModel, sample: Inputs, sample_rows: int, batch_rows: int, stacked: AbstractContextManager[object]
) -> Estimate:
    """An estimate from two forward passes.

    Args:
        stack: in training mode.
        sample: what the model is called with.
        sample_rows: how many rows of each run that are.
        batch_rows: how many rows a micro-batch of a run has.
        stacked: within it dropout draws as in training, where runs may share what is drawn.
    """
    device = next(iter(stack.stacks.values())).device
    of_a_run = batch_rows / (stack.runs * sample_rows)
    with FlopCounterMode(display=False) as flops:
        alone = activation_bytes(stack.model, sample) * of_a_run
    with stacked:
        together = activation_bytes(stack.model, sample) * of_a_run * stack.runs
    machine = CPU if device.type == "cpu" else ACCELERATOR
    layers = (layer for layer in stack.model.modules() if not isinstance(layer, nn.Embedding))
    weights = sum(p.numel() * p.element_size() for layer in layers for p in layer.parameters(recurse=False))
    once = stack.layers * machine.call + 2 * weights / machine.weights
    products = 2 * flops.get_total_flops() * of_a_run / machine.flops  # frozen weights need no gradient
    update = stack.layers * machine.update
    one_by_one = stack.runs * (once + IN_PIECES * products + alone / machine.activations + update)
    at_once = once + stack.runs * (products + update) + together / machine.activations
    return Estimate(stack.runs, one_by_one / at_once, together, alone, free_memory(device))


def activation_bytes(model: nn.Module, inputs: Inputs) -> int:
    """What a forward pass keeps for the backward pass, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with saved_tensors_hooks(note, lambda t: t):
        output = model(*inputs[0], **inputs[1])  # kept alive, so that no address is seen twice
    del output
    return sum(kept.values())


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device."""
    from accelerate.utils import get_max_memory

    place = device.type if device.type in ("cpu", "mps") else device.index or 0
    return int(get_max_memory()[place])


def _size(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"
