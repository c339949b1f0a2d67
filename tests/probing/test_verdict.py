import numpy as np
import pytest

from emomerge.probing import verdict
from emomerge.results import Evidence


def noise(scale=1.0, seed=0, shape=(16, 4)):
    return scale * np.random.default_rng(seed).gamma(4.0, 0.25, shape)


WEIGHT = np.array([1.0, 1.0, 2.0, 1.0])


def ratio(merge, rival):
    return verdict.sharpness_ratio(merge, rival, WEIGHT, against="rival", what="gaussian")


def test_a_model_against_itself_differs_by_exactly_zero():
    a = [noise()]
    assert (ratio(a, a).estimate, ratio(a, a).low, ratio(a, a).high) == (0.0, 0.0, 0.0)
    assert ratio(a, a).sign == 0
    loss = verdict.loss_difference([WEIGHT], [WEIGHT], WEIGHT, against="rival", what="loss")
    assert (loss.estimate, loss.low, loss.high, loss.sign) == (0.0, 0.0, 0.0, 0)


def test_a_planted_difference_is_found_with_its_size_and_sign():
    flat, sharp = [noise(0.5)], [noise(1.0)]
    assert ratio(flat, sharp).estimate == pytest.approx(np.log(0.5))
    assert ratio(flat, sharp).sign == -1
    assert ratio(sharp, flat).sign == 1


def test_the_estimate_is_the_weighted_ratio_of_means():
    a, b = noise(seed=1), noise(seed=2)
    expected = np.log((a.mean(0) @ WEIGHT) / (b.mean(0) @ WEIGHT))
    assert ratio([a], [b]).estimate == pytest.approx(expected)


def test_no_difference_is_seldom_called_one():
    called = sum(ratio([noise(seed=s)], [noise(seed=1000 + s)]).sign != 0 for s in range(40))
    assert called <= 4


def test_sharpness_that_is_not_positive_opens_the_interval():
    below = ratio([noise() - 5], [noise()])  # a merge that is negative throughout lies below every ratio
    assert (below.estimate, below.low, below.high, below.sign) == (None, None, None, 0)
    around = noise() - noise().mean()  # its mean is zero: some draws are negative
    assert ratio([around], [noise()]).low is None
    assert ratio([around], [noise()]).sign == -1
    assert ratio([noise()], [around]).sign == 1
    assert ratio([around], [around]).sign == 0


def test_a_divergence_decides_nothing():
    diverged = noise()
    diverged[0, 0] = np.nan
    found = ratio([diverged], [noise()])
    assert (found.estimate, found.low, found.high, found.sign) == (None, None, None, 0)


def evidence(sign, against="best single run", what="gaussian"):
    return Evidence(
        against=against, what=what, scale="log-ratio", estimate=float(sign), low=float(sign) - 0.1, high=float(sign) + 0.1
    )


def flat(gaussian, hessian=(-1, 0), against="best single run"):
    return [evidence(sign, against) for sign in gaussian] + [
        evidence(sign, against, what) for sign, what in zip(hessian, verdict.HESSIAN, strict=False)
    ]


@pytest.mark.parametrize(
    ("gaussian", "hessian", "missing", "status"),
    [
        ([-1, -1, -1], [-1, -1], [], "flatter"),
        ([-1, -1, 0], [-1, 0], [], "flatter"),
        ([-1, -1, 1], [1, -1], [], "flatter"),  # one of λmax and trace will do
        ([-1, 0, 0], [-1, -1], [], "not shown"),
        ([-1, -1, -1], [0, 0], [], "not shown"),
        ([-1, -1, -1], [1, 0], [], "not shown"),
        ([-1, -1, -1], [1, 1], [], "refuted"),
        ([-1, -1, -1], [-1, -1], ["the loss-matched control"], "not shown"),
        ([-1, -1, -1], [], [], "not shown"),
        ([1, 1, -1], [-1, -1], [], "refuted"),
        ([1, 1, -1], [], ["the loss-matched control"], "refuted"),
        ([1, 0, -1], [0, 0], [], "not shown"),
        ([0, 0, 0], [1], [], "not shown"),  # the other of the two might be lower
    ],
)
def test_flatter_needs_two_of_three_radii_and_one_of_the_hessians_and_nothing_missing(gaussian, hessian, missing, status):
    found = verdict.judge_flatter(flat(gaussian, hessian), 3, missing)
    assert found.status == status
    assert all(name in found.note for name in missing)
    assert ("λmax and trace" in found.note) is (not hessian)


