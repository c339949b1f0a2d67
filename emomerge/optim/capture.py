"""`capture_loss=True`: emo optimizers in training loops that only call `step()`, such as kohya's sd-scripts.

While an optimizer is watched, a wrapper around `torch.Tensor.backward` records every scalar loss on which it is called. The
sum of the losses since the last step is the objective whose gradient that step follows: micro-batches divided by their
number give their mean, and undivided ones a multiple of it. The multiple hardly matters to emoPulse, which depends on
relative changes, as long as the number of micro-batches stays the same. The factor of a `GradScaler` is removed.

A loss is credited to the optimizers whose gradients its backward pass changed. Not captured are `torch.autograd.backward`, a
non-scalar `backward(gradient)`, and a scaled loss that was modified after `GradScaler.scale`. A step without a captured loss
is an error.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import has_torch_function
from torch.utils.weak import WeakTensorKeyDictionary

from emomerge.optim.intake import LossIntake


class Watched(Protocol):
    """The part of an optimizer that capturing needs."""

    intake: LossIntake
    param_groups: list[dict[str, Any]]


Method = Callable[..., Any]
Gradients = list[tuple[Tensor, Tensor | None, int]]
"""Each parameter, its gradient and the gradient's version."""

_watched: dict[int, weakref.ref[Watched]] = {}
_replaced: dict[tuple[type[Any], str], tuple[Method, Method]] = {}
"""(class, name of the method) → (original method, our wrapper)."""
_unscaled = WeakTensorKeyDictionary()
"""Result of `GradScaler.scale` → the loss that was scaled."""
_graph_task: Callable[[], int] | None = getattr(torch._C, "_current_graph_task_id", None)
"""torch's number of the backward pass in progress on this thread, −1 without one; private, so it may be missing."""
_depth = 0
"""Number of `Tensor.backward` calls in progress."""


def watch(optimizer: Watched) -> None:
    """Capture losses for an optimizer until `unwatch` is called or the optimizer is garbage-collected."""
    _watched[id(optimizer)] = weakref.ref(optimizer, functools.partial(_drop, id(optimizer)))
    _replace(Tensor, "backward", _capturing)
    for scaler in _with_subclasses(torch.amp.GradScaler):
        if "scale" in vars(scaler):
            _replace(scaler, "scale", _remembering)


def unwatch(optimizer: Watched) -> None:
    """Stop capturing losses for an optimizer. After the last one, torch's own methods are restored."""
    _drop(id(optimizer))


def _drop(key: int, _: object = None) -> None:
    _watched.pop(key, None)
    if not _watched:
        for (owner, name), (original, wrapper) in list(_replaced.items()):
            if vars(owner)[name] is wrapper:  # otherwise someone wrapped the wrapper, which then stays and does nothing
                setattr(owner, name, original)
                del _replaced[owner, name]


def _replace(owner: type[Any], name: str, wrap: Callable[[Method], Method]) -> None:
    if (owner, name) not in _replaced:
        original = vars(owner)[name]
        wrapper = functools.wraps(original)(wrap(original))
        _replaced[owner, name] = original, wrapper
        setattr(owner, name, wrapper)


def _with_subclasses(parent: type[Any]) -> Iterator[type[Any]]:
    """Yield a class and its present subclasses; FSDP1's scaler, for one, overrides `scale`."""
    yield parent
    for child in parent.__subclasses__():
        yield from _with_subclasses(child)


def _remembering(scale: Method) -> Method:
    """Wrap `GradScaler.scale` to remember which loss it scaled."""

    def remember(self: torch.amp.GradScaler, outputs: Any) -> Any:
        scaled = scale(self, outputs)
        losses, results = ([outputs], [scaled]) if isinstance(outputs, Tensor) else (outputs, scaled)
        if isinstance(losses, (list, tuple)):
            for loss, result in zip(losses, results, strict=True):
                if result is not loss and isinstance(loss, Tensor):
                    _unscaled[result] = loss.detach()
        return scaled

    return remember


def _capturing(backward: Method) -> Method:
    """Wrap `Tensor.backward` to record the loss for the optimizers whose gradients it changes."""

    def capture(self: Tensor, gradient: Tensor | None = None, *args: Any, **kwargs: Any) -> None:
        global _depth
        # A tensor subclass, or a mode such as `with torch.device(...)`, calls `Tensor.backward` again from within this call.
        if self.numel() != 1 or self.is_complex() or has_torch_function((self,)) or _in_backward():
            backward(self, gradient, *args, **kwargs)
            return
        before = [(optimizer, _gradients(optimizer)) for ref in list(_watched.values()) if (optimizer := ref())]
        for optimizer, gradients in before:
            if not _any_sharded(gradients) and all(grad is None for _, grad, _ in gradients):
                optimizer.intake.forget_captured()  # the gradients of earlier losses were discarded
        _depth += 1
        try:
            backward(self, gradient, *args, **kwargs)
        finally:
            _depth -= 1
        loss = _unscaled.get(self, self).detach()
        if gradient is not None:
            loss = loss * gradient.detach()
        for optimizer, gradients in before:
            changed = any(p.grad is not grad or _version(grad) != version for p, grad, version in gradients)
            if changed or _any_sharded(gradients):
                optimizer.intake.capture(loss)

    return capture


def _in_backward() -> bool:
    """Return whether a backward pass is in progress: a call within it computes a part of that pass's gradient.

    Without torch's private function, only passes started by `Tensor.backward` are known.
    """
    return _depth > 0 if _graph_task is None else _graph_task() != -1


def _gradients(optimizer: Watched) -> Gradients:
    """Return what shows afterwards whether backward replaced a gradient or added to it in place."""
    return [(p, p.grad, _version(p.grad)) for group in optimizer.param_groups for p in group["params"]]


def _version(grad: Tensor | None) -> int:
    return 0 if grad is None else grad._version


def _any_sharded(gradients: Gradients) -> bool:
    """Return whether a parameter is sharded (DTensor or FSDP1), whose `grad` may not change before the last micro-batch."""
    return any(hasattr(p, "to_local") or getattr(p, "_fsdp_flattened", False) for p, _, _ in gradients)
