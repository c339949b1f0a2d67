"""emoPulse on the device, for steps without host synchronization: the formulas of `EmoPulse` on a float64 tensor."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from emomerge.errors import BadInput
from emomerge.optim.pulse import PRESETS, EmoPulse, Operations, advance, rate_at

NUMBERS = tuple(part.name for part in fields(EmoPulse) if part.name not in ("preset", "scope", "cautious"))
"""The values that change from step to step, in the order of the tensor."""


def _where(condition: Tensor, yes: Any, no: Any) -> Tensor:
    """`torch.where` in float64, also for two numbers (which torch would take for float32)."""
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
    """`EmoPulse` without host synchronization. Its values stay at one address, as CUDA graphs require.

    Args:
        pulse: initial values and preset.
        device: device of the losses.

    Raises:
        BadInput: the device has no float64.
    """

    finite: Tensor
    """Whether the last loss was finite, shape (); if not, the pulse did not change."""

    def __init__(self, pulse: EmoPulse, device: torch.device) -> None:
        if device.type == "mps":
            raise BadInput("`capturable` needs float64", where=str(device), fix="omit the option")
        self._constants = {name: getattr(pulse, name) for name in ("preset", "scope", "cautious")}
        self._preset = PRESETS[pulse.preset]
        self._figures = torch.tensor([float(getattr(pulse, name)) for name in NUMBERS], dtype=torch.float64, device=device)
        self.finite = torch.ones((), dtype=torch.bool, device=device)

    def update(self, loss: Tensor, scope: float) -> None:
        """Update with the loss of a step, shape (); a non-finite loss changes nothing."""
        self._constants["scope"] = scope
        before = dict(zip(NUMBERS, self._figures.unbind(), strict=True))
        after = advance(self._preset, {**before, "scope": scope}, loss.double(), TENSORS)
        self.finite = torch.isfinite(loss)
        self._figures.copy_(torch.where(self.finite, torch.stack([after[name] for name in NUMBERS]), self._figures))

    def rate_at(self, scope: float) -> Tensor:
        """Return η of the last step for an emoScope, shape (); 0 if the last loss was not finite."""
        figures = dict(zip(NUMBERS, self._figures.unbind(), strict=True))
        return torch.where(self.finite, rate_at(self._preset, figures, scope, TENSORS), 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Return the same as `EmoPulse.state_dict`. Waits for the device."""
        counts = ("steps", "stop_steps")
        numbers = dict(zip(NUMBERS, self._figures.tolist(), strict=True))
        return self._constants | {name: int(value) if name in counts else value for name, value in numbers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load an `EmoPulse.state_dict()`, keeping the address."""
        self._constants = {name: state[name] for name in self._constants}
        self._preset = PRESETS[state["preset"]]
        self._figures.copy_(torch.tensor([float(state[name]) for name in NUMBERS], dtype=torch.float64))
