"""The files of a PEFT adapter, without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from emomerge.errors import BadInput

WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
"""What PEFT puts before the name of every module."""


def load_config(folder: Path) -> dict[str, Any]:
    """Return `adapter_config.json` as it is. Raises BadInput if it is not a JSON object."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput("the adapter's configuration is not JSON", where=path, found=error) from None
    if not isinstance(config, dict):
        raise BadInput("the adapter's configuration is not a JSON object", where=path, found=type(config).__name__)
    return config
