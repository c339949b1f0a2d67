"""Resolve a recipe's device on this machine."""

from __future__ import annotations

import torch

from emomerge.errors import BadInput


def choose_device(name: str) -> torch.device:
    """Return the torch device for a recipe's `device`; `auto` picks an accelerator if there is one.

    Raises:
        BadInput: there is no such device.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return torch.device("cpu") if accelerator is None else accelerator
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput("no such device", where=f"device = {name!r}", found=error, fix="use auto or cpu") from None
    return device
