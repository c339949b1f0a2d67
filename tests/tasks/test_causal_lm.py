from __future__ import annotations

import itertools
import json
import math
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emomerge.errors import BadInput
from emomerge.recipe import Base, Prepare
from emomerge.tasks import make_task
from emomerge.tasks.causal_lm import UNLEARNT, CausalLanguageModel, pack

WORDS = ["the", "cat", "dog", "sat", "ran", "on", "under", "a", "mat", "tree", "and", "slept", "then", "woke", "up", "again"]
TURN = "<{{ m.role }}>{{ m.content }}<|end|>"
TEMPLATE = f"{{% for m in messages %}}{TURN}{{% endfor %}}{{% if add_generation_prompt %}}<assistant>{{% endif %}}"
FORGETFUL = f"{{% for m in messages %}}{{% if loop.last or m.role == 'user' %}}{TURN}{{% endif %}}{{% endfor %}}"
REFUSING = "{{ raise_exception('no system role') }}"


def task_of(train, **options):
    return make_task(CausalLanguageModel(kind="causal-lm", train=str(train), **options))


def save_base(folder, model_class, config_class, template=None, **sizes):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: n for n, word in enumerate(["<|end|>", "<pad>", "<unk>", "<user>", "<assistant>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "<|end|>", "pad_token": "<pad>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, extra_special_tokens=["<user>", "<assistant>"], chat_template=template, **special
    )
    fast.save_pretrained(str(folder))
    torch.manual_seed(0)
    model_class(config_class(vocab_size=len(vocabulary), eos_token_id=0, **sizes)).save_pretrained(str(folder))
    return folder


LLAMA = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A random Llama whose tokenizer knows a few words and a chat template."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    return save_base(folder, LlamaForCausalLM, LlamaConfig, TEMPLATE, bos_token_id=None, **LLAMA)


@pytest.fixture
def base(llama):
    return Base(model=str(llama))


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(count=24, longest=12):
    return [" ".join(WORDS[(n * k) % len(WORDS)] for k in range(1, 3 + n % longest)) for n in range(1, count + 1)]


@pytest.fixture
def stories(tmp_path):
    return jsonl(tmp_path / "stories.jsonl", [{"text": text} for text in texts()])


def everything(split):
    return split.batch(range(len(split)))


def documents_in(data):
    """Every document of packed rows, as id lists, in a canonical order."""
    found = []
    for split in (data.train, data.validation, data.test):
        batch = everything(split)
        for ids, positions in zip(batch["input_ids"].tolist(), batch["position_ids"].tolist(), strict=True):
            starts = [place for place, position in enumerate(positions) if position == 0] + [len(ids)]
            found += [ids[a:b] for a, b in itertools.pairwise(starts)]
    return sorted(document for document in found if set(document) != {1})  # 1 pads


def test_the_same_documents_from_every_kind_of_file(tmp_path, base, stories):
    rows = texts()
    (tmp_path / "s.tsv").write_text("n\ttext\n" + "".join(f"{n}\t{text}\n" for n, text in enumerate(rows)))
    (tmp_path / "bare.tsv").write_text("".join(f"{n}\t{text}\n" for n, text in enumerate(rows)))
    (tmp_path / "s.txt").write_text("\n\n".join(rows) + "\n\n\n")
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    for number, text in enumerate(rows):
        (tmp_path / "folder" / ("deep" if number > 11 else "") / f"{number:02}.md").write_text(text)
    (tmp_path / "folder" / "empty.txt").write_text("\n")
    wanted = task_of(stories).load_data(base)
    count = sum(len(text.split()) + 1 for text in rows)
    assert wanted.summary == f"24 documents of {count} tokens; 22 rows to train, 1 to validate, 1 to test"
    assert wanted.classes == ()
    for source, options in (("s.tsv", {}), ("bare.tsv", {"columns": {"text": 1}}), ("s.txt", {}), ("folder", {})):
        found = task_of(tmp_path / source, **options).load_data(base)
        assert found.train.digest == wanted.train.digest and found.test.digest == wanted.test.digest


def test_one_document_a_row_by_default(base, stories):
    data = task_of(stories).load_data(base)
    batch = data.train.batch([0, 5])
    lengths = batch["attention_mask"].sum(dim=1)
    assert batch["input_ids"].shape[1] == int(lengths.max())
    for ids, labels, length in zip(batch["input_ids"], batch["labels"], lengths, strict=True):
        assert ids[length - 1] == 0 and labels[length - 1] == 0  # the end token is learnt
        assert torch.equal(ids[1:length], labels[1:length])
        assert labels[0] == UNLEARNT and (labels[length:] == UNLEARNT).all()


def test_figures_are_weighted_by_tokens(base, stories):
    task = task_of(stories)
    data = task.load_data(base)
    model = task.new_model(base, data)
    batch = data.train.batch([0, 3, 7])
    with torch.inference_mode():
        found, mean = task.row_figures(model, batch), task.loss(model, batch)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    total, count = 0.0, 0
    for row in range(3):
        losses, hits, entropies = [], [], []
        for place in range(1, batch["input_ids"].shape[1]):
            if batch["labels"][row, place] != UNLEARNT:
                p = logits[row, place - 1].softmax(-1)
                losses.append(-math.log(p[batch["labels"][row, place]]))
                hits.append(float(p.argmax() == batch["labels"][row, place]))
                entropies.append(-sum(float(q) * math.log(q) for q in p))
        assert float(found.weight[row]) == len(losses)
        assert float(found.loss[row]) == pytest.approx(sum(losses) / len(losses), abs=1e-5)
        assert float(found.accuracy[row]) == pytest.approx(sum(hits) / len(hits), abs=1e-6)
        assert float(found.entropy[row]) == pytest.approx(sum(entropies) / len(entropies), abs=1e-5)
        total, count = total + sum(losses), count + len(losses)
    assert len(set(found.weight.tolist())) > 1
    assert float(mean) == pytest.approx(total / count, abs=1e-5)


@given(st.lists(st.integers(1, 20), max_size=60))
def test_packing_keeps_every_item_once_and_no_bin_overflows(lengths):
    bins = pack(lengths, 20)
    assert sorted(number for row in bins for number in row) == list(range(len(lengths)))
    assert all(sum(lengths[number] for number in row) <= 20 for row in bins)
    half_full = sum(sum(lengths[number] for number in row) <= 10 for row in bins)
    assert half_full <= 1  # two of them would have shared one


def test_packed_documents_are_whole_and_blind_to_each_other(base, stories):
    task = task_of(stories, packing="separate", max_length=32)
    data = task.load_data(base)
    plain = task_of(stories).load_data(base)
    alone = [
        ids[: int(mask.sum())].tolist()
        for split in (plain.train, plain.validation, plain.test)
        for ids, mask in zip(everything(split)["input_ids"], everything(split)["attention_mask"], strict=True)
    ]
    assert documents_in(data) == sorted(alone)
    assert len(data.train) < 22 and ", packed, each blind to the others;" in data.summary

    model = task.new_model(base, data)
    batch = data.train.batch([0])
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert len(starts) >= 2 and batch["labels"][0, starts].tolist() == [UNLEARNT] * len(starts)
    other = {name: tensor.clone() for name, tensor in batch.items()}
    other["input_ids"][0, : starts[1]] = 7
    with torch.inference_mode():
        before, after = task.logits(model, batch), task.logits(model, other)
    assert torch.equal(before[0, starts[1] :], after[0, starts[1] :])
    assert not torch.allclose(before[0, : starts[1]], after[0, : starts[1]], atol=1e-4)
    model.train()  # and so it is learnt
    torch.testing.assert_close(task.logits(model, other)[0, starts[1] :].detach(), before[0, starts[1] :])


def test_packing_changes_no_figure(base, stories):
    """The mean over all tokens is the same, however they share rows."""
    means = []
    for packing in ("none", "separate"):
        task = task_of(stories, packing=packing, max_length=32)
        data = task.load_data(base)
        model = task.new_model(base, data)
        with torch.inference_mode():
            rows = task.row_figures(model, everything(data.train))
        means.append((float((rows.loss * rows.weight).sum() / rows.weight.sum()), float(rows.weight.sum())))
    assert means[0][1] == means[1][1] and means[0][0] == pytest.approx(means[1][0], abs=1e-5)


def test_joined_documents_are_one_stream(base, stories):
    task = task_of(stories, packing="joined", max_length=16)
    data = task.load_data(base)
    batch = everything(data.train)
    assert set(batch) == {"input_ids", "labels"} and batch["input_ids"].shape[1] == 16
    stream = [i for row in batch["input_ids"].tolist() for i in row]
    stream = stream[: len(stream) - stream[::-1].index(0)]
    assert stream.count(0) == 22 and 1 not in stream
    assert "joined into one stream" in data.summary
    model = task.new_model(base, data)
    assert torch.isfinite(task.loss(model, batch))


def test_long_text_goes_on_in_the_next_row(tmp_path, base):
    long = " ".join(WORDS[n % len(WORDS)] for n in range(50))
    source = jsonl(tmp_path / "l.jsonl", [{"text": long}] * 8)
    data = task_of(source, max_length=20, eval_fraction=0.5).load_data(base)
    assert data.summary == "8 documents of 408 tokens; 12 rows to train, 6 to validate, 6 to test"
    rows = everything(data.train)
    assert rows["attention_mask"].sum(dim=1).tolist() == [20, 20, 11] * 4
    assert (rows["labels"][:, 0] == UNLEARNT).all()


def test_a_base_that_cannot_keep_documents_apart_says_so(tmp_path, stories):
    from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

    bloom = save_base(tmp_path / "bloom", BloomForCausalLM, BloomConfig, hidden_size=16, n_layer=1, n_head=2)
    task = task_of(stories, packing="separate", max_length=32)
    data = task.load_data(Base(model=str(bloom)))
    with pytest.raises(
        BadInput, match="packed documents attend to each other in this base: .*bloom; set task.packing to joined or none"
    ):
        task.new_model(Base(model=str(bloom)), data)
    gpt2 = save_base(tmp_path / "gpt2", GPT2LMHeadModel, GPT2Config, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    data = task.load_data(Base(model=str(gpt2)))
    model = task.new_model(Base(model=str(gpt2)), data)
    batch = data.train.batch([0])
    second = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()[1]
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][0, :second] = 7
    torch.testing.assert_close(task.logits(model, batch)[0, second:], task.logits(model, other)[0, second:])


def qa(count=20):
    return [{"q": f"the cat {WORDS[n % 5]}", "a": f"a dog {' '.join(WORDS[: n % 4 + 1])}"} for n in range(count)]


def test_only_completions_are_learnt(tmp_path, base):
    source = jsonl(tmp_path / "qa.jsonl", qa())
    task = task_of(source, columns={"prompt": "q", "completion": "a"})
    batch = everything(task.load_data(base).train)
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        length = int(mask.sum())
        assert (labels[:3] == UNLEARNT).all() and torch.equal(labels[3:length], ids[3:length]) and ids[length - 1] == 0


def test_completions_beyond_the_length_are_cut_and_empty_rows_left_out(tmp_path, base):
    rows = qa(16) + [{"q": " ".join(["the"] * 9), "a": "cat"}] * 4
    task = task_of(jsonl(tmp_path / "qa.jsonl", rows), columns={"prompt": "q", "completion": "a"}, max_length=6)
    data = task.load_data(base)
    total = len(data.train) + len(data.validation) + len(data.test)
    assert total == 16 and "tokens left out" in data.summary
    assert everything(data.train)["input_ids"].shape[1] == 6


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_only_the_assistants_turns_of_a_chat_are_learnt(tmp_path, base):
    row = chat(("user", "the cat"), ("assistant", "sat on"), ("user", "and then"), ("assistant", "slept"))
    source = jsonl(tmp_path / "c.jsonl", [row] * 8)
    batch = task_of(source, columns={"messages": "messages"}).load_data(base).train.batch([0])
    names = ["<|end|>", "<pad>", "<unk>", "<user>", "<assistant>", *WORDS]
    shown = [
        (names[i], names[label] if label != UNLEARNT else "")
        for i, label in zip(batch["input_ids"][0], batch["labels"][0], strict=True)
    ]
    assert shown == [
        ("<user>", ""), ("the", ""), ("cat", ""), ("<|end|>", ""), ("<assistant>", ""), ("sat", "sat"), ("on", "on"),
        ("<|end|>", "<|end|>"), ("<user>", ""), ("and", ""), ("then", ""), ("<|end|>", ""), ("<assistant>", ""),
        ("slept", "slept"), ("<|end|>", "<|end|>"),
    ]  # fmt: skip


CHAT = chat(("user", "the cat"), ("assistant", "sat"))


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (None, CHAT, "the base's tokenizer has no chat template: task.columns.messages"),
        (REFUSING, CHAT, r"the chat template rejects these turns: .*row \d; found no system role"),
        (FORGETFUL, chat(*[("user", "a"), ("assistant", "cat")] * 2), r"rewrites earlier turns: .*row \d; give each"),
        (TEMPLATE, chat(("user", "a")), r"not a chat: .*row \d; expected a list of"),
        (TEMPLATE, {"messages": "hello"}, "not a chat"),
        (TEMPLATE, {"messages": [{"role": "assistant"}]}, "not a chat"),
    ],
)
def test_chats_that_cannot_be_read(tmp_path, llama, template, row, message):
    folder = tmp_path / "base"
    shutil.copytree(llama, folder)
    (folder / "chat_template.jinja").unlink()
    if template:
        (folder / "chat_template.jinja").write_text(template)
    task = task_of(jsonl(tmp_path / "c.jsonl", [row] * 8), columns={"messages": "messages"})
    with pytest.raises(BadInput, match=message) as caught:
        task.load_data(Base(model=str(folder)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ([{"text": " "}] * 8, {}, r"row without text: .*row \d; found ' '"),
        ([{"text": None}] * 8, {}, "row without text"),
        ([{"body": "a"}] * 8, {}, r"no column 'text': .*row \d; found columns body"),
        ([{"text": "cat"}] * 8, {"columns": {"prompt": "text", "completion": "answer"}}, "no column 'answer'"),
        ([{"text": "cat dog"}] * 8, {"max_length": 99}, "longer than the base can read: task.max_length; expected at most 64"),
        ([{"text": "cat dog"}], {}, "too few rows"),
        ("cat\n\n" * 9, {"columns": {"text": "text"}}, "plain text has no columns"),
        ("\n\n", {}, "no text: .*expected files ending in .txt"),
        (b"\xff\xfe" * 9, {}, "the file is not UTF-8"),
    ],
)
def test_unusable_text_is_named(tmp_path, base, content, options, message):
    source = tmp_path / ("t.jsonl" if isinstance(content, list) else "t.txt")
    if isinstance(content, bytes):
        source.write_bytes(content)
    else:
        source.write_text(content) if isinstance(content, str) else jsonl(source, content)
    with pytest.raises(BadInput, match=message) as caught:
        task_of(source, **options).load_data(base)
    assert "\n" not in str(caught.value)


