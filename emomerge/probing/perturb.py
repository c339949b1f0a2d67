"""A model that can be moved and put back: the one object every metric works on.

All models of a probe share batches, directions and ball: direction d of a tensor is drawn from a generator seeded by
blake2b(seed, d, tensor name), and its size is the RMS of that tensor *in the base*, so that growth of a model's own
weights is not rewarded (specification of the probe, traps 4 and 6).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn

from emomerge.errors import BadInput, EmomergeError
from emomerge.numerics.hashing import hash_tensors
from emomerge.numerics.seeds import generator_of
from emomerge.numerics.sums import inner, square_sum
from emomerge.probing.ledger import Ledger

Batch: TypeAlias = Any
LossFunction: TypeAlias = Callable[[nn.Module, Batch], tuple[Tensor, float | Sequence[float]]]
"""(model, batch) → mean loss and weight (rows, tokens …) of the batch as a whole, or of each of several groups of its rows:
a scalar tensor and a number, or a tensor (groups,) and as many numbers. Groups give intervals more units to resample."""

Weights: TypeAlias = Mapping[str, Tensor]
"""Parameter name → tensor; what is absent is θ₀."""
Place: TypeAlias = Callable[[Weights], None]
"""θ ← the given weights."""
Move: TypeAlias = Callable[[Weights, float], None]
"""θ ← θ₀ + factor·direction."""
Ball: TypeAlias = Literal["base", "own"]
"""What one unit of a perturbation is: the RMS of the base's tensor, or each weight's own size |w|."""

KEPT_BYTES = 2**28
"""Directions up to this size are kept while they are in use; of larger ones each tensor is drawn again when it is needed."""
INTEGERS = {
    torch.float64: (torch.int64, 52),
    torch.float32: (torch.int32, 23),
    torch.float16: (torch.int16, 10),
    torch.bfloat16: (torch.int16, 7),
}
"""Dtype of weights → integers of its size, and how many bits its fraction has."""


class Lazy(Mapping[str, Tensor]):
    """Tensors by name, each computed when it is asked for: of a large model only one exists at a time."""

    def __init__(self, names: Collection[str], compute: Callable[[str], Tensor]) -> None:
        self._names, self._compute = dict.fromkeys(names), compute

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        with torch.no_grad():
            return self._compute(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass
class Perturbable:
    """A model on fixed batches, in eval mode while it is measured.

    Args:
        model: its floating parameters are moved; frozen ones (`requires_grad=False`) stay. Adapters must be merged into it:
            the sharpness of factors changes with their scale A → cA, B → B/c, which changes no output.
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
    _kept: dict[str, Tensor] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        for name, parameter in self.parameters.items():
            if ".lora_" in name:
                raise BadInput(
                    "sharpness of LoRA factors depends on how they are scaled", where=f"parameter {name}",
                    fix="merge the adapter into its base first (emomerge bake, or merge_and_unload())",
                )  # fmt: skip
            if parameter.dtype not in INTEGERS:
                raise BadInput(
                    "weights of this dtype cannot be perturbed", where=f"parameter {name}", expected="16 bits or more",
                    found=parameter.dtype, fix="load the model in float32",
                )  # fmt: skip
            _require_in_memory(name, parameter)

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What is perturbed, tied tensors once."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad and p.is_floating_point()}

    @property
    def center(self) -> Weights:
        """θ₀, also while the model is somewhere else."""
        return self.parameters if self._kept is None else self._kept

    def evaluate(self, index: int) -> tuple[list[float], list[float]]:
        """Mean loss and weight of each group of rows in one batch, at the present weights."""
        with torch.inference_mode():
            loss, weight = self.loss(self.model, self.batches[index])
        return loss.cpu().double().reshape(-1).tolist(), [*weight] if isinstance(weight, Sequence) else [float(weight)]

    # Where to go.

    def direction(self, number: int, ball: Ball = "base") -> Lazy:
        """One Gaussian direction: for each tensor the ball's unit times standard normals of its shape.

        In half precision it is drawn in float32: the same direction as that of the same model in float32.
        """
        units = self.units(ball)

        def draw(name: str) -> Tensor:
            return normals(self.seed, number, name, self.center[name]).mul_(units[name])

        small = sum(p.numel() * max(4, p.element_size()) for p in self.parameters.values()) <= KEPT_BYTES
        return Lazy(units, cache(draw) if small else draw)

    def units(self, ball: Ball) -> Weights:
        """One unit of a perturbation by name: a scalar (the base's RMS) or |θ₀| of the tensor's shape."""
        if ball == "own":
            return Lazy(self.parameters, lambda name: self.center[name].detach().abs())
        sizes = {name: self.reference.get(name, 0.0) for name in self.parameters}
        return Lazy(
            [name for name, size in sizes.items() if size > 0],
            lambda name: torch.tensor(sizes[name], dtype=_drawn_dtype(self.center[name]), device=self.center[name].device),
        )

    def along(self, direction: Weights, factor: float) -> Lazy:
        """θ₀ + factor·direction, rounded to the weights' dtype."""

        def compute(name: str) -> Tensor:
            center = self.center[name]
            return torch.add(center, direction[name], alpha=factor).to(center.dtype)

        return Lazy(direction, compute)

    def realised(self, direction: Weights, factor: float) -> tuple[float, float]:
        """What is left of factor·direction after rounding: its norm as a fraction of the intended one, and their cosine.

        Raises:
            BadInput: the direction is zero.
        """
        weights = self.along(direction, factor)
        square, wanted, both = 0.0, 0.0, 0.0
        for name in direction:
            step = direction[name]
            got = weights[name].to(step.dtype) - self.center[name].detach().to(step.dtype)
            square, wanted, both = square + inner(got, got), wanted + inner(step, step), both + inner(got, step)
        norm, intended = math.sqrt(square), math.sqrt(wanted)
        if not intended:
            raise BadInput("nothing to perturb", expected="trainable parameters that are not zero, in the reference either")
        return norm / (abs(factor) * intended), both / (norm * intended) * math.copysign(1, factor) if norm else 0.0

    # Going there.

    @contextmanager
    def placed(self, *, in_place: bool = False) -> Iterator[Place]:
        """Within the block the given function sets θ; after it, also after an exception, θ is θ₀ again.

        For forward passes no stored weight is touched: each module is handed its tensors while it runs, one at a time. Where
        a module reads another's weights (`is_swappable`), and for gradients, weights are moved in place and copied back.

        Args:
            in_place: move the parameters themselves, as gradients with respect to them need; costs a copy of them.

        Raises:
            EmomergeError: the SHA-256 of all weights afterwards is not what it was.
        """
        swap = not in_place and self.is_swappable
        with self.guarded(), self._swapped() if swap else self._copied() as place:
            yield place

    @contextmanager
    def moved(self) -> Iterator[Move]:
        """`placed(in_place=True)` for steps from θ₀."""
        with self.placed(in_place=True) as place:
            yield lambda direction, factor: place(self.along(direction, factor))

    @cached_property
    def is_swappable(self) -> bool:
        """Whether handing each module its tensors while it runs does what moving the weights does. Two forward passes, once.

        Fused layers, modules that hold a weight twice, and parents that read a child's weight (`nn.MultiheadAttention`) fail.
        The test point needs no copy to come back from: one bit of each weight is flipped.
        """
        with self.guarded():
            try:
                self._flip()
                expected = self.evaluate(0)
            finally:
                self._flip()
            with self._swapped() as place:
                place(Lazy(self.parameters, lambda name: _flipped(self.parameters[name].detach())))
                return self.evaluate(0) == expected

    def _flip(self) -> None:
        for parameter in self.parameters.values():
            parameter.data.copy_(_flipped(parameter.detach()))

    @contextmanager
    def _swapped(self) -> Iterator[Place]:
        """Modules see the placed weights while they run; the parameters stay what they are."""
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        slots = {
            module: [(leaf, names[id(p)]) for leaf, p in module._parameters.items() if id(p) in names]
            for module in self.model.modules()
        }
        weights: Weights = {}

        def place(new: Weights) -> None:
            nonlocal weights
            weights = new

        def enter(module: nn.Module, args: Any) -> None:
            for leaf, name in slots[module]:
                if name in weights:
                    module._parameters[leaf] = cast(nn.Parameter, weights[name])

        def leave(module: nn.Module, *args: Any) -> None:
            for leaf, name in slots[module]:
                module._parameters[leaf] = self.parameters[name]

        handles = []
        try:
            for module in [module for module, owned in slots.items() if owned]:
                handles.append(module.register_forward_pre_hook(enter))
                handles.append(module.register_forward_hook(leave, always_call=True))
            yield place
        finally:
            for handle in handles:
                handle.remove()
            for module in slots:
                leave(module)

    @contextmanager
    def _copied(self) -> Iterator[Place]:
        """The parameters are moved in place, and restored from a copy."""
        kept = self._kept = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

        @torch.no_grad()
        def place(weights: Weights) -> None:
            for name, parameter in self.parameters.items():
                parameter.data.copy_(weights[name] if name in weights else kept[name])

        try:
            yield place
        finally:
            place({})
            self._kept = None

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Eval mode within the block, and each module's own mode after it."""
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Eval mode, and an EmomergeError if the weights are not the same afterwards."""
        before = self.sha256()
        with self.evaluating():
            try:
                yield
            finally:
                if self.sha256() != before:
                    raise EmomergeError("the probe could not restore the model's weights: their SHA-256 changed")

    def sha256(self) -> str:
        """Hash of all weights, in the order of their names."""
        return hash_tensors(sorted(self.model.state_dict().items()))


def normals(seed: int, number: int, name: str, like: Tensor) -> Tensor:
    """Standard normals of a tensor's shape and device, from a generator seeded by (seed, number, name)."""
    generator = generator_of(seed, number, name, device=like.device)
    return torch.empty(like.shape, dtype=_drawn_dtype(like), device=like.device).normal_(generator=generator)


def _drawn_dtype(like: Tensor) -> torch.dtype:
    return torch.promote_types(like.dtype, torch.float32)


def _flipped(x: Tensor) -> Tensor:
    """x with the third bit of its fraction flipped, which changes a number by at most an eighth; its own inverse, exactly."""
    integers, fraction = INTEGERS[x.dtype]
    return x.view(integers).bitwise_xor(1 << (fraction - 3)).view(x.dtype)


def _require_in_memory(name: str, parameter: Tensor) -> None:
    if parameter.is_meta:
        raise BadInput("the weights are not in memory", where=f"parameter {name}", fix="load the model without offloading")


def rms(model: nn.Module) -> dict[str, float]:
    """Parameter name → root mean square: the ball every model of one probe shares, taken from the base."""
    for name, parameter in model.named_parameters():
        _require_in_memory(name, parameter)
    return {name: math.sqrt(square_sum(p) / p.numel()) if p.numel() else 0.0 for name, p in model.named_parameters()}
