"""The option `geometry="l1"` of EmoTion and EmoVoid: the change of Σ|W| in place of ρ (paper 6.4)."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from emomerge.errors import BadInput
from emomerge.optim.base import EmoOptimizer
from emomerge.optim.batches import block_size, blocks, exact, local, sum_over_shards
from emomerge.optim.device_pulse import DevicePulse
from emomerge.optim.pulse import EmoPulse
from emomerge.optim.rule import Group

Geometry = Literal["exact", "l1"]


class L1Option(EmoOptimizer):
    """An emo optimizer that measures ρ of every tensor, or approximates it by the change of Σ|W|.

    Args:
        geometry: `exact` or `l1`; groups may differ.
        options: those of `EmoOptimizer`.
    """

    _l1 = 0.0
    """Σ|W| before this step's update, if a group needs it."""

    def __init__(self, params: ParamsT, lr: float = 1.0, *, geometry: Geometry = "exact", **options: Any) -> None:
        super().__init__(params, lr, **options)
        self.add_default("geometry", geometry)
        self._check_options(self.defaults)

    @abstractmethod
    def follow_l1(self, now: float) -> None:
        """Take in Σ|W|, after the pulse was updated and before the weights are; `param_groups[0]["l1"]` keeps the last one."""

    def add_param_group(self, param_group: Group) -> None:
        """Add a parameter group. Σ|W| starts again, so that the new weights do not count as growth."""
        super().add_param_group(param_group)
        self.param_groups[0]["l1"] = 0.0

    def l1_norm(self) -> Tensor:
        """Return Σ|W| over all parameters of all groups, a 0-d float64 tensor (float32 on MPS)."""
        device = self._device()
        total = torch.zeros((), dtype=exact(device), device=device)
        for group in self.param_groups:
            for p in group["params"]:
                part = local(p.detach())
                norms = [
                    torch.linalg.vector_norm(block, 1, dtype=exact(p.device))
                    for (block,) in blocks(part, limit=block_size(p.device))
                ]
                total += sum_over_shards(torch.stack(norms).sum(), p).to(device)
        return total

    def _uses_l1(self) -> bool:
        return any(group["geometry"] == "l1" for group in self.param_groups)

    def _to_host(self, loss: Tensor) -> float:
        if not self._uses_l1():
            return super()._to_host(loss)
        number, self._l1 = torch.stack([loss, self.l1_norm()]).tolist()
        return float(number)

    def _advance(self) -> EmoPulse | DevicePulse:
        pulse = super()._advance()
        if self._uses_l1():
            self.follow_l1(self._l1)
        return pulse

    def _check_options(self, group: Group) -> None:
        super()._check_options(group)
        geometry = group.get("geometry", "exact")
        if geometry not in ("exact", "l1"):
            raise BadInput("unknown geometry", expected="exact | l1", found=repr(geometry))
        if geometry == "l1" and self.capturable:
            raise BadInput("`capturable` keeps the step off the host, where `l1` decides", fix="use geometry='exact'")
