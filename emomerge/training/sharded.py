"""Tensors that FSDP2 has cut over the ranks (DTensors): whole on disk, so that any number of ranks resumes from them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; a collective where it is cut."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def cut_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that every rank has whole, if `like` is cut."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    part: Tensor = distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return part


def cut_state(optimizer: Optimizer, state: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """State of parameters by their numbers, cut as the optimizer would have made it for them."""
    parameters = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    for index, values in state.items():
        p, group = parameters[index]
        if not hasattr(p, "full_tensor"):
            continue
        fresh = optimizer.init_state(p, group) if hasattr(optimizer, "init_state") else {}
        for key, value in values.items():
            if isinstance(value, Tensor) and value.dim() > 0:
                values[key] = cut_like(value, fresh.get(key, p))
    return state
