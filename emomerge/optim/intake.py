"""Collects the losses of a step, observed or captured, and averages them for the pulse."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from emomerge.errors import BadInput, MissingLossError

SAMPLE = 64
"""At most this many parameters, evenly spaced, are looked at to see whether backward ran."""


class _Observed:
    """An observed loss, and what is known about its gradient."""

    def __init__(self, value: Tensor | float, settled: bool) -> None:
        self.value = value
        self.settled = settled
        """Whether backward ran."""
        self.accounted = settled
        """Whether it ran before the last look at the gradients."""
        self.visible = False
        """Whether there were gradients afterwards; wrappers such as FSDP keep them elsewhere for a while."""
        self.cleared_since = False
        """Whether gradients were cleared before backward ran."""

    def watch(self, loss: Tensor, params: Sequence[Tensor]) -> None:
        """Follow the backward pass of the loss, for loops that clear gradients without the optimizer."""

        def on_end() -> None:
            self.visible = any(p.grad is not None for p in params)

        def on_start(_: Tensor) -> None:
            self.settled = True
            torch.autograd.Variable._execution_engine.queue_callback(on_end)

        loss.register_hook(on_start)


class LossIntake:
    """The losses since the last step. They stay on their device, without host synchronization.

    A loss is dropped together with its gradients: if a step is skipped (by a GradScaler, or by a loop that leaves out `step()`)
    and the gradients are cleared, the next step must not see the loss. Since `zero_grad` may also stand between `observe` and
    backward, where it clears the gradients of the step before, losses whose backward has not run are kept.
    """

    looks = True
    """Whether gradients are looked at. A loop that takes a step on every loss that it observes can switch this off."""

    def __init__(self) -> None:
        self._observed: list[_Observed] = []
        self._dropped: list[_Observed] = []
        self._divided = False
        self._captured: list[Tensor | float] = []
        self._marks: list[tuple[TensorWeakRef, int] | None] = []

    def observe(self, loss: Tensor | float, divided: bool = False, params: Sequence[Tensor] = ()) -> None:
        """Record the loss of one micro-batch: a scalar tensor (detached here) or a number.

        Args:
            loss: the loss on which backward is called, before a GradScaler.
            divided: the loss is already divided by the number of micro-batches, as transformers and accelerate do before
                backward; the losses of a step are then summed instead of averaged.
            params: the optimizer's parameters, whose gradients tell whether backward ran for earlier losses.

        Raises:
            BadInput: the tensor has more than one element or is complex, or one step mixes divided and undivided losses.
        """
        value = _scalar(loss)
        waiting = any(not each.accounted for each in self._observed)
        grown, cleared = self._look(params)
        self._drop(lambda each: cleared or (each.visible and bool(params) and all(p.grad is None for p in params)))
        self._observed = [each for each in self._observed if each.settled or not each.cleared_since]
        if self._observed and divided != self._divided:
            raise BadInput(
                "one step observes both divided and undivided losses",
                fix="give `divided` the same value for every micro-batch",
            )
        observed = _Observed(value, settled=grown and not waiting)  # backward may also run before `observe`
        if self.looks and isinstance(loss, Tensor) and loss.requires_grad and not torch.compiler.is_compiling():
            observed.watch(loss, _sample(params))
        self._observed.append(observed)
        self._divided = divided

    def capture(self, loss: Tensor) -> None:
        """Record a loss seen in backward. The captured losses are summed, and used only if none is observed."""
        self._captured.append(_scalar(loss))

    def take(self, device: torch.device, params: Sequence[Tensor] = (), host: bool = False) -> Tensor:
        """Return the loss of the step, averaged over the ranks of torch.distributed, and clear the record. No host sync.

        Every rank must call this in the same step, so that all replicas see one mean and stay identical.

        Args:
            device: device of the result.
            params: the optimizer's parameters.
            host: losses that are all in host memory stay there, so that reading the result waits for nothing.

        Returns:
            A float64 tensor (float32 on MPS, which has no float64) of shape () on `device`.

        Raises:
            MissingLossError: no loss was observed or captured since the last call.
        """
        observed = self._observed or self._dropped  # a loop that clears gradients on purpose, such as SAM's, observed before
        losses = [each.value for each in observed] or self._captured
        if not losses:
            raise MissingLossError(
                "step() without a loss: call `observe(loss)` before it or pass a closure that returns the loss; with "
                "transformers use `emomerge.integrations.EmoTrainer`, and in a loop you cannot change pass the optimizer "
                "`capture_loss=True`, which sees `loss.backward()`"
            )
        distributed = dist.is_available() and dist.is_initialized()
        if host and not distributed and all(not isinstance(loss, Tensor) or loss.is_cpu for loss in losses):
            device = torch.device("cpu")
        dtype = torch.float32 if device.type == "mps" else torch.float64
        mean, *others = [_on(device, dtype, loss) for loss in losses]
        if others:
            mean = torch.stack([mean, *others]).sum()
        if others and observed and not self._divided:
            mean = mean / len(losses)
        self.forget()
        self.mark(params)
        if distributed:
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        return mean

    def clear_gradients(self, params: Sequence[Tensor]) -> None:
        """Drop the losses whose gradients are about to be cleared."""
        self.forget_captured()
        if not self._observed:
            return
        self._look(params)
        self._drop()
        for each in self._observed:
            each.cleared_since = True

    def mark(self, params: Sequence[Tensor]) -> None:
        """Remember the gradients, to see later whether they changed."""
        if self.looks and not torch.compiler.is_compiling():
            self._marks = [None if p.grad is None else (TensorWeakRef(p.grad), _version(p.grad)) for p in _sample(params)]

    def _look(self, params: Sequence[Tensor]) -> tuple[bool, bool]:
        """Return whether backward ran since the last look, and whether gradients that were there are gone; remember them."""
        if not self.looks or torch.compiler.is_compiling():
            return False, False
        before, now = self._marks, [p.grad for p in _sample(params)]
        before = before if len(before) == len(now) else [None] * len(now)
        kept = [mark is not None and mark[0]() is grad for mark, grad in zip(before, now, strict=True)]
        grown = any(
            grad is not None and not (same and mark is not None and mark[1] == _version(grad))
            for same, mark, grad in zip(kept, before, now, strict=True)
        )
        cleared = any(
            mark is not None and not same and not (grad is not None and grad.requires_grad)  # create_graph adds out of place
            for same, mark, grad in zip(kept, before, now, strict=True)
        )
        self.mark(params)
        for each in self._observed:
            each.settled |= grown and not cleared
            each.accounted = each.settled
        return grown, cleared

    def _drop(self, cleared: Callable[[_Observed], bool] = lambda each: True) -> None:
        """Drop the losses whose backward has run and whose gradients are cleared."""
        dropped = [each for each in self._observed if each.settled and cleared(each)]
        if dropped:
            self._dropped = dropped
            self._observed = [each for each in self._observed if each not in dropped]

    def forget(self) -> None:
        """Drop all losses."""
        self._observed, self._dropped = [], []
        self.forget_captured()

    def forget_captured(self) -> None:
        """Drop the captured losses, because their gradients were discarded."""
        self._captured.clear()


def _sample(params: Sequence[Tensor]) -> Sequence[Tensor]:
    return params[:: -(-len(params) // SAMPLE) or 1]


def _version(grad: Tensor) -> int:
    version: int = getattr(grad, "_local_tensor", grad)._version  # FSDP2 adds to the local part of a DTensor
    return version


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
