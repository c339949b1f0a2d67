"""Which directions to measure the models in that a verdict does not compare: few, and none that would mislead.

Sharpness differs much more between directions than between similar models, so that the mean over any four of sixteen
directions may be off by a third. Directions in which one model is flat are, however, flat for its relatives. Once some models
have been measured in all directions, the others are therefore measured in a balanced sample: the directions over which the
means of the former come nearest to their means over all (balanced sampling; Royall and Herson 1973, “Robust estimation in
finite populations I”).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np

from emomerge.probing.registry import Array

TRIED = 20_000
"""Up to so many samples, all are tried; beyond that directions are exchanged while that helps."""


def balanced(means: Sequence[Array], count: int) -> tuple[int, ...]:
    """Return the positions of a balanced sample of directions, ascending. Depends on nothing but the arguments.

    Args:
        means: for each model that was measured in all directions its mean losses (radii, directions) over the data.
        count: number of directions in the sample.
    """
    values = np.concatenate([np.asarray(of_model) for of_model in means])
    total = values.shape[1]
    if count >= total:
        return tuple(range(total))
    known = np.isfinite(values).all(axis=1) & (values.max(axis=1) > values.min(axis=1))
    spread = values[known]  # a model that diverged somewhere says nothing about the others
    spread = (spread - spread.mean(axis=1, keepdims=True)) / spread.std(axis=1, keepdims=True)

    def unbalance(samples: Sequence[Sequence[int]]) -> Array:
        found: Array = np.square(spread[:, np.array(samples)].mean(axis=2)).sum(axis=0)
        return found

    if math.comb(total, count) <= TRIED:
        every = [*combinations(range(total), count)]
        return every[int(unbalance(every).argmin())]
    chosen = [*range(count)]
    while True:
        others = [d for d in range(total) if d not in chosen]
        samples = [[*chosen[:i], d, *chosen[i + 1 :]] for i in range(count) for d in others]
        found = unbalance(samples)
        if not found.min() < unbalance([chosen])[0] * (1 - 1e-9):
            return tuple(sorted(chosen))
        chosen = samples[int(found.argmin())]