@pytest.mark.parametrize(("sign", "status"), [(-1, "flatter"), (0, "not shown"), (1, "refuted")])
@pytest.mark.parametrize("rival", ["best single run", "distance-matched", "loss-matched"])
def test_flatter_needs_every_rival(rival, sign, status):
    rivals = ["best single run", "distance-matched", "loss-matched"]
    found = [e for r in rivals for e in flat([sign if r == rival else -1] * 3, against=r)]
    assert verdict.judge_flatter(found, 3, []).status == status


def test_curvature_of_one_model_more_than_another_is_evidence_too():
    trace = verdict.sharpness_ratio([noise(0.5, shape=(32, 4))], [noise(shape=(32, 4))], WEIGHT, against="rival", what="trace")
    top = verdict.sharpness_ratio([noise(0.5, shape=(1, 4))], [noise(shape=(1, 4))], WEIGHT, against="rival", what="λmax")
    assert (trace.sign, top.sign) == (-1, -1)
    found = verdict.judge_flatter([*[evidence(-1, "rival")] * 3, trace, top], 3, [])
    assert found.status == "flatter"


def test_the_interval_of_a_few_seeds_is_students():
    """Of three seeds no resample is wider than they are; the t-interval of their mean has these ends."""
    losses = np.array([1.0, 2.0, 4.0])
    found = verdict.loss_difference([np.array([x]) for x in losses], [np.zeros(1)] * 3, np.ones(1), against="a", what="loss")
    half = 4.303 * losses.std(ddof=1) / np.sqrt(3)
    assert found.estimate == pytest.approx(losses.mean())
    assert found.high - found.low == pytest.approx(2 * half, rel=0.25)  # ten different resamples: a coarse quantile
    assert found.sign == 0
    assert verdict._widening([3, 16, 64]) == pytest.approx(2.69, abs=0.01)
    assert verdict._widening([1, 16, 64]) == verdict._widening([16]) == pytest.approx(1.123, abs=0.002)
    assert verdict._widening([1, 1, 1]) == 1.0


def test_better_needs_every_rival():
    assert verdict.judge_better([evidence(-1), evidence(-1, "plain mean")], []).status == "better"
    assert verdict.judge_better([evidence(-1), evidence(0, "plain mean")], []).status == "not shown"
    assert verdict.judge_better([evidence(-1), evidence(1, "plain mean")], []).status == "refuted"
    assert verdict.judge_better([], []).status == "not shown"


def overall(better, flatter, seeds=3):
    return verdict.overall("tall-mask", better, flatter, merge="tall-mask", best_single=["airy-0"] * seeds)


def test_the_sentence_says_what_was_found():
    yes, flatter = verdict.judge_better([evidence(-1)], []), verdict.judge_flatter(flat([-1] * 3), 3, [])
    no, open_ = verdict.judge_better([evidence(1)], []), verdict.judge_flatter([evidence(-1)] * 3, 3, [])
    assert overall(yes, flatter).status == "better and flatter"
    assert overall(yes, open_).status == "better"
    assert overall(no, flatter).status == "refuted"
    assert "is not better (it loses to best single run)" in overall(no, flatter).sentence
    assert "flatter in everything measured, which is not yet all that the claim needs" in overall(yes, open_).sentence
    assert any("not measured: λmax and trace of the Hessian" in c for c in overall(yes, open_).caveats)


def test_fewer_than_three_seeds_are_measurement_error_only():
    yes, flatter = verdict.judge_better([evidence(-1)], []), verdict.judge_flatter(flat([-1] * 3), 3, [])
    assert any("measurement error only" in c for c in overall(yes, flatter, seeds=1).caveats)
    assert not overall(yes, flatter, seeds=3).caveats
