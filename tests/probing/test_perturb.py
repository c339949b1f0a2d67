import pytest
import torch
from torch import nn

from emomerge.errors import BadInput
from emomerge.probing.perturb import Perturbable, rms


def probe_of(model, seed=0, reference=None):
    return Perturbable(model, lambda m, b: (m(b).square().mean(), len(b)), [torch.ones(2, 3)], reference or rms(model), seed)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(self.second(self.first(x)))


def test_weights_are_restored_to_the_bit_also_after_an_exception():
    model = Tied()
    probe = probe_of(model)
    before, state = probe.sha256(), {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(KeyError), probe.moved() as move:
        move(probe.direction(0), 0.3)
        assert probe.sha256() != before
        assert not model.training
        raise KeyError
    assert probe.sha256() == before
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert model.training


def test_a_direction_depends_on_seed_number_and_name_but_not_on_the_weights():
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    scale = rms(a)
    first, second = probe_of(a, 7, scale).direction(3), probe_of(b, 7, scale).direction(3)
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert not torch.equal(first["weight"], probe_of(a, 8, scale).direction(3)["weight"])
    assert not torch.equal(first["weight"], probe_of(a, 7, scale).direction(4)["weight"])


def test_directions_have_the_size_of_the_base():
    model = nn.Linear(300, 300)
    with torch.no_grad():
        model.weight.normal_().mul_(0.02)
        model.bias.zero_()
    drawn = probe_of(model).direction(0)
    assert drawn["weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert "bias" not in drawn  # RMS 0: a new head's bias is not moved


def test_tied_and_frozen_parameters():
    model = Tied()
    model.first.bias.requires_grad_(False)
    assert set(probe_of(model).parameters) == {"first.weight", "second.bias", "norm.weight", "norm.bias"}


def test_half_precision_is_refused_by_name():
    with pytest.raises(BadInput, match=r"weight; expected float32; found torch\.bfloat16"):
        probe_of(nn.Linear(2, 2).to(torch.bfloat16), reference={})
