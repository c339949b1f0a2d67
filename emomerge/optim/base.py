"""The base class of the emo optimizers: loss, pulse, state and state dict. A subclass adds only its formula (`Rule`)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from emomerge.errors import MissingLossError
from emomerge.numerics.rounding import stochastic_round
from emomerge.optim import capture
from emomerge.optim.batches import Batch, Sorter, State, Tensors, local, to_wide, wide
from emomerge.optim.checks import check_gradients, check_options, check_rates, check_state, explain_failure
from emomerge.optim.device_pulse import DevicePulse
from emomerge.optim.intake import LossIntake
from emomerge.optim.pulse import EmoPulse
from emomerge.optim.rule import Group, Rate, Rule, blend_with_shadow
from emomerge.optim.size import weight_size

PULSE = "pulse_"
"""Prefix of the pulse's values in `param_groups[0]`."""


class EmoOptimizer(Rule, Optimizer):
    """An optimizer whose learning rate is emoPulse (paper, chapters 2–4). Subclasses implement the methods of `Rule`.

    The optimizer must be told the loss: call `opt.observe(loss)` for every micro-batch (the losses are averaged), then
    `opt.step()`; or call `opt.step(closure)`. State and arithmetic are fp32 for half-precision parameters.

    Args:
        params: parameters or parameter groups, as in any torch optimizer.
        lr: emoScope, a multiplier of emoPulse; 1.0 needs no tuning. Groups may differ. If it is 0 in every group, a step
            changes neither weights nor pulse. With the preset `auto` the value has no effect (unless it is 0), but a schedule
            that changes it has: the rate is multiplied by `lr` / initial `lr`.
        betas: β₁, β₂ of the moments.
        eps: added to denominators.
        weight_decay: λ; a step multiplies the weights by 1 − λη.
        preset: the version of emoPulse, a name in `PRESETS`.
        use_shadow: pull the weights towards a slow copy of themselves when the loss jumps.
        maximize: ascend instead of descend; the pulse sees the negated loss.
        cautious: start the pulse with N = d = 0.2.
        capture_loss: observe every loss on which `Tensor.backward` is called, for training loops that only call `step()` (see
            `optim/capture.py`).
        stochastic_rounding: round half-precision weights up or down at random, unbiased, so that steps smaller than half a unit
            in the last place are not lost. Resumed training gives the same bits.
        capturable: compute the pulse on the device, so that a step never waits for it and can be captured in a CUDA graph or
            compiled. A non-finite loss cannot raise then: the step leaves weights and pulse unchanged, and the moments see a
            zero gradient.

    Raises:
        BadInput: an argument out of range, or an unknown preset.
    """

    damping: float = 1.0
    """Factor on the rate of the coming step, applied after its limits: for loops that end with a cooldown. Not saved."""

    intake: LossIntake
    """The losses observed since the last step."""

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
        capture_loss: bool = False,
        stochastic_rounding: bool = False,
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "use_shadow": use_shadow,
            "maximize": maximize,
            "stochastic_rounding": stochastic_rounding,
        }
        self.capture_loss, self.capturable = capture_loss, capturable
        self._check_options(defaults)
        self._pulse = EmoPulse(preset, cautious=cautious)
        self._sized = self._pulse.sized
        self._pulse.scope = 1.0 if self._sized else lr
        self._pulse.rate = self._pulse.rate_at(self._pulse.scope)
        self._device_pulse: DevicePulse | None = None
        super().__init__(params, defaults)
        self._save_pulse()
        self._create_transients()

    def _create_transients(self) -> None:
        """Create the attributes that are not part of the state; copies get their own."""
        self.intake = LossIntake()
        self._sorters: list[Sorter] = []
        self._generators: dict[torch.device, torch.Generator] = {}
        if self.capturable:
            self._device_pulse = DevicePulse(self._pulse, self._device())
        if self.capture_loss:
            capture.watch(self)

    def add_default(self, name: str, value: object) -> None:
        """Register a hyper-parameter of the subclass. Groups may override it like the common ones."""
        self.defaults[name] = value
        for group in self.param_groups:
            group.setdefault(name, value)

    @property
    def pulse(self) -> EmoPulse:
        """The controller: `.rate` (of the first group), `.sigma`, `.trust`, `.dnr`, `.should_stop` and more.

        With `capturable` this is a snapshot, and reading it waits for the device.
        """
        if self._device_pulse is not None:
            self._pulse.load_state_dict(self._device_pulse.state_dict())
        return self._pulse

    def observe(self, loss: Tensor | float, divided: bool = False) -> None:
        """Record the loss of one micro-batch of the coming step.

        The losses since the last `step()` are averaged, and under torch.distributed the ranks too. With a GradScaler, pass the
        unscaled loss; if it skips the step, `zero_grad` drops the losses with the gradients.

        Args:
            loss: a scalar tensor (not synchronized with the host) or a number.
            divided: the loss is already divided by the number of micro-batches; the losses are then summed.
        """
        self.intake.observe(loss, divided, self._params())

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step at the pulse's rate, using up the observed losses.

        Args:
            closure: computes the loss and the gradients; its loss is observed and returned.

        Raises:
            MissingLossError: no loss was observed since the last step.
            NonFiniteLossError: the loss is NaN or infinite. Weights and state are unchanged; catch the error to skip the step.
            BadInput: `lr` was changed by a scheduler, or a gradient is sparse or complex.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            if loss is None:
                raise MissingLossError("the closure returned no loss: end it with `return loss`")
            self.observe(loss)

        pairs = [[(p, p.grad) for p in group["params"] if p.grad is not None] for group in self.param_groups]
        if all(group["lr"] == 0 for group in self.param_groups):
            self.intake.forget()
            for group, group_pairs in zip(self.param_groups, pairs, strict=True):
                for p, _ in group_pairs:  # torch.distributed.checkpoint takes such a step to have the state created
                    self._state_of(p, group)
            return loss

        if not self._sized:
            check_rates(self.param_groups)
        check_gradients(type(self).__name__, chain.from_iterable(pairs))
        pulse = self._advance()
        self._sorters += [Sorter() for _ in range(len(pairs) - len(self._sorters))]
        for group, group_pairs, sorter in zip(self.param_groups, pairs, self._sorters, strict=True):
            if group["lr"] != 0:
                self._update_group(group, [(p, g) for p, g in group_pairs if p.numel()], sorter, pulse)
        if self._device_pulse is None:
            self._save_pulse()
        return loss

    def _advance(self) -> EmoPulse | DevicePulse:
        """Update the pulse with the loss of this step."""
        head = self.param_groups[0]
        mean = self.intake.take(self._device(), self._params(), host=self._device_pulse is None)
        if self._sized and not self._pulse.size:
            self._measure_size()
        if self._device_pulse is not None:
            self._device_pulse.update(-mean if head["maximize"] else mean, self._scope_of(head))
            return self._device_pulse
        loss = self._to_host(mean)
        self._pulse.scope = self._scope_of(head)
        self._pulse.update(-loss if head["maximize"] else loss)
        self._generators.clear()
        return self._pulse

    def _to_host(self, loss: Tensor) -> float:
        """Read the loss: the only host synchronization of a step."""
        return loss.item()

    def _measure_size(self) -> None:
        """Measure the weights, at the first step: by then they are loaded, and sharded if they are to be."""
        self._pulse.size = float(weight_size(p for group in self.param_groups for p in group["params"]))
        if self._device_pulse is not None:
            self._device_pulse.load_state_dict(self._pulse.state_dict())

    def _scope_of(self, group: Group) -> float:
        """Return emoScope of a group: `lr`, or with `auto` its ratio to the `lr` that the group started with."""
        scope: float = group["lr"]
        if self._sized:
            scope = scope / group["scope"] if group["scope"] else 1.0
        return scope

    def _update_group(
        self, group: Group, pairs: list[tuple[Tensor, Tensor]], sorter: Sorter, pulse: EmoPulse | DevicePulse
    ) -> None:
        states = [self._state_of(p, group) for p, _ in pairs]
        try:
            self._update_batches(group, pairs, states, sorter, pulse)
        except RuntimeError as error:
            if (reason := explain_failure(self, zip([p for p, _ in pairs], states, strict=True), group)) is not None:
                raise reason from error
            raise

    def _update_batches(
        self,
        group: Group,
        pairs: list[tuple[Tensor, Tensor]],
        states: list[State],
        sorter: Sorter,
        pulse: EmoPulse | DevicePulse,
    ) -> None:
        for batch in sorter.batches([p for p, _ in pairs], [g for _, g in pairs], states):
            rate = pulse.rate_at(self._scope_of(group)) * self.damping
            if isinstance(pulse, DevicePulse):
                finite = pulse.finite.to(batch.w[0].device)
                batch.g = [torch.where(finite, g, 0) for g in batch.g]
            if group["maximize"]:
                batch.g = torch._foreach_neg(batch.g)
            self._update_batch(batch, rate, group)

    def _update_batch(self, batch: Batch, rate: Rate, group: Group) -> None:
        def write(target: Tensors, source: Tensors) -> None:
            self._round(target, source, group["stochastic_rounding"])

        if not group["use_shadow"]:
            self.apply(batch, rate, group, write)
            return
        w = to_wide(batch.w)
        blend_with_shadow(w, batch.state.pop("shadow"), self._pulse.sigma, self._pulse.trust)
        self.apply(Batch(w, to_wide(batch.g), batch.state, batch.native), rate, group, write)
        if w is not batch.w:
            write(batch.w, w)

    def _round(self, target: Tensors, source: Tensors, stochastic: bool) -> None:
        """Round to half precision."""
        target, source = [local(p) for p in target], [local(t) for t in source]
        if stochastic:
            source = [stochastic_round(t, p.dtype, self._generator(p.device)) for p, t in zip(target, source, strict=True)]
        torch._foreach_copy_(target, source)

    def _generator(self, device: torch.device) -> torch.Generator:
        """Return the noise source of this step, seeded by the number of the step alone."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.pulse.steps)
        return self._generators[device]

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _device(self) -> torch.device:
        return next((p.device for group in self.param_groups for p in group["params"]), torch.device("cpu"))

    def _state_of(self, p: Tensor, group: Group) -> State:
        state: State | None = self.state.get(p)
        if not state:  # missing, or empty because a caller looked into `state`, a defaultdict
            state = self.init_state(p, group)
            if state:  # EmoVoid has none
                self.state[p] = state
        if group["use_shadow"] and "shadow" not in state:
            state["shadow"] = p.detach().to(wide(p.dtype), copy=True)
            self.state[p] = state
        return state

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients as any torch optimizer does, and drop their losses with them, as after a skipped step.

        A loss that was observed but not yet differentiated is kept.
        """
        self.intake.clear_gradients(self._params())
        super().zero_grad(set_to_none)
        self.intake.mark(self._params())

    def add_param_group(self, param_group: Group) -> None:
        """Add a parameter group. The pulse is not affected."""
        self._check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["scope"] = group["lr"]

    def _check_options(self, group: Group) -> None:
        check_options(group, self.capturable)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as any torch optimizer does, but copied: later steps do not change it.

        The pulse is saved in `param_groups[0]`.
        """
        self._save_pulse()
        saved = super().state_dict()
        saved["state"] = {key: {name: value.clone() for name, value in state.items()} for key, state in saved["state"].items()}
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a `state_dict()`, from which training continues with the same bits. The dict is copied.

        Raises:
            BadInput: the dict holds no emoPulse, options out of range, or the state of another optimizer or of parameters of
                other shapes. Nothing is changed then.
        """
        EmoPulse().load_state_dict(_pulse_in(state_dict["param_groups"][0]))
        for group in state_dict["param_groups"]:
            self._check_options({**self.defaults, **group})
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        owners = [(p, group) for group in self.param_groups for p in group["params"]]
        states = [
            (key, p, state_dict["state"][key], group)
            for key, (p, group) in zip(keys, owners, strict=False)
            if key in state_dict["state"]
        ]
        for key, p, saved, group in states:
            check_state(self, key, p, saved, group)
        super().load_state_dict(state_dict)
        for _, p, saved, _ in states:  # torch has cast them to the parameter's dtype, or aliased them
            self.state[p] = {name: value.to(p.device, wide(p.dtype), copy=True) for name, value in saved.items()}

    def __getstate__(self) -> dict[str, Any]:
        self._save_pulse()
        return {**super().__getstate__(), "capture_loss": self.capture_loss, "capturable": self.capturable}

    def __setstate__(self, state: dict[str, Any]) -> None:
        copied = "_pulse" not in self.__dict__  # unpickled or deep-copied, not `load_state_dict`
        if not copied:
            for own, loaded in zip(
                self.param_groups, state["param_groups"], strict=True
            ):  # options an older version did not save
                loaded.update({name: value for name, value in own.items() if name not in loaded})
        super().__setstate__(state)
        if copied:
            self._pulse, self._device_pulse = EmoPulse(), None
        self._pulse.load_state_dict(_pulse_in(self.param_groups[0]))
        self._sized = self._pulse.sized
        if copied:
            self._create_transients()
        elif self._device_pulse is not None:
            self._device_pulse.load_state_dict(self._pulse.state_dict())

    def _save_pulse(self) -> None:
        """Store the pulse where state_dict, pickling and torch.distributed.checkpoint find it."""
        self.param_groups[0].update({PULSE + name: value for name, value in self.pulse.state_dict().items()})


def _pulse_in(group: Group) -> dict[str, Any]:
    return {key.removeprefix(PULSE): value for key, value in group.items() if key.startswith(PULSE)}
