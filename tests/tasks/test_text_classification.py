from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from emomerge.errors import BadInput
from emomerge.recipe import Base
from emomerge.tasks import padding


def rows_of(reviews):
    return [line.split("\t") for line in reviews.read_text().splitlines()[1:]]


def all_rows(data):
    """Every example of the data as (token ids, label), in a canonical order."""
    found = []
    for split in (data.train, data.validation, data.test):
        for row in range(len(split)):
            batch = split.batch([row])
            found.append((tuple(batch["input_ids"][0].tolist()), int(batch["labels"][0])))
    return sorted(found)


@pytest.fixture
def base(tiny_bert):
    return Base(model=str(tiny_bert))


def test_tsv_csv_jsonl_and_numbered_columns_agree(reviews, tmp_path, text_task, base):
    rows = rows_of(reviews)
    with (tmp_path / "r.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("label", "text"), *((n, t) for t, n in rows)])
    (tmp_path / "r.jsonl").write_text("".join(json.dumps({"text": t, "label": n}) + "\n" for t, n in rows))
    (tmp_path / "bare.tsv").write_text("".join(f"{i}\t{n}\t{t}\n" for i, (t, n) in enumerate(rows)))
    data = text_task(reviews).load_data(base)
    assert data.classes == ("neg", "pos")
    assert data.summary == "80 rows in 2 classes; 72 to train, 4 to validate, 4 to test"
    assert (len(data.train), len(data.validation), len(data.test)) == (72, 4, 4)
    for name, options in (
        ("r.csv", {}),
        ("r.jsonl", {}),
        ("bare.tsv", {"columns": {"text": 2, "label": 1}}),
    ):
        other = text_task(tmp_path / name, **options).load_data(base)
        assert other.train.digest == data.train.digest and other.test.digest == data.test.digest


def test_quotes_are_plain_in_tsv_and_rfc_in_csv(tmp_path, text_task, base):
    good = '"good film'
    (tmp_path / "q.tsv").write_text("text\tlabel\n" + f"{good}\tpos\nbad film\tneg\n" * 10)
    text_task(tmp_path / "q.tsv").load_data(base)
    (tmp_path / "q.csv").write_text(
        'text,label\n"good, ""film""\nand story",pos\nbad film,neg\n' * 1 + "bad,neg\ngood,pos\n" * 10
    )
    data = text_task(tmp_path / "q.csv").load_data(base)
    assert data.summary.startswith("22 rows in 2 classes")
    (tmp_path / "open.csv").write_text('text,label\n"good film,pos\nbad film,neg\n')
    with pytest.raises(BadInput, match="the file cannot be read"):
        text_task(tmp_path / "open.csv").load_data(base)


def test_byte_order_mark_and_crlf(reviews, tmp_path, text_task, base):
    other = tmp_path / "windows.tsv"
    other.write_bytes(b"\xef\xbb\xbf" + reviews.read_bytes().replace(b"\n", b"\r\n"))
    assert text_task(other).load_data(base).train.digest == text_task(reviews).load_data(base).train.digest


def test_ratings_are_cut_by_conditions(tmp_path, text_task, base):
    path = tmp_path / "rated.tsv"
    path.write_text("".join(f"good film\t{r}\n" for r in [-2, -0.6, -0.5, 0, 0.5, 0.51, "1e0", ".9", -3, 4] * 3))
    options = {"columns": {"text": 0, "label": 1}, "classes": {"negative": "< -0.5", "positive": "> 0.5"}}
    data = text_task(path, **options).load_data(base)
    assert data.classes == ("negative", "positive")
    assert data.summary.startswith("21 rows in 2 classes; 9 left out")
    assert [label for _, label in all_rows(data)].count(0) == 9
    bands = {"low": "<1", "mid": ">= 1, < 3", "high": ">=3"}
    path.write_text("".join(f"good film\t{r}\n" for r in range(5)) * 4)
    data = text_task(path, columns={"text": 0, "label": 1}, classes=bands).load_data(base)
    assert sorted(label for _, label in all_rows(data)) == [0] * 4 + [1] * 8 + [2] * 8


def test_given_classes_fix_the_order_and_numbers_stand_for_them(tmp_path, text_task, base):
    path = tmp_path / "n.jsonl"
    rows = [{"text": "good film", "label": 0}, {"text": "bad film", "label": 1}] * 12
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = text_task(path, classes=("zebra", "ape")).load_data(base)
    assert data.classes == ("zebra", "ape")
    assert {label for _, label in all_rows(data)} == {0, 1}
    assert text_task(path).load_data(base).classes == ("0", "1")


def test_own_validation_and_test_files_are_used_whole(reviews, tmp_path, text_task, base):
    other = tmp_path / "other.tsv"
    other.write_text("text\tlabel\n" + "bad story\tneg\n" * 3)
    data = text_task(reviews, validation=str(other), test=str(other)).load_data(base)
    assert (len(data.train), len(data.validation), len(data.test)) == (80, 3, 3)
    assert data.validation.batch(range(3))["labels"].tolist() == [0, 0, 0]
    data = text_task(reviews, test=str(other)).load_data(base)
    assert (len(data.train), len(data.validation), len(data.test)) == (72, 8, 3)
    data = text_task(reviews, limit=20, eval_fraction=0.2).load_data(base)
    assert (len(data.train), len(data.validation), len(data.test)) == (16, 2, 2)


def test_long_sentences_are_cut_and_batches_fit_their_longest(reviews, text_task, base):
    data = text_task(reviews, max_length=6).load_data(base)
    batch = data.train.batch(range(len(data.train)))
    assert batch["input_ids"].shape == (72, 6)
    lengths = batch["attention_mask"].sum(1)
    short = int(lengths.argmin())
    assert data.train.batch([short])["input_ids"].shape == (1, int(lengths.min()))


def test_a_datasets_id(monkeypatch, text_task, base):
    import datasets

    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["neg", "pos"]))
    stored = datasets.Dataset.from_dict({"text": ["bad film", "good film"] * 20, "label": [0, 1] * 20}, features=features)

    def load_dataset(name, split):
        assert name == "user/reviews"
        if split not in ("train", "test"):
            raise ValueError(f"Unknown split {split!r}")
        return stored

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = text_task("user/reviews", test="user/reviews").load_data(base)
    assert data.classes == ("neg", "pos") and len(data.test) == 40
    with pytest.raises(BadInput, match=r"no column 'txt': user/reviews; found columns text, label; did you mean 'text'\?"):
        text_task("user/reviews", columns={"text": "txt"}).load_data(base)
    with pytest.raises(BadInput, match="user/reviews, split validation; found ValueError: Unknown split"):
        text_task("user/reviews", validation="user/reviews").load_data(base)


