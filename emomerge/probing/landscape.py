"""The loss along lines through the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from emomerge.probing.perturb import Move, Perturbable
from emomerge.probing.sharpness import key, weights

ALPHAS: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


def alpha_curve(probe: Perturbable, base: Mapping[str, Tensor], alphas: Sequence[float] = ALPHAS) -> NDArray[np.float64]:
    """Loss at θ₀ + α·τ, from the base (α = 0) through the model (α = 1) and beyond.

    Args:
        probe: the model θ = θ₀ + τ.
        base: parameter name → tensor of the base θ₀, on the model's device.
        alphas: where to look.

    Returns:
        (alphas,), weighted mean losses in nats.
    """
    backwards = {name: base[name] - p.detach() for name, p in probe.parameters.items()}  # −τ, so that α = 1 is θ to the bit

    def evaluate(move: Move, alpha: float, batch: int) -> dict[str, list[float]]:
        move(backwards, 1 - alpha)
        return {"loss": probe.evaluate(batch)[0]}

    found = []
    with probe.moved() as move:
        for alpha in alphas:
            asked = [
                (partial(evaluate, move, alpha, b), key(probe, "curve", alpha, None, b)) for b in range(len(probe.batches))
            ]
            found.append(np.concatenate([probe.ledger.ask(ask, **place)["loss"] for ask, place in asked]))
    return np.array(found) @ weights(probe)
