"""The model card of a written model, in the form the Hugging Face Hub reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from emomerge.reporting.report import environment
from emomerge.reporting.table import columns

COLUMNS = ("test_loss", "test_accuracy", "validation_loss", "validation_accuracy", "distance")
"""Figures of the card's table, besides sharpness."""
FACTS = {
    "lambda_crit": "λ_crit = 1/(N−1)", "kept_density": "share of weights that the merge moves",
    "kept_energy": "squared length of the mean task vector kept", "cosine_to_mean": "cosine to the mean task vector",
    "merged_norm": "length of the merged task vector", "norm": "length of the merged task vector",
}  # fmt: skip
"""Diagnostics of the card, in words."""


def model_card(context: Mapping[str, Any]) -> str:
    """Render model_card.md.j2; the card says only what is known.

    Args:
        context: title, about (a sentence), name (this model among `figures`), base, license, library_name, method, params, runs
            ([{name, source, sha256}], the last one hash or {file: hash}), diagnostics, figures (artefacts of results.json),
            files ({file: hash} of this model), recipe_yaml, command, version; any may be missing.
    """
    known = {key: value for key, value in context.items() if value}
    shown = [a for a in known.get("figures", []) if a.get("role") != "control"]
    diagnostics = known.get("diagnostics", {})
    front = _front_matter(known)
    names = {"title", "about", "name", "base", "method", "recipe_yaml", "command", "version"}
    return (
        environment()
        .get_template("model_card.md.j2")
        .render(
            {name: known.get(name) for name in names},
            front=yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(),
            params={key: _plain(value) for key, value in known.get("params", {}).items() if value is not None},
            runs=[{**run, "hashes": _hashes(run.get("sha256"))} for run in known.get("runs", [])],
            files=_hashes(known.get("files")),
            facts={words: diagnostics[key] for key, words in FACTS.items() if diagnostics.get(key) is not None},
            masks=diagnostics.get("mask_density") or {},
            warnings=[str(warning).rstrip(".") for warning in diagnostics.get("warnings") or []],
            figures=shown,
            columns=[c for c in columns({"artefacts": shown}) if c.key in COLUMNS or c.key.startswith("sharpness_")],
        )
    )


def in_table(text: object) -> str:
    """Any text as plain Markdown text, also within a table: nothing in it is markup."""
    return re.sub(r"([\\`*_\[\]|<>&#])", r"\\\1", " ".join(str(text).split()))


def in_code(text: object) -> str:
    """Any text as a Markdown code span."""
    plain = " ".join(str(text).split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", plain)), default=0))
    room = " " if plain.startswith("`") or plain.endswith("`") else ""
    return f"{fence}{room}{plain}{room}{fence}"


def in_block(text: object) -> str:
    """Any text, indented as a Markdown code block, which no text can end."""
    return "\n".join(f"    {line}".rstrip() for line in str(text).strip("\n").splitlines())


def _front_matter(known: Mapping[str, Any]) -> dict[str, Any]:
    base, files = known.get("base"), known.get("files", {})
    front: dict[str, Any] = {}
    if "license" in known:
        front["license"] = known["license"]
    front["library_name"] = known.get("library_name") or (
        "peft" if any("adapter_" in name for name in files) else "transformers"
    )
    if isinstance(base, str) and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", base):  # only a Hub id means something to others
        front |= {"base_model": base, "base_model_relation": "merge"}
    return {**front, "tags": ["emomerge", "merge", "model-merging"]}


def _hashes(value: object) -> dict[str, str]:
    """File → hash, of a mapping or of one hash alone."""
    if isinstance(value, Mapping):
        return {str(name): str(digest) for name, digest in value.items()}
    return {"": str(value)} if value else {}


def _plain(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


environment().filters |= {"md": in_table, "code": in_code, "block": in_block}
