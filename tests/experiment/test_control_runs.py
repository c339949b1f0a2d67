import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from emomerge.adapters import open_run
from emomerge.checkpoints import open_checkpoint
from emomerge.cli import main
from emomerge.controls import CONTROLS
from emomerge.errors import BadInput
from emomerge.experiment.control_runs import control_artefacts, large_batch_runs, long_adamw_runs, sweep_runs
from emomerge.experiment.measure import Artefact, Measurer
from emomerge.experiment.pipeline import Pipeline
from emomerge.experiment.recommendation import recommend
from emomerge.merging import merge
from emomerge.recipe import parse_recipe
from emomerge.results import load_results
from emomerge.training.loop import batch_order, micro_batches
from emomerge.training.plan import RunSpec, run_inputs
from emomerge.training.stacked import Unstackable, prepare_stack

ADAMW = ["adamw-sweep", "adamw-soup", "adamw-long-run", "adamw-large-batch"]


@pytest.fixture(scope="module")
def recipe(tiny_recipe):
    torch.set_num_threads(1)
    return tiny_recipe | {
        "runs": tiny_recipe["runs"] | {"optimizers": ["sens", "cats", "void"]},
        "merge": [{"method": "mean"}],
        "rival": {"learning_rates": [1e-3, 0.5], "sweep": [1e-4, 1e-2], "snapshots": 6},
        "controls": ["best-single", *ADAMW],
    }


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    pipeline = Pipeline(parse_recipe(recipe), tmp_path_factory.mktemp("controls") / "out")
    assert pipeline.run()
    return pipeline


def validation(pipeline, artefact):
    return pipeline.measurer.loss(artefact, "validation")


def test_the_sweep_has_as_many_runs_as_the_merge_at_logarithmically_spaced_rates(finished):
    sweep = sweep_runs(finished.recipe, 0)
    assert [spec.rate for spec in sweep] == [1e-4, 1e-3, 1e-2]
    assert {spec.steps for spec in sweep} == {6}
    losses = [validation(finished, finished.run_artefact(spec)) for spec in sweep]
    chosen = control_artefacts(finished)["adamw-sweep"][0]
    assert validation(finished, chosen) == min(losses) < max(losses)
    assert [row.name for row in load_results(finished.space.out).artefacts if row.control == "adamw-sweep"] == [chosen.name]


def test_the_rates_of_the_sweep_depend_on_what_is_trained(recipe):
    def rates(**changes):
        return parse_recipe({**recipe, "rival": {}, **changes}).sweep_rates

    model = {"base": {"model": "some/model"}}
    assert (rates()[0], rates()[-1]) == (1e-4, 1e-2)
    assert rates(**model) == rates()
    assert rates(adapter={"kind": "full"}) == rates()
    assert rates(adapter={"kind": "full"}, **model) == (1e-5, 1e-4, 1e-3)
    assert rates(runs={"optimizers": ["sens"]}) == (1e-3,)
    with pytest.raises(BadInput, match="sweep"):
        rates(rival={"sweep": [1e-2, 1e-4]})


def test_the_soup_is_the_greedy_soup_of_the_sweep(finished):
    found = control_artefacts(finished)
    sweep = [finished.run_artefact(spec) for spec in sweep_runs(finished.recipe, 0)]
    expected = merge(
        finished.base, [a.checkpoint for a in sweep], method="greedy-soup", held_out_loss=finished.measurer.held_out_loss
    )
    soup = found["adamw-soup"][0]
    for name in finished.base:
        torch.testing.assert_close(soup.checkpoint[name], expected[name], rtol=1e-5, atol=1e-6)
    assert validation(finished, soup) <= validation(finished, found["adamw-sweep"][0])


def test_the_long_run_stops_where_its_validation_loss_was_lowest(recipe, tmp_path, monkeypatch):
    """Here the losses are such that each run is best after six steps."""
    out, loss = tmp_path / "out", Measurer.loss

    def lowest_at_six(self, artefact, split):
        at_six = artefact.name.endswith("step 6")
        return 0.0 if at_six and split == "validation" else loss(self, artefact, split)

    monkeypatch.setattr(Measurer, "loss", lowest_at_six)
    only = {**recipe, "controls": ["adamw-long-run"]}
    pipeline = Pipeline(parse_recipe(only), out)
    assert pipeline.run()
    assert not Pipeline(parse_recipe(only), out).run(), "removing snapshots leaves the runs finished"
    for spec in long_adamw_runs(pipeline.recipe, 0):
        assert spec.snapshots == (3, 6, 9, 12, 15)
        assert [folder.name for folder in (pipeline.run_dir(spec).path / "snapshots").iterdir()] == ["step-000006"]
    (row,) = (row for row in load_results(out).artefacts if row.control == "adamw-long-run")
    assert row.name == "long-adamw-0.001-0 until step 6"
    assert row.path == str(out / "runs/long-adamw-0.001-0/snapshots/step-000006")
    assert row.name in (Path(row.path) / "README.md").read_text()
    shorter = open_run(pipeline.base, row.path)
    whole = open_run(pipeline.base, out / "runs/long-adamw-0.001-0/adapter")
    assert any(not torch.equal(shorter[name], whole[name]) for name in whole)


