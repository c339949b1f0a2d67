"""Hessian-vector products of a Perturbable: of the whole loss, and projections for every batch.

`finite-difference`, the default, computes Hv ≈ [∇L(θ + εv) − ∇L(θ − εv)]/2ε: two gradients, which need the memory of a training
step and work with fused attention, which has no double backward. One-sided, Hv ≈ [∇L(θ + εv) − ∇L(θ)]/ε, it is one gradient
besides ∇L(θ). For random v, ‖εv‖ is 2e-4·‖θ‖. Rounding adds an error of constant norm to a gradient, so that ε may shrink as
‖Hv‖ grows (`shorten`), and the error due to the third derivative with it. If two ε disagree, the larger is halved. `autograd`
is exact (double backward, attention in its math backend) and costs two to three times as much as central differences.

A network with kinks (ReLU) has no Hessian at them. Double backward ignores kinks; finite differences see those that a step
crosses, since the loss surface really is rough there. Two ε then disagree, which is reported.
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
from emomerge.probing.perturb import Perturbable, Step, normals
from emomerge.probing.registry import BACKWARD

Array: TypeAlias = NDArray[np.float64]
Method = Literal["finite-difference", "autograd"]

STEP = {torch.float32: 2e-4, torch.float64: 2e-6}
"""‖εv‖/‖θ‖ of a random v."""
AGREEMENT = 0.002
"""Two ε are small enough if their products differ by less than this, relatively."""
DOUBTFUL = 0.01
"""Relative difference above which a warning is given."""
DISAGREES = (
    f"Hessian products by finite differences at two ε differ by more than {DOUBTFUL:.0%}: the loss has kinks, as ReLU "
    "makes them, or bends too fast for float32; see `disagreement`, or take the products by autograd"
)
HALVINGS = 4
"""How often ε may be halved; for random vectors, rounding of float32 weights matters below 2e-4/2⁴."""


class Curvature:
    """The Hessian ∇²L of a model, L the weighted mean over its batches; created by `curvature`.

    Args:
        probe: the model.
        step_along: from `probe.stepper()`.
        hvp: how Hessian-vector products are computed.
        only: names of the parameters that the matrix is about; by default all that are perturbed.
    """

    def __init__(self, probe: Perturbable, step_along: Step, hvp: Method, only: Sequence[str] | None = None) -> None:
        self.probe, self._step_along, self.hvp = probe, step_along, hvp
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
        self._totals: dict[int, float] = {}
        """Batch → its weight."""
        self.disagreement: float | None = None
        """Relative difference of the products by two ε; None until they are compared, and for `autograd`."""

    def draw(self, purpose: str, number: int) -> Tensor:
        """Return a vector (size,) of standard normals, seeded by the probe's seed, `purpose`, number and parameter name."""
        return self.flat([normals(self.probe.seed, number, f"{purpose}/{name}", p) for name, p in self.parameters.items()])

    def views(self, vector: Tensor) -> dict[str, Tensor]:
        """Return the parts of a flat vector by parameter name, in the parameters' shapes."""
        parts = zip(self.parameters.items(), vector.split(self.sizes), strict=True)
        return {name: part.view(p.shape) for (name, p), part in parts}

    def flat(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return one vector (size,) of tensors in the parameters' order."""
        return torch.cat([t.detach().reshape(-1).to(self.device, self.dtype) for t in tensors])

    def sums(self, a: Tensor, b: Tensor) -> Tensor:
        """Return ⟨a, b⟩ restricted to each parameter, (parameters,) float64 on the CPU."""
        return torch.cat([dots([x], y).cpu() for x, y in zip(a.split(self.sizes), b.split(self.sizes), strict=True)])

    @property
    def weights(self) -> Array:
        """Weights of the batches, summing to one, (batches,); known after the first product."""
        return np.array(self._weights) / sum(self._weights)

    def product(self, vector: Tensor, against: Sequence[Tensor], *, one_sided: bool = False) -> tuple[Tensor, Array]:
        """Return H·v, and uᵀH_b·v for every batch b and each u in `against`.

        Cost, in gradients of all batches: 2; 1 for `one_sided` (and 1 the first time); `autograd`: one gradient and one
        double backward.

        Args:
            vector: v (size,).
            against: vectors u (size,).
            one_sided: compute [∇L(θ + εv) − ∇L(θ)]/ε. Its error ε/2·∇³L[v, v] makes an odd contribution to vᵀHv, so that a
                mean over random signs of v is not biased by it.

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
        """Set ε for the next vector of a Krylov space, as small as rounding allows.

        The rounding error of a gradient has the same norm δ for all v, so that the relative error δ/ε‖Hv‖ is that of a random
        v as long as ε‖Hv‖ is. Of the second vector only ‖Hv₁‖ ≤ ‖Hv₂‖ ≤ ‖H‖_F ≈ √n‖Hv₁‖ is known; the geometric mean is used.

        Args:
            lengths: ‖Hv‖ of the unit vectors so far, the first of them random.
        """
        expected = max(lengths[1:], default=lengths[0] * self.size**0.25)
        self.step = STEP[self.dtype] * (lengths[0] / expected if expected > lengths[0] else 1.0)

    def agreed(
        self, vector: Tensor, against: Sequence[Tensor], scale: float = 0.0, known: Tensor | None = None
    ) -> tuple[Tensor, Array]:
        """Return `product` with ε halved until ε and ε/2 agree, or until halving does not help any more.

        Cost: 2 to 5 products, or 1 where it is `known`; `autograd`: 1.

        Args:
            vector, against: see `product`.
            scale: differences are relative to ‖Hv‖, or to this if it is larger.
            known: Hv by another ε, (size,); saves the second product if it agrees.
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
        """Return ∇ of the mean loss of a batch at θ + factor·vector, (size,), and the weight of the batch."""
        self._step_along(self.views(vector), factor)
        with torch.enable_grad():
            loss, weight = self._loss(batch)
            gradients = torch.autograd.grad(loss, [*self.parameters.values()], materialize_grads=True)
        self.probe.on_passes(BACKWARD)
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
                self.probe.on_passes(2 * BACKWARD)
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
        if batch not in self._totals:  # copied from the device once
            self._totals[batch] = float(weight.cpu().double().sum() if isinstance(weight, Tensor) else np.sum(weight))
        total = self._totals[batch]
        return (loss * weights).sum() / total, total


@contextmanager
def curvature(probe: Perturbable, hvp: Method = "finite-difference", only: Sequence[str] | None = None) -> Iterator[Curvature]:
    """Yield the Hessian of a model. Afterwards, also after an exception, the weights are the same to the bit."""
    with probe.stepper() as step_along:
        yield Curvature(probe, step_along, hvp, only)
