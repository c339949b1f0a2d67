"""The probe in workers: the figures of one process, whoever dies on the way."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from emomerge.checkpoints import MemoryCheckpoint, model_checkpoint, open_checkpoint, write_checkpoint
from emomerge.errors import EmomergeError
from emomerge.experiment.assessment import probe_models
from emomerge.probing.ledger import FIELDS, Ledger
from emomerge.probing.registry import METRICS as REGISTRY
from emomerge.probing.registry import Measurement, metric
from emomerge.progress import Display
from emomerge.recipe import parse_recipe
from emomerge.tasks import make_task
from emomerge.training import open_engine

METRICS = ("gaussian", "adaptive", "hessian", "basin", "worst-case", "curve")


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A recipe, its base's folder, a model, and what one process finds."""
    pytest.importorskip("sklearn")
    torch.set_num_threads(1)
    section = {
        "name": "t",
        "base": {"prepare": {"model": "vit", "hidden": 16, "layers": 1, "patch_size": 4}},
        "task": {"kind": "image-classification", "train": "digits", "limit": 64, "eval_fraction": 0.25},
        "probe": {"batches": 1, "batch_size": 16, "directions": 6, "lanczos_steps": 3, "trace_probes": 2, "radii": [0.03]},
    }
    recipe, root = parse_recipe(section), tmp_path_factory.mktemp("jobs")
    task = make_task(recipe.task)
    torch.manual_seed(0)
    model = task.new_model(recipe.base, task.load_data(recipe.base))
    model.config.save_pretrained(root / "files")
    task.save_processor(root / "files")
    base = model_checkpoint(model, source="base")
    write_checkpoint(base, root / "base", files_from=root / "files")
    other = MemoryCheckpoint({name: base[name] + 0.02 * torch.randn_like(base[name]) for name in base})
    write_checkpoint(other, root / "model", files_from=root / "files")
    return recipe, root, probe(recipe, root, root / "here")


def probe(recipe, root, out, engine=None):
    found = probe_models(recipe, [str(root / "model")], root / "base", out, Display(quiet=True), METRICS, engine)
    return json.dumps([found.model_dump(mode="json", include={"artefacts", "columns", "curves"})])


class Dying:
    """An engine whose calls happen at once; of every three new ones one is lost after some evaluations, but for their rows."""

    max_parallel = None

    def __init__(self, monkeypatch):
        self.monkeypatch, self.jobs, self.added = monkeypatch, [], 0

    def submit(self, function, job):
        dies = len(self.jobs) % 3 == 2 and job.ledger not in {known.ledger for known in self.jobs}
        self.jobs.append(job)
        self.error = None
        add, self.added = Ledger._add, 0

        def dying(ledger, rows):
            self.added += 1
            if self.added > 2 and dies:
                raise KeyboardInterrupt
            add(ledger, rows)

        with self.monkeypatch.context() as patch:
            patch.setattr(Ledger, "_add", dying)
            try:
                self.returned = function(job)
            except KeyboardInterrupt as lost:
                self.error = lost
        return Over(self.error, None if self.error else self.returned)


class Over:
    def __init__(self, error, returned):
        self.error, self.returned = error, returned

    def done(self):
        return True

    def result(self):
        if self.error:
            raise RuntimeError("a worker that died")
        return self.returned

    def cancel(self):
        pass


def test_the_same_figures_although_workers_die(given, tmp_path, monkeypatch):
    recipe, root, here = given
    engine = Dying(monkeypatch)
    monkeypatch.setattr("emomerge.training.workers.POLL", 0)
    assert probe(recipe, root, tmp_path / "there", engine) == here
    per_model = 2 * 2 + 3 + 1  # six directions of two metrics in jobs of four and two; three other metrics; scores
    of_one = 1  # the curve from the base to the other model
    assert len({job.ledger for job in engine.jobs}) == 2 * per_model + of_one < len(engine.jobs)
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["evaluations.jsonl", "results.json"]

    # What they found is not evaluated again, neither by us nor by workers.
    rows = (tmp_path / "there" / "evaluations.jsonl").read_text().splitlines()
    keys = [tuple(json.loads(row)[field] for field in FIELDS) for row in rows]
    assert len(set(keys)) == len(keys)
    engine.jobs.clear()
    assert probe(recipe, root, tmp_path / "there", engine) == here
    assert engine.jobs == []
    assert (tmp_path / "there" / "evaluations.jsonl").read_text().splitlines() == rows


def test_equal_weights_are_measured_by_one_job(given, tmp_path, monkeypatch):
    recipe, root, _ = given
    monkeypatch.setattr("emomerge.training.workers.POLL", 0)
    engine = Dying(monkeypatch)
    probe_models(recipe, [str(root / "base")], root / "base", tmp_path / "there", Display(quiet=True), ["gaussian"], engine)
    assert len({job.ledger for job in engine.jobs}) == 3
    assert {job.artefact.hash for job in engine.jobs} == {engine.jobs[0].artefact.hash}
    assert len({(job.artefact.name, job.ledger) for job in engine.jobs}) == 3


def test_errors_are_reported_after_all_other_jobs_are_done(given, tmp_path, monkeypatch):
    recipe, root, here = given
    monkeypatch.setattr("emomerge.training.workers.POLL", 0)
    engine = Dying(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setitem(REGISTRY, "hessian", replace(REGISTRY["hessian"], function=lambda probe, **options: 1 / 0))
        with pytest.raises(EmomergeError, match="hessian of base failed: ZeroDivisionError.*hessian of model failed"):
            probe(recipe, root, tmp_path / "there", engine)
    engine.jobs.clear()
    assert probe(recipe, root, tmp_path / "there", engine) == here
    assert {job.metric for job in engine.jobs} == {"hessian"}


def test_a_new_metric_runs_from_a_recipe_in_workers_and_in_the_results(given, tmp_path, monkeypatch):
    recipe, root, _ = given
    monkeypatch.setattr("emomerge.training.workers.POLL", 0)
    monkeypatch.setitem(REGISTRY, "largest-weight", None)  # removed again after the test

    @metric("largest-weight", split="whole")
    def largest_weight(probe, factor: float = 1.0):
        """Measure the largest weight."""
        row = probe.ledger.ask(
            lambda: {"largest": max(float(p.detach().abs().max()) for p in probe.parameters.values())},
            **probe.ledger_key("largest weight", 0.0, None, 0),
        )
        return Measurement(np.array(row["largest"]), factor * row["largest"])

    section = {"preset": "quick", "metrics": ("largest-weight",), "options": {"largest-weight": {"factor": 2}}}
    recipe = recipe.model_copy(update={"probe": recipe.probe.model_copy(update=section)})
    engine = Dying(monkeypatch)
    results = probe_models(recipe, [str(root / "model")], root / "base", tmp_path / "there", Display(quiet=True), None, engine)
    (column,) = [column for column in results.columns if column.key == "largest-weight"]
    assert (column.title, column.meaning) == ("largest-weight", "Measure the largest weight")
    weights = open_checkpoint(root / "model")
    assert results.artefacts[1].mean(column.key) == 2 * max(float(weights[name].abs().max()) for name in weights)
    assert {job.metric for job in engine.jobs} == {"gaussian", "curve", "largest-weight", "basics"}


@pytest.mark.cluster
def test_ray_finds_the_same_figures(given, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    recipe, root, here = given
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    try:
        engine = open_engine("ray", max_parallel=2, settings={}, folder=tmp_path)
        assert probe(recipe, root, tmp_path / "there", engine) == here
    finally:
        ray.shutdown()
