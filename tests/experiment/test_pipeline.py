import hashlib
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from emomerge.adapters import open_run
from emomerge.checkpoints import load_into, open_checkpoint
from emomerge.cli.status import status_of
from emomerge.errors import BadInput, RunFailed
from emomerge.experiment.control_runs import control_artefacts, long_adamw_runs
from emomerge.experiment.measure import Measurer
from emomerge.experiment.pipeline import Pipeline
from emomerge.experiment.workspace import Workspace
from emomerge.merging import merge
from emomerge.progress import Display
from emomerge.recipe import parse_recipe
from emomerge.results import load_results
from emomerge.training import RunDir


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def finished(tiny_recipe, tmp_path_factory):
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("finished") / "out"
    assert Pipeline(parse_recipe(tiny_recipe), out).run()
    return out


def hashes(out):
    return {str(f.relative_to(out)): hashlib.sha256(f.read_bytes()).hexdigest() for f in out.glob("*/*/*.safetensors")}


def test_everything_is_there(finished, tiny_recipe):
    results = load_results(finished)
    names = [row.name for row in results.artefacts]
    runs = ["sens-0", "airy-0", "cats-0", "tion-0", "void-0"]
    merges = ["tall-mask", "ties", "mean", "greedy-soup"]
    assert names[:10] == ["base", *runs, *merges]
    controls = ["adamw-sweep", "adamw-soup", "long-run", "adamw-long-run", "distance-matched", "loss-matched"]
    assert [row.control for row in results.artefacts][10:] == controls
    for row in results.artefacts:
        assert row.loss("test") > 0
        assert 0 <= row.accuracy("test") <= 1
        assert {key for key in row.estimates if key.startswith("sharp")} == {f"sharpness_{r}" for r in ("0.01", "0.03", "0.1")}
    assert set(results.traces) == set(runs)
    assert all(len(trace.rate) == 6 for trace in results.traces.values())
    assert results.merges["tall-mask"].lambda_crit == pytest.approx(0.25)
    assert (finished / "report.html").stat().st_size > 100_000
    assert results.verdict.sentence in (finished / "report.html").read_text().replace("&#39;", "'")
    assert results.selected.name in names


def test_controls_have_the_length_of_the_merge(finished):
    results = load_results(finished)
    by_name = {row.name: row for row in results.artefacts}
    merged = by_name[results.verdict.merge]
    for control in (row for row in results.artefacts if row.control == "distance-matched"):
        assert control.mean("distance") == pytest.approx(merged.mean("distance"), rel=1e-4)
        assert control.of in by_name


def test_test_figures_come_from_the_test_split_and_choices_from_validation(finished, tiny_recipe):
    made = Pipeline(parse_recipe(tiny_recipe), finished)
    data = made.data
    splits = (data.train, data.validation, data.test)
    rows = [{tuple(x.flatten().tolist()) for x in split.batch(range(len(split)))["pixel_values"]} for split in splits]
    assert not rows[0] & rows[1]
    assert not rows[1] & rows[2]
    results = load_results(finished)
    best = min((a for a in results.artefacts if a.role in ("run", "merge")), key=lambda a: a.loss("validation"))
    selected = next(a for a in results.artefacts if a.name == results.selected.name)
    assert results.selected.validation_loss == pytest.approx(selected.loss("validation"))
    if results.selected.kind == "model":
        assert selected.name == best.name
    else:
        assert selected.loss("validation") < best.loss("validation") or selected.name == "base"


def test_the_written_merge_is_what_was_evaluated(finished, tiny_recipe):
    made = Pipeline(parse_recipe(tiny_recipe), finished)
    measurer: Measurer = made.measurer
    batch = measurer.batches("test")[0]
    for spec in made.recipe.merge:
        load_into(measurer.model, open_checkpoint(finished / "merges" / spec.label))
        with torch.inference_mode():
            evaluated = made.task.logits(measurer.model, batch)
            loaded = made.task.logits(made.task.reload_model(finished / "merges" / spec.label), batch)
        assert (evaluated - loaded).abs().max() <= 1e-5


