from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from emomerge.cli.printing import print_results
from emomerge.experiment.measure import Artefact, Measurer
from emomerge.experiment.recommendation import recommend
from emomerge.recipe import parse_recipe
from emomerge.results import Results

BATCHES = 60
RECIPE = {"name": "r", "base": {"model": "m"}, "task": {"kind": "text-classification", "train": "a"}, "runs": {"steps": 20}}


class Losses(Measurer):
    """Measures artefacts whose losses are known: a mean, and noise that all artefacts share or that is their own."""

    def __init__(self, validation, train=None, own=0.01):
        self.recipe = parse_recipe(RECIPE)
        self.data = SimpleNamespace(train=range(640), validation=range(120))
        self.context = SimpleNamespace(base_folder=Path("out/base"))
        self._means = {"validation": validation, "train": train or {}}
        self._own = own

    def scores(self, artefact, split):
        shared = np.random.default_rng(0).normal(size=BATCHES)
        own = np.random.default_rng(sum(map(ord, artefact.name))).normal(size=BATCHES)
        noise = shared + self._own * (own - own.mean())
        mean = self._means[split].get(artefact.name, 1.0)
        return {"loss": mean + noise - noise.mean(), "weight": np.ones(BATCHES)}


def artefact(name, role, **about):
    return Artefact(name, role, None, name, path=Path("out") / name, **about)


BASE, RUN, MERGE = artefact("base", "base"), artefact("sens-0", "run"), artefact("mean", "merge")
OTHER = artefact("positioning", "merge")
SWEEP = artefact("adamw-sweep-0.001-0", "control", control="adamw-sweep")
SOUP = Artefact(
    "adamw-soup-0", "control", None, "soup", control="adamw-soup", method="greedy-soup", sources=(Path("a b"), Path("c"))
)


def found(validation, controls=(SWEEP, SOUP), **noise):
    return recommend(Losses({OTHER.name: 9.0, **validation}, **noise), BASE, [RUN], [[MERGE], [OTHER]], controls)


def test_the_best_model_is_used_if_it_is_better_than_the_base_and_no_control_is_better():
    chosen = found({"base": 1.0, "sens-0": 0.6, "mean": 0.5, SWEEP.name: 0.55, SOUP.name: 0.5001})
    assert (chosen.name, chosen.kind, chosen.path) == ("mean", "model", "out/mean")
    assert chosen.sentence == (
        "Use mean, with a validation loss of 0.5000: no run and no other merge has a lower one (sens-0: 0.6000)."
    )
    single = found({"sens-0": 0.4, "mean": 0.5, SWEEP.name: 0.5, SOUP.name: 0.5})
    assert (single.name, single.sentence) == (
        "sens-0",
        "Use sens-0, with a validation loss of 0.4000: below the 0.5000 of the first merge, mean, by more than the interval.",
    )


@pytest.mark.parametrize(("loss", "name"), [(0.49, "mean"), (0.2, "positioning")])
def test_the_first_merge_stays_unless_another_is_better_by_more_than_the_interval(loss, name):
    """A merge that fits weights to the validation rows has a low validation loss by that alone."""
    chosen = found({"sens-0": 0.6, "mean": 0.5, "positioning": loss}, own=0.1)
    assert (chosen.name, chosen.kind) == (name, "model")
    if name == "mean":
        assert chosen.sentence.endswith("the loss of positioning, 0.4900, is lower by less than the interval.")


@pytest.mark.parametrize(("sweep", "kind"), [(0.4, "control"), (0.4999, "model"), (0.6, "model")])
def test_a_control_is_taken_if_it_is_better_by_more_than_the_interval(sweep, kind):
    chosen = found({"sens-0": 0.6, "mean": 0.5, SWEEP.name: sweep, SOUP.name: 0.7})
    assert chosen.kind == kind
    assert chosen.sentence.startswith("Take the control adamw-sweep" if kind == "control" else "Use mean")
    assert chosen.path == (str(SWEEP.path) if kind == "control" else str(MERGE.path))


def test_a_control_without_a_folder_comes_with_a_command():
    chosen = found({"sens-0": 0.6, "mean": 0.5, SWEEP.name: 0.4, SOUP.name: 0.3})
    assert (chosen.name, chosen.path, chosen.validation_loss) == ("adamw-soup-0", None, pytest.approx(0.3))
    assert chosen.command == (
        "emomerge merge out/base 'a b' c --method greedy-soup --recipe out/recipe.yaml -o adamw-soup-0"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("validation", "train", "own", "reason"),
    [
        (0.9999, {}, 0.01, "20 steps (0.5 epochs of 640 rows) moved not even the training loss: raise `runs.steps`"),
        (0.98, {"sens-0": 0.5, "mean": 0.5}, 0.5, "120 validation rows cannot tell this from chance"),
        (1.2, {"sens-0": 0.5, "mean": 0.5}, 0.01, "only the loss on the 640 training rows fell"),
    ],
)
def test_nothing_is_recommended_where_nothing_was_learnt(validation, train, own, reason):
    losses = {"sens-0": validation, "mean": validation, SWEEP.name: 1.3, SOUP.name: 1.3}
    chosen = found(losses, train=train, own=own)
    assert (chosen.name, chosen.kind, chosen.path, chosen.command) == ("base", "nothing", None, "")
    assert chosen.sentence.startswith("Nothing was learnt: ")
    assert reason in chosen.sentence


def test_a_control_that_learnt_something_is_taken_where_the_runs_did_not():
    assert found({"sens-0": 0.9999, "mean": 1.0, SWEEP.name: 0.9, SOUP.name: 1.0}).name == SWEEP.name


def test_a_control_is_not_taken_where_it_too_is_no_better_than_the_base():
    assert found({"sens-0": 1.5, "mean": 1.5, SWEEP.name: 1.2, SOUP.name: 1.2}).kind == "nothing"


def test_a_diverged_model_is_never_recommended():
    assert found({"sens-0": 0.5, "mean": float("nan"), SWEEP.name: float("nan"), SOUP.name: 0.6}).name == "sens-0"


@pytest.mark.parametrize(("sweep", "shown"), [(0.4, f"  {SWEEP.path}\n"), (0.9, None)])
def test_the_terminal_shows_where_a_control_is(sweep, shown, capsys):
    losses = {"sens-0": 0.6, "mean": 0.5, SWEEP.name: sweep, SOUP.name: 0.9}
    print_results(Results(name="r", selected=found(losses)), Path("report.html"))
    printed = capsys.readouterr().out
    assert (shown in printed) if shown else (str(SWEEP.path) not in printed)