def test_a_long_run_that_is_best_at_its_end_keeps_no_snapshot(finished):
    ends = [finished.run_artefact(spec) for spec in long_adamw_runs(finished.recipe, 0)]
    for spec, end in zip(long_adamw_runs(finished.recipe, 0), ends, strict=True):
        kept = list((finished.run_dir(spec).path / "snapshots").glob("*"))
        steps = [int(folder.name.removeprefix("step-")) for folder in kept]
        assert all(validation(finished, finished.snapshot_artefact(spec, s)) < validation(finished, end) for s in steps)
    chosen = control_artefacts(finished)["adamw-long-run"][0]
    assert validation(finished, chosen) <= min(validation(finished, end) for end in ends)


def test_large_batches_hold_the_rows_of_all_runs(finished):
    recipe = finished.recipe
    spec = large_batch_runs(recipe, 0)[0]
    assert list(micro_batches(recipe.runs, spec, 2)) == [6, 7, 8]
    order = batch_order(recipe.runs, spec, 50)
    first = torch.cat([order.batch(micro) for micro in micro_batches(recipe.runs, spec, 0)])
    sweep = batch_order(recipe.runs, sweep_runs(recipe, 0)[0], 50)
    assert torch.equal(first, torch.cat([sweep.batch(number) for number in range(3)]))
    assert finished.run_dir(spec).state["steps_taken"] == 6
    assert control_artefacts(finished)["adamw-large-batch"][0].control == "adamw-large-batch"


def test_large_batches_in_one_pass_equal_those_trained_alone(finished, recipe, tmp_path):
    weights = []
    for parallel in ("stacked", "sequential"):
        shutil.copytree(finished.space.base, tmp_path / parallel / "base")
        shutil.copytree(finished.space.out / "stamps", tmp_path / parallel / "stamps")
        made = Pipeline(parse_recipe(recipe | {"runs": recipe["runs"] | {"parallel": parallel}}), tmp_path / parallel)
        specs = large_batch_runs(made.recipe, 0)
        made.train(specs)
        weights.append(open_run(made.base, made.run_dir(specs[0]).path))
    for name in finished.base:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-4, atol=1e-5)
    mixed = [sweep_runs(finished.recipe, 0)[0], specs[0]]
    with pytest.raises(Unstackable, match="batches of different sizes"):
        prepare_stack(finished.context, mixed)


def test_controls_of_equal_length_and_batch_are_trained_together(recipe, tmp_path):
    groups = []

    class Recorded(Pipeline):
        def train(self, specs=None):
            if specs is not None:
                groups.append([spec.name for spec in specs])
            super().train(specs)

    assert Recorded(parse_recipe({**recipe, "controls": [*ADAMW, "long-run"]}), tmp_path / "out").run()
    assert [len(group) for group in groups] == [3, 2, 3]
    assert groups[0] == ["adamw-sweep-0.0001-0", "adamw-sweep-0.001-0", "adamw-sweep-0.01-0"]
    assert {name.partition("-")[0] for name in groups[2]} == {"long"}


def test_full_fine_tunes_keep_the_snapshots_of_one_run_at_a_time(recipe, tmp_path):
    seen = []

    class Watched(Pipeline):
        def train(self, specs=None):
            super().train(specs)
            folders = self.space.runs.glob("long-adamw-*/snapshots/*")
            seen.append(len({folder.parent.parent.name for folder in folders if len(list(folder.parent.iterdir())) > 1}))

    full = {**recipe, "adapter": {"kind": "full"}, "controls": ["adamw-long-run"]}
    assert Watched(parse_recipe(full), tmp_path / "out").run()
    assert max(seen) == 1
    assert not Pipeline(parse_recipe(full), tmp_path / "out").run()


def test_a_kill_while_snapshots_are_removed_costs_no_training(finished, recipe, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished.space.out, out)
    spec = long_adamw_runs(finished.recipe, 0)[0]
    for step in spec.snapshots:  # as if the kill came between the state and the folders
        shutil.copytree(
            out / "runs" / spec.name / "adapter", out / "runs" / spec.name / f"snapshots/step-{step:06d}", dirs_exist_ok=True
        )
    (out / "stamps/controls.json").unlink()
    before = {f: f.stat().st_mtime_ns for f in out.glob("runs/*/adapter/*.safetensors")}
    assert Pipeline(parse_recipe(recipe), out).run()
    assert before == {f: f.stat().st_mtime_ns for f in out.glob("runs/*/adapter/*.safetensors")}
    assert len(list((out / "runs" / spec.name / "snapshots").glob("*"))) <= 1