def test_again_there_is_nothing_to_do(finished, tiny_recipe):
    before = hashes(finished), {f: f.stat().st_mtime_ns for f in finished.rglob("*.safetensors")}
    assert not Pipeline(parse_recipe(tiny_recipe), finished).run()
    assert before == (hashes(finished), {f: f.stat().st_mtime_ns for f in finished.rglob("*.safetensors")})


def test_only_what_changed_is_done_again(finished, tiny_recipe, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    before = {f: f.stat().st_mtime_ns for f in (out / "runs").rglob("*.safetensors")}
    changed = {**tiny_recipe, "merge": [{"method": "mean"}, {"method": "ties", "density": 0.5}]}
    assert Pipeline(parse_recipe(changed), out).run()
    assert before == {f: f.stat().st_mtime_ns for f in (out / "runs").rglob("*.safetensors")}
    assert json.loads((out / "merges/ties/merge.json").read_text())["params"] == {"density": 0.5}
    assert [row.name for row in load_results(out).artefacts if row.role == "merge"] == ["mean", "ties"]
    (out / "merges/mean/model.safetensors").unlink()
    assert Pipeline(parse_recipe(changed), out).run()
    assert (out / "merges/mean/model.safetensors").exists()


KILLS = {
    "base": ("torch.optim.AdamW.step", 7),
    "base, before its stamp": ("emomerge.experiment.workspace.Workspace.write_stamp", 1),
    "run 1": ("emomerge.training.run_dir.RunDir.append_metrics", 3),
    "run 2": ("emomerge.training.run_dir.RunDir.append_metrics", 6 + 1),
    "run 3": ("emomerge.training.run_dir.RunDir.append_metrics", 12 + 6),
    "run 4, between weights and state": ("emomerge.training.run_dir.RunDir.write_state", 3 * 5 + 3),
    "run 5": ("emomerge.training.run_dir.RunDir.append_metrics", 24 + 4),
    "merge, in a file": ("emomerge.merging.MergedCheckpoint.__getitem__", 30),
    "merge, before its stamp": ("emomerge.experiment.workspace.Workspace.write_stamp", 3),
    "probe, early": ("emomerge.probing.ledger.Ledger._add", 80),
    "probe, late": ("emomerge.probing.ledger.Ledger._add", 220),
    "report": ("emomerge.experiment.pipeline.write_report", 1),
}
OFTEN = ("base", "run 4, between weights and state", "merge, in a file", "probe, early")
"""The moments that every run of the tests tries; `-m slow` tries the others."""


# Forked from a server that only imported things: a fork of this process could inherit locks of threads that it does not have.
CHILDREN = multiprocessing.get_context("forkserver") if hasattr(os, "fork") else None
if CHILDREN:
    CHILDREN.set_forkserver_preload(["emomerge.experiment.pipeline", "transformers", "peft", "altair", "sklearn.datasets"])


def in_child(recipe, out, kill=None):
    """Run a recipe in a process of its own, which `kill` may end; its exit status, or minus the signal that ended it."""
    process = CHILDREN.Process(target=work, args=(recipe, out, kill))
    process.start()
    process.join(120)
    return process.exitcode


def work(recipe, out, kill):
    torch.set_num_threads(1)
    if kill:
        kill_at_call(*kill)
    Pipeline(parse_recipe(recipe), out).run()


def kill_at_call(target, number):
    """Let the n-th call of a function end this process as `kill -9` does."""
    import importlib

    parts = target.split(".")
    for split in range(len(parts) - 1, 0, -1):
        try:
            owner = importlib.import_module(".".join(parts[:split]))
            break
        except ModuleNotFoundError:
            continue
    for part in parts[split:-1]:
        owner = getattr(owner, part)
    original, calls = getattr(owner, parts[-1]), iter(range(1, number + 1))

    def counted(*args, **kwargs):
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, parts[-1], counted)


