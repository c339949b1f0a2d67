"""Causal language modelling: plain text, prompt and completion, or chats; a tokenizer; and any causal language model."""

from __future__ import annotations

import bisect
import itertools
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from emomerge import recipe
from emomerge.checkpoints import working_dtype
from emomerge.errors import BadInput
from emomerge.files import require_regular
from emomerge.numerics.seeds import cpu_seed
from emomerge.tasks import sources
from emomerge.tasks.base import Batch, RowFigures, Split, TaskData, Texts, inputs_of, predictive_entropy
from emomerge.tasks.pretrained import load_complete, load_config, load_tokenizer, quiet
from emomerge.tasks.rows import ENDINGS, read_rows
from emomerge.tasks.text import TextSplit, TextTask, check_vocabulary


class LanguageColumns(recipe.Section):
    """Columns of one of three forms: plain text, prompt and completion, or chat messages."""

    text: str | int | None = None
    """All of it is learned; the column `text` if no column is named."""
    prompt: str | int | None = None
    """Read but not learned."""
    completion: str | int | None = None
    messages: str | None = None
    """A list of `{role, content}`, formatted by the tokenizer's chat template; only the assistant's turns are learned."""

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if (self.prompt is None) != (self.completion is None):
            raise ValueError("`prompt` and `completion` come together")
        if sum(column is not None for column in (self.text, self.prompt, self.messages)) > 1:
            raise ValueError("give `text`, or `prompt` and `completion`, or `messages`")
        return self


class CausalLanguageModel(recipe.DataSection):
    """Section `task` of a recipe that predicts the next token.

    Data are TSV, CSV, JSONL, plain text (documents are the files of a folder, or the paragraphs of a file), a `datasets` id, or
    `python-docs` and `python-code`, which come with Python.
    """

    networks: ClassVar = {"llama": ("train", "vocabulary")}

    kind: Literal["causal-lm"]
    columns: LanguageColumns = LanguageColumns()
    max_length: int = Field(256, ge=4)
    """Tokens per row. Longer plain text continues in another row; longer prompts and chats are truncated."""
    packing: Literal["none", "separate", "joined"] = "none"
    """How documents share rows. `none`: one per row. `separate`: several, each with its own positions and without attention to
    the others (the base is tested for this). `joined`: one stream with an end token between documents and attention
    across them."""

    def for_base(self, prepare: recipe.Prepare) -> Self:
        """Return the task on the text that the prepared base learns from."""
        if prepare.train is None:
            return self
        return self.model_copy(update={"train": prepare.train, "validation": None, "test": None, "limit": None})


UNLEARNT = -100
"""Label of a token that is read but not predicted, by the convention of transformers and torch."""
_TEXT_ENDINGS = (".txt", ".md", ".rst", ".py")
_SAMPLES, _PROMPT, _CONTINUATION = 4, 24, 64


class Tokens(NamedTuple):
    """A document or a piece of one: token ids, and for each its label (the id itself, or UNLEARNT)."""

    ids: list[int]
    labels: list[int]

    @property
    def has_targets(self) -> bool:
        """Whether any token is predicted; the first one cannot be, as nothing precedes it."""
        return any(label != UNLEARNT for label in self.labels[1:])