def test_adamw_is_clipped_by_a_setting_of_its_own(recipe):
    def of(spec, rival, **runs):
        return run_inputs(parse_recipe({**recipe, "runs": {**recipe["runs"], **runs}, "rival": rival}), spec, "base")

    adamw = RunSpec("a", "adamw", 0, 6, control="adamw-sweep", rate=1e-3)
    own = RunSpec("b", "sens", 0, 6, control="long-run")
    unclipped = {"max_grad_norm": None}
    assert of(adamw, {}, max_grad_norm=0.5) == of(adamw, {}, max_grad_norm=1.0), "clipped at 1, whatever the runs are"
    assert of(adamw, unclipped, max_grad_norm=None) != of(adamw, {}, max_grad_norm=None)
    assert of(own, {}, max_grad_norm=0.5) == of(own, unclipped, max_grad_norm=0.5)
    assert of(own, {}, max_grad_norm=0.5) != of(own, {}, max_grad_norm=None)


def test_clipping_shortens_the_gradients_of_adamw(finished, recipe, tmp_path):
    spec = sweep_runs(finished.recipe, 0)[0]
    other = Pipeline(parse_recipe({**recipe, "rival": {**recipe["rival"], "max_grad_norm": 1e-4}}), tmp_path / "out")
    shutil.copytree(finished.space.out, tmp_path / "out")
    assert not other.run_is_done(spec)
    other.train([spec])
    first, second = (next(pipeline.run_dir(spec).metrics()) for pipeline in (finished, other))
    assert first["loss"] == pytest.approx(second["loss"])
    assert finished.run_dir(spec).state["sha256"] != other.run_dir(spec).state["sha256"]


def test_every_model_costs_what_was_trained_to_choose_it(finished):
    examples = {row.control or row.name: row.mean("examples") for row in load_results(finished.space.out).artefacts}
    one = 6 * 8
    assert (examples["sens-0"], examples["mean"]) == (one, 3 * one)
    assert examples["adamw-sweep"] == examples["adamw-soup"] == 3 * one
    assert examples["adamw-long-run"] == examples["adamw-large-batch"] == 2 * 3 * one, "at two rates"
    assert examples["base"] is None
    cpu = {row.control or row.name: row.mean("cpu_seconds") for row in load_results(finished.space.out).artefacts}
    assert cpu["mean"] > cpu["sens-0"] > 0
    assert (
        cpu["adamw-soup"]
        == cpu["adamw-sweep"]
        == pytest.approx(sum(finished.run_dir(spec).state["cpu_seconds"] for spec in sweep_runs(finished.recipe, 0)))
    )


def test_the_cpu_time_of_runs_of_earlier_versions_is_unknown(finished, recipe, tmp_path):
    shutil.copytree(finished.space.out, tmp_path / "out")
    again = Pipeline(parse_recipe(recipe), tmp_path / "out")
    spec = again.specs[0]
    state = again.run_dir(spec).state
    del state["cpu_seconds"]
    (again.run_dir(spec).path / "run.json").write_text(json.dumps(state))
    assert again.run_is_done(spec)
    assert again.run_artefact(spec).cost == (48, None)
    assert again.merge_artefact(again.recipe.merge[0], 0).cost == (3 * 48, None)


def test_the_command_for_a_soup_writes_the_soup(finished, tmp_path, monkeypatch):
    soup = control_artefacts(finished)["adamw-soup"][0]
    base = Artefact("base", "base", finished.base, finished.base_hash)
    winner = replace(finished.run_artefact(finished.specs[0]), checkpoint=finished.base, hash=finished.base_hash)
    found = recommend(finished.measurer, base, [winner], [[winner]], [soup])
    assert (found.kind, found.path) == ("control", None)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, shlex.split(found.command)[1:])
    assert done.exit_code == 0, done.output
    written = open_checkpoint(tmp_path / "adamw-soup-0")
    for name in finished.base:
        torch.testing.assert_close(written[name], soup.checkpoint[name], rtol=1e-5, atol=1e-6)


def test_controls_made_from_others_need_them(recipe):
    for kind, control in CONTROLS.items():
        if control.made_from is not None:
            with pytest.raises(BadInput, match=f"`{kind}` is made from `{control.made_from}`; add `{control.made_from}`"):
                parse_recipe({**recipe, "controls": [kind]})


def test_the_stamp_holds_what_is_needed_to_find_the_controls_again(finished):
    facts = json.loads((finished.space.out / "stamps/controls.json").read_text())
    assert facts["diverged"] == []
    assert [
        RunSpec(**{**plan, "snapshots": tuple(plan["snapshots"])}) for plan in facts["trained"]
    ] == finished.trained_controls
    for row in load_results(finished.space.out).artefacts:
        if row.path:
            assert row.name in (Path(row.path) / "README.md").read_text()