@pytest.mark.skipif(CHILDREN is None, reason="needs fork")
@pytest.mark.parametrize("point", [pytest.param(p, marks=() if p in OFTEN else pytest.mark.slow) for p in KILLS])
def test_killed_anywhere_it_ends_with_the_same_bits(finished, tiny_recipe, tmp_path, point):
    out = tmp_path / "out"
    assert in_child(tiny_recipe, out, KILLS[point]) == -signal.SIGKILL
    assert hashes(out) != hashes(finished) or point.startswith(("probe", "report"))
    assert in_child(tiny_recipe, out) == 0
    assert hashes(out) == hashes(finished)
    again, whole = load_results(out), load_results(finished)
    elsewhere = {"seconds": None, "path": None}
    for a, b in zip(again.artefacts, whole.artefacts, strict=True):
        assert a.estimates.get("examples") == b.estimates.get("examples")
        for row in (a, b):
            row.estimates.pop("cpu_seconds", None)
        assert a.model_copy(update=elsewhere) == b.model_copy(update=elsewhere)
    assert again.verdict == whole.verdict
    assert not [f for f in out.rglob("*") if f.name.endswith((".tmp", ".old"))]


def test_two_processes_never_share_a_folder(finished, tiny_recipe):
    made = Pipeline(parse_recipe(tiny_recipe), finished)
    with Workspace(finished).locked(), pytest.raises(BadInput, match="another emomerge is working here"):
        made.run()


def test_a_process_that_is_turned_away_removes_nothing(tmp_path):
    space = Workspace(tmp_path / "out")
    with space.locked():
        with pytest.raises(BadInput), Workspace(tmp_path / "out").locked():
            pass
        assert space.out.exists()
        assert space.is_busy()
    assert not space.out.exists()


def test_training_seeds_are_merged_and_judged_apart(tiny_recipe, tmp_path):
    runs = {**tiny_recipe["runs"], "seeds": [0, 1], "optimizers": ["sens", "cats"]}
    recipe = {**tiny_recipe, "merge": [{"method": "mean"}], "runs": runs}
    out = tmp_path / "out"
    assert Pipeline(parse_recipe(recipe), out).run()
    results = load_results(out)
    assert {row.name for row in results.artefacts if row.role == "merge"} == {"mean-seed0", "mean-seed1"}
    assert any("2 training seeds" in caveat for caveat in results.verdict.caveats)


def test_train_all_only(tiny_recipe, tmp_path):
    made = Pipeline(parse_recipe(tiny_recipe), tmp_path / "out")
    assert made.train_all(["cats"])
    assert [d.name for d in (tmp_path / "out/runs").iterdir()] == ["cats-0"]
    assert RunDir(tmp_path / "out/runs/cats-0").state["state"] == "done"
    assert not made.train_all(["cats"])


def test_a_recipe_with_rounds_comes_to_its_end(tiny_recipe, tmp_path):
    options = {"rounds": 3, "outer": {"momentum": 0.5}, "average": "lawa", "cooldown": 0.5, "optimizers": ["sens", "cats"]}
    recipe = {
        **tiny_recipe,
        "merge": [{"method": "mean"}],
        "runs": {**tiny_recipe["runs"], **options},
        "controls": ["long-run"],
    }
    out = tmp_path / "out"
    with pytest.raises(BadInput, match="rounds need all runs"):
        Pipeline(parse_recipe(recipe), out).train_all(["cats"])
    assert Pipeline(parse_recipe(recipe), out).run()
    assert not Pipeline(parse_recipe(recipe), out).run()
    results = load_results(out)
    assert any("3 rounds" in caveat for caveat in results.verdict.caveats)
    assert [row["step"] for row in RunDir(out / "runs/cats-0").metrics()] == [1, 2, 3, 4, 5, 6]
    artefacts = {row.name: row for row in results.artefacts}
    assert artefacts["sens-0"].path.endswith("adapter-average")
    assert "in 3 rounds" in (out / "runs/sens-0/adapter-average/README.md").read_text()
    (long,) = (row for row in results.artefacts if row.control == "long-run")
    assert len(list(RunDir(out / "runs" / long.name).metrics())) == 12
    assert {run["rounds"] for run in status_of(out)["runs"] if run["name"] in ("sens-0", "cats-0")} == {3}