TWO = "good\tpos\nbad\tneg\n"
BY_RATING = {"columns": {"text": 0, "label": 1}, "classes": {"low": "< 1", "high": "> 0"}}


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.tsv", "txt\tlabel\n" + TWO, {}, "no column 'text': .*a.tsv; found columns txt, label; did you mean 'txt'?"),
        ("a.tsv", "q\tlabel\n" + TWO, {}, "no column 'text': .*; found columns q, label; set task.columns"),
        ("a.tsv", TWO, {"columns": {"text": 0, "label": 4}}, "too few columns: .*a.tsv, row 1; expected a column 4"),
        ("a.tsv", TWO, {"columns": {"text": 0, "label": -1}}, "columns are counted from 0: task.columns; found -1"),
        ("a.tsv", "text\tlabel\ngood\tpos\nlonely\n", {}, "row with too few columns: .*, row 3; .*found 1 columns"),
        ("a.tsv", "text\tlabel\ngood\t\n", {}, "row without a label: .*, row 2"),
        ("a.tsv", "text\tlabel\n \tpos\n", {}, "row without text: .*, row 2; found ' '"),
        ("a.tsv", "text\tlabel\n", {}, "the data file has no rows"),
        ("a.tsv", "", {}, "the data file is empty"),
        ("a.tsv", "text\tlabel\n" + TWO, {}, "too few rows|no training row"),
        ("a.tsv", "text\tlabel\n" + "good\tpos\n" * 9, {}, "classification needs two classes: .*; found pos"),
        (
            "a.tsv",
            "text\tlabel\n" + TWO * 9 + "so\tmeh\n",
            {"classes": ("neg", "pos")},
            "label outside the classes: .*a.tsv, row 20; expected neg, pos; found 'meh'",
        ),
        ("a.tsv", "text\tlabel\n" + TWO * 9, {"classes": ("neg", "pos", "odd")}, "no training row of class 'odd'"),
        ("a.tsv", "text\tlabel\n" + TWO * 9, {"classes": ("neg", "neg")}, "a class is named twice"),
        ("a.tsv", "good\t0.5\n", BY_RATING, "a rating meets two conditions: .*, row 1; found 0.5 in 'low' and 'high'"),
        ("a.tsv", "good\t1_0\n", BY_RATING, "rating is not a number: .*, row 1; found '1_0'"),
        ("a.tsv", "good\tnan\n", BY_RATING, "rating is not a number"),
        ("a.tsv", "text\tlabel\n" + TWO, {"classes": {"a": "=> 1", "b": "< 1"}}, "task.classes.a; .*'=> 1'"),
        ("a.tsv", "text\tlabel\n" + TWO, {"classes": {"a": "> 1,", "b": "< 1"}}, "condition not understood"),
        ("a.csv", b"text,label\n\xff\xfe,pos\n", {}, "the file is not UTF-8"),
        ("a.jsonl", '{"text": "good", "label": "pos"}\n{nope\n', {}, "line is not a JSON object: .*a.jsonl, row 2"),
        ("a.jsonl", "[1]\n", {}, "line is not a JSON object: .*, row 1; found Input should be an object"),
        ("a.jsonl", '{"texts": "good", "label": 1}\n', {}, "no column 'text': .*, row 1; .*did you mean 'texts'?"),
        ("a.jsonl", '{"text": 3, "label": 1}\n', {}, "row without text: .*, row 1; found 3"),
        ("a.jsonl", '{"text": "good", "label": null}\n', {}, "row without a label: .*, row 1"),
        ("a.md", TWO, {}, "not text data: .*a.md; expected a .tsv, .csv or .jsonl file"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_said_in_one_line(tmp_path, text_task, base, name, content, options, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput, match=message) as caught:
        text_task(tmp_path / name, **options).load_data(base)
    assert "\n" not in str(caught.value)


def test_labels_of_the_test_file_must_be_among_the_classes(reviews, tmp_path, text_task, base):
    other = tmp_path / "other.tsv"
    other.write_text("text\tlabel\nbad story\todd\n")
    with pytest.raises(BadInput, match=r"label outside the classes: .*other.tsv, row 2; expected neg, pos; found 'odd'"):
        text_task(reviews, test=str(other)).load_data(base)


def test_max_length_beyond_the_base(reviews, text_task, base):
    text_task(reviews).load_data(base)  # the default gives way
    with pytest.raises(BadInput, match="task.max_length; expected at most 32; found 33"):
        text_task(reviews, max_length=33).load_data(base)


def test_a_tokenizer_of_another_base(reviews, text_task, tiny_bert, tmp_path):
    config = json.loads((tiny_bert / "config.json").read_text())
    for file in tiny_bert.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 10}))
    with pytest.raises(BadInput, match="tokens that the base lacks; expected ids below 10; found 20"):
        text_task(reviews).load_data(Base(model=str(tmp_path)))


