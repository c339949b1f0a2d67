"""Hessian-vector products of a Perturbable: of the whole loss, and projected for every batch.

`finite-difference`, the default, takes Hv ≈ [∇L(θ + εv) − ∇L(θ − εv)]/2ε: two gradients, in the memory of a training step, and
through fused attention, which has no double backward; or one gradient beside ∇L(θ), Hv ≈ [∇L(θ + εv) − ∇L(θ)]/ε. For random v
‖εv‖ is 2e-4·‖θ‖. Rounding adds an error of fixed length to a gradient, so that ε may shrink as ‖Hv‖ grows (`shorten`), and
with it what the third derivative adds. Where two ε disagree, the larger is halved. `autograd` is exact (double backward,
attention computed by its formula) and costs two to three times as much as central differences.

A network with kinks (ReLU) has no Hessian at them. Double backward ignores them; finite differences see those that a step
crosses, as a rough loss surface really has them, and two ε then disagree, which is reported.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from emomerge.errors import BadInput
from emomerge.probing.hessian.vectors import dots, norm
from emomerge.probing.perturb import Move, Perturbable, normals

Array: TypeAlias = NDArray[np.float64]
Method = Literal["finite-difference", "autograd"]

STEP = {torch.float32: 2e-4, torch.float64: 2e-6}
"""‖εv‖/‖θ‖ of a random v."""
AGREEMENT = 0.002
"""Relative difference of the products by two ε at which both are small enough."""
DOUBTFUL = 0.01
"""Relative difference that is warned of."""
DISAGREES = (
    f"Hessian products by finite differences at two ε differ by more than {DOUBTFUL:.0%}: the loss has kinks, as ReLU "
    "makes them, or bends too fast for float32; see `disagreement`, or take the products by autograd"
)
HALVINGS = 4
"""How often ε may be halved; below 2e-4/2⁴ of random vectors the rounding of float32 weights is felt."""


class Curvature:
    """∇²L of a model, L the weighted mean over its batches; made by `curvature`.

    Args:
        probe: the model.
        move: of `probe.moved()`.
        hvp: how products are taken.
        only: names of the parameters that make up the matrix; by default all that are perturbed.
    """

    def __init__(self, probe: Perturbable, move: Move, hvp: Method, only: Sequence[str] | None = None) -> None:
        self.probe, self._move, self.hvp = probe, move, hvp
        self.parameters = {name: p for name, p in probe.parameters.items() if only is None or name in only}
        if not self.parameters:
            raise BadInput("the Hessian has no parameters", expected="trainable floating parameters", found="none")
        for name, parameter in self.parameters.items():
            if parameter.dtype not in STEP:
                raise BadInput(
                    "differences of gradients do not survive this dtype", where=f"parameter {name}",
                    expected="float32 or float64", found=parameter.dtype, fix="load the model in float32",
                )  # fmt: skip
        first = next(iter(self.parameters.values()))
        self.device, self.dtype = first.device, first.dtype
        self.sizes = [p.numel() for p in self.parameters.values()]
        self.size = sum(self.sizes)
        whole = torch.cat([p.detach().reshape(-1).to(self.device) for p in probe.parameters.values()])
        self._norm = norm(whole) or 1.0
        self.step = STEP[self.dtype]
        self.disagreement: float | None = None
        """How far the products by two ε differ, relative to their length; None until compared, and for `autograd`."""

    def draw(self, what: str, number: int) -> Tensor:
        """A vector (size,) of standard normals, seeded by the probe's seed, `what`, number and parameter name."""
        return self.flat([normals(self.probe.seed, number, f"{what}/{name}", p) for name, p in self.parameters.items()])

    def views(self, vector: Tensor) -> dict[str, Tensor]:
        """The parts of a flat vector by parameter name, in the parameters' shapes."""
        parts = zip(self.parameters.items(), vector.split(self.sizes), strict=True)
        return {name: part.view(p.shape) for (name, p), part in parts}

    def flat(self, tensors: Sequence[Tensor]) -> Tensor:
        """One vector (size,) of tensors in the parameters' order."""
        return torch.cat([t.detach().reshape(-1).to(self.device, self.dtype) for t in tensors])

    def sums(self, a: Tensor, b: Tensor) -> Tensor:
        """⟨a, b⟩ of each parameter's part, (parameters,) float64 on the CPU."""
        return torch.cat([dots([x], y).cpu() for x, y in zip(a.split(self.sizes), b.split(self.sizes), strict=True)])

    @property
    def weights(self) -> Array:
        """Weight of every batch, summing to one, (batches,); known after the first product."""
        return np.array(self._weights) / sum(self._weights)

    def product(self, vector: Tensor, against: Sequence[Tensor], *, one_sided: bool = False) -> tuple[Tensor, Array]:
        """H·v, and uᵀH_b·v for every batch b and each u of `against`.

        Cost, in gradients of all batches: 2; 1 for `one_sided` (and 1 the first time); `autograd`: one gradient and one
        double backward.

        Args:
            vector: v (size,).
            against: vectors u (size,).
            one_sided: take [∇L(θ + εv) − ∇L(θ)]/ε: in error by ε/2·∇³L[v, v], which is odd in v, so that the mean over
                random signs of v has no bias from it.

        Returns:
            (size,) and (batches, len(against)).
        """
        total = torch.zeros_like(vector)
        units, self._weights = [], []
        epsilon = self.step * self._norm / (norm(vector) or 1.0)
        for batch in range(len(self.probe.batches)):
            if self.hvp == "autograd":
                part, weight = self._double_backward(batch, vector)
            elif one_sided:
                center = self._centers[batch]
                part, weight = self._gradient(batch, vector, epsilon)
                part.sub_(center).div_(epsilon)
            else:
                part, weight = self._gradient(batch, vector, epsilon)
                part.sub_(self._gradient(batch, vector, -epsilon)[0]).div_(2 * epsilon)
            units.append(dots(against, part).tolist())
            self._weights.append(weight)
            total.add_(part, alpha=weight)
        return total.div_(sum(self._weights)), np.array(units)

    def shorten(self, lengths: Sequence[float]) -> None:
        """ε for the next vector of a Krylov space, as short as rounding allows.

        A gradient's rounding error has one length δ for all v, so that δ/ε‖Hv‖ stays what it is for a random v if ε‖Hv‖ does.
        Of the second vector only ‖Hv₁‖ ≤ ‖Hv₂‖ ≤ ‖H‖_F ≈ √n‖Hv₁‖ is known, and their geometric mean is taken.

        Args:
            lengths: ‖Hv‖ of the unit vectors so far, the first of them random.
        """
        expected = max(lengths[1:], default=lengths[0] * self.size**0.25)
        self.step = STEP[self.dtype] * (lengths[0] / expected if expected > lengths[0] else 1.0)

    def agreed(
        self, vector: Tensor, against: Sequence[Tensor], scale: float = 0.0, known: Tensor | None = None
    ) -> tuple[Tensor, Array]:
        """As `product`, with ε halved from its present size until ε and ε/2 agree, or until that helps no longer.

        Cost: 2 to 5 products, or 1 where it is `known`; `autograd`: 1.

        Args:
            vector, against: see `product`.
            scale: the difference is relative to ‖Hv‖, or to this where it is larger.
            known: Hv by another ε (size,), which saves the second product if it agrees.
        """
        best = self.product(vector, against)
        if self.hvp == "autograd":
            return best

        def difference(found: Tensor, other: Tensor) -> float:
            length = max(norm(found), scale)
            return norm(found - other) / length if length else 0.0

        differs = math.inf if known is None else difference(best[0], known)
        if differs > AGREEMENT:
            differs = math.inf
            for _ in range(HALVINGS):
                self.step /= 2
                found = self.product(vector, against)
                now = difference(found[0], best[0])
                if now >= differs:
                    self.step *= 2  # rounding or kinks: a smaller step is no better
                    break
                best, differs = found, now
                if not now > AGREEMENT:
                    break
        self.disagreement = max(self.disagreement or 0.0, differs)
        if self.disagreement > DOUBTFUL:
            warnings.warn(DISAGREES, stacklevel=2)
        return best

    @cached_property
    def _centers(self) -> list[Tensor]:
        nowhere = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        return [self._gradient(batch, nowhere, 0.0)[0] for batch in range(len(self.probe.batches))]

    def _gradient(self, batch: int, vector: Tensor, factor: float) -> tuple[Tensor, float]:
        """∇ of one batch's mean loss at θ + factor·vector, (size,), and the batch's weight."""
        self._move(self.views(vector), factor)
        with torch.enable_grad():
            loss, weight = self._loss(batch)
            gradients = torch.autograd.grad(loss, [*self.parameters.values()], materialize_grads=True)
        return self.flat(gradients), weight

    def _double_backward(self, batch: int, vector: Tensor) -> tuple[Tensor, float]:
        parameters = [*self.parameters.values()]
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            loss, weight = self._loss(batch)
            gradients = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
            curved = [(g, v) for g, v in zip(gradients, self.views(vector).values(), strict=True) if g.requires_grad]
            if not curved:
                return torch.zeros_like(vector), weight
            outputs, directions = zip(*curved, strict=True)
            try:
                products = torch.autograd.grad(outputs, parameters, directions, materialize_grads=True)
            except RuntimeError as error:
                if not re.search("derivative|differentiate", str(error)):
                    raise
                raise BadInput(
                    "the model has no double backward", found=error, fix="take Hessian products by finite differences"
                ) from None
        return self.flat(products), weight

    def _loss(self, batch: int) -> tuple[Tensor, float]:
        loss, weight = self.probe.loss(self.probe.model, self.probe.batches[batch])
        weights = torch.as_tensor(weight, dtype=loss.dtype, device=loss.device)
        total = float(np.sum(weight))
        return (loss * weights).sum() / total, total


@contextmanager
def curvature(probe: Perturbable, hvp: Method = "finite-difference", only: Sequence[str] | None = None) -> Iterator[Curvature]:
    """The Hessian of a model; its weights are the same to the bit afterwards, also after an exception."""
    with probe.moved() as move:
        yield Curvature(probe, move, hvp, only)
