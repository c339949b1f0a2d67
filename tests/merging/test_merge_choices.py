"""What held-out loss decides: weights, scale, λ, the members of a soup. It is a quadratic with a known optimum."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emomerge.checkpoints import MemoryCheckpoint
from emomerge.errors import BadInput, EmomergeError
from emomerge.merging import merge, reference
from emomerge.merging.engine import lowest_place

D = 400


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Valley:
    """‖θ − θ*‖², with a count of how often it was asked."""

    def __init__(self, target):
        self.target = target
        self.calls = 0

    def __call__(self, checkpoint):
        self.calls += 1
        return float(((checkpoint["w"] - self.target).double() ** 2).sum())


@pytest.fixture
def base():
    return MemoryCheckpoint({"w": normal(0, D), "steps": torch.tensor(3)})


@pytest.fixture
def make_runs(base, exact_run):
    return lambda taus: [exact_run(base, {"w": tau, "steps": None}) for tau in taus]


@pytest.fixture
def taus():
    return normal(1, D) + 0.5 * normal(2, 4, D)


@pytest.mark.parametrize("best", [0.1, 0.6, 1.5])
def test_auto_scale_finds_the_optimum(base, make_runs, taus, best):
    loss = Valley(base["w"] + best * taus.mean(0))
    merged = merge(base, make_runs(taus), method="mean", scale="auto", held_out_loss=loss)
    assert merged.scale == best
    assert loss.calls <= 8
    torch.testing.assert_close(merged["w"], loss.target)
    assert merged["steps"] is base["steps"]
    report = merged.diagnostics()
    assert report["params"]["scale"] == best
    assert min(report["scale_losses"], key=report["scale_losses"].get) == f"{best:g}"


def test_of_equally_good_scales_the_smallest_is_taken(base, make_runs, taus):
    assert merge(base, make_runs(taus), method="mean", scale="auto", held_out_loss=lambda _: 1.0).scale == 0.1


def test_a_scale_without_a_loss_is_passed_over(base, make_runs, taus):
    losses = {0.1: math.nan, 0.2: 2.0, 0.3: 1.0, 0.4: 3.0}
    merged = merge(
        base, make_runs(taus), method="mean", scale="auto", held_out_loss=lambda tried: losses.get(tried.scale, math.inf)
    )
    assert merged.scale == 0.3
    assert merged.diagnostics()["scale_losses"]["0.1"] is None


@given(st.lists(st.integers(1, 9), max_size=20), st.lists(st.integers(1, 9), min_size=1, max_size=20), st.integers(1, 4))
def test_the_minimum_of_a_valley_is_found_by_few_measurements(down, up, coarse):
    fall, rise = [sum(down[i:]) for i in range(len(down))], [sum(up[:i]) for i in range(len(up))]
    values, asked = [*fall, *rise], set()

    def measure(place):
        asked.add(place)
        return values[place]

    assert lowest_place(measure, len(values), coarse) == values.index(min(values))
    assert len(asked) <= -(-len(values) // coarse) + 2 * coarse


def test_no_scale_with_a_loss_is_a_failure(base, make_runs, taus):
    with pytest.raises(EmomergeError, match="not finite at any scale"):
        merge(base, make_runs(taus), method="mean", scale="auto", held_out_loss=lambda _: math.nan)


def test_auto_weights_are_the_softmax_of_z_scored_losses(base, make_runs, taus):
    losses = [1.0, 2.0, 4.0, 5.0]
    z = [(x - 3) / math.sqrt(2.5) for x in losses]
    expected = [math.exp(-x) / sum(math.exp(-y) for y in z) for x in z]
    merged = merge(base, make_runs(taus), method="mean", weights="auto", run_losses=losses)
    assert merged.diagnostics()["params"]["weights"] == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(merged["w"], base["w"] + torch.tensor(expected) @ taus)


def test_auto_weights_of_equal_losses_are_equal(base, make_runs, taus):
    merged = merge(base, make_runs(taus), method="mean", weights="auto", run_losses=[2.0] * 4)
    assert torch.equal(merged["w"], merge(base, make_runs(taus), method="mean")["w"])


def test_tall_mask_chooses_weights_and_scale_where_it_can(base, make_runs, taus):
    loss = Valley(base["w"] + taus[2])
    report = merge(base, make_runs(taus), held_out_loss=loss).diagnostics()
    weights = report["params"]["weights"]
    assert weights[2] == max(weights) > 0.3
    assert sum(weights) == pytest.approx(1)
    assert len(report["scale_losses"]) <= 8
    assert report["params"]["k"] == 2
    assert report["params"]["lambda"] == 0.4
    assert loss.calls == 4 + len(report["scale_losses"])


def test_tall_mask_without_a_loss_is_plain(base, make_runs, taus):
    params = merge(base, make_runs(taus)).diagnostics()["params"]
    assert (params["weights"], params["scale"], params["lambdas"]) == ([0.25] * 4, 1.0, [0.4] * 4)


def test_what_is_given_is_not_chosen(base, make_runs, taus):
    loss = Valley(base["w"])
    params = merge(base, make_runs(taus), held_out_loss=loss, weights="equal", scale=1.0).diagnostics()["params"]
    assert (params["weights"], params["scale"]) == ([0.25] * 4, 1.0)
    assert loss.calls == 0


def test_known_run_losses_are_not_measured_again(base, make_runs, taus):
    loss = Valley(base["w"])
    merge(base, make_runs(taus), method="greedy-soup", held_out_loss=loss, run_losses=[1.0, 2.0, 3.0, 4.0])
    assert loss.calls == 3


@pytest.mark.parametrize("r", ["mean", "sum", "ties"])
def test_auto_lambda_takes_the_best_reconstruction_of_each_run(base, make_runs, taus, r):
    trimmed = reference.trim(taus, 0.2)
    vector = {
        "mean": reference.mean(taus, torch.ones(4)),
        "sum": reference.total(taus),
        "ties": reference.ties(trimmed, reference.elect(trimmed), "sum"),
    }[r]

    def masked(run, lambda_):
        return base["w"] + torch.where(taus[run].abs() > lambda_ * (vector - taus[run]).abs(), vector, 0)

    loss = Valley(masked(1, 0.3))
    expected = [min((0.2, 0.3, 0.4, 0.5, 0.6), key=lambda x: loss({"w": masked(run, x)})) for run in range(4)]
    assert expected[1] == 0.3
    merged = merge(base, make_runs(taus), reference=r, lambda_="auto", held_out_loss=loss, weights="equal", scale=1.0)
    assert merged.diagnostics()["params"]["lambdas"] == expected
    assert torch.equal(merged["w"], base["w"] + reference.tall_mask(taus, vector, expected, 2))


def test_greedy_soup_goes_on_after_a_run_that_does_not_help(base, make_runs):
    towards, off, far = torch.ones(D), normal(3, D), 2 * normal(4, D)
    taus = torch.stack([towards + 2 * off, towards - off, towards + 1.1 * far, towards - 1.5 * off])
    loss = Valley(base["w"] + towards)
    merged = merge(base, make_runs(taus), method="greedy-soup", held_out_loss=loss, names=["a", "b", "c", "d"])
    # In the order b, d, a, c: b alone; d is on the same side; a makes up for b; c is noise of its own.
    params = merged.diagnostics()["params"]
    assert params["members"] == ["b", "a"]
    torch.testing.assert_close(merged["w"], base["w"] + (taus[0] + taus[1]) / 2)


def test_greedy_soup_is_never_worse_than_the_best_run(base, make_runs, taus):
    loss = Valley(base["w"] + taus[3])
    merged = merge(base, make_runs(taus), method="greedy-soup", held_out_loss=loss)
    assert loss(merged) <= min(loss(run) for run in make_runs(taus))
    assert merged.diagnostics()["params"]["chosen"] == [3]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"method": "greedy-soup"}, "greedy-soup"),
        ({"method": "greedy-soup", "run_losses": [1.0] * 4}, "greedy-soup"),
        ({"method": "tall-mask", "lambda_": "auto"}, "lambda: auto"),
        ({"method": "mean", "weights": "auto"}, "weights: auto"),
        ({"method": "ties", "scale": "auto"}, "scale: auto"),
    ],
)
def test_a_choice_without_a_loss_asks_for_a_recipe(base, make_runs, taus, arguments, named):
    with pytest.raises(BadInput, match=rf"^{named} .*--recipe"):
        merge(base, make_runs(taus), **arguments)


def test_a_run_without_a_finite_loss_is_named(base, make_runs, taus):
    with pytest.raises(BadInput, match="run lost.*nan"):
        merge(base, make_runs(taus), run_losses=[1.0, math.nan, 1.0, 1.0], names=["a", "lost", "c", "d"])


def test_a_merge_of_one_run_is_no_worse_than_the_run(base, make_runs, taus):
    runs = make_runs(taus)
    best = runs[2]["w"]

    def loss(model):  # its optimum is a run; θ₀ + (θ − θ₀) differs from that run by rounding
        return 1.0 + Valley(best)(model) + 1e-9 * all(model is not run for run in runs)

    merged = merge(base, runs, method="greedy-soup", held_out_loss=loss)
    assert merged.diagnostics()["params"]["chosen"] == [2] and merged.diagnostics()["warnings"] == []


def test_a_merge_worse_than_its_best_run_says_so(base, make_runs, taus):
    names = ["a", "b", "c", "d"]
    loss = Valley(base["w"] + taus[2])
    report = merge(base, make_runs(taus), method="mean", scale="auto", held_out_loss=loss, names=names,
                   run_losses=[3.0, 2.0, 0.0, 1.0]).diagnostics()  # fmt: skip
    assert any("worse than 0 of run c" in warning for warning in report["warnings"])
