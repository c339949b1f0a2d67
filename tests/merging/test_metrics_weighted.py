import math

import pytest
import torch

from emomerge.checkpoints import MemoryCheckpoint
from emomerge.errors import BadInput
from emomerge.merging import merge


def merged(losses, **options):
    """Merge one-hot runs, whose merge is therefore the weights; their held-out losses are known."""
    base = MemoryCheckpoint({"w": torch.zeros(len(losses))})
    runs = [MemoryCheckpoint({"w": row}) for row in torch.eye(len(losses))]
    names = [f"run {i}" for i in range(len(losses))]
    options = {"held_out_loss": lambda _: math.nan, "run_losses": losses, "names": names} | options
    return merge(base, runs, method="metrics-weighted", **options)


@pytest.mark.parametrize("penalty", [0.0, 1.0, 4.0, 30.0])
def test_weights_are_inverse_powers_of_the_losses(penalty):
    losses = [0.5, 2.0, 0.4]
    powers = [loss**-penalty for loss in losses]
    found = merged(losses, penalty=penalty)
    expected = [power / sum(powers) for power in powers]
    assert found.diagnostics()["params"]["shares"] == pytest.approx(expected)
    assert found["w"].tolist() == pytest.approx(expected, rel=1e-6)


def test_weights_do_not_depend_on_the_unit_and_no_penalty_is_too_large():
    assert merged([0.5, 2.0])["w"].tolist() == pytest.approx(merged([50.0, 200.0])["w"].tolist())
    assert merged([1e-3, 5e-3, 1e3], penalty=1000.0)["w"].tolist() == [1, 0, 0]
    assert merged([0.0, 1.0, 0.0])["w"].tolist() == [0.5, 0, 0.5]
    assert merged([0.0, 1.0], penalty=0.0)["w"].tolist() == [0.5, 0.5]


def test_losses_are_measured_once_if_they_are_not_known():
    seen = []

    def loss(checkpoint):
        seen.append(checkpoint["w"].tolist())
        return 1.0 + checkpoint["w"][0].item()

    found = merged([None, None], held_out_loss=loss, run_losses=None, penalty=1.0)
    assert found["w"].tolist() == pytest.approx([1 / 3, 2 / 3])
    assert seen == [[1, 0], [0, 1]]


def test_negative_losses_and_no_losses_are_refused():
    with pytest.raises(BadInput, match="needs losses of at least 0: run 1; found -0.5; use greedy-soup"):
        merged([1.0, -0.5])
    with pytest.raises(BadInput, match=r"^metrics-weighted is chosen by held-out loss.*--recipe"):
        merged([1.0, 2.0], held_out_loss=None)
