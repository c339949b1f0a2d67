"""Merges of the means at which the runs met, instead of the runs."""

import json
import pickle
import re
import shutil

import pytest
import torch
from click.testing import CliRunner

from emomerge.checkpoints import open_checkpoint
from emomerge.cli import main
from emomerge.errors import BadInput
from emomerge.experiment.pipeline import Pipeline
from emomerge.merging import merge
from emomerge.progress import Display
from emomerge.recipe import parse_recipe
from emomerge.results import load_results

SOUP = {"method": "greedy-soup", "of": "rounds", "name": "soup-of-rounds"}


@pytest.fixture(scope="module")
def recipe(tiny_recipe):
    torch.set_num_threads(1)
    runs = tiny_recipe["runs"] | {"rounds": 3, "optimizers": ["sens", "cats"]}
    return tiny_recipe | {"runs": runs, "merge": [SOUP, {"method": "mean"}], "controls": ["best-single"]}


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "out"
    assert Pipeline(parse_recipe(recipe), out).run()
    return out


def record(out, name="soup-of-rounds"):
    return json.loads((out / "merges" / name / "merge.json").read_text())


def test_a_merge_of_rounds_is_the_merge_of_the_kept_means(finished, recipe):
    written = record(finished)
    folders = [finished / f"runs/rounds-0/round-{number}" for number in (1, 2, 3)]
    assert [run["name"] for run in written["runs"]] == ["round-1", "round-2", "round-3"]
    assert [run["source"] for run in written["runs"]] == [str(folder) for folder in folders]
    assert all("adapter_model.safetensors" in run["sha256"] for run in written["runs"])
    assert (written["of"], record(finished, "mean")["of"]) == ("rounds", "runs")
    base = open_checkpoint(finished / "base")
    measurer = Pipeline(parse_recipe(recipe), finished).measurer
    expected = merge(base, folders, method="greedy-soup", held_out_loss=measurer.held_out_loss, names=["a", "b", "c"])
    soup = open_checkpoint(finished / "merges/soup-of-rounds")
    assert all(torch.equal(soup[name], expected[name]) for name in base)


def test_results_and_cards_name_the_rounds(finished):
    results = load_results(finished)
    assert [row.name for row in results.artefacts] == ["base", "sens-0", "cats-0", "soup-of-rounds", "mean"]
    assert results.cosines.names == ("sens-0", "cats-0")
    assert {row.name for row in results.artefacts if row.mean("cosine_to_mean") is not None} == {"mean"}
    assert results.verdict.merge == "soup-of-rounds"
    assert {evidence.against for evidence in results.verdict.better.evidence} == {"best single run", "plain mean"}
    assert (results.merges["soup-of-rounds"].of, results.merges["mean"].of) == ("rounds", "runs")
    assert re.search("of 3 rounds; chosen [^<]*; members round-", (finished / "report.html").read_text())
    card = (finished / "merges/soup-of-rounds/README.md").read_text()
    assert "from the means of the runs after 3 rounds over" in card
    assert "## Rounds\n\n- `round-1` from" in card
    assert " from 2 runs over" in (finished / "merges/mean/README.md").read_text()


def test_a_merge_of_rounds_can_be_repeated(finished, tmp_path):
    folder = finished / "merges/soup-of-rounds"
    result = CliRunner().invoke(main, ["merge", "--again", str(folder), "-o", str(tmp_path / "again"), "--quiet"])
    assert result.exit_code == 0, result.output
    again, first = open_checkpoint(tmp_path / "again"), open_checkpoint(folder)
    assert all(torch.equal(again[name], first[name]) for name in first)


def test_losses_of_kept_rounds_are_remembered(finished, recipe, monkeypatch):
    made = Pipeline(parse_recipe(recipe), finished)
    rounds = made.round_artefacts(0)
    expected = [made.measurer.loss(artefact, "validation") for artefact in rounds]
    assert len(set(expected)) == 3
    monkeypatch.setattr("emomerge.experiment.measure.load_into", None)
    assert [made.measurer.loss(artefact, "validation") for artefact in rounds] == expected


def test_artefacts_of_an_adapter_can_be_sent_to_workers(finished, recipe):
    made = Pipeline(parse_recipe(recipe), finished)
    merged = made.merge_artefact(made.recipe.merge[0], 0)
    run = made.run_artefact(made.specs[0])
    for artefact in (run, made.round_artefacts(0)[0], merged, made.measurer.distance_matched(run, merged)):
        sent = pickle.loads(pickle.dumps(artefact))
        assert sent.hash == artefact.hash
        assert all(torch.equal(sent.checkpoint[name], artefact.checkpoint[name]) for name in made.base)


