"""Perturbable: a model whose weights can be perturbed and restored. Every metric works on one.

All models of a probe share their batches, directions and ball. Direction d of a tensor is drawn from a generator seeded by
blake2b(seed, d, tensor name) and scaled by the RMS of that tensor *in the base*: a ball relative to each model's own weights
would reward models for growing them (specification of the probe, traps 4 and 6).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from emomerge.errors import BadInput, EmomergeError
from emomerge.numerics.hashing import hash_tensors
from emomerge.numerics.seeds import generator_of
from emomerge.numerics.sums import inner, square_sum
from emomerge.probing.ledger import Ledger

Batch: TypeAlias = Any
LossFunction: TypeAlias = Callable[[nn.Module, Batch], tuple[Tensor, float | Sequence[float] | Tensor]]
"""(model, batch) → mean loss and weight (number of rows or tokens), either of the whole batch (a scalar tensor and a number)
or of several groups of its rows (a tensor (groups,) and as many numbers, or a tensor of them on the model's device). Groups
give bootstrap intervals more units to resample."""

Array: TypeAlias = NDArray[np.float64]
Weights: TypeAlias = Mapping[str, Tensor]
"""Parameter name → tensor; parameters that are missing keep their values θ₀."""
SetWeights: TypeAlias = Callable[[Weights], None]
"""Set θ to the given weights."""
Step: TypeAlias = Callable[[Weights, float], None]
"""Set θ to θ₀ + factor·direction."""
Ball: TypeAlias = Literal["base", "own"]
"""The unit of a perturbation: the RMS of the base's tensor, or each weight's own magnitude |w|."""

KEPT_BYTES = 2**28
"""Directions and perturbed weights up to this size are kept while in use; larger ones are made again for every forward pass,
one tensor at a time."""
INTEGERS = {
    torch.float64: (torch.int64, 52),
    torch.float32: (torch.int32, 23),
    torch.float16: (torch.int16, 10),
    torch.bfloat16: (torch.int16, 7),
}
"""Dtype of weights → integer dtype of the same size, number of fraction bits."""


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, computed on access, so that of a large model only one tensor exists at a time.

    Args:
        names: of the tensors.
        compute: returns a tensor.
        write: writes a tensor into memory of its shape and dtype, if there is a way that needs no other memory. New memory
            takes the system longer to provide than the sums that fill it.
    """

    def __init__(
        self, names: Collection[str], compute: Callable[[str], Tensor], write: Callable[[str, Tensor], object] | None = None
    ) -> None:
        self._names, self._compute, self._write = dict.fromkeys(names), compute, write

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        with torch.no_grad():
            return self._compute(name)

    def write(self, name: str, out: Tensor) -> None:
        """Write a tensor into memory of its shape."""
        with torch.no_grad():
            if self._write is None:
                out.copy_(self._compute(name))
            else:
                self._write(name, out)

    @property
    def is_written(self) -> bool:
        """Whether `write` needs no memory for another tensor."""
        return self._write is not None

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass
class Perturbable:
    """A model and fixed batches; the model is in eval mode while it is measured.

    Args:
        model: its trainable floating-point parameters are perturbed. Adapters must be merged into it: the sharpness of LoRA
            factors changes under A → cA, B → B/c, which leaves every output as it is.
        loss: see LossFunction.
        batches: on the model's device; the same for all models that are compared.
        reference: parameter name → RMS of that tensor in the base, see `rms`; tensors with RMS 0 are not perturbed.
        seed: seed of the directions.
        model_hash, data_hash: identify model and data in the ledger.
        ledger: remembers evaluations; by default in memory.
        on_passes: called with the number of forward passes of a batch that were just made; a backward pass counts as two.
    """

    model: nn.Module
    loss: LossFunction
    batches: Sequence[Batch]
    reference: Mapping[str, float]
    seed: int = 0
    model_hash: str = "model"
    data_hash: str = "data"
    ledger: Ledger = field(default_factory=Ledger)
    on_passes: Callable[[float], None] = field(default=lambda passes: None, repr=False)
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
        """The parameters that are perturbed; tied tensors appear once."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad and p.is_floating_point()}

    @property
    def center(self) -> Weights:
        """θ₀, even while the model holds other weights."""
        return self.parameters if self._kept is None else self._kept

    @cached_property
    def is_small(self) -> bool:
        """Whether a direction, and a perturbed copy of the weights, are kept while they are in use: up to KEPT_BYTES each."""
        return sum(p.numel() * max(4, p.element_size()) for p in self.parameters.values()) <= KEPT_BYTES

    def evaluate(self, index: int) -> tuple[list[float], list[float]]:
        """Return the mean loss and the weight of each group of rows in one batch, at the current weights."""
        return self.evaluate_all([index])[0]

    def evaluate_all(self, indices: Sequence[int]) -> list[tuple[list[float], list[float]]]:
        """Return what `evaluate` does for several batches. The host waits for the device once."""
        losses: list[Tensor] = []
        weights: list[float | Sequence[float] | Tensor] = []
        with torch.inference_mode():
            for index in indices:
                loss, weight = self.loss(self.model, self.batches[index])
                losses.append(loss.reshape(-1))
                weights.append(weight)
                self.on_passes(1)
            found = _on_host(losses)
            known = iter(_on_host([weight.reshape(-1) for weight in weights if isinstance(weight, Tensor)]))
        plain = [next(known) if isinstance(w, Tensor) else [*w] if isinstance(w, Sequence) else [float(w)] for w in weights]
        return list(zip(found, plain, strict=True))

    def ledger_key(self, metric: str, radius: float, direction: int | None, batch: int) -> dict[str, Any]:
        """Return the ledger's key of one evaluation."""
        return {
            "model": self.model_hash, "data": self.data_hash, "metric": metric,
            "radius": radius, "direction": direction, "batch": batch,
        }  # fmt: skip

    def center_losses(self) -> Array:
        """Return the loss at θ₀ of every unit, that is every group of rows of every batch, (units,)."""
        return np.concatenate([self.center_row(batch)["loss"] for batch in range(len(self.batches))])

    def unit_weights(self) -> Array:
        """Return the weight of every unit, summing to one, (units,)."""
        found = np.concatenate([self.center_row(batch)["weight"] for batch in range(len(self.batches))])
        total: float = found.sum()
        return found / total

    def center_row(self, batch: int) -> dict[str, Any]:
        """Return `loss` and `weight` of every group of rows in one batch at θ₀."""

        def evaluate() -> dict[str, list[float]]:
            with self.evaluating():
                loss, weight = self.evaluate(batch)
            return {"loss": loss, "weight": weight}

        return self.ledger.ask(evaluate, **self.ledger_key("loss", 0.0, None, batch))

    def losses_at(
        self, set_weights: SetWeights, metric: str, radius: float, number: int | None, weights: Weights,
        *, model: str | None = None,
    ) -> Array:  # fmt: skip
        """Return the loss of every unit at other weights, (units,). One ledger row per batch.

        Args:
            set_weights: from `weight_setter`.
            metric, radius, number: the ledger's key.
            weights: the other weights.
            model: the key's model; by default this one.
        """

        def evaluate(batches: Sequence[int]) -> list[dict[str, list[float]]]:
            set_weights(weights)
            return [{"loss": loss} for loss, _ in self.evaluate_all(batches)]

        keys = [self.ledger_key(metric, radius, number, batch) for batch in range(len(self.batches))]
        if model is not None:
            keys = [{**key, "model": model} for key in keys]
        return np.concatenate([row["loss"] for row in self.ledger.ask_all(evaluate, keys)])

    # Perturbations.

    def direction(self, number: int, ball: Ball = "base") -> LazyTensors:
        """Return a Gaussian direction: for each tensor, the ball's unit times standard normals of the tensor's shape.

        Directions of half-precision models are drawn in float32, so that they equal those of the same model in float32.
        """
        units = self.units(ball)

        def draw(name: str) -> Tensor:
            return normals(self.seed, number, name, self.center[name]).mul_(units[name])

        return LazyTensors(units, cache(draw) if self.is_small else draw)

    def units(self, ball: Ball) -> Weights:
        """Return the unit of a perturbation by parameter name: a scalar (the base's RMS) or |θ₀|, of the tensor's shape."""
        if ball == "own":
            return LazyTensors(self.parameters, lambda name: self.center[name].detach().abs())
        sizes = {name: self.reference.get(name, 0.0) for name in self.parameters}
        return LazyTensors(
            [name for name, size in sizes.items() if size > 0],
            lambda name: torch.tensor(sizes[name], dtype=_drawn_dtype(self.center[name]), device=self.center[name].device),
        )

    def along(self, direction: Weights, factor: float) -> LazyTensors:
        """Return θ₀ + factor·direction, rounded to the weights' dtype."""

        def compute(name: str) -> Tensor:
            center = self.center[name]
            return torch.add(center, direction[name], alpha=factor).to(center.dtype)

        def write(name: str, out: Tensor) -> None:
            center = self.center[name]
            if _drawn_dtype(center) != out.dtype:  # rounded once, from the wider sum
                out.copy_(compute(name))
            elif isinstance(direction, LazyTensors) and direction.is_written:
                direction.write(name, out)
                torch.add(center, out, alpha=factor, out=out)
            else:
                torch.add(center, direction[name], alpha=factor, out=out)

        return LazyTensors(direction, compute, write)

    def realised(self, direction: Weights, factors: Sequence[float]) -> list[tuple[float, float]]:
        """Return what rounding leaves of factor·direction for several factors: norm relative to the intended one, and cosine.

        Raises:
            BadInput: the direction is zero.
        """
        weights = [self.along(direction, factor) for factor in factors]
        wanted, squares, products = 0.0, [0.0] * len(factors), [0.0] * len(factors)
        for name in direction:
            step = direction[name]
            wanted += inner(step, step)
            for n, moved in enumerate(weights):
                got = moved[name].to(step.dtype) - self.center[name].detach().to(step.dtype)
                squares[n] += inner(got, got)
                products[n] += inner(got, step)
        intended = math.sqrt(wanted)
        if not intended:
            raise BadInput("nothing to perturb", expected="trainable parameters that are not zero, in the reference either")
        return [
            (norm / (abs(factor) * intended), both / (norm * intended) * math.copysign(1, factor) if norm else 0.0)
            for factor, norm, both in zip(factors, map(math.sqrt, squares), products, strict=True)
        ]

    # Setting weights.

    @contextmanager
    def weight_setter(self, *, in_place: bool = False) -> Iterator[SetWeights]:
        """Yield a function that sets θ. At the end of the block, also after an exception, θ is θ₀ again.

        For forward passes stored weights are not touched: modules receive other tensors, all at once if the model is small
        (`is_small`), else each module its own while it runs. If that is not the same as changing the parameters (see
        `is_swappable`), and for gradients, parameters are changed in place and restored from a copy.

        Args:
            in_place: change the parameters themselves, as gradients with respect to them need. Costs a copy of them.

        Raises:
            EmomergeError: the SHA-256 of all weights changed.
        """
        swap = not in_place and self.is_swappable
        with self.guarded() as remember, self._swapping() if swap else self._copied() as set_weights:

            def remember_and_set(weights: Weights) -> None:
                remember()
                set_weights(weights)

            yield remember_and_set

    @contextmanager
    def stepper(self) -> Iterator[Step]:
        """Yield a function that steps from θ₀ along a direction: `weight_setter(in_place=True)` for gradients."""
        with self.weight_setter(in_place=True) as set_weights:
            yield lambda direction, factor: set_weights(self.along(direction, factor))

    @cached_property
    def is_swappable(self) -> bool:
        """Whether swapping tensors into running modules is the same as changing the parameters. Two forward passes, once.

        Modules that hold a weight twice fail this test, and in models that are not small fused layers and parents that read a
        child's weight (`nn.MultiheadAttention`) do. It flips one bit of each weight, which is undone without a copy.
        """
        with self.guarded() as remember:
            remember()
            try:
                self._flip()
                expected = self.evaluate(0)
            finally:
                self._flip()
            with self._swapping() as set_weights:
                set_weights(LazyTensors(self.parameters, lambda name: _flipped(self.parameters[name].detach())))
                return self.evaluate(0) == expected

    def _flip(self) -> None:
        for parameter in self.parameters.values():
            parameter.data.copy_(_flipped(parameter.detach()))

    def _swapping(self) -> AbstractContextManager[SetWeights]:
        return self._swapped() if self.is_small else self._swapped_by_module()

    @property
    def _slots(self) -> dict[nn.Module, list[tuple[str, str]]]:
        """Module → (attribute, parameter) of each parameter that it holds; to be read while the parameters are in place."""
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        return {
            module: [(leaf, names[id(p)]) for leaf, p in module._parameters.items() if id(p) in names]
            for module in self.model.modules()
        }

    @contextmanager
    def _swapped(self) -> Iterator[SetWeights]:
        """All modules hold other weights; the parameters themselves stay as they are."""
        places: dict[str, list[tuple[nn.Module, str]]] = {name: [] for name in self.parameters}
        for module, owned in self._slots.items():
            for leaf, name in owned:
                places[name].append((module, leaf))

        others: dict[str, Tensor] = {}  # written to again and again: new memory would cost as much as small models' passes

        @torch.no_grad()
        def set_weights(new: Weights) -> None:
            for name, holders in places.items():
                tensor: Tensor = self.parameters[name]
                if name in new:
                    if name not in others:
                        others[name] = torch.empty_like(tensor)
                    tensor = others[name]
                    _write(new, name, tensor)
                for module, leaf in holders:
                    module._parameters[leaf] = cast(nn.Parameter, tensor)

        try:
            yield set_weights
        finally:
            set_weights({})

    @contextmanager
    def _swapped_by_module(self) -> Iterator[SetWeights]:
        """Modules hold other weights while they run, so that of these one module's exist at a time."""
        slots = self._slots
        weights: Weights = {}

        def set_weights(new: Weights) -> None:
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
            yield set_weights
        finally:
            for handle in handles:
                handle.remove()
            for module in slots:
                leave(module)

    @contextmanager
    def _copied(self) -> Iterator[SetWeights]:
        """Parameters are changed in place and restored from a copy."""
        kept = self._kept = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

        @torch.no_grad()
        def set_weights(weights: Weights) -> None:
            for name, parameter in self.parameters.items():
                _write(weights if name in weights else kept, name, parameter.data)

        try:
            yield set_weights
        finally:
            set_weights({})
            self._kept = None

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Put all modules into eval mode within the block, and restore their modes afterwards."""
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training

    @contextmanager
    def guarded(self) -> Iterator[Callable[[], None]]:
        """Put all modules into eval mode within the block; raise an EmomergeError if the weights have changed afterwards.

        Yields:
            What is to be called before weights are changed. If it is not, as where all evaluations are known, there is nothing
            to compare, and no hash is computed.
        """
        before: list[str] = []

        def remember() -> None:
            if not before:
                before.append(self.sha256())

        with self.evaluating():
            try:
                yield remember
            finally:
                if before and self.sha256() != before[0]:
                    raise EmomergeError("the probe could not restore the model's weights: their SHA-256 changed")

    def sha256(self) -> str:
        """Return the SHA-256 of all weights, in the order of their names."""
        return hash_tensors(sorted(self.model.state_dict().items()))


def _write(weights: Weights, name: str, out: Tensor) -> None:
    """Write one of some weights into memory of its shape and dtype."""
    if isinstance(weights, LazyTensors):
        weights.write(name, out)
    else:
        out.copy_(weights[name])


def _on_host(tensors: Sequence[Tensor]) -> list[list[float]]:
    """Return the elements of flat tensors, copied from the device at once."""
    if not tensors:
        return []
    whole = torch.cat([*tensors]).cpu().double()
    return [part.tolist() for part in whole.split([len(tensor) for tensor in tensors])]


def normals(seed: int, number: int, name: str, like: Tensor) -> Tensor:
    """Return standard normals of a tensor's shape and device, from a generator seeded by (seed, number, name)."""
    generator = generator_of(seed, number, name, device=like.device)
    return torch.empty(like.shape, dtype=_drawn_dtype(like), device=like.device).normal_(generator=generator)


def _drawn_dtype(like: Tensor) -> torch.dtype:
    return torch.promote_types(like.dtype, torch.float32)


def _flipped(x: Tensor) -> Tensor:
    """Flip the third fraction bit of each number, a change by at most an eighth. Applied twice it is the identity, exactly."""
    integers, fraction = INTEGERS[x.dtype]
    return x.view(integers).bitwise_xor(1 << (fraction - 3)).view(x.dtype)


def _require_in_memory(name: str, parameter: Tensor) -> None:
    if parameter.is_meta:
        raise BadInput("the weights are not in memory", where=f"parameter {name}", fix="load the model without offloading")


def rms(model: nn.Module) -> dict[str, float]:
    """Return parameter name → root mean square; taken of the base, this sets the ball that all models of a probe share."""
    for name, parameter in model.named_parameters():
        _require_in_memory(name, parameter)
    return {name: math.sqrt(square_sum(p) / p.numel()) if p.numel() else 0.0 for name, p in model.named_parameters()}