def test_fresh_head_depends_on_the_bases_seed_alone(reviews, text_task, tiny_bert, capfd):
    task = text_task(reviews)
    data = task.load_data(Base(model=str(tiny_bert)))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = task.new_model(Base(model=str(tiny_bert), seed=3), data)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    two = task.new_model(Base(model=str(tiny_bert), seed=3), data)
    other = task.new_model(Base(model=str(tiny_bert), seed=4), data)
    same = {n: torch.equal(p, two.state_dict()[n]) for n, p in one.state_dict().items()}
    assert all(same.values())
    differ = {n for n, p in one.state_dict().items() if not torch.equal(p, other.state_dict()[n])}
    assert differ == {"classifier.weight"}
    assert one.config.id2label == {0: "neg", 1: "pos"} and one.config.label2id == {"neg": 0, "pos": 1}
    assert not one.training and {p.dtype for p in one.parameters()} == {torch.float32}
    out, err = capfd.readouterr()
    assert out == "" and err == ""


def test_padding_does_not_change_the_loss(reviews, text_task, base):
    task = text_task(reviews)
    data = task.load_data(base)
    model = task.new_model(base, data)
    with torch.inference_mode():
        single = [float(task.loss(model, data.train.batch([row]))) for row in range(16)]
        together = task.logits(model, data.train.batch(range(16)))
    labels = data.train.batch(range(16))["labels"]
    rows = F.cross_entropy(together, labels, reduction="none")
    torch.testing.assert_close(rows, torch.tensor(single), atol=1e-5, rtol=0)


