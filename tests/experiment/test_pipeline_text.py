"""A pretrained text encoder without a head, from TSV to merged classifier."""

import random

import pytest
import torch

import emomerge
from emomerge.checkpoints import load_into
from emomerge.experiment.pipeline import Pipeline
from emomerge.recipe import parse_recipe
from emomerge.results import load_results

GOOD, BAD, FILLER = ["good", "fine", "lovely"], ["bad", "dull", "awful"], ["the", "film", "a", "story", "is", "and"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    from transformers import BertConfig, BertModel, BertTokenizerFast

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("text")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *FILLER]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=32).save_pretrained(str(folder / "bert"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=32, **sizes)).save_pretrained(folder / "bert")
    rng = random.Random(0)
    rows = [
        f"{n}\t{rng.uniform(1, 4) * sign:.3f}\t{' '.join(rng.choices(FILLER, k=3))} {rng.choice(GOOD if sign > 0 else BAD)}"
        for n, sign in enumerate([1, -1] * 60)
    ]
    (folder / "reviews.tsv").write_text("\n".join([*rows, "120\t0.1\tneither here nor there"]) + "\n")
    recipe = parse_recipe(
        {
            "name": "reviews",
            "base": {"model": str(folder / "bert")},
            "task": {
                "kind": "text-classification", "train": str(folder / "reviews.tsv"), "columns": {"text": 2, "label": 1},
                "classes": {"negative": "< -0.5", "positive": "> 0.5"}, "eval_fraction": 0.3, "max_length": 16,
            },
            "adapter": {"kind": "lora", "rank": 2, "alpha": 4},
            "runs": {
                "procedure": "paper", "preset": "guarded", "steps": 60, "batch_size": 8, "lr": 30.0,
                "optimizers": ["sens", "cats"],
            },
            "merge": [{"method": "tall-mask"}, {"method": "mean", "dtype": "bfloat16"}],
            "controls": ["distance-matched"],
            "probe": {"batches": 1, "batch_size": 32, "directions": 2},
        }
    )  # fmt: skip
    made = Pipeline(recipe, folder / "out")
    assert made.run()
    return made


def test_it_learns_and_reports(finished):
    results = load_results(finished.space.out)
    losses = {row.name: row.loss("test") for row in results.artefacts}
    assert losses["sens-0"] < losses["base"] - 0.02
    assert results.data.classes == ("negative", "positive")
    assert "120 rows in 2 classes; 1 left out" in results.data.summary


def test_the_merge_loads_by_itself_and_is_what_was_evaluated(finished):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = finished.space.merges / "tall-mask"
    loaded = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert loaded.config.id2label == {0: "negative", 1: "positive"}
    assert len(AutoTokenizer.from_pretrained(folder)) == 17
    load_into(finished.measurer.model, emomerge.open_checkpoint(folder))
    with torch.inference_mode():
        for batch in finished.measurer.batches("test"):
            evaluated = finished.task.logits(finished.measurer.model, batch)
            again = loaded(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
            assert (evaluated - again).abs().max() <= 1e-5
    assert emomerge.open_checkpoint(finished.space.merges / "mean").info("classifier.weight").dtype == torch.bfloat16


def test_a_run_is_base_and_adapter_in_peft(finished):
    from peft import PeftModel

    run = finished.space.runs / "sens-0"
    live = PeftModel.from_pretrained(finished.task.reload_model(finished.space.base), run / "adapter").eval()
    baked = finished.task.reload_model(finished.space.base)
    load_into(baked, emomerge.bake(finished.space.base, run))
    batch = finished.measurer.batches("test")[0]
    with torch.inference_mode():
        assert (finished.task.logits(live, batch) - finished.task.logits(baked, batch)).abs().max() <= 1e-5
    assert not torch.equal(baked.classifier.weight, finished.task.reload_model(finished.space.base).classifier.weight)