def test_a_datasets_id(monkeypatch, base):
    import datasets

    rows = [chat(("user", "the cat"), ("assistant", f"{WORDS[n % 5]} on")) | {"text": text} for n, text in enumerate(texts())]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset.from_list(rows))
    plain, chats = task_of("user/stories"), task_of("user/stories", columns={"messages": "messages"})
    assert plain.load_data(base).summary.startswith("24 documents")
    labels = everything(chats.load_data(base).train)["labels"]
    assert (labels != UNLEARNT).sum(dim=1).tolist() == [3] * 22
    with pytest.raises(BadInput, match="no column 'body': user/stories; found columns messages, text"):
        task_of("user/stories", columns={"text": "body"}).load_data(base)


def test_nothing_to_learn(tmp_path, base):
    source = jsonl(tmp_path / "qa.jsonl", [{"q": "the cat sat on", "a": "mat"}] * 10)
    with pytest.raises(BadInput, match="nothing to learn: .*; expected documents with a token to predict among the first 4"):
        task_of(source, columns={"prompt": "q", "completion": "a"}, max_length=4).load_data(base)


def test_unusable_bases_are_named(tmp_path, llama, stories):
    with pytest.raises(BadInput, match="the base cannot be loaded"):
        task_of(stories).load_data(Base(model=str(tmp_path)))
    from transformers import LlamaConfig, LlamaForCausalLM

    small = save_base(tmp_path / "small", LlamaForCausalLM, LlamaConfig, **LLAMA)
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"vocab_size": 6}))
    with pytest.raises(BadInput, match="tokens that the base lacks; expected ids below 6"):
        task_of(stories).load_data(Base(model=str(small)))
    base = Base(model=str(llama))
    task = task_of(stories)
    data = task.load_data(base)
    (small / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(BadInput, match="tensors are missing or have the wrong shape: .*small"):
        task.new_model(Base(model=str(small)), data)
    with pytest.raises(BadInput, match="no such model folder"):
        task.reload_model(tmp_path / "none")
    with pytest.raises(RuntimeError, match="call load_data before"):
        task_of(stories).save_processor(tmp_path)


PREPARE = Prepare(model="llama", hidden=32, layers=1, vocabulary=300, steps=2)


def test_a_prepared_llama_and_its_tokenizer_come_back_from_disk(tmp_path, stories):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = Base(prepare=PREPARE)
    task = task_of(stories)
    data = task.load_data(base)
    model = task.new_model(base, data)
    model.save_pretrained(str(tmp_path))
    task.save_files(model, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path))
    assert (
        258 <= len(tokenizer) <= 300 and tokenizer.decode(tokenizer("the żółw 🐢\n  sat")["input_ids"]) == "the żółw 🐢\n  sat"
    )
    batch = data.test.batch([0])
    wanted = task.logits(model, batch)
    for again in (task.reload_model(tmp_path), AutoModelForCausalLM.from_pretrained(str(tmp_path))):
        assert torch.equal(task.logits(again, batch), wanted) and not again.training
    samples = task.samples(model)
    assert samples == task.samples(task.reload_model(tmp_path))
    assert len(samples.prompts) == len(samples.texts) == 1  # one test document
    with pytest.raises(BadInput, match="a multiple of 32; found 40"):
        task.new_model(Base(prepare=PREPARE.model_copy(update={"hidden": 40})), data)
    with pytest.raises(BadInput, match="a prepared base has no chat template"):
        task_of(stories, columns={"messages": "text"}).load_data(base)


def test_a_prompt_is_what_samples_continue(tmp_path, base):
    task = task_of(jsonl(tmp_path / "qa.jsonl", qa()), columns={"prompt": "q", "completion": "a"})
    data = task.load_data(base)
    samples = task.samples(task.new_model(base, data))
    assert all(len(prompt.split()) == 3 and prompt.startswith("the cat") for prompt in samples.prompts)


def test_what_comes_with_python(tmp_path):
    base = Base(prepare=PREPARE)
    code = task_of("python-code", limit=8, max_length=32).load_data(base)
    docs = task_of("python-docs", limit=8, max_length=32).load_data(base)
    assert code.summary.startswith("8 documents") and code.train.digest != docs.train.digest
