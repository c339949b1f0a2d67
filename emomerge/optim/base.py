"""What the five emo optimizers share: loss, pulse, shadow, state. A rule adds its own formula and no more."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from emomerge.errors import BadInput, MissingLossError
from emomerge.optim.intake import LossIntake
from emomerge.optim.pulse import EmoPulse

Group = dict[str, Any]
State = dict[str, Tensor]

PULSE = "pulse_"
"""Prefix of the pulse's figures in `param_groups[0]`."""


class EmoOptimizer(Optimizer):
    """An optimizer whose learning rate is emoPulse (paper, chapters 2–4). Subclasses give `init_state` and `update`.

    The loss must reach it: `opt.observe(loss)` any number of times (micro-batches are averaged), then `opt.step()`; or
    `opt.step(closure)`. Half-precision parameters keep their state and do their arithmetic in fp32.

    Args:
        params: parameters or parameter groups, as in any torch optimizer.
        lr: emoScope, a multiplier of emoPulse; 1.0 needs no tuning. Groups may differ. With 0 everywhere a step leaves
            weights and pulse alone.
        betas: β₁, β₂ of the moments.
        eps: added to denominators.
        weight_decay: λ; a step multiplies the weights by 1 − λη.
        preset: the version of emoPulse, a name in `PRESETS`.
        use_shadow: pull the weights towards a slow copy of themselves when the loss jumps.
        maximize: climb instead of descend; the loss is mirrored with the gradient.
        cautious: start the pulse with N = d = 0.2.

    Raises:
        BadInput: an argument out of range, or an unknown preset.
    """

    pulse: EmoPulse
    """The controller: `.rate` (of the first group), `.sigma`, `.trust`, `.dnr`, `.should_stop` …, at any time."""

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.995),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        preset: str = "v3.8",
        use_shadow: bool = False,
        maximize: bool = False,
        cautious: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "use_shadow": use_shadow,
            "maximize": maximize,
        }
        _check_options(defaults)
        self.pulse = EmoPulse(preset, lr, cautious)
        self._intake = LossIntake()
        super().__init__(params, defaults)
        self._save_pulse()

    @abstractmethod
    def init_state(self, w: Tensor, group: Group) -> State:
        """The rule's state tensors for one parameter, given in the dtype of the arithmetic."""

    @abstractmethod
    def update(self, w: Tensor, g: Tensor, state: State, rate: float, group: Group) -> None:
        """The rule: change `w` and `state` in place. `g` is the gradient (read only), `rate` η."""

    def prepare(self) -> None:
        """What a rule measures over all parameters, between the pulse and the first update."""

    def observe(self, loss: Tensor | float) -> None:
        """Note the loss of a micro-batch of the coming step: a scalar tensor (no host sync) or a number.

        Under accumulation give the loss of each micro-batch undivided; under a GradScaler the unscaled one. All losses
        since the last `step()` are averaged, and under torch.distributed so are the ranks.
        """
        self._intake.observe(loss)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step at the pulse's rate; consumes the observed losses.

        Args:
            closure: computes the loss and the gradients; its loss is observed and returned.

        Raises:
            MissingLossError: no loss was observed since the last step.
            NonFiniteLossError: the loss is NaN or infinite. Weights and state are as before; catch it to skip the step.
            BadInput: a scheduler changed `lr`, or a gradient is sparse or complex.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            if loss is None:
                raise MissingLossError("the closure returned no loss: end it with `return loss`")
            self.observe(loss)

        trained = [(p, p.grad, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if all(group["lr"] == 0 for group in self.param_groups):
            self._intake.forget()
            for p, _, group in trained:  # torch.distributed.checkpoint asks for the state's tensors by such a step
                self._state_of(p, group)
            return loss

        self._check_step(trained)
        mean = self._intake.take(self._device())
        self.pulse.scope = self.param_groups[0]["lr"]
        self.pulse.update(-mean if self.param_groups[0]["maximize"] else mean)
        self.prepare()
        for p, grad, group in trained:
            if group["lr"] != 0:
                self._update(p, grad, group)
        self._save_pulse()
        return loss

    def add_param_group(self, param_group: Group) -> None:
        """Train more parameters from now on; the pulse goes on as it is."""
        _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["scope"] = group["lr"]

    def state_dict(self) -> dict[str, Any]:
        """As in any torch optimizer, but a copy: later steps do not change it. The pulse is in `param_groups[0]`."""
        saved = super().state_dict()
        saved["state"] = {key: {name: value.clone() for name, value in state.items()} for key, state in saved["state"].items()}
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue bit-identically from a `state_dict()`. The dict is copied, so it may be loaded again.

        Raises:
            BadInput: the dict holds no emoPulse.
        """
        EmoPulse().load_state_dict(_pulse_in(state_dict["param_groups"][0]))  # refuse it before anything changes
        super().load_state_dict(state_dict)
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for key, p in zip(keys, params, strict=True):  # torch has cast them to the parameter's dtype, or aliased them
            if key in state_dict["state"]:
                saved = state_dict["state"][key]
                self.state[p] = {name: value.to(p.device, _dtype(p), copy=True) for name, value in saved.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "pulse" not in self.__dict__:  # unpickled or deep-copied
            self.pulse = EmoPulse()
        self._intake = LossIntake()
        self.pulse.load_state_dict(_pulse_in(self.param_groups[0]))

    def add_default(self, name: str, value: object) -> None:
        """A hyper-parameter of one rule, which groups may set like the common ones."""
        self.defaults[name] = value
        for group in self.param_groups:
            group.setdefault(name, value)

    def _update(self, p: Tensor, grad: Tensor, group: Group) -> None:
        w, g = p.to(_dtype(p)), grad.to(_dtype(p))  # copies for half precision only
        state = self._state_of(p, group)
        if group["use_shadow"]:
            self._mix_shadow(w, state["shadow"])
        self.update(w, -g if group["maximize"] else g, state, self.pulse.rate_at(group["lr"]), group)
        if w is not p:
            p.copy_(w)

    def _mix_shadow(self, w: Tensor, shadow: Tensor) -> None:
        """When the loss jumps, blend the shadow into the weights; else let it follow them slowly."""
        sigma, trust = abs(self.pulse.sigma), abs(self.pulse.trust)
        if sigma > 0.625:
            ratio = 1 - sigma
            w.mul_(1 - ratio).add_(shadow, alpha=trust)
        else:
            shadow.lerp_(w, 0.1 * trust)

    def _state_of(self, p: Tensor, group: Group) -> State:
        state: State | None = self.state.get(p)
        if state is None:
            w = p.detach().to(_dtype(p))
            state = self.init_state(w, group)
            if group["use_shadow"]:
                state["shadow"] = w.clone()
            if state:  # EmoVoid has none
                self.state[p] = state
        return state

    def _check_step(self, trained: list[tuple[Tensor, Tensor, Group]]) -> None:
        """Refuse what this step cannot do, before anything has changed."""
        for number, group in enumerate(self.param_groups):
            if group["lr"] not in (0, group["scope"]):
                raise BadInput(
                    "something (a scheduler?) changed `lr`; emoPulse sets the rate itself and `lr` only multiplies it",
                    where=f"param_groups[{number}]['lr']",
                    expected=group["scope"],
                    found=group["lr"],
                    fix="use a constant schedule; to rescale on purpose, set group['scope'] to the same value",
                )
        for p, grad, _ in trained:
            if grad.is_sparse or grad.is_complex():
                kind = "sparse" if grad.is_sparse else "complex"
                raise BadInput(
                    f"{type(self).__name__} cannot use a {kind} gradient",
                    where=f"parameter of shape {tuple(p.shape)}",
                    fix="train with sparse=False" if kind == "sparse" else "use torch.view_as_real",
                )

    def _device(self) -> torch.device:
        return next((p.device for group in self.param_groups for p in group["params"]), torch.device("cpu"))

    def _save_pulse(self) -> None:
        """Keep the pulse where state_dict, pickling and torch.distributed.checkpoint find it."""
        self.param_groups[0].update({PULSE + name: value for name, value in self.pulse.state_dict().items()})


def _pulse_in(group: Group) -> dict[str, Any]:
    return {key.removeprefix(PULSE): value for key, value in group.items() if key.startswith(PULSE)}


def _dtype(p: Tensor) -> torch.dtype:
    """The dtype of arithmetic and state: float64 for float64, else float32."""
    return torch.promote_types(p.dtype, torch.float32)


def _check_options(group: Group) -> None:
    """Refuse hyper-parameters out of range."""
    ranges = {
        "lr": (group["lr"], math.inf),
        "eps": (group["eps"], math.inf),
        "weight_decay": (group["weight_decay"], math.inf),
        "betas[0]": (group["betas"][0], 1.0),
        "betas[1]": (group["betas"][1], 1.0),
    }
    for name, (value, end) in ranges.items():
        if not isinstance(value, (int, float)) or not 0 <= value < end:
            raise BadInput("option out of range", where=name, expected=f"a number in [0, {end})", found=repr(value))