def test_a_finished_folder_is_extended_by_a_merge_of_rounds(finished, recipe, tmp_path):
    """Kept rounds are used; if one is missing, the runs are trained again, to the same bits."""
    out, soup = tmp_path / "out", (finished / "merges/soup-of-rounds/model.safetensors").read_bytes()
    shutil.copytree(finished, out)
    only_mean = recipe | {"merge": [{"method": "mean"}]}
    assert Pipeline(parse_recipe(only_mean), out).run()
    shutil.rmtree(out / "merges/soup-of-rounds")

    trained = {file: file.stat().st_mtime_ns for file in out.glob("runs/*/adapter/*.safetensors")}
    assert Pipeline(parse_recipe(recipe), out).run()
    assert (out / "merges/soup-of-rounds/model.safetensors").read_bytes() == soup
    assert trained == {file: file.stat().st_mtime_ns for file in trained}
    assert not Pipeline(parse_recipe(recipe), out).run()

    shutil.rmtree(out / "runs/rounds-0/round-1")
    assert not Pipeline(parse_recipe(only_mean), out).status()["probe"]
    assert Pipeline(parse_recipe(only_mean), out).status()["runs"]
    display = Heard(quiet=True)
    again = Pipeline(parse_recipe(recipe), out, display=display)
    assert not again.status()["runs"]
    assert again.run()
    assert "training the runs again: a merge is made of their rounds, which were not kept" in display.said
    assert (out / "merges/soup-of-rounds/model.safetensors").read_bytes() == soup

    shutil.rmtree(out / "runs/rounds-0/round-3")
    assert Pipeline(parse_recipe(recipe), out).run()
    assert (out / "runs/rounds-0/round-3/adapter_model.safetensors").exists()
    assert not Pipeline(parse_recipe(recipe), out).run()


class Heard(Display):
    """A display that remembers what is said."""

    def __init__(self, *, quiet):
        super().__init__(quiet=quiet)
        self.said = []

    def say(self, text):
        self.said.append(text)


def test_every_seed_has_a_merge_of_its_own_rounds(recipe, tmp_path):
    runs = recipe["runs"] | {"seeds": [0, 1], "keep_rounds": 2, "parallel": "sequential"}
    changed = recipe | {"runs": runs, "adapter": {"kind": "full"}, "merge": [SOUP]}
    assert Pipeline(parse_recipe(changed), tmp_path / "out").run()
    for seed in (0, 1):
        sources = [run["source"] for run in record(tmp_path / "out", f"soup-of-rounds-seed{seed}")["runs"]]
        assert sources == [str(tmp_path / f"out/runs/rounds-{seed}/round-{number}") for number in (1, 3)]
    results = load_results(tmp_path / "out")
    assert results.cosines is None
    assert {"soup-of-rounds-seed0", "soup-of-rounds-seed1"} < {row.name for row in results.artefacts}
    assert not Pipeline(parse_recipe(changed), tmp_path / "out").run()


@pytest.mark.parametrize(("runs", "kept"), [({"rounds": 1}, 0), ({"keep_rounds": 1}, 1), ({"keep_rounds": 0}, 0)])
def test_one_round_is_not_merged(recipe, runs, kept):
    changed = recipe | {"runs": recipe["runs"] | runs}
    message = f"`soup-of-rounds` is made of rounds and needs 2 or more, but {kept} are kept; set `runs.rounds` and `runs.keep"
    with pytest.raises(BadInput, match=message):
        parse_recipe(changed)
    parse_recipe(changed | {"runs": changed["runs"] | {"rounds": 2, "keep_rounds": 2}})
    parse_recipe(changed | {"merge": [{"method": "greedy-soup"}]})


@pytest.mark.parametrize(
    ("merge", "message"),
    [
        ({"method": "slerp", "of": "rounds"}, "slerp merges exactly 2 rounds: merge slerp; found 3"),
        (
            {"method": "fisher", "of": "rounds"},
            "files that only runs have: merge fisher; leave out `of`, or give `information`",
        ),
    ],
)
def test_a_merge_that_cannot_be_made_is_refused_before_training(recipe, tmp_path, merge, message):
    with pytest.raises(BadInput, match=message):
        Pipeline(parse_recipe(recipe | {"merge": [merge]}), tmp_path / "out")
    Pipeline(parse_recipe(recipe | {"merge": [{"method": "slerp"}, {"method": "fisher"}]}), tmp_path / "out")
    two = recipe | {"runs": recipe["runs"] | {"keep_rounds": 2}, "merge": [{"method": "slerp", "of": "rounds"}]}
    Pipeline(parse_recipe(two), tmp_path / "out")
