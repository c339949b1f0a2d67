"""A model that can be moved and put back: the one object every metric works on.

All models of a probe share batches, directions and ball: direction d of a tensor is drawn from a generator seeded by
blake2b(seed, d, tensor name), and its size is the RMS of that tensor *in the base*, so that growth of a model's own
weights is not rewarded (specification of the probe, traps 4 and 6).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from emomerge.errors import BadInput, EmomergeError
from emomerge.probing.ledger import Ledger

Batch: TypeAlias = Any
LossFunction: TypeAlias = Callable[[nn.Module, Batch], tuple[Tensor, float | Sequence[float]]]
"""(model, batch) → mean loss and weight (rows, tokens …) of the batch as a whole, or of each of several groups of its rows:
a scalar tensor and a number, or a tensor (groups,) and as many numbers. Groups give intervals more units to resample."""

Move: TypeAlias = Callable[[Mapping[str, Tensor], float], None]
"""θ ← θ₀ + factor·direction."""


@dataclass
class Perturbable:
    """A model on fixed batches, in eval mode while it is measured.

    Args:
        model: its floating parameters are moved and restored in place; frozen ones (`requires_grad=False`) stay.
        loss: see LossFunction.
        batches: the same for every model that is to be compared, on the model's device.
        reference: parameter name → RMS of that tensor in the base; tensors with RMS 0 are not moved. See `rms`.
        seed: seed of the directions.
        model_hash, data_hash: what the ledger files evaluations under.
        ledger: remembers evaluations; by default in memory.
    """

    model: nn.Module
    loss: LossFunction
    batches: Sequence[Batch]
    reference: Mapping[str, float]
    seed: int = 0
    model_hash: str = "model"
    data_hash: str = "data"
    ledger: Ledger = field(default_factory=Ledger)

    def __post_init__(self) -> None:
        for name, parameter in self.parameters.items():
            if parameter.dtype in (torch.float16, torch.bfloat16):
                raise BadInput(
                    "small perturbations do not survive this dtype", where=f"parameter {name}",
                    expected="float32", found=parameter.dtype, fix="load the model in float32",
                )  # fmt: skip

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What is perturbed, tied tensors once."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad and p.is_floating_point()}

    def evaluate(self, index: int) -> tuple[list[float], list[float]]:
        """Mean loss and weight of each group of rows in one batch, at the present weights."""
        with torch.inference_mode():
            loss, weight = self.loss(self.model, self.batches[index])
        return loss.cpu().double().reshape(-1).tolist(), [*weight] if isinstance(weight, Sequence) else [float(weight)]

    def direction(self, number: int) -> dict[str, Tensor]:
        """One Gaussian direction: for each tensor, RMS of the base's tensor times standard normals of its shape."""
        drawn = {}
        for name, parameter in self.parameters.items():
            rms = self.reference.get(name, 0.0)
            if rms > 0:
                key = hashlib.blake2b(f"{self.seed}/{number}/{name}".encode(), digest_size=8).digest()
                generator = torch.Generator(parameter.device).manual_seed(int.from_bytes(key, "little") >> 1)
                noise = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
                drawn[name] = noise.normal_(generator=generator).mul_(rms)
        return drawn

    @contextmanager
    def moved(self) -> Iterator[Move]:
        """Within the block the given function sets θ ← θ₀ + factor·direction; after it, also after an exception, θ is θ₀ again.

        Raises:
            EmomergeError: the SHA-256 of all weights afterwards is not what it was.
        """
        before = self.sha256()
        kept = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        training = self.model.training
        self.model.eval()

        @torch.no_grad()
        def move(direction: Mapping[str, Tensor], factor: float) -> None:
            for name, step in direction.items():
                torch.add(kept[name], step, alpha=factor, out=self.parameters[name].data)

        try:
            yield move
        finally:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.data.copy_(kept[name])
            self.model.train(training)
            if self.sha256() != before:
                raise EmomergeError("the probe could not restore the model's weights: their SHA-256 changed")

    def sha256(self) -> str:
        """Hash of all weights, in the order of their names."""
        total = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            total.update(name.encode())
            total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return total.hexdigest()


def square_sum(tensor: Tensor) -> float:
    """Σ x² in float64, on the CPU: some accelerators have no float64."""
    return float(tensor.detach().cpu().double().square().sum())


def rms(model: nn.Module) -> dict[str, float]:
    """Parameter name → root mean square: the ball every model of one probe shares, taken from the base."""
    return {name: math.sqrt(square_sum(p) / p.numel()) if p.numel() else 0.0 for name, p in model.named_parameters()}
