"""Read PEFT's adapter folders: the change of each base tensor.

The forward pass of the live PEFT model is the reference, since it is what was trained; its `merge` differs for some types. Any
adapter with an effect that is not known exactly is refused by name.
"""

from __future__ import annotations

from pathlib import Path

from emomerge.adapters.change import Change
from emomerge.adapters.peft.config import read_config
from emomerge.adapters.peft.formulas import FormulaReader
from emomerge.adapters.peft.lora import LoraReader
from emomerge.adapters.peft.types import LIVE, kind_of
from emomerge.checkpoints import Checkpoint


def read_peft(folder: Path, base: Checkpoint, *, allow_unmatched: bool = False) -> dict[str, Change]:
    """Read a PEFT adapter folder; see `AdapterFormat.read`.

    Args:
        folder: the adapter.
        base: the model that it was trained on. Its tensors may have the names on disk or in memory, with or without a head.
        allow_unmatched: skip adapter keys that match no base tensor, with a warning.

    Raises:
        BadInput: the adapter is damaged, of a type that cannot be baked, or of another model.
    """
    folder = Path(folder)
    config = read_config(folder)
    if config["peft_type"] == "LORA":
        return LoraReader(folder, config, base, allow_unmatched).changes()
    if config["peft_type"] in LIVE:
        from emomerge.adapters.peft.live import LiveReader

        return LiveReader(folder, config, base, allow_unmatched).changes()
    return FormulaReader(folder, config, base, allow_unmatched, kind_of(config["peft_type"])).changes()
