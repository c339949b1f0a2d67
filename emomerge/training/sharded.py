"""Tensors sharded over ranks by FSDP2 (DTensors). On disk they are unsharded, so that any number of ranks can resume."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def unshard(tensor: Tensor) -> Tensor:
    """Return the full tensor; a collective operation if it is sharded."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this rank's shard of a full tensor if `like` is sharded, else the tensor itself."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    shard: Tensor = distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return shard


def shard_state(optimizer: Optimizer, state: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Shard an optimizer's state, by parameter index, as the optimizer itself would have initialized it."""
    parameters = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    for index, values in state.items():
        p, group = parameters[index]
        if not hasattr(p, "full_tensor"):
            continue
        fresh = optimizer.init_state(p, group) if hasattr(optimizer, "init_state") else {}
        for key, value in values.items():
            if isinstance(value, Tensor) and value.dim() > 0:
                values[key] = shard_like(value, fresh.get(key, p))
    return state
