"""The texts in the header of a single-file model: what is kept of the base's, and what is said about the output.

The keys `modelspec.*` are those of the Stability AI Model Metadata Standard (`modelspec.merged_from`, `modelspec.date`),
`ss_*` and `sshs_*` those of sd-scripts, `emomerge` ours.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RECORD = "emomerge"
"""The key under which a file says how it was made, in JSON."""
_HASHES = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
_FORBIDDEN = ("sshs_", "ss_")


def kept_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata of a base that also hold for models made from it: no hashes, and nothing about a training."""
    return {key: text for key, text in metadata.items() if key not in _HASHES and not key.startswith(_FORBIDDEN)}


def made_of(
    metadata: Mapping[str, str], *, title: str, sources: Sequence[str | Path], record: Mapping[str, Any], is_image_model: bool
) -> dict[str, str]:
    """Return what to add to the metadata of a base about a model made from it.

    Args:
        metadata: those of the base.
        title: name of the model.
        sources: the base, then the runs or adapters.
        record: how it was made, ready for JSON.
        is_image_model: whether programs for images will look for `modelspec.*`, which other models have only if their base has.
    """
    found = {RECORD: json.dumps(record, ensure_ascii=False)}
    if is_image_model or any(key.startswith("modelspec.") for key in metadata):
        found |= {
            "modelspec.title": title,
            "modelspec.merged_from": ", ".join(_name(source) for source in sources),
            "modelspec.date": date(),
        }
    return found


def _name(source: str | Path) -> str:
    return Path(source).name.removesuffix(".safetensors") or str(source)


def date() -> str:
    """Return the time in ISO 8601, in UTC; that of SOURCE_DATE_EPOCH if it is set, for files that are to be the same again."""
    given = os.environ.get("SOURCE_DATE_EPOCH", "")
    moment = datetime.fromtimestamp(int(given), UTC) if given.isdecimal() else datetime.now(UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S")
