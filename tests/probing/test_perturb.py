import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import emomerge
from emomerge.errors import BadInput, EmomergeError
from emomerge.numerics.sums import inner
from emomerge.probing import perturb, sharpness
from emomerge.probing.perturb import LazyTensors, Perturbable, rms


def loss(model, batch):
    return model(batch).square().mean(), len(batch)


BATCHES = [torch.linspace(-1, 1, 6).view(2, 3)]


def probe_of(model, seed=0, reference=None, batches=BATCHES, **options):
    return Perturbable(model, loss, batches, reference or rms(model), seed, **options)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(self.second(self.first(x)))


class Peeking(nn.Module):
    """A parent that reads its child's weight."""

    def __init__(self):
        super().__init__()
        self.child = nn.Linear(3, 3)

    def forward(self, x):
        return nn.functional.linear(x, self.child.weight)


class Recurrent(nn.Module):
    """`nn.LSTM` holds its weights in a second list, which it brings up to date in every forward pass."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 4)

    def forward(self, x):
        return self.lstm(x)[0]


class Attending(nn.Module):
    """`nn.MultiheadAttention` reads the weight of its `out_proj`."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(3, 1)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class Twice(nn.Module):
    """A module that is called by itself."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3))

    def forward(self, x, again=True):
        return self(x, again=False) @ self.weight if again else (x + 1) @ self.weight


@pytest.fixture(params=["at once", "by module"])
def swapping(request, monkeypatch):
    """How other weights are swapped in: all at once, or as in large models each module's while it runs."""
    if request.param == "by module":
        monkeypatch.setattr(perturb, "KEPT_BYTES", 0)
    return request.param


SWAPPABLE = {Tied: True, Peeking: False, Recurrent: True, Attending: False, Twice: False}
"""Whether it can be swapped by module; at once all of these can."""