def test_wrong_merge_parameters_are_found_before_anything_is_trained(tiny_recipe, tmp_path):
    recipe = {**tiny_recipe, "merge": [{"method": "ties", "densty": 0.2}]}
    with pytest.raises(BadInput, match="densty.*density"):
        Pipeline(parse_recipe(recipe), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_changed_data_are_noticed(tmp_path):
    file = tmp_path / "a.tsv"
    recipe = parse_recipe({"name": "r", "base": {"model": "m"}, "task": {"kind": "text-classification", "train": str(file)}})
    space = Workspace(tmp_path / "out")
    space.out.mkdir()
    file.write_text("a\tb\n")
    first = space.input_hash(recipe)
    assert space.input_hash(recipe) == first
    os.utime(file, ns=(1, 1))
    assert space.input_hash(recipe) == first  # touched, not changed
    file.write_text("a\tc\n")
    os.utime(file, ns=(2, 2))
    assert space.input_hash(recipe) != first


def test_a_foreign_folder_is_left_alone(finished, tiny_recipe, tmp_path):
    for name in ("base", "runs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("precious")
    made = Pipeline(parse_recipe(tiny_recipe), tmp_path)
    with pytest.raises(BadInput, match="a `base` that emomerge did not make"):
        made.run()
    with pytest.raises(BadInput, match="not an output folder of emomerge"):
        made.restart()
    inside = {**tiny_recipe, "base": {"model": str(finished / "base")}}
    with pytest.raises(BadInput, match="the base lies inside the output folder"):
        Pipeline(parse_recipe(inside), finished).run()
    assert (tmp_path / "base/mine.txt").read_text() == (tmp_path / "runs/mine.txt").read_text() == "precious"


def test_restart_forgets_and_unusable_data_leave_nothing(finished, tiny_recipe, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    Pipeline(parse_recipe(tiny_recipe), out).restart()
    assert not out.exists()
    wrong = {**tiny_recipe, "task": {**tiny_recipe["task"], "train": "nowhere/at-all"}}
    with pytest.raises(BadInput):
        Pipeline(parse_recipe(wrong), tmp_path / "new").run()
    assert not (tmp_path / "new").exists()


def test_another_base_makes_everything_after_it_stale(finished, tiny_recipe, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    stamp = out / "stamps/base.json"
    changed = json.loads(stamp.read_text())
    changed["sha256"] = {"model.safetensors": "other bits"}
    stamp.write_text(json.dumps(changed))
    stages = Pipeline(parse_recipe(tiny_recipe), out).status()
    assert stages.pop("base")
    assert not any(stages.values())


def test_the_controls_that_a_sceptic_asks_for(tiny_recipe, tmp_path):
    """AdamW at the best of two rates, the mean of AdamW runs in other orders, SWA, the loss-matched point of the long run."""
    recipe = {
        **tiny_recipe,
        "merge": [{"method": "mean"}],
        "runs": {**tiny_recipe["runs"], "optimizers": ["sens", "cats"]},
        "rival": {"learning_rates": [1e-5, 1e-2], "snapshots": 4},
        "controls": ["distance-matched", "loss-matched", "long-run", "adamw-long-run", "adamw-average", "swa"],
    }
    out = tmp_path / "out"
    pipeline = Pipeline(parse_recipe(recipe), out)
    assert pipeline.run()
    assert not Pipeline(parse_recipe(recipe), out).run()
    by_control = {row.control: row for row in load_results(out).artefacts if row.control}
    assert set(by_control) == set(recipe["controls"])
    rates = [pipeline.measurer.loss(pipeline.run_artefact(s), "validation") for s in long_adamw_runs(pipeline.recipe, 0)]
    assert by_control["adamw-long-run"].loss("validation") == min(rates) < max(rates)

    (long,) = [spec for spec in pipeline.trained_controls if spec.control == "long-run"]
    assert long.snapshots == (3, 6, 9, 12)
    snapshots = [open_run(pipeline.base, pipeline.run_dir(long).snapshot(step)) for step in long.snapshots]
    last = open_run(pipeline.base, pipeline.run_dir(long).path)
    name = next(n for n in last if "query" in n and n.endswith("weight"))
    assert torch.equal(snapshots[-1][name], last[name])
    swa = control_artefacts(pipeline)["swa"][0]
    assert torch.equal(swa.checkpoint[name], merge(pipeline.base, snapshots[2:], method="mean")[name])
    matched, merged = by_control["loss-matched"], next(row for row in load_results(out).artefacts if row.role == "merge")
    losses = [pipeline.measurer.loss(pipeline.snapshot_artefact(long, step), "train") for step in long.snapshots]
    assert matched.loss("train") == min(losses, key=lambda loss: abs(loss - merged.loss("train")))
    members = [spec for spec in pipeline.trained_controls if spec.control == "adamw-average"]
    first, second = (open_run(pipeline.base, pipeline.run_dir(spec).path)[name] for spec in members)
    assert not torch.equal(first, second), "the members see their data in different orders"
    assert members[0].rate == 1e-2, "the rate whose long run did best"


@pytest.fixture(scope="module")
def probed(tiny_recipe, tmp_path_factory):
    """A run with the probe's standard preset, small."""
    recipe = {
        **tiny_recipe,
        "merge": [{"method": "tall-mask"}, {"method": "mean"}],
        "runs": {**tiny_recipe["runs"], "optimizers": ["sens", "cats"]},
        "probe": {"preset": "standard", "batches": 1, "batch_size": 32, "directions": 2, "lanczos_steps": 4, "trace_probes": 3},
    }
    out = tmp_path_factory.mktemp("probed") / "out"
    assert Pipeline(parse_recipe(recipe), out).run()
    return recipe, out


def test_the_standard_probe_measures_the_merge_its_rivals_and_the_base(probed):
    _, out = probed
    results = load_results(out)
    by_name = {row.name: row for row in results.artefacts}
    single = results.verdict.best_single[0]
    rivals = {
        a.name
        for a in results.artefacts
        if a.control in ("adamw-sweep", "adamw-soup", "long-run", "adamw-long-run", "loss-matched")
    }
    matched = {a.name for a in results.artefacts if a.control == "distance-matched" and a.of == single}
    measured = {name for name, a in by_name.items() if a.hessian}
    assert measured == {"base", "tall-mask", "mean", single} | rivals | matched
    for name in measured:
        found = by_name[name]
        assert {f"adaptive_{radius}" for radius in ("0.05", "0.1", "0.2")} <= set(found.estimates)
        assert found.mean("basin") > 0
        assert found.mean("lambda_min") <= found.mean("lambda_max")
        assert sum(found.hessian.layers.values()) == pytest.approx(found.mean("trace"), rel=1e-4)
    assert len(by_name["tall-mask"].hessian.subspace.eigenvalues) == 2
    assert results.barriers.names == ("tall-mask", "sens-0", "cats-0")
    flatter = results.verdict.flatter
    assert {e.what for e in flatter.evidence} >= {"λmax", "trace"}
    assert {e.against for e in flatter.evidence} == {"best single run", "distance-matched", "loss-matched"}
    assert flatter.note == "", "nothing that the claim needs is left unmeasured"


def test_a_probe_whose_ledger_lost_rows_ends_with_the_same_figures(probed, tmp_path):
    recipe, out = probed
    copy = tmp_path / "out"
    shutil.copytree(out, copy)
    ledger = copy / "evaluations.jsonl"
    lines = ledger.read_text().splitlines(keepends=True)
    ledger.write_text("".join(line for line in lines if len(line) % 3 and "lanczos" not in line) + lines[0][:20])
    (copy / "stamps" / "probe.json").unlink()
    assert Pipeline(parse_recipe(recipe), copy).run()
    for part in ("artefacts", "verdict", "barriers", "curves"):
        before, after = (json.dumps(json.loads(load_results(folder).to_json())[part]) for folder in (out, copy))
        assert before.replace(str(out), "") == after.replace(str(copy), ""), part


def test_a_long_run_that_diverges_is_a_finding_and_no_obstacle(tiny_recipe, tmp_path, monkeypatch):
    train = Pipeline.train

    def diverging(self, specs=None):
        if specs and specs[0].role == "control":
            raise RunFailed("run long-sens-0 failed: the loss is nan")
        train(self, specs)

    monkeypatch.setattr(Pipeline, "train", diverging)
    recipe = {**tiny_recipe, "merge": [{"method": "mean"}], "runs": {**tiny_recipe["runs"], "optimizers": ["sens", "cats"]}}
    out = tmp_path / "out"
    assert Pipeline(parse_recipe(recipe), out).run()
    assert "long run" in " ".join(load_results(out).verdict.caveats)
    assert not Pipeline(parse_recipe(recipe), out).run()


def test_every_written_model_has_a_card_and_a_worse_merge_says_so(finished):
    results = load_results(finished)
    by_name = {row.name: row for row in results.artefacts}
    for row in results.artefacts:
        if row.path:
            assert row.name in (Path(row.path) / "README.md").read_text()
    best = min(row.loss("validation") for row in results.artefacts if row.role == "run")
    for name, facts in results.merges.items():
        warned = any("use that run instead" in warning for warning in facts.warnings)
        assert warned == (by_name[name].loss("validation") > best)


def test_results_of_another_schema_are_measured_again_from_the_ledger(finished, tiny_recipe, tmp_path, capsys):
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    (out / "results.json").write_text(json.dumps({"name": "tiny", "artefacts": [], "verdict": {}}))
    for name in ("probe", "report"):
        stamp = json.loads((out / f"stamps/{name}.json").read_text())
        (out / f"stamps/{name}.json").write_text(json.dumps({**stamp, "inputs": "without a schema version"}))
    weights = {f: f.stat().st_mtime_ns for f in out.rglob("*.safetensors")}
    evaluations = (out / "evaluations.jsonl").read_text()
    pipeline = Pipeline(parse_recipe(tiny_recipe), out, display=Display())
    assert [name for name, done in pipeline.status().items() if not done] == ["probe", "report"]
    assert pipeline.run()
    assert "results.json was written by another version" in " ".join(capsys.readouterr().err.split())
    assert {f: f.stat().st_mtime_ns for f in out.rglob("*.safetensors")} == weights
    assert (out / "evaluations.jsonl").read_text() == evaluations
    estimates = [[row.estimates for row in load_results(folder).artefacts] for folder in (out, finished)]
    assert estimates[0] == estimates[1]


def test_results_damaged_without_changing_their_size_are_measured_again(finished, tiny_recipe, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    good = (out / "results.json").read_text()
    (out / "results.json").write_text(good.replace('"schema_version": ', '"schema_versiom": ', 1))
    pipeline = Pipeline(parse_recipe(tiny_recipe), out)
    assert [name for name, done in pipeline.status().items() if not done] == ["probe"]
    assert pipeline.run()
    estimates = [[row.estimates for row in load_results(folder).artefacts] for folder in (out, finished)]
    assert estimates[0] == estimates[1]
