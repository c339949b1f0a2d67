"""The next token: plain text, completions of prompts, or chats; a tokenizer; and any causal language model."""

from __future__ import annotations

import bisect
import itertools
import math
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emomerge import recipe
from emomerge.checkpoints import working_dtype
from emomerge.errors import BadInput
from emomerge.numerics.seeds import cpu_seed
from emomerge.recipe import LanguageColumns
from emomerge.tasks import sources
from emomerge.tasks.base import Batch, RowFigures, Split, Task, TaskData, Texts, predictive_entropy
from emomerge.tasks.pretrained import input_length, load_complete, load_config, load_tokenizer, quiet, reload_complete
from emomerge.tasks.tables import ENDINGS, read_rows
from emomerge.tasks.text_classification import TextSplit

UNLEARNT = -100
"""Label of a token that is read and not predicted; transformers' and torch's convention."""
_TEXT_ENDINGS = (".txt", ".md", ".rst", ".py")
_SAMPLES, _PROMPT, _CONTINUATION = 4, 24, 64


class Tokens(NamedTuple):
    """A document, or a piece of one: ids, and for each what is to be predicted there (the id itself, or UNLEARNT)."""

    ids: list[int]
    labels: list[int]

    @property
    def learns(self) -> bool:
        """Whether anything is predicted; the first token has nothing before it to be predicted from."""
        return any(label != UNLEARNT for label in self.labels[1:])


class CausalLanguageModelTask(Task):
    """Cross-entropy of the next token, by a transformers causal language model; every token weighs the same.

    Args:
        section: the recipe's `task`.
    """

    kind = "causal-lm"
    peft_task_type = "CAUSAL_LM"

    def __init__(self, section: recipe.CausalLanguageModel) -> None:
        self.section = section
        self._tokenizer: Any = None
        self._prompts: list[list[int]] = []

    def load_data(self, base: recipe.Base) -> TaskData:
        """Read, split, tokenise and pack all documents; see `Task.load_data`."""
        section = self.section
        given = {"train": section.train, "validation": section.validation, "test": section.test}
        documents = {role: _read(source, role, section.columns) for role, source in given.items() if source is not None}
        own = documents["train"]
        picks = sources.split_rows(len(own), section, validation=section.validation is None, test=section.test is None)
        cut = {role: [own[row] for row in rows.tolist()] for role, rows in zip(given, picks, strict=True)}
        parts = cut | {role: documents[role] for role in documents if role != "train"}

        self._tokenizer = load_tokenizer(base) if base.prepare is None else _trained_tokenizer(base.prepare, section)
        config = None if base.prepare is not None else load_config(base).get_text_config()
        length = input_length(section, self._tokenizer, config)
        encode = _Encoder(self._tokenizer, section.columns, getattr(config, "vocab_size", math.inf))
        encoded = {role: [encode(document) for document in parts[role]] for role in given}
        pieces = {role: self._pieces(encoded[role], length, given[role] or section.train) for role in given}
        self._prompts = [_prompt(document, length) for document in encoded["test"][:_SAMPLES]]
        splits = {role: self._rows(pieces[role], length) for role in given}
        return TaskData(**splits, classes=(), summary=self._summary(encoded, pieces, splits))

    def _pieces(self, documents: Sequence[Tokens], length: int, source: str) -> list[Tokens]:
        """Documents in pieces that fit a row: plain text goes on in the next piece, other forms are cut off."""
        plain = _form(self.section.columns) == "text"
        if self.section.packing == "joined":
            pieces = _slices(_joined(documents), length)
        else:
            cut = [piece for document in documents for piece in _slices(document, length)[: None if plain else 1]]
            # Nothing in its row comes before a piece's first token, or only what it must not see.
            pieces = [Tokens(ids, [UNLEARNT, *labels[1:]]) for ids, labels in cut]
        kept = [piece for piece in pieces if piece.learns]
        if not kept:
            raise BadInput(
                "nothing to learn", where=source, expected=f"documents with something to predict within {length} tokens"
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
        # The padding counts from 0 too: it is one more document that nobody sees.
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
        """The base as it is, or a new small Llama; see `Task.new_model`."""
        from transformers import AutoModelForCausalLM

        from emomerge.tasks import models

        if base.prepare is not None:
            return models.build_llama(base.prepare, self._tokenizer, positions=self.section.max_length)
        model = load_complete(AutoModelForCausalLM, base)
        if self.section.packing == "separate":
            _check_blind(model, data.train, str(base.model))
        return model

    def save_processor(self, folder: str | Path) -> None:
        """Write the tokenizer's files."""
        if self._tokenizer is None:
            raise RuntimeError("load_data comes before save_processor")
        self._tokenizer.save_pretrained(str(folder))

    def reload_model(self, folder: str | Path, *, trust_remote_code: bool = False) -> nn.Module:
        """A saved causal language model; see `Task.reload_model`."""
        from transformers import AutoModelForCausalLM

        return reload_complete(AutoModelForCausalLM, folder, trust_remote_code)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Scores (rows, tokens, vocabulary) of the token after each."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        scores: Tensor = model(**inputs, use_cache=False).logits  # with a cache, packed documents would see each other
        return scores

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy over the batch's learnt tokens in nats: a scalar, fp32 also under autocast."""
        logits, targets = self._predictions(model, batch)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=UNLEARNT)

    def row_figures(self, model: nn.Module, batch: Batch) -> RowFigures:
        """Means over each row's learnt tokens, weighted by their number; see `Task.row_figures`."""
        logits, targets = self._predictions(model, batch)
        learnt = (targets != UNLEARNT).to(logits.dtype)
        weight = learnt.sum(dim=1)
        loss = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=UNLEARNT, reduction="none")
        correct = (logits.argmax(dim=-1) == targets).to(logits.dtype)
        means = [(figure * learnt).sum(dim=1) / weight for figure in (loss, correct, predictive_entropy(logits))]
        return RowFigures(means[0], weight, *means[1:])

    def _predictions(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (rows, tokens − 1, vocabulary), and the token each is to predict (rows, tokens − 1)."""
        logits = self.logits(model, batch)[:, :-1]
        return logits.to(working_dtype(logits.dtype)), batch["labels"][:, 1:]

    def samples(self, model: nn.Module) -> Texts:
        """Continuations of the first test documents, drawn at temperature 0.8 with one seed for all models."""
        device = next(model.parameters()).device
        texts = []
        for prompt in self._prompts:
            ids = torch.tensor([prompt], device=device)
            with quiet(), cpu_seed(0), torch.inference_mode():
                drawn = model.generate(  # type: ignore[operator]  # of transformers' models
                    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=_CONTINUATION,
                    do_sample=True, temperature=0.8, top_k=50, top_p=1.0, pad_token_id=self._tokenizer.pad_token_id,
                )  # fmt: skip
            texts.append(self._tokenizer.decode(drawn[0, len(prompt) :], skip_special_tokens=True))
        about = "The first test documents go on, drawn at temperature 0.8 with the same seed."
        return Texts([self._tokenizer.decode(prompt) for prompt in self._prompts], texts, about)


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: each item goes into the fullest bin it fits. Returns the item numbers of each bin."""
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
    """Rows as tensors (rows, width), padded on the right: what stands left of a token is then its own text."""
    ids = torch.full((len(rows), width), pad)
    labels = torch.full((len(rows), width), UNLEARNT)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens.ids)] = torch.tensor(tokens.ids)
        labels[row, : len(tokens.ids)] = torch.tensor(tokens.labels)
    return {"input_ids": ids, "labels": labels}


