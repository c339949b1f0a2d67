"""EmoVoid: no moments at all."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from emomerge.optim.base import Group, State
from emomerge.optim.geometry import Geometry, WRefOptimizer, geom_relation

HOLD_STEPS = 55
"""For how long `l1` holds Σ|W|: at the start, and again when should_stop turns true."""


class EmoVoid(WRefOptimizer):
    """W ← W − η·(1−ρ)·sign(G) (paper 6.3). No weight decay: growth along the weights brakes itself.

    `geometry="l1"`: W ← W·L1_ref/L1 while Σ|W| is held (paper 6.4), then W ← W − η·sign(G).

    State: none (arguments as in `WRefOptimizer`; `betas` and `weight_decay` have no effect).
    """

    scale = 1.0
    """L1_ref/L1 of this step (`l1`)."""

    def __init__(self, params: ParamsT, lr: float = 1.0, *, geometry: Geometry = "exact", **options: Any) -> None:
        super().__init__(params, lr, geometry=geometry, **options)
        self.param_groups[0].setdefault("l1_hold", HOLD_STEPS)  # steps left

    def init_state(self, w: Tensor, group: Group) -> State:
        """Nothing."""
        return {}

    def prepare(self) -> None:
        """The factor that holds Σ|W| at what the last step left."""
        if any(group["geometry"] == "l1" for group in self.param_groups):
            head = self.param_groups[0]
            before, now = head["l1"], self.measure_l1()
            self.scale = before / (now + 1e-8) if before and head["l1_hold"] else 1.0
            head["l1"] = now * self.scale
            head["l1_hold"] = HOLD_STEPS if self.pulse.stop_steps == 1 else max(head["l1_hold"] - 1, 0)

    def update(self, w: Tensor, g: Tensor, state: State, rate: float, group: Group) -> None:
        """Step by the sign, the shorter the more of the gradient lies along the weights."""
        if group["geometry"] == "exact":
            w.addcmul_(g.sign(), 1 - geom_relation(w, g, group["eps"]), value=-rate)
        else:
            w.mul_(self.scale)
            w.sub_(g.sign(), alpha=rate)
