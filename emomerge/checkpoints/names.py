"""The names on disk of a live model's tensors.

transformers renames modules between disk and memory: a ViT's `vit.encoder.layer.0.attention.attention.query.weight` is
`vit.layers.0.attention.q_proj.weight` in the module. Checkpoints always use the names on disk.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from emomerge.checkpoints.checkpoint import Checkpoint, MemoryCheckpoint
from emomerge.errors import BadInput


def disk_names(model: nn.Module) -> dict[str, str]:
    """Return name in the module → name on disk, for every tensor of `model.state_dict()`.

    If saving would reshape or join tensors (fused experts), the whole model keeps its module names, which transformers loads as
    well. The names are the same for a model that is not of transformers.
    """
    state = model.state_dict()
    same = {name: name for name in state}
    transformers = sys.modules.get("transformers")  # imported already if the model is one of its own
    if transformers is None or not hasattr(model, "config") or not isinstance(model, transformers.PreTrainedModel):
        return same
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # versions before 5 rename nothing
        return same

    # Stand-ins without data: a tensor that transformers returns unchanged was only renamed.
    stand_ins = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    module_names = {id(tensor): name for name, tensor in stand_ins.items()}
    on_disk = revert_weight_conversion(model, dict(stand_ins))
    if {id(tensor) for tensor in on_disk.values()} != set(module_names):
        return same
    return {module_names[id(tensor)]: name for name, tensor in on_disk.items()}


def model_checkpoint(model: nn.Module, *, source: str) -> MemoryCheckpoint:
    """Return the weights of a live model by their names on disk, with persistent buffers, and tied tensors once.

    The tensors share the model's memory: write or clone them before the model changes.
    """
    state, to_disk = model.state_dict(), disk_names(model)
    kept = [names[0] for names in _aliases(model, state)]
    return MemoryCheckpoint({to_disk[name]: state[name].detach() for name in kept}, source=source)


def load_into(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy every tensor of a checkpoint into a live model, in place, one at a time, cast to the parameters' dtypes.

    Raises:
        BadInput: the checkpoint lacks a tensor, has one that the model lacks, or one of another shape. The model is then
            unchanged.
    """
    state, to_disk = model.state_dict(), disk_names(model)
    pairs: dict[str, str] = {}
    known: set[str] = set()
    missing: list[str] = []
    for aliases in _aliases(model, state):
        candidates = [candidate for name in aliases for candidate in (to_disk[name], name)]
        known.update(candidates)
        found = next((name for name in candidates if name in checkpoint), None)
        if found is not None:
            pairs[aliases[0]] = found
        elif not _matches(getattr(model, "_keys_to_ignore_on_load_missing", None), aliases[0]):
            missing.append(candidates[0])
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None)
    unexpected = [name for name in checkpoint.names() if name not in known and not _matches(ignored, name)]
    _refuse_difference(checkpoint, missing, unexpected)
    for name, found in pairs.items():
        if checkpoint.info(found).shape != tuple(state[name].shape):
            raise BadInput(
                "a tensor has another shape than the model's",
                where=f"{checkpoint.source}, {found}",
                expected=tuple(state[name].shape),
                found=checkpoint.info(found).shape,
            )
    with torch.no_grad():
        for name, found in pairs.items():
            state[name].copy_(checkpoint[found])


def _aliases(model: nn.Module, state: Mapping[str, Tensor]) -> list[list[str]]:
    """Return the names of each distinct tensor, first the one it is saved under: one not tied to another by transformers."""
    ties = getattr(model, "all_tied_weights_keys", None)
    tied = set(ties) if isinstance(ties, Mapping) else set()
    groups: dict[object, list[str]] = defaultdict(list)
    owners = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for name in state:
        groups[id(owners.get(name, state[name]))].append(name)
    return [sorted(names, key=lambda name: name in tied) for names in groups.values()]


def _refuse_difference(checkpoint: Checkpoint, missing: list[str], unexpected: list[str]) -> None:
    if missing or unexpected:
        parts = [
            f"{len(names)} {kind} (such as {names[0]})"
            for names, kind in ((missing, "missing"), (unexpected, "unexpected"))
            if names
        ]
        raise BadInput(
            "the checkpoint is not of this model",
            where=checkpoint.source,
            expected="the model's own tensor names",
            found=", ".join(parts),
            fix="use the checkpoint's own base",
        )


def _matches(patterns: Iterable[str] | None, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())
