"""transformers' Trainer with an emo optimizer that sees the loss Trainer logs."""

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
    """Trainer, with everything it takes, whose optimizer is an emo optimizer.

    The rate is emoPulse's: `learning_rate`, `optim` and `adam_*` of the arguments are not used, and `lr` in `emo_options`
    (emoScope, 1.0) multiplies it. The schedule is constant. TrainingArguments' own default, "linear", reads as no
    wish; another schedule or a warmup is refused. `weight_decay` of the arguments holds, for the usual groups.
    Logs show the pulse: `learning_rate` is the effective rate of the first group, beside `sigma`, `trust` and `dnr`.

    Args:
        emo: a name in `OPTIMIZERS` or an optimizer class. `optimizers=(optimizer, None)` takes its place.
        emo_options: its keyword arguments, such as `{"preset": "v3.9"}`.

    Raises:
        BadInput: a schedule or warmup was asked for, an optimizer is not an emo optimizer, or options cannot apply.

    Example:
        >>> trainer = EmoTrainer(model, args, train_dataset=data, emo="cats")
        >>> trainer.train(resume_from_checkpoint=True)
        >>> class EmoSFTTrainer(EmoTrainer, SFTTrainer): ...  # and any other trainer that is a Trainer
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
                raise BadInput("`emo_options` are for an optimizer that EmoTrainer makes", fix="give them to yours")
        elif self.optimizer_cls_and_kwargs is None:
            self.optimizer_cls_and_kwargs = _optimizer_class(emo), _options(emo_options)

    @property
    def emo_optimizer(self) -> EmoOptimizer:
        """The emo optimizer inside accelerate's wrapper; there is none before `train()` unless it was given."""
        return _unwrap(self.optimizer)

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """A constant schedule, unless a scheduler was given."""
        if self.lr_scheduler is None:
            self.lr_scheduler = get_constant_schedule(optimizer or self.optimizer)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of the coming step, as in Trainer."""
        self.emo_optimizer.intake.forget()  # what a step skipped by a GradScaler left
        batches: tuple[list[Any], Tensor | int | None] = super().get_batch_samples(*args, **kwargs)
        return batches

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of one micro-batch; the loss that Trainer logs for it is observed.

        Trainer sums these over the step: they are divided already, by micro-batches or by `num_items_in_batch`.
        """
        loss: Tensor = super().training_step(model, *args, **kwargs)
        self.emo_optimizer.observe(loss, divided=True)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as Trainer does, with the pulse in the place of the constant schedule."""
        if "learning_rate" in logs:
            pulse = self.emo_optimizer.pulse
            logs |= {"learning_rate": pulse.rate, "sigma": pulse.sigma, "trust": pulse.trust, "dnr": pulse.dnr}
        super().log(logs, *args, **kwargs)


def _unwrap(optimizer: Any) -> EmoOptimizer:
    """The emo optimizer inside the wrappers of accelerate and DeepSpeed, which keep theirs in `.optimizer`."""
    inner = optimizer
    while not isinstance(inner, EmoOptimizer):
        if not hasattr(inner, "optimizer"):
            raise BadInput("EmoTrainer is for emo optimizers", found=type(optimizer).__name__, fix="use Trainer for others")
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
            "Trainer's parameter groups have their own weight decay",
            where="emo_options['weight_decay']",
            fix="set `weight_decay` in the TrainingArguments",
        )
    return options


def _check_schedule(args: TrainingArguments) -> None:
    schedule = SchedulerType(args.lr_scheduler_type)
    if schedule not in (SchedulerType.LINEAR, SchedulerType.CONSTANT) or args.warmup_steps:
        raise BadInput(
            "emoPulse sets the rate itself, so there is no schedule and no warmup",
            where="TrainingArguments",
            found=f"lr_scheduler_type={schedule.value}, warmup_steps={args.warmup_steps}",
            fix='use lr_scheduler_type="constant" and warmup_steps=0',
        )
    if args.learning_rate != TrainingArguments.learning_rate:
        warnings.warn(
            f"learning_rate={args.learning_rate} is not used: emoPulse sets the rate; emo_options={{'lr': …}} multiplies it",
            stacklevel=3,
        )
