"""PEFT as an adapter format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from emomerge.adapters.peft.files import CONFIG, WEIGHTS, load_config
from emomerge.adapters.peft.types import REFUSED

if TYPE_CHECKING:
    from emomerge.adapters.change import Change
    from emomerge.checkpoints import Checkpoint

_FACTS = """
    peft_type r init_r lora_alpha alpha randlora_alpha use_rslora use_dora oft_block_size boft_block_size boft_block_num
    n_frequency token_indices trainable_token_indices target_modules target_parameters modules_to_save base_model_name_or_path
""".split()  # noqa: SIM905


class _Peft:
    """The `AdapterFormat` of PEFT's folders."""

    layout = f"a folder with {CONFIG} and {WEIGHTS}"

    def claims(self, path: Path) -> bool:
        """Claim a folder with a configuration, or the weight file beside one."""
        return (_folder(path) / CONFIG).is_file()

    def files(self, path: Path) -> list[Path]:
        """Return the configuration and the weight file."""
        return [_folder(path) / CONFIG, _folder(path) / WEIGHTS]

    def read(self, path: Path, base: Checkpoint, *, allow_unmatched: bool) -> dict[str, Change]:
        """Read the tensors of any type that `types` lists, and replaced tensors; see `reader`."""
        from emomerge.adapters.peft.reader import read_peft

        return read_peft(_folder(path), base, allow_unmatched=allow_unmatched)

    def facts(self, path: Path) -> dict[str, Any]:
        """Return the fields of the configuration that say what the adapter is, and why it cannot be baked if it cannot."""
        config = load_config(_folder(path))
        found = {key: config[key] for key in _FACTS if config.get(key)}
        refused = REFUSED.get(str(config.get("peft_type")))
        return found if refused is None else found | {"cannot be baked": refused.reason}


PEFT = _Peft()


def _folder(path: Path) -> Path:
    return path.parent if path.name == WEIGHTS and path.is_file() else path