def test_a_saved_model_comes_back(reviews, text_task, base, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    task = text_task(reviews)
    data = task.load_data(base)
    model = task.new_model(base, data)
    model.save_pretrained(str(tmp_path / "out"))
    task.save_processor(tmp_path / "out")
    again = task.reload_model(tmp_path / "out")
    batch = data.test.batch(range(len(data.test)))
    assert torch.equal(task.logits(again, batch), task.logits(model, batch)) and not again.training
    plain = AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "out"))
    tokens = AutoTokenizer.from_pretrained(str(tmp_path / "out"))(["good film"], return_tensors="pt")
    assert plain(**tokens).logits.shape == (1, 2)
    kept = task.new_model(Base(model=str(tmp_path / "out"), seed=9), data)
    assert torch.equal(kept.classifier.weight, model.classifier.weight)
    assert text_task(reviews).load_data(Base(model=str(tmp_path / "out"))).train.digest == data.train.digest


def test_a_head_for_other_classes_is_drawn_anew(reviews, text_task, base, tmp_path):
    task = text_task(reviews)
    data = task.load_data(base)
    task.new_model(base, data).save_pretrained(str(tmp_path / "two"))
    task.save_processor(tmp_path / "two")
    three = tmp_path / "three.tsv"
    three.write_text("text\tlabel\n" + "good\tpos\nbad\tneg\na film\tmeh\n" * 10)
    task = text_task(three)
    model = task.new_model(Base(model=str(tmp_path / "two")), task.load_data(base))
    assert model.classifier.weight.shape == (3, 16) and model.config.num_labels == 3
    swapped = text_task(reviews, classes=("pos", "neg"))
    with pytest.raises(BadInput, match=r"another order: .*; expected classes: \[neg, pos\]; found \[pos, neg\]"):
        swapped.new_model(Base(model=str(tmp_path / "two")), swapped.load_data(base))


def test_a_decoder_without_padding_token_is_given_one(reviews, text_task, tiny_bert, tmp_path):
    from transformers import AutoTokenizer, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

    backend = AutoTokenizer.from_pretrained(str(tiny_bert)).backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[SEP]", unk_token="[UNK]")
    folder = tmp_path / "decoder"
    tokenizer.save_pretrained(str(folder))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    LlamaModel(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **sizes)).save_pretrained(str(folder))
    task, base = text_task(reviews, max_length=32), Base(model=str(folder))
    data = task.load_data(base)
    model = task.new_model(base, data)
    with torch.inference_mode():
        together = task.logits(model, data.train.batch(range(8)))
        single = torch.cat([task.logits(model, data.train.batch([row])) for row in range(8)])
    torch.testing.assert_close(together, single, atol=1e-5, rtol=0)


