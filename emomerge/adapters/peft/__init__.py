"""PEFT's LoRA folders: `adapter_config.json` and `adapter_model.safetensors`. Importable without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emomerge.errors import BadInput

if TYPE_CHECKING:
    from emomerge.adapters.change import Change
    from emomerge.checkpoints import Checkpoint

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
"""What PEFT puts before the name of every module."""

_FACTS = ("peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "modules_to_save", "base_model_name_or_path")


class _Peft:
    """The `AdapterFormat` of PEFT; see its methods there."""

    layout = f"a folder with {CONFIG} and {WEIGHTS}"

    def claims(self, path: Path) -> bool:
        """Claim a folder with a configuration, or the weight file beside one."""
        return (_folder(path) / CONFIG).is_file()

    def files(self, path: Path) -> list[Path]:
        """Return the configuration and the weight file."""
        return [_folder(path) / CONFIG, _folder(path) / WEIGHTS]

    def read(self, path: Path, base: Checkpoint, *, allow_unmatched: bool) -> dict[str, Change]:
        """Read LoRA factors and replaced tensors; see `reader`."""
        from emomerge.adapters.peft.reader import read_peft

        return read_peft(_folder(path), base, allow_unmatched=allow_unmatched)

    def facts(self, path: Path) -> dict[str, Any]:
        """Return the fields of the configuration that say what the adapter is."""
        config = load_config(_folder(path))
        return {key: config[key] for key in _FACTS if config.get(key)}


PEFT = _Peft()


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


def _folder(path: Path) -> Path:
    return path.parent if path.name == WEIGHTS and path.is_file() else path