@pytest.mark.parametrize("in_place", [False, True])
def test_weights_are_restored_to_the_bit_also_after_an_exception(in_place, swapping):
    model = Tied()
    model.norm.eval()
    probe = probe_of(model)
    before, state = probe.sha256(), {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(KeyError), probe.weight_setter(in_place=in_place) as place:
        place(probe.along(probe.direction(0), 0.3))
        untouched = all(torch.equal(p, state[name]) for name, p in probe.parameters.items())
        assert untouched is not in_place  # for forward passes no stored weight is touched
        assert not model.training
        raise KeyError
    assert probe.sha256() == before
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert model.second.weight is model.first.weight
    assert isinstance(model.first.weight, nn.Parameter)
    assert model.training
    assert not model.norm.training
    assert not model.first._forward_hooks
    assert not model.first._forward_pre_hooks


def test_an_exception_in_the_middle_of_a_forward_pass(swapping):
    class Failing(Tied):
        fails = False

        def forward(self, x):
            if self.fails:
                self.first(x)
                self.second.register_forward_hook(lambda *args: 1 / 0)
            return super().forward(x)

    model = Failing()
    probe = probe_of(model)
    before = probe.sha256()
    assert probe.is_swappable
    model.fails = True
    with pytest.raises(ZeroDivisionError):
        sharpness.gaussian(probe, directions=1)
    assert probe.sha256() == before
    assert model.first.weight is model.second.weight is probe.parameters["first.weight"]


def test_nothing_is_hashed_where_all_evaluations_are_known(monkeypatch):
    probe = probe_of(Tied())
    found = sharpness.gaussian(probe, directions=2)
    monkeypatch.setattr(type(probe), "sha256", lambda self: 1 / 0)
    again = sharpness.gaussian(probe, directions=2)
    assert np.array_equal(again.values, found.values)
    with pytest.raises(ZeroDivisionError):
        sharpness.gaussian(probe, directions=3)


def test_a_change_of_the_weights_behind_the_probes_back_is_noticed():
    model = Tied()
    with pytest.raises(EmomergeError, match="could not restore"), probe_of(model).weight_setter() as set_weights:
        set_weights({})
        model.norm.running_mean.add_(1)


@pytest.mark.parametrize("kind", SWAPPABLE)
def test_swapped_weights_give_what_a_moved_clone_gives(kind, swapping):
    torch.manual_seed(0)
    model = kind()
    probe, clone = probe_of(model), copy.deepcopy(model).eval()
    assert probe.is_swappable is (SWAPPABLE[kind] or swapping == "at once")
    there = dict(probe.along(probe.direction(5), 0.3))
    clone.load_state_dict(there, strict=False)
    with probe.weight_setter() as place:
        place(there)
        assert probe.evaluate(0) == probe_of(clone).evaluate(0)
        place({})
        assert probe.evaluate(0) == probe_of(model).evaluate(0)


def test_the_self_test_sees_a_weight_that_is_held_twice(swapping):
    class Holding(Peeking):
        def forward(self, x):
            return nn.functional.linear(self.child(x), self.held)

    model = Holding()
    model.held = model.child.weight.detach()  # a second view of the same memory, which no swap of parameters reaches
    assert not probe_of(model).is_swappable


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_flipping_is_its_own_inverse(dtype):
    x = torch.randn(1000).to(dtype)
    flipped = perturb._flipped(x)
    assert torch.equal(perturb._flipped(flipped), x)
    change = ((flipped - x) / x).abs()
    assert change.min() >= 1 / 17
    assert change.max() <= 1 / 8


def test_large_directions_are_drawn_again_and_are_the_same(monkeypatch):
    model = Tied()
    kept = sharpness.gaussian(probe_of(model), directions=2).values
    monkeypatch.setattr(perturb, "KEPT_BYTES", 0)
    assert (sharpness.gaussian(probe_of(model), directions=2).values == kept).all()


def test_several_batches_are_evaluated_as_one_by_one_and_passes_are_counted():
    batches, counted = [torch.rand(rows, 3) for rows in (5, 2, 4)], []

    def grouped(model, batch):  # in groups of two rows; the weights are a tensor, a list or a number
        losses = torch.stack([rows.square().mean() for rows in model(batch).split(2)])
        weights = torch.tensor([float(len(rows)) for rows in batch.split(2)])
        return losses, {5: weights, 4: weights.tolist(), 2: float(weights[0])}[len(batch)]

    model = Tied().eval()
    probe = Perturbable(model, grouped, batches, rms(model), on_passes=counted.append)
    found = probe.evaluate_all([2, 0, 1])
    assert found == [probe.evaluate(index) for index in (2, 0, 1)]
    assert [weights for _, weights in found] == [[2.0, 2.0], [2.0, 2.0, 1.0], [2.0]]
    assert sum(counted) == 6


def test_gradients_are_those_at_the_moved_weights():
    model = nn.Linear(3, 1, bias=False)
    probe = probe_of(model)
    with probe.stepper() as move:
        move({"weight": torch.ones(1, 3)}, 2.0)
        moved = probe.parameters["weight"].detach().clone()
        found = torch.autograd.grad(loss(model, probe.batches[0])[0], model.weight)[0]
    x = probe.batches[0]
    torch.testing.assert_close(found, 2 * (x @ moved.T).T @ x / 2)


def test_a_direction_depends_on_seed_number_and_name_but_not_on_the_weights():
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    scale = rms(a)
    first, second = probe_of(a, 7, scale).direction(3), probe_of(b, 7, scale).direction(3)
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert not torch.equal(first["weight"], probe_of(a, 8, scale).direction(3)["weight"])
    assert not torch.equal(first["weight"], probe_of(a, 7, scale).direction(4)["weight"])
    assert set(probe_of(a, 7, scale).direction(3)) == {"weight", "bias"}
    with pytest.raises(KeyError):
        first["wait"]


def test_directions_have_the_size_of_the_base():
    model = nn.Linear(300, 300)
    with torch.no_grad():
        model.weight.normal_().mul_(0.02)
        model.bias.zero_()
    drawn = probe_of(model).direction(0)
    assert drawn["weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert "bias" not in drawn  # RMS 0: a new head's bias is not moved


def test_the_own_ball_scales_each_weight_and_keeps_zeros():
    model = nn.Linear(4, 4)
    with torch.no_grad():
        model.weight[0] = 0
        model.bias.zero_()
    drawn, normal = probe_of(model).direction(0, "own"), perturb.normals(0, 0, "weight", model.weight)
    assert torch.equal(drawn["weight"], normal * model.weight.detach().abs())
    assert not drawn["weight"][0].any()
    assert not drawn["bias"].any()


def test_the_own_ball_is_that_of_the_center_while_weights_are_moved():
    probe = probe_of(Peeking())
    expected = probe.direction(0, "own")["child.weight"]
    with probe.weight_setter() as place:
        place(probe.along(probe.direction(0), 10.0))
        assert torch.equal(probe.direction(0, "own")["child.weight"], expected)


def test_tied_and_frozen_parameters():
    model = Tied()
    model.first.bias.requires_grad_(False)
    assert set(probe_of(model).parameters) == {"first.weight", "second.bias", "norm.weight", "norm.bias"}


def test_factors_of_an_adapter_are_refused_by_name():
    model = nn.Sequential()
    model.lora_A = nn.Linear(2, 2)
    with pytest.raises(BadInput, match=r"depends on how they are scaled.*0\.lora_A\.weight; merge the adapter"):
        probe_of(nn.Sequential(model), reference={"x": 1.0})


def test_weights_that_are_elsewhere_are_refused_by_name():
    with pytest.raises(BadInput, match="parameter weight; load the model without offloading"):
        probe_of(nn.Linear(2, 2, device="meta"), reference={"x": 1.0})


def test_a_model_that_accelerate_has_placed_is_measured_as_any_other(tmp_path):
    from accelerate import dispatch_model

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    batches = [torch.randn(5, 3)]

    def found(model):
        return emomerge.probe(model, lambda m, x: (m(x).square().mean(), 1.0), batches, ["gaussian", "hessian"])

    plain, placed = found(model), {"0": "cpu", "1": "cpu", "2": "cpu"}
    assert found(dispatch_model(copy.deepcopy(model), placed, main_device="cpu", force_hooks=True)) == plain
    placed["2"] = "disk"
    with pytest.raises(BadInput, match=r"not in memory: parameter 2\.weight; load the model without offloading"):
        found(dispatch_model(model, placed, main_device="cpu", offload_dir=tmp_path, force_hooks=True))


def test_what_cannot_be_perturbed_is_refused_by_name():
    small = nn.Linear(2, 2).to(torch.float8_e4m3fn)
    with pytest.raises(BadInput, match=r"parameter weight; .*; found torch\.float8_e4m3fn; load the model in float32"):
        probe_of(small, reference={"x": 1.0})
    with pytest.raises(BadInput, match="nothing to perturb"):
        sharpness.gaussian(probe_of(nn.Linear(3, 3), reference={"other": 1.0}), directions=1)


@pytest.fixture
def half():
    torch.manual_seed(0)
    return nn.Linear(200, 200).to(torch.bfloat16)


@pytest.mark.parametrize(("radius", "cosine", "expected"), [(0.001, 0.6, 0.75), (0.3, 1.0, 1.0)])
def test_what_bfloat16_leaves_of_a_radius(half, radius, cosine, expected):
    probe = probe_of(half)
    norm, found = probe.realised(probe.direction(0), [radius, -radius])[0]
    assert found == pytest.approx(cosine, abs=0.1)
    assert norm == pytest.approx(expected, rel=0.05)
    backwards, same = probe.realised(probe.direction(0), [-radius])[0]
    assert (backwards, same) == (pytest.approx(norm, rel=0.01), pytest.approx(found, abs=0.01))


def test_a_radius_that_the_dtype_cannot_hold_is_refused_and_a_larger_one_is_not(half):
    batches = [torch.ones(2, 200, dtype=torch.bfloat16)]
    with pytest.raises(BadInput, match=r"below what the weights' dtype resolves: radius 0\.001 in bfloat16; .* float32"):
        sharpness.gaussian(probe_of(half, batches=batches), [0.001, 0.1], directions=1)
    found = sharpness.gaussian(probe_of(half, batches=batches), [0.1], directions=1).summary["0.1"]
    assert found["realised"]["cosine"] > 0.99
    with pytest.raises(BadInput, match="radius 1e-09 in float32"):
        sharpness.gaussian(probe_of(nn.Linear(3, 3)), [1e-9], directions=1)


def test_a_direction_in_half_precision_is_that_in_single(half):
    single = probe_of(copy.deepcopy(half).float()).direction(0)["weight"]
    assert torch.equal(probe_of(half).direction(0)["weight"], single)


@pytest.mark.parametrize("threads", [1, 2])
def test_sums_are_exact_enough_and_the_same_for_any_thread_count(threads):
    x = torch.randn(3_000_001, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = inner(x, x + 1)
    finally:
        torch.set_num_threads(before)
    assert found == inner(x, x + 1)
    assert found == pytest.approx(math.fsum((x.double() * (x + 1).double()).tolist()), rel=1e-14)


def test_lazy_tensors_are_computed_when_they_are_asked_for():
    asked = []
    lazy = LazyTensors(["a", "b"], lambda name: asked.append(name) or torch.ones(1))
    assert len(lazy) == 2
    assert "a" in lazy
    assert not asked
    assert lazy["b"] == 1
    assert asked == ["b"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_weights_written_into_other_memory_have_the_bits_of_those_returned(dtype):
    torch.manual_seed(0)
    model = nn.Linear(40, 30).to(dtype)
    probe = Perturbable(model, lambda m, x: (m(x).mean(), 1.0), [torch.ones(1, 40, dtype=dtype)], rms(model))
    drawn = probe.direction(3)
    wide = torch.promote_types(dtype, torch.float32)
    written = LazyTensors(
        probe.parameters,
        lambda name: probe.center[name].detach().to(wide) * 3,
        lambda name, out: torch.mul(probe.center[name].detach().to(wide), 3, out=out),
    )
    for direction in (drawn, written, dict(drawn)):
        moved = probe.along(direction, 0.37)
        for name, expected in moved.items():
            out = torch.full_like(expected, torch.nan)
            moved.write(name, out)
            assert out.equal(expected) and out.dtype == dtype
