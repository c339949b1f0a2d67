"""`capture_loss=True`: emo optimizers in trainers that call `step()` bare, such as kohya's sd-scripts.

While an optimizer is watched, a wrapper around `torch.Tensor.backward` notes every scalar loss on its way backward. What went
backward since the last step adds up to the objective whose gradient that step follows. So micro-batches divided by their
number give their mean, and undivided ones a multiple of it, which emoPulse, a function of relative changes, hardly sees as
long as their number stays the same. What a `GradScaler` multiplied a loss by is left out.

A loss belongs to the optimizers whose gradients its backward changed. Not seen are `torch.autograd.backward`, a non-scalar
`backward(gradient)`, and a scaled loss that was changed after `GradScaler.scale`; a step that saw nothing is an error.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_unary
from torch.utils.weak import WeakTensorKeyDictionary

if TYPE_CHECKING:
    from emomerge.optim.base import EmoOptimizer

Method = Callable[..., Any]
Gradients = list[tuple[Tensor, Tensor | None, int]]

_watched: dict[int, weakref.ref[EmoOptimizer]] = {}
_replaced: dict[tuple[type[Any], str], tuple[Method, Method]] = {}
"""(class, name of the method) → (theirs, ours)."""
_unscaled = WeakTensorKeyDictionary()
"""What `GradScaler.scale` returned → what it was given."""


def watch(optimizer: EmoOptimizer) -> None:
    """Capture losses for this optimizer, until `unwatch` or its end. It is held weakly."""
    _watched[id(optimizer)] = weakref.ref(optimizer, functools.partial(_drop, id(optimizer)))
    _replace(Tensor, "backward", _capturing)
    for scaler in _family(torch.amp.GradScaler):
        if "scale" in vars(scaler):
            _replace(scaler, "scale", _remembering)


def unwatch(optimizer: EmoOptimizer) -> None:
    """Stop capturing for it. After the last one, torch's own methods are back."""
    _drop(id(optimizer))


def _drop(key: int, _: object = None) -> None:
    _watched.pop(key, None)
    if not _watched:
        for (owner, name), (theirs, ours) in list(_replaced.items()):
            if vars(owner)[name] is ours:  # else somebody wrapped ours in turn; it stays below and lets everything pass
                setattr(owner, name, theirs)
                del _replaced[owner, name]


def _replace(owner: type[Any], name: str, wrapper: Callable[[Method], Method]) -> None:
    if (owner, name) not in _replaced:
        theirs = vars(owner)[name]
        ours = functools.wraps(theirs)(wrapper(theirs))
        _replaced[owner, name] = theirs, ours
        setattr(owner, name, ours)


def _family(parent: type[Any]) -> Iterator[type[Any]]:
    """The class and its subclasses so far: FSDP1's scaler, for one, scales in its own way."""
    yield parent
    for child in parent.__subclasses__():
        yield from _family(child)


def _remembering(scale: Method) -> Method:
    """`GradScaler.scale` that remembers which loss it scaled."""

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
    """`Tensor.backward` that notes its loss for the optimizers whose gradients it changes."""

    def capture(self: Tensor, gradient: Tensor | None = None, *args: Any, **kwargs: Any) -> None:
        if self.numel() != 1 or self.is_complex() or _comes_again(self):
            backward(self, gradient, *args, **kwargs)
            return
        before = [(optimizer, _gradients(optimizer)) for ref in list(_watched.values()) if (optimizer := ref())]
        for optimizer, gradients in before:
            if not _any_sharded(gradients) and all(grad is None for _, grad, _ in gradients):
                optimizer._intake.forget_captured()  # the gradients of earlier losses were thrown away
        backward(self, gradient, *args, **kwargs)
        loss = _unscaled.get(self, self).detach()
        if gradient is not None:
            loss = loss * gradient.detach()
        for optimizer, gradients in before:
            changed = any(p.grad is not grad or _version(grad) != version for p, grad, version in gradients)
            if changed or _any_sharded(gradients):
                optimizer._intake.capture(loss)

    return capture


def _comes_again(loss: Tensor) -> bool:
    """Whether this call is not the outermost `backward` on plain tensors.

    A tensor subclass, or a mode such as `with torch.device(...)`, calls `Tensor.backward` once more from within it, and a
    backward that runs inside another one computes part of the other's gradient.
    """
    return has_torch_function_unary(loss) or torch._C._current_graph_task_id() != -1


def _gradients(optimizer: EmoOptimizer) -> Gradients:
    """Each parameter, its gradient and the version of that: a backward replaces the gradient or adds to it in place."""
    return [(p, p.grad, _version(p.grad)) for group in optimizer.param_groups for p in group["params"]]


def _version(grad: Tensor | None) -> int:
    return 0 if grad is None else grad._version


def _any_sharded(gradients: Gradients) -> bool:
    """Whether a parameter is FSDP's or another DTensor: its `grad` may stay as it is until the last micro-batch."""
    return any(hasattr(p, "to_local") or getattr(p, "_fsdp_flattened", False) for p, _, _ in gradients)
