import numpy as np
import pytest

from emomerge.probing import verdict
from emomerge.probing.verdict import Evidence


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
    assert called <= 6  # 5 % nominal; small samples of a percentile bootstrap exceed it a little


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
    return Evidence(against, what, "log-ratio", float(sign), float(sign) - 0.1, float(sign) + 0.1)


@pytest.mark.parametrize(
    ("signs", "missing", "status"),
    [
        ([-1, -1, -1], [], "flatter"),
        ([-1, -1, 0], [], "flatter"),
        ([-1, 0, 0], [], "not shown"),
        ([-1, -1, -1], ["the Hessian"], "not shown"),
        ([1, 1, -1], [], "refuted"),
        ([1, 1, -1], ["the Hessian"], "refuted"),
        ([1, 0, -1], [], "not shown"),
    ],
)
def test_flatter_needs_two_of_three_radii_and_nothing_missing(signs, missing, status):
    found = verdict.judge_flatter([evidence(s) for s in signs], 3, missing)
    assert found["status"] == status
    assert bool(found["note"]) == bool(missing)


def test_flatter_needs_every_rival():
    both = [evidence(-1, "a")] * 3 + [evidence(0, "b")] * 3
    assert verdict.judge_flatter(both, 3, [])["status"] == "not shown"
    both = [evidence(-1, "a")] * 3 + [evidence(1, "b")] * 3
    assert verdict.judge_flatter(both, 3, [])["status"] == "refuted"


def test_better_needs_every_rival():
    assert verdict.judge_better([evidence(-1), evidence(-1, "plain mean")], [])["status"] == "better"
    assert verdict.judge_better([evidence(-1), evidence(0, "plain mean")], [])["status"] == "not shown"
    assert verdict.judge_better([evidence(-1), evidence(1, "plain mean")], [])["status"] == "refuted"
    assert verdict.judge_better([], [])["status"] == "not shown"


def overall(better, flatter, seeds=3):
    return verdict.overall("tall-mask", better, flatter, seeds)


def test_the_sentence_says_what_was_found():
    yes, flat = verdict.judge_better([evidence(-1)], []), verdict.judge_flatter([evidence(-1)] * 3, 3, [])
    no, open_ = verdict.judge_better([evidence(1)], []), verdict.judge_flatter([evidence(-1)] * 3, 3, ["the Hessian"])
    assert overall(yes, flat)["status"] == "better and flatter"
    assert overall(yes, open_)["status"] == "better"
    assert overall(no, flat)["status"] == "refuted"
    assert "is not better (it loses to best single run)" in overall(no, flat)["sentence"]
    assert "flatter in everything measured, which is not yet all that the claim needs" in overall(yes, open_)["sentence"]
    assert any("not measured: the Hessian" in c for c in overall(yes, open_)["caveats"])


def test_fewer_than_three_seeds_are_measurement_error_only():
    yes, flat = verdict.judge_better([evidence(-1)], []), verdict.judge_flatter([evidence(-1)] * 3, 3, [])
    assert any("measurement error only" in c for c in overall(yes, flat, seeds=1)["caveats"])
    assert not overall(yes, flat, seeds=3)["caveats"]
