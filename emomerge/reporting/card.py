"""The model card of a written model, in the form the Hugging Face Hub reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from emomerge.reporting.report import environment
from emomerge.reporting.table import columns


def model_card(context: Mapping[str, Any]) -> str:
    """Render model_card.md.j2; the card says only what is known.

    Args:
        context: title, name, about (a sentence), base, method, params, runs ([{name, source, sha256}]), diagnostics, figures
            (artefacts of results.json), recipe_yaml, command, version; any may be missing.
    """
    known = {key: value for key, value in context.items() if value}
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["emomerge", "merge", "model-merging"]}
    base = known.get("base")
    if isinstance(base, str) and base.count("/") == 1 and not base.startswith((".", "/")):
        front["base_model"] = base  # only a Hub id means something to other readers of the card
    shown = [a for a in known.get("figures", []) if a.get("role") != "control"]
    return environment().get_template("model_card.md.j2").render(
        front=yaml.safe_dump(front, sort_keys=False).strip(), figures=shown, columns=columns({"artefacts": shown}), **{
            "title": "A model", "about": None, "name": None, "base": None, "method": None, "params": {}, "runs": [], "diagnostics": {},
            "recipe_yaml": None, "command": None, "version": None,
        } | {key: value for key, value in known.items() if key != "figures"},
    )  # fmt: skip
