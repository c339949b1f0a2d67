"""Model cards in the format of the Hugging Face Hub, built as plain text without a template engine."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import yaml
from pydantic import BaseModel, ConfigDict, JsonValue

from emomerge.errors import shown, shown_lines
from emomerge.reporting.table import FilledColumn, artefacts, filled_columns
from emomerge.reporting.text import percent, short
from emomerge.results import TRUNK, MergeFacts, Results

Hashes: TypeAlias = str | Mapping[str, str] | None
"""One SHA-256, or file → SHA-256."""
DIAGNOSTICS = {
    "lambda_crit": "λ_crit = 1/(N−1)", "kept_density": "share of weights that the merge moves",
    "kept_energy": "squared length of the mean task vector kept", "cosine_to_mean": "cosine to the mean task vector",
    "merged_norm": "length of the merged task vector",
}  # fmt: skip
"""Field of MergeFacts → its label in the card."""
CHOICES = (
    "Choices were made by the validation figures; the test figures served for nothing but this table. Sharpness: mean rise of "
    "the loss under Gaussian noise of σ times the RMS of the base's tensor, ± standard error."
)


class _Given(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", arbitrary_types_allowed=True)


class MergedRun(_Given):
    """A run, or the mean of the runs after a round, that went into a merge."""

    name: str
    source: str | None = None
    sha256: Hashes = None


class Card(_Given):
    """Facts about a model. Missing ones are left out of its card; unknown keys are ignored."""

    title: str = "A model"
    about: str = ""
    """One sentence."""
    name: str = ""
    """Name of this model among the artefacts of `results`."""
    base: str = ""
    license: str = ""
    library_name: str = ""
    method: str = ""
    params: dict[str, JsonValue] = {}
    runs: tuple[MergedRun, ...] = ()
    of: Literal["runs", "rounds"] = "runs"
    """What `runs` are: finished runs, or the means of the runs after some rounds."""
    diagnostics: MergeFacts | None = None
    results: Results | None = None
    files: dict[str, str] = {}
    """File of this model → SHA-256."""
    recipe_yaml: str | None = None
    command: str | None = None
    version: str = ""
    """Version of emomerge."""


def model_card(card: Card) -> str:
    """Return the README.md of a model."""
    head = f"---\n{_front_matter(card)}\n---\n\n# {in_table(card.title)}\n\n"
    parts = [
        _params(card),
        *_warnings(card),
        _figures(card),
        _section("Diagnostics", _diagnostics(card)),
        _section(card.of.capitalize(), [_run(run) for run in card.runs]),
        _section("Files", [f"- {_hash(file, digest)}" for file, digest in card.files.items()]),
        _repeat(card),
    ]
    about = f"{in_table(card.about)}\n\n" if card.about else ""
    return head + about + _origin(card) + "".join(f"\n{part}" for part in parts if part)


def in_table(text: object) -> str:
    """Escape a text for Markdown, so that it is shown literally, also within a table."""
    return re.sub(r"([\\`*_\[\]|<>&#])", r"\\\1", shown(" ".join(str(text).split())))


def in_code(text: object) -> str:
    """Return a text as a Markdown code span."""
    plain = shown(" ".join(str(text).split()))
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", plain)), default=0))
    room = " " if plain.startswith("`") or plain.endswith("`") else ""
    return f"{fence}{room}{plain}{room}{fence}"


def in_block(text: object) -> str:
    """Return a text as an indented Markdown code block, which its content cannot terminate."""
    return "\n".join(f"    {line}".rstrip() for line in shown_lines(str(text).strip("\n")).split("\n"))


def _front_matter(card: Card) -> str:
    library = "peft" if any("adapter_" in name for name in card.files) else "transformers"
    front: dict[str, str | list[str]] = {"license": card.license} if card.license else {}
    front["library_name"] = card.library_name or library
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", card.base):  # a local path is useless to others
        front |= {"base_model": card.base, "base_model_relation": "merge"}
    front["tags"] = ["emomerge", "merge", "model-merging"]
    return yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip()


def _origin(card: Card) -> str:
    if not card.method:
        return ""
    version = f" {card.version}" if card.version else ""
    count = len(card.runs)
    models = f"{count} run{'s' if count > 1 else ''}"
    if card.of == "rounds":
        trunk = sum(run.name == TRUNK for run in card.runs)
        models = "the trunk and " * trunk + f"the means of the runs after {count - trunk} rounds"
    runs = f" from {models}" if card.runs else ""
    base = f" over {in_code(card.base)}" if card.base else ""
    return f"Merged by emomerge{version} with the method {in_code(card.method)}{runs}{base}.\n"


def _params(card: Card) -> str:
    params = [f"{in_code(key)} {in_table(_plain(value))}" for key, value in card.params.items() if value is not None]
    return f"Parameters: {'; '.join(params)}.\n" if params else ""


def _warnings(card: Card) -> list[str]:
    warnings = card.diagnostics.warnings if card.diagnostics else ()
    return [f"> **Warning:** {in_table(warning.rstrip('.'))}.\n" for warning in warnings]


def _section(title: str, lines: Sequence[str]) -> str:
    return f"## {title}\n\n" + "".join(f"{line}\n" for line in lines) if lines else ""


def _figures(card: Card) -> str:
    if card.results is None or not (rows := [row for row in artefacts(card.results) if row.role != "control"]):
        return ""
    columns = filled_columns(card.results.model_copy(update={"artefacts": tuple(rows)}), "card")
    names = [f"**{in_table(row.name)}**" if row.name == card.name else in_table(row.name) for row in rows]
    lines = [
        _line("", [in_table(filled.column.title) for filled in columns]),
        "|---|" + "---:|" * len(columns),
        *(_line(f" {name}", _cells(columns, i)) for i, name in enumerate(names)),
    ]
    return _section("Figures", [*lines, "", CHOICES])


def _line(name: str, cells: Sequence[str]) -> str:
    return f"|{name} |" + "".join(f" {cell} |" for cell in cells)


def _cells(columns: Sequence[FilledColumn], row: int) -> list[str]:
    return [filled.cells[row] for filled in columns]


def _diagnostics(card: Card) -> list[str]:
    facts = card.diagnostics
    if facts is None:
        return []
    numbers = {words: getattr(facts, field) for field, words in DIAGNOSTICS.items()}
    masks = [f"- mask of {in_code(run)}: {percent(density)} of the weights" for run, density in facts.mask_density.items()]
    return [f"- {in_table(words)}: {short(value, 4)}" for words, value in numbers.items() if value is not None] + masks


def _run(run: MergedRun) -> str:
    hashes = run.sha256 if isinstance(run.sha256, Mapping) else {"": run.sha256} if run.sha256 else {}
    source = f" from {in_code(run.source)}" if run.source else ""
    return f"- {in_code(run.name)}{source}" + "".join(f"; {_hash(file, digest)}" for file, digest in hashes.items())


def _hash(file: str, digest: str) -> str:
    return (f"{in_code(file)} " if file else "") + f"SHA-256 {in_code(digest)}"


def _repeat(card: Card) -> str:
    command = f"{in_block(card.command)}\n" if card.command else ""
    recipe = f"\nThe recipe:\n\n{in_block(card.recipe_yaml)}\n" if card.recipe_yaml else ""
    return f"## Repeat it\n\n{command}{recipe}" if command or recipe else ""


def _plain(value: JsonValue) -> str:
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