class CausalLanguageModelTask(TextTask):
    """Cross-entropy of the next token, by a causal language model of transformers; every token has the same weight."""

    section_class = CausalLanguageModel
    section: CausalLanguageModel
    auto_class = "AutoModelForCausalLM"
    peft_task_type = "CAUSAL_LM"
    perplexity = True

    def __init__(self, section: CausalLanguageModel) -> None:
        super().__init__(section)
        self._prompts: list[list[int]] = []

    def load_data(self, base: recipe.Base) -> TaskData:
        """Read, split, tokenize and pack all documents; see `Task.load_data`."""
        section = self.section
        given = {"train": section.train, "validation": section.validation, "test": section.test}
        documents = {role: _read(source, role, section.columns) for role, source in given.items() if source is not None}
        own = documents["train"]
        picks = sources.split_rows(len(own), section, validation=section.validation is None, test=section.test is None)
        cut = {role: [own[row] for row in rows.tolist()] for role, rows in zip(given, picks, strict=True)}
        parts = cut | {role: documents[role] for role in documents if role != "train"}

        self._tokenizer = load_tokenizer(base) if base.prepare is None else _trained_tokenizer(base.prepare, section)
        config = None if base.prepare is not None else load_config(base).get_text_config()
        length = self._max_length(config)
        encode = _Encoder(self._tokenizer, section.columns, config)
        encoded = {role: [encode(document) for document in parts[role]] for role in given}
        pieces = {role: self._pieces(encoded[role], length, given[role] or section.train) for role in given}
        self._prompts = [_prompt(document, length) for document in encoded["test"][:_SAMPLES]]
        splits = {role: self._rows(pieces[role], length) for role in given}
        return TaskData(**splits, classes=(), summary=self._summary(encoded, pieces, splits))

    def _pieces(self, documents: Sequence[Tokens], length: int, source: str) -> list[Tokens]:
        """Cut documents into pieces that fit a row: plain text continues in the next piece, other forms are truncated."""
        plain = _form(self.section.columns) == "text"
        if self.section.packing == "joined":
            pieces = _slices(_joined(documents), length)
        else:
            cut = [piece for document in documents for piece in _slices(document, length)[: None if plain else 1]]
            # Nothing in the row precedes a piece's first token, except other documents that it must not see.
            pieces = [Tokens(ids, [UNLEARNT, *labels[1:]]) for ids, labels in cut]
        kept = [piece for piece in pieces if piece.has_targets]
        if not kept:
            raise BadInput(
                "nothing to learn", where=source, expected=f"documents with a token to predict among the first {length}"
            )
        return kept

    def _rows(self, pieces: Sequence[Tokens], length: int) -> Split:
        pad = self._tokenizer.pad_token_id
        if self.section.packing == "none":
            width = max(len(piece.ids) for piece in pieces)
            mask = [[1] * len(piece.ids) + [0] * (width - len(piece.ids)) for piece in pieces]
            return TextSplit({**_padded(pieces, width, pad), "attention_mask": torch.tensor(mask)})
        if self.section.packing == "joined":
            return Split(_padded(pieces, length, pad))
        rows = [[pieces[number] for number in row] for row in pack([len(piece.ids) for piece in pieces], length)]
        # Positions restart at the padding too, which makes it one more document that the others do not see.
        positions = [[p for n in [*(len(t.ids) for t in row), length] for p in range(n)][:length] for row in rows]
        return Split({**_padded([_joined(row) for row in rows], length, pad), "position_ids": torch.tensor(positions)})

    def _summary(self, documents: dict[str, list[Tokens]], pieces: dict[str, list[Tokens]], splits: dict[str, Split]) -> str:
        count = sum(map(len, documents.values()))
        read, kept = (sum(len(t.ids) for part in parts.values() for t in part) for parts in (documents, pieces))
        how = {"none": "", "separate": ", packed, each blind to the others", "joined": ", joined into one stream"}
        text = f"{count:,} documents of {read:,} tokens{how[self.section.packing]}"
        if kept < read:
            text += f"; {read - kept:,} tokens left out"
        train, validation, test = (f"{len(split):,}" for split in splits.values())
        return f"{text}; {train} rows to train, {validation} to validate, {test} to test"

    def new_model(self, base: recipe.Base, data: TaskData) -> nn.Module:
        """Return the base unchanged, or a new small Llama; see `Task.new_model`."""
        if base.prepare is not None:
            from emomerge.tasks import models

            return models.build_llama(base.prepare, self._tokenizer, positions=self.section.max_length)
        model = load_complete(self.loader, base)
        if self.section.packing == "separate":
            _check_separation(model, data.train, str(base.model))
        return model

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the scores (rows, tokens, vocabulary) of the token after each."""
        scores: Tensor = model(**inputs_of(batch), use_cache=False).logits  # a cache would let packed documents attend
        return scores

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy over the batch's learned tokens in nats: a scalar, float32 even under autocast."""
        logits, targets = self._predictions(model, batch)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=UNLEARNT)

    def row_figures(self, model: nn.Module, batch: Batch) -> RowFigures:
        """Return means over each row's learned tokens, weighted by their number; see `Task.row_figures`."""
        logits, targets = self._predictions(model, batch)
        learned = (targets != UNLEARNT).to(logits.dtype)
        weight = learned.sum(dim=1)
        loss = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=UNLEARNT, reduction="none")
        correct = (logits.argmax(dim=-1) == targets).to(logits.dtype)
        means = [(figure * learned).sum(dim=1) / weight for figure in (loss, correct, predictive_entropy(logits))]
        return RowFigures(means[0], weight, *means[1:])

    def _predictions(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return logits (rows, tokens − 1, vocabulary) and their target tokens (rows, tokens − 1)."""
        logits = self.logits(model, batch)[:, :-1]
        return logits.to(working_dtype(logits.dtype)), batch["labels"][:, 1:]

    def samples(self, model: nn.Module) -> Texts:
        """Return continuations of the first test documents, sampled at temperature 0.8 with one seed for all models."""
        device = next(model.parameters()).device
        texts = []
        for prompt in self._prompts:
            ids = torch.tensor([prompt], device=device)
            with quiet(), cpu_seed(0), torch.inference_mode():
                drawn = model.generate(  # type: ignore[operator]  # a method of transformers models
                    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=_CONTINUATION,
                    do_sample=True, temperature=0.8, top_k=50, top_p=1.0, pad_token_id=self._tokenizer.pad_token_id,
                )  # fmt: skip
            texts.append(self._tokenizer.decode(drawn[0, len(prompt) :], skip_special_tokens=True))
        about = "The first test documents go on, drawn at temperature 0.8 with the same seed."
        return Texts([self._tokenizer.decode(prompt) for prompt in self._prompts], texts, about)


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack items into bins by best-fit decreasing: each goes into the fullest bin that has room for it.

    Args:
        lengths: of the items, each at most `capacity`.
        capacity: of a bin.

    Returns:
        the item numbers of each bin.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (space left, bin), ascending
    for number in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        place = bisect.bisect_left(room, (lengths[number], 0))
        space, row = room.pop(place) if place < len(room) else (capacity, len(bins))
        if row == len(bins):
            bins.append([])
        bins[row].append(number)
        bisect.insort(room, (space - lengths[number], row))
    return bins


def _joined(parts: Sequence[Tokens]) -> Tokens:
    return Tokens(*(list(itertools.chain.from_iterable(field)) for field in zip(*parts, strict=True)))


def _slices(tokens: Tokens, length: int) -> list[Tokens]:
    starts = range(0, len(tokens.ids), length)
    return [Tokens(tokens.ids[start : start + length], tokens.labels[start : start + length]) for start in starts]


def _padded(rows: Sequence[Tokens], width: int, pad: int) -> dict[str, Tensor]:
    """Return rows as tensors (rows, width), padded on the right, so that no padding precedes a token."""
    ids = torch.full((len(rows), width), pad)
    labels = torch.full((len(rows), width), UNLEARNT)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens.ids)] = torch.tensor(tokens.ids)
        labels[row, : len(tokens.ids)] = torch.tensor(tokens.labels)
    return {"input_ids": ids, "labels": labels}


def _prompt(document: Tokens, length: int) -> list[int]:
    """Return the start that a sample continues: the prompt, truncated on the left, or the first words of a plain text."""
    first = next((place for place, label in enumerate(document.labels) if label != UNLEARNT), len(document.ids))
    return document.ids[:first][-length:] or document.ids[: min(_PROMPT, (len(document.ids) + 1) // 2)]


def _check_separation(model: nn.Module, train: Split, source: str) -> None:
    """Check that a document's predictions do not depend on the document before it in the row."""
    ids = train.batch([0])["input_ids"][:, :8]
    half = ids.shape[1] // 2
    other = torch.cat([(ids[:, :half] == 0).long(), ids[:, half:]], dim=1)  # differs everywhere, whatever the vocabulary
    positions = torch.cat([torch.arange(half), torch.arange(ids.shape[1] - half)])[None]
    try:
        with torch.inference_mode():
            one, two = (model(input_ids=row, position_ids=positions, use_cache=False).logits[:, half:] for row in (ids, other))
        separate = torch.allclose(one, two, rtol=1e-4, atol=1e-4)
    except (TypeError, ValueError):  # a model that takes no positions
        separate = False
    if not separate:
        fix = "set task.packing to joined or none"
        raise BadInput("packed documents attend to each other in this base", where=source, fix=fix)


# Tokens


def _form(columns: LanguageColumns) -> str:
    return "messages" if columns.messages is not None else "text" if columns.prompt is None else "completion"


class _Encoder:
    """Encode documents with the tokenizer's start token, if it has one, and an end token.

    Args:
        tokenizer: of the base.
        columns: determine the form of the documents.
        config: of the base; None if the base is still to be built.
    """

    def __init__(self, tokenizer: Any, columns: LanguageColumns, config: Any) -> None:
        self.tokenizer, self.config = tokenizer, config
        if tokenizer.eos_token_id is None:
            raise BadInput("the base's tokenizer has no end token")
        self.start = tokenizer("")["input_ids"][:1] if tokenizer.bos_token_id in tokenizer("")["input_ids"] else []
        form = _form(columns)
        if form == "messages" and not tokenizer.chat_template:
            raise BadInput("the base's tokenizer has no chat template", where="task.columns.messages")
        forms: dict[str, Callable[..., Tokens]]
        forms = {"messages": self._chat, "completion": self._completion, "text": self._text}
        self.encode = forms[form]

    def __call__(self, document: Document) -> Tokens:
        with quiet():
            tokens = self.encode(*document.cells, document.where)
        check_vocabulary(max(tokens.ids, default=-1), self.config)
        return tokens

    def _ids(self, text: Any, where: str) -> list[int]:
        if not isinstance(text, str) or not text.strip():
            raise BadInput("row without text", where=where, found=repr(text))
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _text(self, text: Any, where: str) -> Tokens:
        ids = [*self.start, *self._ids(text, where), self.tokenizer.eos_token_id]
        return Tokens(ids, ids)

    def _completion(self, prompt: Any, completion: Any, where: str) -> Tokens:
        read = [*self.start, *self._ids(prompt, where)]
        learnt = [*self._ids(completion, where), self.tokenizer.eos_token_id]
        return Tokens(read + learnt, [UNLEARNT] * len(read) + learnt)

    def _chat(self, messages: Any, where: str) -> Tokens:
        """Find the assistant's turns as what the template appends to the text of the turns before."""
        turns = messages if isinstance(messages, list) else []
        if not all(isinstance(turn, dict) and isinstance(turn.get("content"), str) and "role" in turn for turn in turns):
            turns = []
        answers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
        if not answers:
            raise BadInput("not a chat", where=where, expected="a list of {role, content} with an assistant's turn")
        ids = self._templated(turns, where)
        labels = [UNLEARNT] * len(ids)
        for number in answers:
            before = self._templated(turns[:number], where, add_generation_prompt=True)
            after = self._templated(turns[: number + 1], where)
            if ids[: len(after)] != after or after[: len(before)] != before:
                raise BadInput(
                    "the chat template rewrites earlier turns", where=where, fix="give each assistant's turn a row of its own"
                )
            labels[len(before) : len(after)] = after[len(before) :]
        return Tokens(ids, labels)

    def _templated(self, turns: list[Any], where: str, **options: Any) -> list[int]:
        try:
            ids: list[int] = self.tokenizer.apply_chat_template(turns, return_dict=False, **options)
        except Exception as error:  # templates raise their own errors
            raise BadInput("the chat template rejects these turns", where=where, found=error) from None
        return ids


def _trained_tokenizer(prepare: recipe.Prepare, section: CausalLanguageModel) -> Any:
    """Train a byte-level BPE on the text that a prepared base learns from."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if _form(section.columns) == "messages":
        raise BadInput("a prepared base has no chat template", where="task.columns.messages", fix="give `base.model`")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=prepare.vocabulary, special_tokens=["<|end|>", "<|pad|>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    documents = _read(prepare.train or section.train, "train", section.columns)
    tokenizer.train_from_iterator((str(cell) for document in documents for cell in document.cells), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")


# Documents


class Document(NamedTuple):
    """One document: its text, its prompt and completion, or its messages, and where it comes from."""

    cells: tuple[Any, ...]
    where: str


def _read(source: str, role: str, columns: LanguageColumns) -> list[Document]:
    """Read all documents of a file, a folder, a data set or a bundled text."""
    path = Path(source).expanduser()
    texts: Iterable[tuple[str, str]]
    if not path.exists() and source in _BUNDLED:
        texts = _BUNDLED[source]()
    elif path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _TEXT_ENDINGS)
        texts = [(_read_text(file), str(file)) for file in files]
        texts = [(text, where) for text, where in texts if text.strip()]
    elif path.is_file() and path.suffix.lower() not in ENDINGS:
        paragraphs = [part.strip("\n") for part in _read_text(path).split("\n\n")]
        texts = [(part, f"{path}, paragraph {n}") for n, part in enumerate(paragraphs, start=1) if part.strip()]
    else:
        names = [columns.messages] if columns.messages is not None else [columns.prompt, columns.completion]
        wanted = [name for name in names if name is not None] or ["text" if columns.text is None else columns.text]
        return [Document(row.cells, f"{source}, row {row.number}") for row in read_rows(source, role, wanted)]
    if columns != LanguageColumns():
        raise BadInput("plain text has no columns", where=source, fix="leave task.columns out")
    documents = [Document((text,), where) for text, where in texts]
    if not documents:
        raise BadInput("no text", where=source, expected=f"files ending in {', '.join(_TEXT_ENDINGS)}, with text in them")
    return documents


def _read_text(path: Path) -> str:
    require_regular(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput("the file is not UTF-8", where=path, found=error) from None
    except OSError as error:
        raise BadInput("the file cannot be read", where=path, found=error) from None


def _python_docs() -> list[tuple[str, str]]:
    """Return the language reference that `help()` shows: about 80 topics."""
    from pydoc_data.topics import topics

    return [(text, f"python-docs, {name}") for name, text in sorted(topics.items())]


def _python_code() -> list[tuple[str, str]]:
    """Return the top-level modules of the standard library."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return [(text, str(file)) for file in files if (text := _read_text(file)).strip()]


_BUNDLED = {"python-docs": _python_docs, "python-code": _python_code}
"""Texts that come with every Python, under its license."""