def test_bases_that_cannot_be_loaded(reviews, text_task, base, tiny_bert, tmp_path):
    task = text_task(reviews)
    data = task.load_data(base)
    empty = tmp_path / "empty"
    empty.mkdir()
    for model, message in (
        (tmp_path / "none", "no such model folder"),
        (reviews, "no such model folder"),
        (empty, "the base cannot be loaded"),
    ):
        with pytest.raises(BadInput, match=message) as caught:
            task.new_model(Base(model=str(model)), data)
        assert "\n" not in str(caught.value)
    (empty / "adapter_config.json").write_text('{"base_model_name_or_path": "/etc"}')
    with pytest.raises(BadInput, match="an adapter is not a base"):
        task.new_model(Base(model=str(empty)), data)
    with pytest.raises(BadInput, match="an adapter is not a base"):
        task.reload_model(empty)
    with pytest.raises(BadInput, match="no such model folder"):
        task.reload_model(tmp_path / "none")


def copy_of(tiny_bert, folder, change):
    folder.mkdir()
    (folder / "config.json").write_bytes((tiny_bert / "config.json").read_bytes())
    save_file(change(load_file(tiny_bert / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    return folder


def test_weights_that_are_not_the_models(reviews, text_task, base, tiny_bert, tmp_path):
    task = text_task(reviews)
    data = task.load_data(base)
    other = copy_of(tiny_bert, tmp_path / "other", lambda t: {f"alien.{n}": x for n, x in t.items()})
    with pytest.raises(BadInput, match="the base's weights are not those of its architecture"):
        task.new_model(Base(model=str(other)), data)
    cut = copy_of(tiny_bert, tmp_path / "cut", lambda t: {n: x[..., :4].contiguous() for n, x in t.items()})
    with pytest.raises(BadInput, match="another shape than its configuration says"):
        task.new_model(Base(model=str(cut)), data)
    with pytest.raises(BadInput, match="tensors are missing or have the wrong shape: .*classifier.bias, classifier.weight"):
        task.reload_model(tiny_bert)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_bytes((tiny_bert / "config.json").read_bytes())
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(BadInput, match="the base cannot be loaded"):
        task.new_model(Base(model=str(pickled)), data)


def test_save_processor_needs_the_data_first(reviews, text_task, tmp_path):
    with pytest.raises(RuntimeError, match="call load_data before save_processor"):
        text_task(reviews).save_processor(tmp_path)


def test_hash_seed_and_threads_change_nothing(reviews, tiny_bert):
    code = f"""
import torch, sys
torch.set_num_threads(int(sys.argv[1]))
from emomerge import recipe
from emomerge.tasks import make_task
from emomerge.tasks.text_classification import TextClassification
task = make_task(TextClassification(kind="text-classification", train={str(reviews)!r}))
base = recipe.Base(model={str(tiny_bert)!r})
data = task.load_data(base)
head = task.new_model(base, data).classifier.weight.detach()
print(data.train.digest, data.validation.digest, data.test.digest, head.numpy().tobytes().hex())
"""
    outs = {
        subprocess.run(
            [sys.executable, "-c", code, threads],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads, seed in (("1", "1"), ("2", "2"))
    }
    assert len(outs) == 1 and re.fullmatch(r"([0-9a-f]{64} ){3}[0-9a-f]+\n", outs.pop())


def test_figures_of_rows_do_not_depend_on_the_rows_that_share_their_pass(reviews, text_task, base, monkeypatch):
    task = text_task(reviews)
    data = task.load_data(base)
    model, batch = task.new_model(base, data), data.train.batch(range(20))
    widths = []
    model.register_forward_pre_hook(lambda *call: widths.append(call[2]["input_ids"].shape[1]), with_kwargs=True)
    whole, gradients = [], []
    for calls in (1e8, 0.0):  # at the price of no calls, a small model gains from narrow passes, too
        monkeypatch.setattr(padding, "CALLS", calls)
        monkeypatch.setattr(padding, "SMALL_PASS", 4)
        found = task.row_figures(model, batch)
        whole.append(torch.stack([figure.detach() for figure in found]))
        gradients.append(torch.autograd.grad(found.loss.sum(), model.bert.embeddings.word_embeddings.weight)[0])
    assert len(widths) > 3 and widths[1:] == sorted(widths[1:]) and widths[-1] == widths[0]
    torch.testing.assert_close(*whole)
    torch.testing.assert_close(*gradients)
