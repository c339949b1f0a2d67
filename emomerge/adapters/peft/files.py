"""The files of a PEFT adapter, without torch."""

from __future__ import annotations

from pathlib import Path

from emomerge import watch
from emomerge.files import JsonObject, read_json

WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
"""What PEFT puts before the name of every module."""


def load_config(folder: Path) -> JsonObject:
    """Return `adapter_config.json` as it is. Raises BadInput if it is not a JSON object."""
    path = folder / CONFIG
    config = read_json(path, JsonObject, what="the adapter's configuration is not a JSON object")
    watch.note(path, watch.identity_of(path.stat()))
    return config
