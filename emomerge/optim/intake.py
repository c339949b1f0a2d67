"""How the loss reaches a pulse: observed where it is computed, averaged where the step needs it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from emomerge.errors import BadInput, MissingLossError


class LossIntake:
    """The losses observed since the last step. They stay on their device until the step asks for their mean."""

    def __init__(self) -> None:
        self._losses: list[Tensor | float] = []

    def observe(self, loss: Tensor | float) -> None:
        """Note the loss of one micro-batch: a scalar tensor (detached here, no host sync) or a number.

        Raises:
            BadInput: the tensor has more than one element or is complex.
        """
        if not isinstance(loss, Tensor):
            self._losses.append(float(loss))
        elif loss.numel() != 1 or loss.is_complex():
            raise BadInput(
                "a loss is one real number",
                found=f"{loss.dtype} of shape {tuple(loss.shape)}",
                fix="average it first, as in `loss.mean()`",
            )
        else:
            self._losses.append(loss.detach().clone().reshape(()))  # a copy: `loss /= n` may follow

    def take(self, device: torch.device) -> float:
        """Mean over micro-batches and, under torch.distributed, over ranks; then forget them. One host sync.

        Every rank must take its loss at the same step, so that all replicas see one mean and stay alike.

        Raises:
            MissingLossError: nothing was observed since the last call.
        """
        if not self._losses:
            raise MissingLossError(
                "step() without a loss: call `observe(loss)` before it, or give a closure that returns the loss"
            )
        dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        mean = torch.stack([torch.as_tensor(loss, dtype=dtype, device=device) for loss in self._losses]).mean()
        self.forget()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        return float(mean)

    def forget(self) -> None:
        """Drop what was observed."""
        self._losses.clear()