def _prompt(document: Tokens, length: int) -> list[int]:
    """What a sample continues: the prompt, cut on the left where it is long, or the first words of a plain text."""
    first = next((place for place, label in enumerate(document.labels) if label != UNLEARNT), len(document.ids))
    return document.ids[:first][-length:] or document.ids[: min(_PROMPT, (len(document.ids) + 1) // 2)]


def _check_blind(model: nn.Module, train: Split, source: str) -> None:
    """Whether a document's predictions stay the same when the one before it in its row is another; BadInput if not."""
    ids = train.batch([0])["input_ids"][:, :8]
    half = ids.shape[1] // 2
    other = torch.cat([(ids[:, :half] == 0).long(), ids[:, half:]], dim=1)  # differs everywhere, whatever the vocabulary
    positions = torch.cat([torch.arange(half), torch.arange(ids.shape[1] - half)])[None]
    try:
        with torch.inference_mode():
            one, two = (model(input_ids=row, position_ids=positions, use_cache=False).logits[:, half:] for row in (ids, other))
        blind = torch.allclose(one, two, rtol=1e-4, atol=1e-4)
    except (TypeError, ValueError):  # a model that takes no positions
        blind = False
    if not blind:
        fix = "set task.packing to joined or none"
        raise BadInput("in this base, packed documents see each other", where=source, fix=fix)


# Tokens


def _form(columns: LanguageColumns) -> str:
    return "messages" if columns.messages is not None else "text" if columns.prompt is None else "completion"


class _Encoder:
    """Documents → Tokens, with the tokenizer's own start token, where it has one, and an end token.

    Args:
        tokenizer: of the base.
        columns: say which form documents have.
        vocabulary: token ids that the base knows.
    """

    def __init__(self, tokenizer: Any, columns: LanguageColumns, vocabulary: float) -> None:
        self.tokenizer, self.vocabulary = tokenizer, vocabulary
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
        if tokens.ids and max(tokens.ids) >= self.vocabulary:
            raise BadInput(
                "the tokenizer gives tokens the base has not", expected=f"ids below {self.vocabulary}", found=max(tokens.ids)
            )
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
        """The assistant's turns are found as what the template adds to the turns before: prefixes of one another."""
        turns = messages if isinstance(messages, list) else []
        if not all(isinstance(turn, dict) and isinstance(turn.get("content"), str) and "role" in turn for turn in turns):
            turns = []
        answers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
        if not answers:
            raise BadInput("no chat", where=where, expected="a list of {role, content} with an assistant's turn")
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
        except Exception as error:  # templates raise errors of their own making
            raise BadInput("the chat template refuses these turns", where=where, found=error) from None
        return ids


def _trained_tokenizer(prepare: recipe.Prepare, section: recipe.CausalLanguageModel) -> Any:
    """A byte-level BPE of the text that a prepared base learns."""
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
    """One document: its text, its prompt and completion, or its messages, and where it is from."""

    cells: tuple[Any, ...]
    where: str


def _read(source: str, role: str, columns: LanguageColumns) -> list[Document]:
    """All documents of a file, a folder, a data set, or what comes with Python."""
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
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput("the file is not UTF-8", where=path, found=error) from None
    except OSError as error:
        raise BadInput("the file cannot be read", where=path, found=error) from None


def _python_docs() -> list[tuple[str, str]]:
    """The language reference that `help()` shows: about 80 topics."""
    from pydoc_data.topics import topics

    return [(text, f"python-docs, {name}") for name, text in sorted(topics.items())]


def _python_code() -> list[tuple[str, str]]:
    """The modules of the standard library that are one file."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return [(text, str(file)) for file in files if (text := _read_text(file)).strip()]


_BUNDLED = {"python-docs": _python_docs, "python-code": _python_code}
"""Text that comes with every Python, under its licence."""
