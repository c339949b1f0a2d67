"""Balanced samples of directions."""

import numpy as np
import pytest

from emomerge.probing.balance import balanced


def relatives(models, directions, seed, kinship=0.9):
    """Mean sharpness (models, 2 radii, directions) of models that mostly share which directions are steep."""
    rng = np.random.default_rng(seed)
    common = rng.gamma(4, 1, (2, directions))
    own = rng.gamma(4, 1, (models, 2, directions))
    sizes = rng.uniform(1e-4, 1e-1, (models, 1, 1))
    return sizes * (kinship * common + (1 - kinship) * own)


def off(values, sample):
    """How far the means over a sample are from those over all directions, relative, (models, radii)."""
    return np.abs(values[..., list(sample)].mean(-1) / values.mean(-1) - 1)


@pytest.mark.parametrize("directions, count", [(16, 4), (64, 16)])  # all samples are tried, and too many to be tried
def test_models_that_were_not_looked_at_profit_from_the_balance(directions, count):
    first, best = [], []
    for seed in range(10):
        values = relatives(12, directions, seed)
        sample = balanced(list(values[:3]), count)
        assert len(set(sample)) == count and list(sample) == sorted(sample)
        assert sample == balanced(list(values[:3]), count)
        first.append(off(values[3:], range(count)).mean())
        best.append(off(values[3:], sample).mean())
    assert np.mean(best) < 0.45 * np.mean(first)


def test_the_exact_sample_is_found_and_models_that_diverged_do_not_count():
    values = np.array([[1.0, 9.0, 2.0, 5.0, 8.0, 5.0], [3.0, 0.0, 7.0, 2.0, 9.0, 3.0]])  # the mean: 5 and 4
    diverged, constant = np.array([[np.nan, 1, 2, 3, 4, 5]]), np.ones((1, 6))
    expected = min(((a, b) for b in range(6) for a in range(b)), key=lambda s: (badness(values, s), s))
    assert balanced([values, diverged, constant], 2) == expected
    assert balanced([diverged, constant], 2) == (0, 1)


def badness(values, sample):
    spread = (values - values.mean(1, keepdims=True)) / values.std(1, keepdims=True)
    return float(np.square(spread[:, list(sample)].mean(1)).sum())


def test_few_directions_are_all_taken():
    assert balanced([np.ones((3, 4))], 4) == (0, 1, 2, 3)
    assert balanced([np.ones((3, 2))], 4) == (0, 1)
