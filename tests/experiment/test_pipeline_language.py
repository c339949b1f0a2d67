"""The recipe causal-lm in small: from text to merge and report."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import emomerge
from emomerge.checkpoints import load_into
from emomerge.experiment.pipeline import Pipeline
from emomerge.recipe import load_recipe
from emomerge.results import load_results

RECIPES = Path(__file__).parents[2] / "recipes"
NOUNS, VERBS = ["cat", "dog", "bird", "fish"], ["sees", "likes", "hears"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("language")
    story = [f"the {a} {v} the {b}." for a in NOUNS for v in VERBS for b in NOUNS]
    (folder / "base.txt").write_text("\n\n".join(story))
    (folder / "runs.txt").write_text("\n\n".join(" ".join(reversed(s.split())) for s in story))
    changes = [
        f"base.prepare.train={folder / 'base.txt'}", f"task.train={folder / 'runs.txt'}", "task.limit=null",
        "task.max_length=32",
        "base.prepare.hidden=32", "base.prepare.layers=1", "base.prepare.vocabulary=290", "base.prepare.steps=40",
        "base.prepare.batch_size=8", "base.prepare.learning_rate=0.01", "adapter.rank=4", "runs.steps=40", "runs.batch_size=8",
        "runs.procedure=paper", "runs.preset=guarded",
        "runs.lr=30", "runs.optimizers=[sens, cats]", "merge=[{method: tall-mask}, {method: mean, dtype: bfloat16}]",
        "controls=[distance-matched]", "probe.batch_size=8", "probe.directions=2",
    ]  # fmt: skip
    recipe = load_recipe(RECIPES / "causal-lm.yaml", changes)
    made = Pipeline(recipe, folder / "out")
    assert made.run()
    return made


def test_it_learns_and_reports(finished):
    results = load_results(finished.space.out)
    losses = {row.name: row.loss("test") for row in results.artefacts}
    assert losses["sens-0"] < losses["base"] - 0.1
    assert results.data.classes == () and "each blind to the others" in results.data.summary
    page = finished.space.report.read_text()
    assert "perplexity" in page and "Samples" in page and "percentage points" not in page
    best = results.verdict.best_single[0]
    assert list(results.samples.texts) == ["base", best, "tall-mask"]
    assert all(len(found) == len(results.samples.prompts) for found in results.samples.texts.values())


def test_reported_losses_are_means_over_tokens(finished):
    from transformers import AutoModelForCausalLM

    folder = finished.space.merges / "tall-mask"
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    total, count = 0.0, 0
    with torch.inference_mode():
        for batch in finished.measurer.batches("test"):
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
            for row, place in (batch["labels"][:, 1:] != -100).nonzero().tolist():
                total -= float(logits[row, place].log_softmax(-1)[batch["labels"][row, place + 1]])
                count += 1
    row = next(row for row in load_results(finished.space.out).artefacts if row.name == "tall-mask")
    assert row.loss("test") == pytest.approx(total / count, abs=1e-5)
    weights = finished.measurer.scores(finished.merge_artefact(finished.recipe.merge[0], 0), "test")["weight"]
    assert weights.sum() == count and len(np.unique(weights)) > 1


def test_a_merge_writes_by_itself(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = finished.space.merges / "mean"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert emomerge.open_checkpoint(folder).info("model.embed_tokens.weight").dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    written = model.generate(**tokenizer("dog. the", return_tensors="pt", return_token_type_ids=False), max_new_tokens=8)
    assert len(tokenizer.decode(written[0])) > len("dog. the")


def test_a_run_is_base_and_adapter_in_peft(finished):
    from peft import PeftModel

    run = finished.space.runs / "sens-0"
    live = PeftModel.from_pretrained(finished.task.reload_model(finished.space.base), run / "adapter").eval()
    assert live.peft_config["default"].task_type == "CAUSAL_LM"
    baked = finished.task.reload_model(finished.space.base)
    load_into(baked, emomerge.bake(finished.space.base, run))
    batch = finished.measurer.batches("test")[0]
    with torch.inference_mode():
        assert (finished.task.logits(live, batch) - finished.task.logits(baked, batch)).abs().max() <= 1e-4


def test_a_gradient_of_groups_is_that_of_the_tokens(finished):
    """The probe's units are weighted by tokens: their weighted mean is the loss over all tokens."""
    measurer = finished.measurer
    batch = measurer.batches("train")[0]
    with torch.inference_mode():
        losses, weights = measurer.grouped_loss(measurer.model, batch)
        whole = float(finished.task.loss(measurer.model, batch))
    assert len(losses) == len(weights) > 1
    assert math.isclose(float(np.average(losses, weights=weights)), whole, rel_tol=1e-5)
