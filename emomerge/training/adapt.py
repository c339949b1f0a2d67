"""Making a model trainable, by a LoRA adapter (PEFT) or in full, and saving the result."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn

from emomerge.checkpoints import atomic, model_checkpoint, write_checkpoint
from emomerge.checkpoints.reader import lasting_name
from emomerge.errors import BadInput
from emomerge.numerics.seeds import seed_of
from emomerge.recipe import Full, Lora


def adapt(model: nn.Module, adapter: Lora | Full, *, task_type: str | None, head: str | None, seed: int) -> nn.Module:
    """Return the model with `requires_grad` set on the parameters to train.

    The adapter's initial weights depend on `seed` alone, so that all runs of a training seed start from the same point.

    Args:
        model: the base, changed in place.
        adapter: the recipe's `adapter`.
        task_type: PEFT's name of the task, which decides how it treats heads; None if PEFT has no name for it.
        head: name of a freshly initialized module to train in full and save with the adapter, if any.
        seed: training seed.

    Raises:
        BadInput: the adapter's targets match no module of the model.
    """
    if isinstance(adapter, Full):
        return model.requires_grad_(True)

    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        use_rslora=adapter.rslora,
        target_modules=adapter.targets if isinstance(adapter.targets, str) else list(adapter.targets),
        modules_to_save=[head] if head else None,
        task_type=task_type,
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed_of("adapter", seed))
        try:
            adapted: nn.Module = get_peft_model(model, config)
        except ValueError as error:
            raise BadInput("the adapter fits no module", where=f"adapter.targets = {adapter.targets!r}", found=error) from None
    return adapted


def save_adapted(model: nn.Module, folder: Path, *, base_folder: Path) -> None:
    """Write the trained weights, replacing `folder`: a PEFT adapter, or a dense checkpoint for `from_pretrained`."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        if not base_folder.is_dir():
            raise BadInput("the base folder is missing", where=base_folder, fix="put it back; the same command resumes")
        write_checkpoint(model_checkpoint(model, source=str(folder)), folder, files_from=base_folder, force=True)
        return
    for config in model.peft_config.values():
        config.base_model_name_or_path = lasting_name(base_folder)
    with atomic.new_folder(folder, force=True) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(str(temporary), safe_serialization=True, save_embedding_layers=False)
        (temporary / "README.md").unlink(missing_ok=True)  # PEFT's empty template; the report stage writes a model card
