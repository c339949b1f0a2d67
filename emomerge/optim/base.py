"""What the five emo optimizers share: loss, pulse, shadow, state. A rule adds its own formula and no more."""

from __future__ import annotations

import math
import sys
from abc import abstractmethod
from collections.abc import Callable
from itertools import chain
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from emomerge.errors import BadInput, MissingLossError
from emomerge.numerics.rounding import stochastic_round
from emomerge.optim import capture
from emomerge.optim.batches import Batch, Lists, Sorter, State, Tensors, block_size, local, to_wide, wide
from emomerge.optim.device_pulse import DevicePulse
from emomerge.optim.intake import LossIntake
from emomerge.optim.pulse import EmoPulse

Group = dict[str, Any]
Rate = float | Tensor

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
        capture_loss: observe whatever goes through `Tensor.backward`, for loops that call `step()` and no more (see
            `optim/capture.py`).
        stochastic_rounding: write half-precision weights rounded up or down at random, in the mean exactly, so that steps
            below half a unit of the last place are not lost. The same bits when training is resumed.
        capturable: compute the pulse on the device, so that a step never waits for it and can be captured in a CUDA graph or
            compiled whole. A loss that is not finite cannot raise then: such a step leaves weights and pulse as they are, and
            the moments see a zero gradient.

    Raises:
        BadInput: an argument out of range, or an unknown preset.
    """

    one_pass = False
    """Whether `update` reads each tensor once, so that cutting them into blocks that fit the cache gains nothing."""

    damping: float = 1.0
    """Multiplies the rate of the coming step, after its limits: for a loop that ends with a cooldown. Not part of the state."""

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
        self._pulse = EmoPulse(preset, lr, cautious)
        self._device_pulse: DevicePulse | None = None
        super().__init__(params, defaults)
        self._save_pulse()
        self._prepare_steps()

    def _prepare_steps(self) -> None:
        """What is not state: made anew for a copy."""
        self._intake = LossIntake()
        self._sorters: list[Sorter] = []
        self._generators: dict[torch.device, torch.Generator] = {}
        if self.capturable:
            self._device_pulse = DevicePulse(self._pulse, self._device())
        if self.capture_loss:
            capture.watch(self)

    @property
    def pulse(self) -> EmoPulse:
        """The controller: `.rate` (of the first group), `.sigma`, `.trust`, `.dnr`, `.should_stop` …, at any time.

        With `capturable` a snapshot, and a host sync.
        """
        if self._device_pulse is not None:
            self._pulse.load_state_dict(self._device_pulse.state_dict())
        return self._pulse

    @abstractmethod
    def init_state(self, w: Tensor, group: Group) -> State:
        """The rule's state tensors for one parameter, in the dtype of the arithmetic (`wide`), which w may not have."""

    @abstractmethod
    def update(self, w: Tensors, g: Tensors, state: Lists, rate: Rate, group: Group) -> None:
        """The rule, element by element: change the weights and the state in place.

        Args:
            w: weights in the dtype of the arithmetic; whole tensors, or one block of a large one.
            g: their gradients, read only.
            state: by name what `init_state` and `measure` made, cut like the weights if it has their shape.
            rate: η, a tensor of one element with `capturable`.
            group: the hyper-parameters.
        """

    def update_native(self, w: Tensors, g: Tensors, state: Lists, rate: float, group: Group) -> bool:
        """The same by a kernel of kernels.c, if the rule has one for these options; False if not, and nothing has changed."""
        return False

    def measure(self, w: Tensors, g: Tensors, state: Lists, group: Group) -> Lists:
        """What a rule needs to know of whole tensors before their update: more lists for `update`, by name."""
        return {}

    def survey(self) -> list[Tensor]:
        """What a rule needs to know of all parameters at once: 0-d tensors on one device, numbers in `prepare`."""
        return []

    def prepare(self, *surveyed: float) -> None:
        """Take in what `survey` found, between the pulse and the first update."""

    def observe(self, loss: Tensor | float, divided: bool = False) -> None:
        """Note the loss of a micro-batch of the coming step: a scalar tensor (no host sync) or a number.

        Under a GradScaler give the unscaled loss. All losses since the last `step()` are averaged, and under
        torch.distributed so are the ranks.

        Args:
            loss: the loss of the micro-batch.
            divided: it has already been divided by the number of micro-batches: add the losses up instead.
        """
        self._intake.observe(loss, divided)

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

        trained = [[(p, p.grad) for p in group["params"] if p.grad is not None] for group in self.param_groups]
        if all(group["lr"] == 0 for group in self.param_groups):
            self._intake.forget()
            for group, pairs in zip(self.param_groups, trained, strict=True):
                for p, _ in pairs:  # torch.distributed.checkpoint asks for the state's tensors by such a step
                    self._state_of(p, group)
            return loss

        self._check_step(trained)
        pulse = self._advance()
        self._sorters += [Sorter() for _ in range(len(trained) - len(self._sorters))]
        for group, pairs, sorter in zip(self.param_groups, trained, self._sorters, strict=True):
            if group["lr"] != 0:
                self._update_group(group, [(p, g) for p, g in pairs if p.numel()], sorter, pulse)
        if self._device_pulse is None:
            self._save_pulse()
        return loss

    def _advance(self) -> EmoPulse | DevicePulse:
        """Give the pulse the loss of the step, and the rule what it surveys."""
        head = self.param_groups[0]
        mean = self._intake.take(self._device())
        if self._device_pulse is not None:
            self._device_pulse.update(-mean if head["maximize"] else mean, head["lr"])
            return self._device_pulse
        surveyed = self.survey()
        loss, *numbers = torch.stack([mean, *surveyed]).tolist() if surveyed else [mean.item()]  # the one host sync of a step
        self._pulse.scope = head["lr"]
        self._pulse.update(-loss if head["maximize"] else loss)
        self.prepare(*numbers)
        self._generators.clear()
        return self._pulse

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in any torch optimizer; losses that were captured (not those observed) go with their gradients."""
        self._intake.forget_captured()
        super().zero_grad(set_to_none)

    def add_param_group(self, param_group: Group) -> None:
        """Train more parameters from now on; the pulse goes on as it is."""
        self._check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["scope"] = group["lr"]

    def state_dict(self) -> dict[str, Any]:
        """As in any torch optimizer, but a copy: later steps do not change it. The pulse is in `param_groups[0]`."""
        self._save_pulse()
        saved = super().state_dict()
        saved["state"] = {key: {name: value.clone() for name, value in state.items()} for key, state in saved["state"].items()}
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue bit-identically from a `state_dict()`. The dict is copied, so it may be loaded again.

        Raises:
            BadInput: the dict holds no emoPulse, options that are out of range, or the state of another rule or of parameters
                of another shape. Nothing has changed.
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
            self._check_state(key, p, saved, group)
        super().load_state_dict(state_dict)
        for _, p, saved, _ in states:  # torch has cast them to the parameter's dtype, or aliased them
            self.state[p] = {name: value.to(p.device, wide(p.dtype), copy=True) for name, value in saved.items()}

    def __getstate__(self) -> dict[str, Any]:
        self._save_pulse()
        return {**super().__getstate__(), "capture_loss": self.capture_loss, "capturable": self.capturable}

    def __setstate__(self, state: dict[str, Any]) -> None:
        copied = "_pulse" not in self.__dict__  # unpickled or deep-copied, not `load_state_dict`
        if not copied:
            for own, loaded in zip(self.param_groups, state["param_groups"], strict=True):  # what an older version did not save
                loaded.update({name: value for name, value in own.items() if name not in loaded})
        super().__setstate__(state)
        if copied:
            self._pulse, self._device_pulse = EmoPulse(), None
        self._pulse.load_state_dict(_pulse_in(self.param_groups[0]))
        if copied:
            self._prepare_steps()
        elif self._device_pulse is not None:
            self._device_pulse.load_state_dict(self._pulse.state_dict())

    def add_default(self, name: str, value: object) -> None:
        """A hyper-parameter of one rule, which groups may set like the common ones."""
        self.defaults[name] = value
        for group in self.param_groups:
            group.setdefault(name, value)

    def _update_group(
        self, group: Group, pairs: list[tuple[Tensor, Tensor]], sorter: Sorter, pulse: EmoPulse | DevicePulse
    ) -> None:
        states = [self._state_of(p, group) for p, _ in pairs]
        for batch in sorter.batches([p for p, _ in pairs], [g for _, g in pairs], states):
            rate = pulse.rate_at(group["lr"]) * self.damping
            if isinstance(pulse, DevicePulse):
                live = pulse.live.to(batch.w[0].device)
                batch.g = [torch.where(live, g, 0) for g in batch.g]
            if group["maximize"]:
                batch.g = torch._foreach_neg(batch.g)
            if group["use_shadow"]:
                self._update_with_shadow(batch, rate, group)
            else:
                self._update(batch, rate, group)

    def _update(self, batch: Batch, rate: Rate, group: Group) -> None:
        if batch.native and isinstance(rate, float) and self.update_native(batch.w, batch.g, batch.state, rate, group):
            return
        whole = self.one_pass and batch.w[0].dtype == wide(batch.w[0].dtype)
        limit = sys.maxsize if whole else block_size(batch.w[0].device)
        for part in batch.parts(limit):
            part.state |= self.measure(part.w, part.g, part.state, group)
            part = part.local()
            for block in part.blocks(limit):
                w, g = to_wide(block.w), to_wide(block.g)
                self.update(w, g, block.state, rate, group)
                if w is not block.w:
                    self._write(block.w, w, group)

    def _update_with_shadow(self, batch: Batch, rate: Rate, group: Group) -> None:
        """When the loss jumps, blend the shadow into the weights; else let it follow them slowly. Then the rule's update."""
        w, shadow = to_wide(batch.w), batch.state.pop("shadow")
        sigma, trust = abs(self._pulse.sigma), abs(self._pulse.trust)
        if sigma > 0.625:
            torch._foreach_mul_(w, sigma)
            torch._foreach_add_(w, shadow, alpha=trust)
        else:
            torch._foreach_lerp_(shadow, w, 0.1 * trust)
        self._update(Batch(w, to_wide(batch.g), batch.state, batch.native), rate, group)
        if w is not batch.w:
            self._write(batch.w, w, group)

    def _write(self, target: Tensors, source: Tensors, group: Group) -> None:
        """Round to half precision."""
        target, source = [local(p) for p in target], [local(t) for t in source]
        if group["stochastic_rounding"]:
            source = [stochastic_round(t, p.dtype, self._generator(p.device)) for p, t in zip(target, source, strict=True)]
        torch._foreach_copy_(target, source)

    def _state_of(self, p: Tensor, group: Group) -> State:
        state: State | None = self.state.get(p)
        if not state:  # or empty: `state` is a defaultdict, which somebody may have looked into
            state = self.init_state(p, group)
            if state:  # EmoVoid has none
                self.state[p] = state
        if group["use_shadow"] and "shadow" not in state:
            state["shadow"] = p.detach().to(wide(p.dtype), copy=True)
            self.state[p] = state
        return state

    def _check_state(self, key: object, p: Tensor, saved: State, group: Group) -> None:
        """Refuse what this rule did not make for a parameter like this."""
        if hasattr(p, "to_local"):  # sharded, of which torch knows more than we do
            return
        wanted = {name: tuple(t.shape) for name, t in self.init_state(torch.empty_like(p, device="meta"), group).items()}
        if "shadow" in saved:
            wanted["shadow"] = tuple(p.shape)
        found = {name: tuple(t.shape) for name, t in saved.items()}
        if found != wanted:
            raise BadInput(
                "the state of another rule, or of a parameter of another shape",
                where=f"state of parameter {key}",
                expected=wanted,
                found=found,
                fix=f"load what {type(self).__name__} saved for this model",
            )

    def _check_options(self, group: Group) -> None:
        """Refuse hyper-parameters out of range."""
        if not isinstance(group["betas"], (tuple, list)) or len(group["betas"]) != 2:
            raise BadInput("option out of range", where="betas", expected="two numbers, β₁ and β₂", found=repr(group["betas"]))
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
        for name in ("use_shadow", "stochastic_rounding"):
            if self.capturable and group[name]:
                raise BadInput(f"`capturable` keeps the host out of the step, which `{name}` needs", fix="choose one of them")

    def _check_step(self, trained: list[list[tuple[Tensor, Tensor]]]) -> None:
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
        for p, grad in chain.from_iterable(trained):
            if grad.is_sparse or grad.is_complex():
                kind = "sparse" if grad.is_sparse else "complex"
                raise BadInput(
                    f"{type(self).__name__} cannot use a {kind} gradient",
                    where=f"parameter of shape {tuple(p.shape)}",
                    fix="train with sparse=False" if kind == "sparse" else "use torch.view_as_real",
                )

    def _generator(self, device: torch.device) -> torch.Generator:
        """Noise for stochastic rounding that depends on the number of the step and on nothing else."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.pulse.steps)
        return self._generators[device]

    def _device(self) -> torch.device:
        return next((p.device for group in self.param_groups for p in group["params"]), torch.device("cpu"))

    def _save_pulse(self) -> None:
        """Keep the pulse where state_dict, pickling and torch.distributed.checkpoint find it."""
        self.param_groups[0].update({PULSE + name: value for name, value in self.pulse.state_dict().items()})


def _pulse_in(group: Group) -> dict[str, Any]:
    return {key.removeprefix(PULSE): value for key, value in group.items() if key.startswith(PULSE)}


def descend(w: Tensors, u: Tensors, rate: Rate, decay: float) -> None:
    """W ← W(1 − λη) − η·u."""
    if isinstance(rate, Tensor):
        rate = rate.to(w[0].device, w[0].dtype)
        torch._foreach_mul_(w, 1 - rate * decay)
        torch._foreach_sub_(w, torch._foreach_mul(u, rate))
        return
    if decay:
        torch._foreach_mul_(w, 1 - rate * decay)
    torch._foreach_add_(w, u, alpha=-rate)
