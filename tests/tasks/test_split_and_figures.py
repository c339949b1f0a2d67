from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from emomerge.errors import BadInput
from emomerge.experiment.scores import Scorer, score
from emomerge.tasks import Split, Task, sources
from emomerge.tasks.text import TextSplit
from emomerge.tasks.text_classification import TextClassification


def section(**options):
    return TextClassification(kind="text-classification", train="t.tsv", **options)


class Toy(Task):
    """Logits straight from a linear layer with dropout before it."""

    def load_data(self, base): ...

    def logits(self, model, batch):
        return model(batch["x"])


def toy(rows=37):
    torch.manual_seed(1)
    split = Split({"x": torch.randn(rows, 6), "labels": torch.randint(3, (rows,))})
    return Toy(None), nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3)), split


def test_batch_take_and_digest():
    split = Split({"x": torch.arange(12.0).view(6, 2), "labels": torch.arange(6)})
    assert split.batch([4, 1])["x"].tolist() == [[8.0, 9.0], [2.0, 3.0]]
    part = split.take(torch.tensor([5, 0]))
    assert len(part) == 2 and part.batch([0])["labels"].tolist() == [5]
    assert part.digest == split.take([5, 0]).digest != split.take([0, 5]).digest
    split.batch([0, 1])["x"].zero_()
    assert split.batch([0])["x"].tolist() == [[0.0, 1.0]]


def test_digest_does_not_depend_on_how_far_a_split_is_padded():
    wide = TextSplit(
        {
            "input_ids": torch.tensor([[5, 6, 0, 0], [7, 0, 0, 0]]),
            "attention_mask": torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]),
            "labels": torch.tensor([0, 1]),
        }
    )
    batch = wide.batch([1])
    assert batch["input_ids"].tolist() == [[7]] and batch["input_ids"].dtype == torch.int64
    narrow = TextSplit(wide.batch([0, 1]))
    assert narrow.digest == wide.digest


def test_row_figures_equal_direct_computation():
    task, model, split = toy()
    batch = split.batch(range(37))
    with torch.inference_mode():
        loss, weight, correct, entropy = task.row_figures(model.eval(), batch)
    logits = model[1](batch["x"]).detach().double()
    p = logits.softmax(-1)
    torch.testing.assert_close(loss.double(), F.cross_entropy(logits, batch["labels"], reduction="none"), atol=1e-6, rtol=0)
    assert correct.tolist() == (logits.argmax(-1) == batch["labels"]).tolist()
    torch.testing.assert_close(entropy.double(), -(p * p.log()).sum(-1), atol=1e-6, rtol=0)
    assert weight.tolist() == [1] * 37
    whole = score(task, model, batch)  # weights of one change no bit of a mean
    assert [whole[name] for name in ("loss", "accuracy", "entropy")] == torch.stack([loss, correct, entropy]).mean(1).tolist()
    assert whole["weight"] == 37
    assert float(loss.mean()) == pytest.approx(float(task.loss(model, batch).detach()), abs=1e-6)


def test_loss_is_float32_of_half_logits():
    task, model, split = toy()
    model = model.bfloat16().eval()
    batch = {"x": split.batch(range(4))["x"].bfloat16(), "labels": split.batch(range(4))["labels"]}
    assert task.loss(model, batch).dtype == torch.float32


class Padded(Split):
    """Rows of different lengths in batches as wide as their longest row."""

    lengths = property(lambda self: self._fields["length"])

    def batch(self, indices):
        batch = super().batch(indices)
        Padded.widths.append(int(batch["length"].max()))
        return {name: batch[name] for name in ("x", "labels")}


@pytest.mark.parametrize("size, width", [(5, 7), (3, 3), (4, 40)])
def test_scores_of_batches_do_not_depend_on_the_rows_that_are_evaluated_together(size, width):
    task, model, plain = toy()
    lengths = torch.randint(1, 99, (37,), generator=torch.Generator().manual_seed(1))
    split, Padded.widths = Padded(plain.batch(range(37)) | {"length": lengths}), []
    rows = torch.arange(36, 3, -1)
    scorer = Scorer(split, rows, size=size, width=width, device=torch.device("cpu"))
    expected = [score(task, model.eval(), plain.batch(part)) for part in rows.split(size)]
    everything = range(len(expected))
    assert scorer.sizes == [len(part) for part in rows.split(size)]
    for wanted in (everything, everything[1::2]):
        for found, number in zip(scorer.scores(task, model, wanted), wanted, strict=True):
            assert found == pytest.approx(expected[number], rel=1e-6) and found.keys() == expected[number].keys()
    assert sum(Padded.widths[:2]) <= 2 * lengths.median() or width > 16  # short rows keep each other company
    assert len(Padded.widths) == sum(-(-len(part) // width) for part in rows.split(size * scorer.together))  # each moved once
    total = sum(e["loss"] * e["weight"] for e in expected) / len(rows)
    assert scorer.mean_loss(task, model) == pytest.approx(total, rel=1e-6)


@given(
    rows=st.integers(8, 300),
    fraction=st.floats(0.01, 0.89),
    seed=st.integers(0, 5),
    validation=st.booleans(),
    test=st.booleans(),
    limit=st.none() | st.integers(8, 400),
)
def test_split_rows_partition_what_is_used(rows, fraction, seed, validation, test, limit):
    settings = section(eval_fraction=fraction, seed=seed, limit=limit)
    parts = sources.split_rows(rows, settings, validation=validation, test=test)
    train, held_validation, held_test = (set(part.tolist()) for part in parts)
    used = min(rows, limit or rows)
    assert len(train | held_validation | held_test) == len(train) + len(held_validation) + len(held_test) == used
    assert bool(held_validation) == validation and bool(held_test) == test
    if validation and test:
        assert 0 <= len(held_validation) - len(held_test) <= 1
    again = sources.split_rows(rows, settings, validation=validation, test=test)
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))


def test_limit_draws_by_seed():
    draws = [set(sources.split_rows(100, section(seed=s, limit=10), validation=False, test=False)[0].tolist()) for s in (0, 1)]
    assert draws[0] != draws[1] and draws[0] != set(range(10))


def test_too_few_rows_to_split():
    with pytest.raises(BadInput, match="too few rows: t.tsv; expected at least 3; found 2"):
        sources.split_rows(2, section(), validation=True, test=True)


def test_whole_number_classes_sort_as_numbers():
    assert sources.distinct_classes(["10", "9", "1"]) == ("1", "9", "10")
    assert sources.distinct_classes(["b", "10", "a"]) == ("10", "a", "b")


def test_label_numbers_count_only_where_names_are_no_numbers():
    assert sources.class_index(("neg", "pos"))("1", "row") == 1
    assert sources.class_index(("1", "2"))("1", "row") == 0
    with pytest.raises(BadInput, match="label outside the classes: row; expected 1, 2; found '0'"):
        sources.class_index(("1", "2"))("0", "row")


@pytest.mark.parametrize("source", ["missing.tsv", "./missing", "a/b/c", "~/missing", "x/train-images-idx3-ubyte"])
def test_a_missing_path_is_not_taken_for_a_hub_id(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="no such data file or folder"):
        sources.local_path(source)


def test_an_id_is_no_path_and_an_existing_path_is_no_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sources.local_path("user/some.data-set") is None
    (tmp_path / "imdb").mkdir()
    assert sources.local_path("imdb") is not None
