"""Comparing experiments: who is ranked, in what order, with which intervals, and what is refused."""

from __future__ import annotations

import base64
import csv
import io
import json
import re

import numpy as np
import pytest
from losses import UNITS, with_losses

from emomerge.errors import BadInput
from emomerge.reporting.comparison import Comparison, compare, comparison_table, write_comparison
from emomerge.reporting.comparison.ranks import rank_models
from emomerge.results import Results, Rows


@pytest.fixture
def three(results) -> dict[str, Results]:
    return {"a": with_losses(results, 0.0), "b": with_losses(results, 0.2), "c": with_losses(results, 0.0001, noise=0.1)}


def test_ranks_and_intervals(three):
    found = compare(three)
    (group,) = found.groups
    assert {contender.run for contender in group.recommended} == {"a", "b", "c"}
    by_run = {contender.run: contender for contender in group.recommended}
    assert by_run["b"].rank == 3 and (by_run["b"].rank_low, by_run["b"].rank_high) == (3, 3)
    assert {(by_run[run].rank_low, by_run[run].rank_high) for run in "ac"} == {(1, 2)}
    assert "cannot be told apart" in found.advice[0] and "b" not in found.advice[0].split("cannot")[0].split()
    for contender in group.models:
        assert contender.rank_low <= contender.rank <= contender.rank_high
        losses = three[contender.run].held_out.losses[contender.model]
        assert contender.test_loss == pytest.approx(np.average(losses, weights=three["a"].held_out.weights))
    assert len(group.models) == 3 * len(three["a"].artefacts)


def test_a_clear_winner_is_named_with_the_distance_to_the_next(results):
    found = compare({"a": with_losses(results, 0.3), "b": with_losses(results, 0.0)})
    assert found.advice[0].startswith(f"Use {results.selected.name} of b. ")
    second = found.groups[0].recommended[1]
    assert second.difference_low < 0.3 < second.difference_high
    assert second.difference_low > 0.25


def test_pairing_removes_what_rows_have_in_common():
    hard = np.random.default_rng(1).exponential(1.0, 50)
    ranking = rank_models([hard, hard + 0.01 + 0.001 * np.sin(np.arange(50))], np.ones(50))
    assert ranking.low.tolist() == [1, 2]
    assert ranking.high.tolist() == [1, 2]
    estimate, low, high = ranking.difference(1, 0)
    assert low < 0.01 < high and high - low < 0.002
    assert estimate == pytest.approx(0.01, abs=1e-3)


def test_the_intervals_cover_the_truth_for_all_pairs_together():
    rng, held, trials = np.random.default_rng(2), 0, 200
    for _ in range(trials):
        truth = np.array([0.0, 0.1, 0.1, 0.3, 0.5])
        ranking = rank_models(truth[:, None] + rng.standard_normal((5, 40)) + rng.standard_normal(40), rng.integers(1, 4, 40))
        off = np.abs(ranking.mean[:, None] - ranking.mean - (truth[:, None] - truth))
        held += bool((off <= ranking.half + 1e-12).all())
    assert 0.91 < held / trials <= 1


def test_equal_models_share_a_rank():
    losses = np.random.default_rng(3).exponential(1.0, 30)
    ranking = rank_models([losses, losses, losses + 1], np.ones(30))
    assert ranking.rank.tolist() == [1, 1, 3]
    assert (ranking.low.tolist(), ranking.high.tolist()) == ([1, 1, 3], [2, 2, 3])
    alone = rank_models([[1.0], [2.0]], [1.0])
    assert alone.low.tolist() == [1, 1] and alone.high.tolist() == [2, 2]


def test_other_rows_form_a_group_and_say_so(three, results):
    other = results.data.model_copy(update={"rows": Rows(train=9, validation=7, test=77)})
    found = compare({**three, "d": with_losses(results, 0.0, rows="other", labels="other", data=other)})
    assert [group.runs for group in found.groups] == [("a", "b", "c"), ("d",)]
    assert any("d was measured on other test rows (77) than a" in note for note in found.notes)
    assert found.advice[0].startswith("Of a, b, c: ")


def test_the_same_labels_read_by_another_tokenizer_are_comparable(results):
    task = {"task": {"kind": "text-classification", "train": "x.tsv", "max_length": 8}}
    one = with_losses(results, 0.0, recipe=task)
    two = with_losses(results, 0.1, rows="longer", recipe={"task": {**task["task"], "max_length": 16}})
    found = compare({"one": one, "two": two})
    assert len(found.groups) == 1
    assert any("read them differently" in note for note in found.notes)
    elsewhere = {"task": {**task["task"], "train": "y.tsv"}}
    with pytest.raises(BadInput, match="no two of these"):
        compare({"one": one, "two": with_losses(results, 0.1, rows="longer", recipe=elsewhere)})


