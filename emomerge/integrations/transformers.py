"""A transformers Trainer with an emo optimizer, which observes the loss that Trainer logs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import Optimizer
from transformers import Trainer, TrainingArguments, get_constant_schedule
from transformers.trainer_utils import SchedulerType

from emomerge.errors import BadInput
from emomerge.optim.base import EmoOptimizer
from emomerge.optim.table import OPTIMIZERS, known_names


class EmoTrainer(Trainer):  # type: ignore[misc]
    """A Trainer whose optimizer is an emo optimizer.

    emoPulse sets the rate: `learning_rate`, `optim` and `adam_*` of the TrainingArguments are not used, and `lr` in
    `emo_options` (emoScope, 1.0) multiplies the rate. The schedule is constant: "linear", the default of TrainingArguments, is
    ignored; any other schedule and a warmup are refused. `weight_decay` of the TrainingArguments applies to the usual groups.
    Logs contain the pulse: `learning_rate` is the effective rate of the first group, next to `sigma`, `trust` and `dnr`.

    Args:
        emo: a name in `OPTIMIZERS` or an optimizer class. Not used if `optimizers=(optimizer, None)` is passed.
        emo_options: its keyword arguments, such as `{"preset": "v3.9"}`.

    Raises:
        BadInput: a schedule or warmup is set, the optimizer is not an emo optimizer, or options cannot be applied.

    Example:
        >>> trainer = EmoTrainer(model, args, train_dataset=data, emo="cats")
        >>> trainer.train(resume_from_checkpoint=True)
        >>> class EmoSFTTrainer(EmoTrainer, SFTTrainer): ...  # and likewise for any other subclass of Trainer
    """

    optimizer: Any
    lr_scheduler: LRScheduler | None
    optimizer_cls_and_kwargs: tuple[type[Optimizer], dict[str, Any]] | None

    def __init__(
        self,
        *args: Any,
        emo: str | type[EmoOptimizer] = "sens",
        emo_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        _check_schedule(self.args)
        if self.optimizer is not None:
            _unwrap(self.optimizer)
            if emo_options:
                raise BadInput("`emo_options` only apply to an optimizer created by EmoTrainer", fix="pass them to your own")
        elif self.optimizer_cls_and_kwargs is None:
            self.optimizer_cls_and_kwargs = _optimizer_class(emo), _options(emo_options)

    @property
    def emo_optimizer(self) -> EmoOptimizer:
        """The emo optimizer inside accelerate's wrapper. Before `train()` it exists only if it was passed in."""
        return _unwrap(self.optimizer)

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """Create a constant schedule, unless a scheduler was passed in."""
        if self.lr_scheduler is None:
            self.lr_scheduler = get_constant_schedule(optimizer or self.optimizer)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Tensor | int | None]:
        """Return the micro-batches of the coming step, as in Trainer."""
        self.emo_optimizer.intake.forget()  # losses of a step that a GradScaler skipped
        batches: tuple[list[Any], Tensor | int | None] = super().get_batch_samples(*args, **kwargs)
        return batches

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Run forward and backward on one micro-batch and observe the loss that Trainer logs for it.

        Trainer sums them over the step; they are already divided by the number of micro-batches or `num_items_in_batch`.
        """
        loss: Tensor = super().training_step(model, *args, **kwargs)
        self.emo_optimizer.observe(loss, divided=True)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as Trainer does, with the pulse in place of the constant schedule."""
        if "learning_rate" in logs:
            pulse = self.emo_optimizer.pulse
            logs |= {"learning_rate": pulse.rate, "sigma": pulse.sigma, "trust": pulse.trust, "dnr": pulse.dnr}
        super().log(logs, *args, **kwargs)


def _unwrap(optimizer: Any) -> EmoOptimizer:
    """Return the emo optimizer inside the wrappers of accelerate and DeepSpeed, which keep it in `.optimizer`."""
    inner = optimizer
    while not isinstance(inner, EmoOptimizer):
        if not hasattr(inner, "optimizer"):
            raise BadInput("EmoTrainer takes emo optimizers only", found=type(optimizer).__name__, fix="use Trainer for others")
        inner = inner.optimizer
    return inner


def _optimizer_class(emo: str | type[EmoOptimizer]) -> type[EmoOptimizer]:
    if isinstance(emo, str) and emo in OPTIMIZERS:
        return OPTIMIZERS[emo].load()
    if isinstance(emo, type) and issubclass(emo, EmoOptimizer):
        return emo
    raise BadInput("unknown emo optimizer", expected=f"{known_names(str(emo))} or a class of emomerge.optim", found=repr(emo))


def _options(emo_options: Mapping[str, Any] | None) -> dict[str, Any]:
    options = dict(emo_options or {})
    if "weight_decay" in options:
        raise BadInput(
            "the parameter groups of Trainer set their own weight decay",
            where="emo_options['weight_decay']",
            fix="set `weight_decay` in the TrainingArguments",
        )
    return options


def _check_schedule(args: TrainingArguments) -> None:
    schedule = SchedulerType(args.lr_scheduler_type)
    if schedule not in (SchedulerType.LINEAR, SchedulerType.CONSTANT) or args.warmup_steps:
        raise BadInput(
            "emoPulse sets the rate itself; schedules and warmup do not apply",
            where="TrainingArguments",
            found=f"lr_scheduler_type={schedule.value}, warmup_steps={args.warmup_steps}",
            fix='use lr_scheduler_type="constant" and warmup_steps=0',
        )
    if args.learning_rate != TrainingArguments.learning_rate:
        warnings.warn(
            f"learning_rate={args.learning_rate} is not used: emoPulse sets the rate; emo_options={{'lr': …}} multiplies it",
            stacklevel=3,
        )
