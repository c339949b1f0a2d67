import pytest
import torch

from emomerge.checkpoints import MemoryCheckpoint
from emomerge.checkpoints.factors import Factors, Term
from emomerge.errors import BadInput
from emomerge.merging.vectors import TaskVectors
from emomerge.numerics.sums import run_sum, weighted_sum

SHAPE = (37, 53)
WEIGHTS = {0: 0.3, 2: -1.7, 1: 1.1}


class Adapted(MemoryCheckpoint):
    """A base with a change of `w` as factors, and the head replaced."""

    def __init__(self, base, seed, size):
        generator = torch.Generator().manual_seed(seed)
        a, b = (torch.randn(*shape, generator=generator) for shape in ((4, SHAPE[1]), (SHAPE[0], 4)))
        self.parts = Factors(SHAPE, (Term(size * a, b, 0.37),))
        head = torch.randn(5, generator=generator)
        super().__init__({"w": base["w"] + self.parts.dense(), "head": head, "still": base["still"]})

    def delta(self, name, base):
        return self.parts.dense() if name == "w" else super().delta(name, base)

    def factors(self, name, base):
        return self.parts if name == "w" else None


@pytest.fixture
def base():
    return MemoryCheckpoint({"w": torch.randn(*SHAPE), "head": torch.zeros(5), "still": torch.ones(3)})


def measured(base, sizes=(1.0, 1.0, 1.0), **options):
    """The tensors whose held-out loss is measured."""
    runs = [Adapted(base, seed, size) for seed, size in enumerate(sizes)]
    seen = []

    def loss(checkpoint):
        seen.append({name: checkpoint[name] for name in checkpoint})
        return 0.0

    vectors = TaskVectors(base, runs, labels=["a", "b", "c"], held_out_loss=loss)
    rule = options.pop("rule", lambda _, deltas: weighted_sum((d := deltas[list(WEIGHTS)]), d.new_tensor([*WEIGHTS.values()])))
    vectors.loss_of(rule, "a choice", **options)
    return seen[0]


def test_factors_are_summed_at_once_with_the_bits_of_their_sum(base, monkeypatch):
    expected = measured(base)
    rows = TaskVectors.rows
    monkeypatch.setattr(TaskVectors, "rows", lambda self, name: pytest.fail(name) if name == "w" else rows(self, name))
    found = measured(base, weights=WEIGHTS)
    assert all(found[name].equal(expected[name]) for name in expected) and not found["w"].equal(base["w"])


def test_a_mean_has_the_bits_of_the_mean(base):
    options = {"rule": lambda _, deltas: run_sum(deltas[run] for run in (2, 0, 1)) / 3}
    expected, found = measured(base, **options), measured(base, **options, weights=dict.fromkeys((2, 0, 1), 1.0), over=3)
    assert all(found[name].equal(expected[name]) for name in expected)


def test_factors_that_are_not_finite_are_refused_by_name(base):
    with pytest.raises(BadInput, match="w of run b"):
        measured(base, sizes=(1.0, float("nan"), 1.0), weights=WEIGHTS)
