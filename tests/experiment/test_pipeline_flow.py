"""The recipe flow-fashion in small, on digits: from noise to merge and report."""

import base64
from pathlib import Path

import pytest
import torch

import emomerge
from emomerge.checkpoints import load_into
from emomerge.experiment.pipeline import Pipeline
from emomerge.recipe import load_recipe
from emomerge.reporting import png
from emomerge.results import load_results

RECIPE = Path(__file__).parents[2] / "recipes" / "flow-fashion.yaml"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    pytest.importorskip("sklearn")
    torch.set_num_threads(1)
    changes = [
        "task.train=digits", "task.limit=200", "task.eval_fraction=0.4", "task.sampling_steps=2",
        "base.prepare.hidden=32", "base.prepare.layers=1", "base.prepare.patch_size=4", "base.prepare.steps=120",
        "base.prepare.batch_size=16",
        "base.prepare.learning_rate=0.01", "adapter.rank=4", "runs.steps=40", "runs.batch_size=16",
        "runs.procedure=paper", "runs.preset=guarded", "runs.lr=30",
        "runs.optimizers=[sens, cats]", "merge=[{method: tall-mask}, {method: mean}]", "controls=[distance-matched]",
        "probe.batch_size=32", "probe.directions=2",
    ]  # fmt: skip
    made = Pipeline(load_recipe(RECIPE, changes), tmp_path_factory.mktemp("flow") / "out")
    assert made.run()
    return made


def test_it_learns_and_reports_without_accuracies(finished):
    results = load_results(finished.space.out)
    losses = {row.name: row.loss("test") for row in results.artefacts}
    assert losses["sens-0"] < losses["base"] - 0.02
    assert all(not {"test_accuracy", "entropy"} & set(row.estimates) for row in results.artefacts)
    assert results.data.unit == "mean squared error" and len(results.data.classes) == 10
    page = finished.space.report.read_text()
    assert "nats" not in page.split("<script>")[0] and "cross-entropy" not in page.split("<script>")[0]


def test_the_report_shows_what_models_draw(finished):
    samples = load_results(finished.space.out).samples
    best = load_results(finished.space.out).verdict.best_single[0]
    assert list(samples.images) == ["base", best, "tall-mask"]
    pictures = [base64.b64decode(image) for image in samples.images.values()]
    assert len(set(pictures)) == 3 and all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert samples.images["tall-mask"] in finished.space.report.read_text()
    finished.measurer.load(finished.merge_artefact(finished.recipe.merge[0], 0))
    again = png(finished.task.samples(finished.measurer.model).picture.numpy())
    assert base64.b64encode(again).decode() == samples.images["tall-mask"]


def test_a_run_is_base_and_adapter_in_peft(finished):
    from peft import PeftModel

    run = finished.space.runs / "sens-0"
    live = PeftModel.from_pretrained(finished.task.reload_model(finished.space.base), run / "adapter").eval()
    baked = finished.task.reload_model(finished.space.base)
    load_into(baked, emomerge.bake(finished.space.base, run))
    batch = finished.measurer.batches("test")[0]
    with torch.inference_mode():
        pair = [finished.task.row_figures(model, batch).loss for model in (live, baked)]
    torch.testing.assert_close(*pair, atol=1e-5, rtol=1e-5)
