"""A loss is forgotten together with its gradients when a loop skips the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from emomerge.errors import MissingLossError
from emomerge.optim import EmoPulseLR, EmoSens

SKIPPED = 2
"""The number of the step that every loop below skips."""
CLEAR: dict[str, Callable[[nn.Module, Any], None]] = {
    "optimizer": lambda net, opt: opt.zero_grad(),
    "optimizer, in place": lambda net, opt: opt.zero_grad(set_to_none=False),
    "model": lambda net, opt: net.zero_grad(),
}


def losses_seen(
    order: str, clear: Callable[[nn.Module, Any], None], *, at: str, value: Callable[[Tensor], Any], parts: int = 1
) -> list[float]:
    """Train for five steps, whose losses are 10, 20, …, and return the loss that each step saw.

    Args:
        order: "before" or "after" backward, where the loss is observed.
        clear: clears the gradients.
        at: where they are cleared: the "start" or "end" of a step, or "between" observation and backward.
        value: what is observed, given the loss.
        parts: micro-batches of a step.
    """
    torch.manual_seed(0)
    net = nn.Linear(2, 1)
    opt = EmoSens(net.parameters())
    seen = []
    for step in range(5):
        if at == "start":
            clear(net, opt)
        for part in range(parts):
            goal = 10.0 * (step + 1) + part
            loss = net(torch.ones(1, 2)).sum() * 0 + net.bias.sum() * 1e-6 + goal
            if order == "before":
                opt.observe(value(loss))
            if at == "between" and part == 0:
                clear(net, opt)
            loss.backward()
            if order == "after":
                opt.observe(value(loss))
        if step != SKIPPED:
            opt.step()
            seen.append(round(opt.pulse.loss, 2))
        if at == "end":
            clear(net, opt)
    return seen


@pytest.mark.parametrize("clear", CLEAR)
@pytest.mark.parametrize(
    ("order", "at"), [(o, a) for o in ("before", "after") for a in ("start", "end")] + [("before", "between")]
)
@pytest.mark.parametrize("parts", [1, 2])
def test_the_loss_of_a_skipped_step_is_forgotten(clear: str, order: str, at: str, parts: int) -> None:
    if clear == "model" and at == "between":
        pytest.skip("nothing tells whether the loss or its predecessor was cleared")
    expected = [10.0, 20.0, 40.0, 50.0] if parts == 1 else [10.5, 20.5, 40.5, 50.5]
    assert losses_seen(order, CLEAR[clear], at=at, value=lambda loss: loss, parts=parts) == expected


@pytest.mark.parametrize("value", [Tensor.item, Tensor.detach])
@pytest.mark.parametrize(("order", "at"), [("before", "start"), ("before", "end"), ("before", "between"), ("after", "end")])
def test_losses_without_a_graph_are_forgotten_too(value: Callable[[Tensor], Any], order: str, at: str) -> None:
    assert losses_seen(order, CLEAR["optimizer"], at=at, value=value) == [10.0, 20.0, 40.0, 50.0]


def test_gradients_that_are_kept_keep_their_losses() -> None:
    """Without `zero_grad` the skipped step is part of an accumulation."""
    assert losses_seen("before", lambda net, opt: None, at="end", value=lambda loss: loss) == [10.0, 20.0, 35.0, 50.0]


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 1e38])
def test_a_scaler_that_finds_infinities_leaves_no_loss_behind(bad: float) -> None:
    net = nn.Linear(1, 1)
    opt, scaler = EmoSens(net.parameters()), torch.amp.GradScaler("cpu", init_scale=2.0**127)
    for factor in (bad, 0.0):
        loss = net(torch.ones(1, 1)).sum() * factor + 7 * (factor == 0)
        opt.observe(loss)
        scaler.scale(loss).backward()
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
    assert opt.pulse.steps == 1
    assert opt.pulse.loss == 7.0


def test_a_loss_that_a_loop_refuses_before_backward_is_forgotten() -> None:
    net = nn.Linear(1, 1)
    opt = EmoSens(net.parameters())
    for goal in (1.0, float("nan"), 3.0):
        opt.zero_grad()
        loss = net(torch.ones(1, 1)).sum() * 0 + goal
        opt.observe(loss)
        if not loss.isfinite():
            continue
        loss.backward()
        opt.step()
    assert opt.pulse.loss == 3.0


def test_a_scheduler_forgets_the_loss_of_a_skipped_step() -> None:
    net = nn.Linear(1, 1)
    adamw = torch.optim.AdamW(net.parameters())
    scheduler = EmoPulseLR(adamw)
    for goal in (1.0, float("inf"), 3.0):
        loss = net(torch.ones(1, 1)).sum() * 0 + goal
        scheduler.observe(loss)
        loss.backward()
        if loss.isfinite():
            scheduler.step()
            adamw.step()
        adamw.zero_grad()
    assert scheduler.pulse.loss == 3.0


def test_a_loop_that_clears_gradients_between_two_passes_keeps_its_loss() -> None:
    """As SAM does: the step follows the second gradient, and its loss is the first."""
    net = nn.Linear(1, 1)
    opt = EmoSens(net.parameters())
    loss = net(torch.ones(1, 1)).sum() * 0 + 5
    opt.observe(loss)
    loss.backward()
    opt.zero_grad()
    net(torch.ones(1, 1)).sum().backward()
    opt.step()
    assert opt.pulse.loss == 5.0
    with pytest.raises(MissingLossError):
        opt.step()


def test_gradients_of_gradients_accumulate_with_their_losses() -> None:
    net = nn.Linear(1, 1)
    opt = EmoSens(net.parameters())
    for goal in (2.0, 4.0):
        loss = net(torch.ones(1, 1)).square().sum() * 1e-9 + goal
        opt.observe(loss)
        loss.backward(create_graph=True)
    with torch.no_grad():
        opt.step()
    assert opt.pulse.loss == pytest.approx(3.0)
