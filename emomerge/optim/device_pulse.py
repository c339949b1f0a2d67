"""emoPulse on the device, for steps that never wait for it: the formulas of `EmoPulse` on a float64 tensor."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from emomerge.errors import BadInput
from emomerge.optim.pulse import PRESETS, EmoPulse, Operations, advance, rate_at

NUMBERS = tuple(part.name for part in fields(EmoPulse) if part.name not in ("preset", "scope", "cautious"))
"""The figures that change from step to step, in the order in which the tensor holds them."""


def _where(condition: Tensor, yes: Any, no: Any) -> Tensor:
    """`torch.where`, which takes two numbers for float32."""
    if not isinstance(yes, Tensor):
        yes = torch.full((), yes, dtype=torch.float64, device=condition.device)
    return torch.where(condition, yes, no)


TENSORS = Operations(
    where=_where,
    maximum=lambda a, b: torch.clamp(a, min=b),
    minimum=lambda a, b: torch.clamp(a, max=b),
    tanh=torch.tanh,
    copysign=torch.copysign,
)


class DevicePulse:
    """`EmoPulse` without a host sync; its figures stay at one address, as a CUDA graph needs.

    Args:
        pulse: where it starts; its preset is kept.
        device: where the losses are.

    Raises:
        BadInput: the device has no float64.
    """

    finite: Tensor
    """Whether the last loss was finite, shape (); where not, the pulse is as it was."""

    def __init__(self, pulse: EmoPulse, device: torch.device) -> None:
        if device.type == "mps":
            raise BadInput("`capturable` needs float64", where=str(device), fix="leave it out")
        self._constants = {name: getattr(pulse, name) for name in ("preset", "scope", "cautious")}
        self._preset = PRESETS[pulse.preset]
        self._figures = torch.tensor([float(getattr(pulse, name)) for name in NUMBERS], dtype=torch.float64, device=device)
        self.finite = torch.ones((), dtype=torch.bool, device=device)

    def update(self, loss: Tensor, scope: float) -> None:
        """Take in the loss of a step, shape (); one that is not finite changes nothing."""
        self._constants["scope"] = scope
        before = dict(zip(NUMBERS, self._figures.unbind(), strict=True))
        after = advance(self._preset, {**before, "scope": scope}, loss.double(), TENSORS)
        self.finite = torch.isfinite(loss)
        self._figures.copy_(torch.where(self.finite, torch.stack([after[name] for name in NUMBERS]), self._figures))

    def rate_at(self, scope: float) -> Tensor:
        """η of the last step for an emoScope, shape (); 0 where the last loss was not finite."""
        figures = dict(zip(NUMBERS, self._figures.unbind(), strict=True))
        return torch.where(self.finite, rate_at(self._preset, figures, scope, TENSORS), 0.0)

    def state_dict(self) -> dict[str, Any]:
        """As `EmoPulse.state_dict`. A host sync."""
        counts = ("steps", "stop_steps")
        numbers = dict(zip(NUMBERS, self._figures.tolist(), strict=True))
        return self._constants | {name: int(value) if name in counts else value for name, value in numbers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from an `EmoPulse.state_dict()`, at the same address."""
        self._constants = {name: state[name] for name in self._constants}
        self._preset = PRESETS[state["preset"]]
        self._figures.copy_(torch.tensor([float(state[name]) for name in NUMBERS], dtype=torch.float64))
