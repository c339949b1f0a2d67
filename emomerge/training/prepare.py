"""Training the small base of a demonstration with torch's AdamW and cosine decay."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from emomerge.errors import EmomergeError
from emomerge.numerics.seeds import seed_of
from emomerge.recipe import Prepare
from emomerge.tasks import Task, TaskData
from emomerge.training.order import BatchOrder


def fit(
    model: nn.Module,
    task: Task,
    data: TaskData,
    prepare: Prepare,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Train a model in place and leave it in eval mode.

    Args:
        model: the model, on the device to train on.
        task, data: the task to train on.
        prepare: steps, batch size, peak learning rate and seed.
        on_step: called with the step, counted from 1, and its loss.

    Raises:
        EmomergeError: the weights became NaN or infinite.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=prepare.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, prepare.steps)
    order = BatchOrder(len(data.train), prepare.batch_size, "prepare", prepare.seed)
    device = next(model.parameters()).device
    model.train()
    with torch.random.fork_rng():
        torch.manual_seed(seed_of("prepare", prepare.seed))
        for step in range(prepare.steps):
            batch = {key: value.to(device) for key, value in data.train.batch(order.batch(step)).items()}
            loss = task.loss(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            on_step(step + 1, float(loss.detach()))
    if not all(torch.isfinite(p).all() for p in model.parameters()):
        rate = prepare.learning_rate
        raise EmomergeError(f"training the base diverged with learning_rate {rate:g}; choose a smaller one")
    model.eval()
