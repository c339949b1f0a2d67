"""What stacking is expected to bring and to cost: the same figures on every start, so that a resumed run decides the same."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from emomerge.training.stacked.losses import Inputs
from emomerge.training.stacked.model import StackedModel, Unstackable

LAYER_SECONDS = 2.2e-4
"""What calling an adapted layer costs, forward and backward, with what stands around it, however few its rows."""
RATE = {"cpu": 9e10, "cuda": 2e13}
"""Multiplications and additions a second in large matrix products. The CPU's is measured on one core, CUDA's is a guess."""
SMALL = 1.3
"""How much longer the same products take in the pieces of one run."""
WORTHWHILE = 1.05
MARGIN = 1.5
"""Memory of a pass over that of its activations: gradients and intermediate results."""


@dataclass(frozen=True)
class Estimate:
    """Of training some runs in one pass, against one by one.

    Attributes:
        runs: how many.
        faster: how many times less time it takes.
        activations: bytes that the backward pass of one run needs.
        free: bytes that are free.
    """

    runs: int
    faster: float
    activations: float
    free: float

    def __str__(self) -> str:
        return (
            f"{self.runs} runs in one pass: about {self.faster:.1f} times faster than one by one, "
            f"{_size(self.runs * self.activations)} of activations instead of {_size(self.activations)} "
            f"(estimated; {_size(self.free)} are free)"
        )

    def check(self) -> None:
        """Raises Unstackable where it would not fit into memory, or not be faster."""
        if self.runs * self.activations * MARGIN > self.free:
            need = _size(self.runs * self.activations * MARGIN)
            raise Unstackable(f"{self.runs} runs in one pass need an estimated {need}, and {_size(self.free)} are free")
        if self.faster < WORTHWHILE:
            raise Unstackable(f"{self.runs} runs in one pass are expected to be no faster ({self.faster:.2f} times)")


def estimate(stack: StackedModel, sample: Inputs, sample_rows: int, batch_rows: int) -> Estimate:
    """An estimate from one forward pass.

    Args:
        stack: in training mode.
        sample: what the model is called with.
        sample_rows: how many rows of each run that are.
        batch_rows: how many rows a micro-batch of a run has.
    """
    device = next(iter(stack.stacks.values())).device
    of_a_run = batch_rows / (stack.runs * sample_rows)
    with FlopCounterMode(display=False) as flops:
        kept = activation_bytes(stack.model, sample)
    work = 3 * flops.get_total_flops() * of_a_run / RATE.get(device.type, RATE["cuda"])
    calls = stack.layers * LAYER_SECONDS
    faster = stack.runs * (calls + SMALL * work) / (calls + stack.runs * work)
    return Estimate(stack.runs, faster, kept * of_a_run, free_memory(device))


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
