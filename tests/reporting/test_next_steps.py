"""What the page says to do next follows from what was measured."""

import pytest

from emomerge.reporting.advice import next_steps
from emomerge.results import ArtefactRow, Claim, Data, Evidence, Results, Rows, Verdict


def results(low, high, seeds=(0,)):
    middle = (low + high) / 2
    evidence = Evidence(against="long run", what="test loss", scale="difference", estimate=middle, low=low, high=high)
    claim = Claim(status="not shown")
    better = Claim(status="not shown", evidence=(evidence,))
    verdict = Verdict(
        status="not shown", sentence="s", merge="mean", best_single=("sens-0",), better=better, flatter=claim
    )  # fmt: skip
    rows = [ArtefactRow(name=f"sens-{seed}", role="run", method="sens", seed=seed, path=None, estimates={}) for seed in seeds]
    data = Data(summary="", rows=Rows(train=10, validation=20, test=1_270))
    return Results(name="r", verdict=verdict, artefacts=rows, data=data)


def test_a_difference_within_its_interval_names_rows_seeds_and_the_smallest_difference_that_would_show():
    found = " ".join(next_steps(results(-0.12, 0.02)))
    assert "long run: the difference is within its interval" in found
    assert "With 1,270 test rows and 1 training seed, a difference of test loss below about 0.07 nats" in found
    assert "--set runs.seeds=[0,1,2]" in found


@pytest.mark.parametrize(("seeds", "asked"), [((0,), True), ((0, 1), True), ((0, 1, 2), False)])
def test_three_seeds_are_enough(seeds, asked):
    found = " ".join(next_steps(results(-0.2, -0.1, seeds)))
    assert ("runs.seeds" in found) == asked
    assert "within its interval" not in found, "the merge is better"