@pytest.mark.parametrize("what", ["no losses", "other batches", "other unit"])
def test_what_cannot_be_compared_is_refused_with_the_reason(results, what):
    one, two = with_losses(results, 0.0), with_losses(results, 0.1)
    if what == "no losses":
        two, words = two.model_copy(update={"held_out": None}), "two/results.json"
    elif what == "other batches":
        held = two.held_out.model_copy(update={"weights": tuple([2.0] * UNITS)})
        two, words = two.model_copy(update={"held_out": held}), "probe.batch_size"
    else:
        two, words = two.model_copy(update={"data": two.data.model_copy(update={"unit": "pixels"})}), "pixels"
    with pytest.raises(BadInput, match=words):
        compare({"one": one, "two": two})


def test_trainings_of_one_recipe_are_named(results):
    recipe = {"name": "x", "task": {"kind": "k"}, "runs": {"steps": 3, "seeds": [0]}}
    seeds = {**recipe, "name": "y", "runs": {"steps": 3, "seeds": [1]}}
    other = {**recipe, "runs": {"steps": 4, "seeds": [0]}}
    found = compare({n: with_losses(results, s, recipe=r) for n, s, r in (("a", 0, recipe), ("b", 1, seeds), ("c", 2, other))})
    assert any(note.startswith("a, b are trainings of one recipe") for note in found.notes)


def test_a_model_that_diverged_has_no_rank(results):
    broken = with_losses(results, 0.1)
    name = results.selected.name
    losses = {**broken.held_out.losses, name: (None, *broken.held_out.losses[name][1:])}
    broken = broken.model_copy(update={"held_out": broken.held_out.model_copy(update={"losses": losses})})
    found = compare({"a": with_losses(results, 0), "b": broken})
    last = found.groups[0].recommended[-1]
    assert (last.run, last.rank, last.difference) == ("b", None, None)
    assert "Too few models" in found.advice[0]


def test_the_page_holds_every_figure(three, tmp_path):
    found = compare(three)
    page = write_comparison(found, tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert "http" not in re.sub(r"<script>.*?</script>|http://www.w3.org/\S+", "", page, flags=re.DOTALL)
    assert page.index("What to do now") < page.index("All models")
    links = dict(re.findall(r'download="[^"]*\.(csv|json)" href="data:[a-z/]+;base64,([^"]+)"', page))
    texts = {kind: base64.b64decode(text).decode() for kind, text in links.items()}
    assert Comparison.model_validate_json(texts["json"]) == found
    rows = list(csv.DictReader(io.StringIO(texts["csv"])))
    for row, contender in zip(rows, found.groups[0].models, strict=True):
        assert (row["run"], row["model"], int(row["rank"])) == (contender.run, contender.model, contender.rank)
        for key in ("test_loss", "difference_low", "difference_high"):
            assert float(row[key]) == getattr(contender, key)


def test_the_table_fits_80_columns(three):
    from rich.console import Console

    console = Console(width=80, file=io.StringIO())
    console.print(comparison_table(compare(three).groups[0]))
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "1 (1–2)" in text and "\n3 " in text


def test_json_is_what_the_schema_says(three, tmp_path):
    from click.testing import CliRunner

    from emomerge.cli import main
    from emomerge.cli.schema import schema_of

    jsonschema = pytest.importorskip("jsonschema")
    for name, results in three.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(results.to_json(), encoding="utf-8")
    folders = [str(tmp_path / name) for name in three]
    page = str(tmp_path / "x.html")
    done = CliRunner().invoke(main, ["report", *folders, "-o", page, "--json"])
    assert done.exit_code == 0, done.output
    jsonschema.Draft202012Validator(schema_of("report")).validate(json.loads(done.stdout))
    again = CliRunner().invoke(main, ["report", *folders, "-o", page])
    assert again.exit_code == 2 and "--force" in again.stderr
    twice = CliRunner().invoke(main, ["report", folders[0], folders[0], "-o", str(tmp_path / "y.html")])
    assert twice.exit_code == 2 and "named twice" in twice.stderr
    shown = CliRunner().invoke(main, ["report", *folders, "-o", page, "--force"])
    assert "cannot be told apart" in shown.stdout
