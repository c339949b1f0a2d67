"""Collects the losses of a step, observed or captured, and averages them for the pulse."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from emomerge.errors import BadInput, MissingLossError


class LossIntake:
    """The losses since the last step. They stay on their device, without host synchronization."""

    def __init__(self) -> None:
        self._observed: list[Tensor | float] = []
        self._divided = False
        self._captured: list[Tensor | float] = []

    def observe(self, loss: Tensor | float, divided: bool = False) -> None:
        """Record the loss of one micro-batch: a scalar tensor (detached here) or a number.

        Args:
            loss: the loss on which backward is called, before a GradScaler.
            divided: the loss is already divided by the number of micro-batches, as transformers and accelerate do before
                backward; the losses of a step are then summed instead of averaged.

        Raises:
            BadInput: the tensor has more than one element or is complex, or one step mixes divided and undivided losses.
        """
        if self._observed and divided != self._divided:
            raise BadInput(
                "one step observes both divided and undivided losses",
                fix="give `divided` the same value for every micro-batch",
            )
        self._observed.append(_scalar(loss))
        self._divided = divided

    def capture(self, loss: Tensor) -> None:
        """Record a loss seen in backward. The captured losses are summed, and used only if none is observed."""
        self._captured.append(_scalar(loss))

    def take(self, device: torch.device) -> Tensor:
        """Return the loss of the step, averaged over the ranks of torch.distributed, and clear the record. No host sync.

        Every rank must call this in the same step, so that all replicas see one mean and stay identical.

        Returns:
            A float64 tensor (float32 on MPS, which has no float64) of shape () on `device`.

        Raises:
            MissingLossError: no loss was observed or captured since the last call.
        """
        losses = self._observed or self._captured
        if not losses:
            raise MissingLossError(
                "step() without a loss: call `observe(loss)` before it or pass a closure that returns the loss; with "
                "transformers use `emomerge.integrations.EmoTrainer`, and in a loop you cannot change pass the optimizer "
                "`capture_loss=True`, which sees `loss.backward()`"
            )
        dtype = torch.float32 if device.type == "mps" else torch.float64
        mean, *others = [_on(device, dtype, loss) for loss in losses]
        if others:
            mean = torch.stack([mean, *others]).sum()
        if others and self._observed and not self._divided:
            mean = mean / len(losses)
        self.forget()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        return mean

    def forget(self) -> None:
        """Drop all losses."""
        self._observed.clear()
        self.forget_captured()

    def forget_captured(self) -> None:
        """Drop the captured losses, because their gradients were discarded."""
        self._captured.clear()


def _scalar(loss: Tensor | float) -> Tensor | float:
    if not isinstance(loss, Tensor):
        return float(loss)
    if loss.numel() != 1 or loss.is_complex():
        raise BadInput(
            "a loss is one real number",
            found=f"{loss.dtype} of shape {tuple(loss.shape)}",
            fix="average it first, as in `loss.mean()`",
        )
    return loss.detach().clone().reshape(())  # a copy: `loss /= n` may follow


def _on(device: torch.device, dtype: torch.dtype, loss: Tensor | float) -> Tensor:
    if isinstance(loss, Tensor):
        return loss.to(device, dtype)
    return torch.full((), loss, dtype=dtype, device=device)  # filled there, not copied from the host
