"""The size of the weights, and the rate that `auto` derives from it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from emomerge.optim import OPTIMIZERS, EmoOptimizer, EmoPulseLR, EmoSens, weight_size
from emomerge.optim.size import FALLBACK


def test_size_of_one_matrix() -> None:
    w = nn.Parameter(torch.full((16, 9, 2), 0.5))
    assert weight_size([w]).item() == pytest.approx(0.5 / 4)  # min(16, 18) = 16


def test_size_is_the_mean_over_elements_of_the_tensors_that_count() -> None:
    a, b = nn.Parameter(torch.full((4, 25), 2.0)), nn.Parameter(torch.full((100, 9), -3.0))
    ignored = [
        nn.Parameter(torch.full((1000,), 9.0)),  # a vector
        nn.Parameter(torch.zeros(1000, 4)),  # LoRA's B
        nn.Parameter(torch.ones(50, 50), requires_grad=False),
        nn.Parameter(torch.ones(0, 3)),
    ]
    assert weight_size([a, *ignored, b]).item() == pytest.approx((100 * 2 / 2 + 900 * 3 / 3) / 1000)


@pytest.mark.parametrize("params", [[], [nn.Parameter(torch.ones(7))], [nn.Parameter(torch.zeros(7, 2))]])
def test_size_where_nothing_counts(params: list[nn.Parameter]) -> None:
    assert weight_size(params).item() == pytest.approx(FALLBACK)


def test_size_does_not_depend_on_threads_or_layout() -> None:
    w = torch.randn(300, 700, generator=torch.Generator().manual_seed(0))
    threads, found = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(weight_size([nn.Parameter(w)]).item())
    torch.set_num_threads(threads)
    assert found[0] == found[1]
    assert weight_size([nn.Parameter(w.T)]).item() == pytest.approx(found[0], rel=1e-12)
    assert weight_size([nn.Parameter(w.bfloat16())]).item() == pytest.approx(found[0], rel=1e-3)


def network(width: float = 1.0) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    with torch.no_grad():
        for p in model.parameters():
            p *= width
    return model


X = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))


def train(model: nn.Module, optimizer: EmoOptimizer, steps: int = 20) -> list[Tensor]:
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(X) - X[:, :1].sin()).square().mean()
        loss.backward()
        optimizer.observe(loss)
        optimizer.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_lr_has_no_effect_with_auto(name: str) -> None:
    results = []
    for lr in (0.01, 1.0, 100.0):
        model = network()
        optimizer = OPTIMIZERS[name].load()(model.parameters(), lr=lr, preset="auto")
        results.append(train(model, optimizer))
        assert optimizer.pulse.size == pytest.approx(weight_size(network().parameters()).item())
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    assert not torch.equal(results[0][0], next(network().parameters()))


def test_lr_0_stops_training_with_auto() -> None:
    model = network()
    train(model, EmoSens(model.parameters(), lr=0, preset="auto"))
    assert all(map(torch.equal, model.parameters(), network().parameters()))


def test_schedule_scales_the_rate_of_auto() -> None:
    model = network()
    optimizer = EmoSens(model.parameters(), lr=3e-4, preset="auto")
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=10)
    shares = []
    for _ in range(10):
        train(model, optimizer, 1)
        shares.append(optimizer.pulse.rate / (0.12 * optimizer.pulse.size * optimizer.pulse.dnr))
        schedule.step()
    assert shares == pytest.approx([1 - k / 10 for k in range(10)])


def test_rate_of_auto_follows_the_scale_of_the_weights() -> None:
    rates = []
    for width in (1.0, 4.0):
        model = network(width)
        optimizer = EmoSens(model.parameters(), preset="auto")
        train(model, optimizer, 1)
        rates.append(optimizer.pulse.rate)
    assert rates[1] == pytest.approx(4 * rates[0])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_capturable_and_resumed_training_with_auto(name: str) -> None:
    whole, resumed, on_device = network(), network(), network()
    optimizer_class = OPTIMIZERS[name].load()
    expected = train(whole, optimizer_class(whole.parameters(), preset="auto"))

    first = optimizer_class(resumed.parameters(), preset="auto")
    train(resumed, first, 7)
    later = optimizer_class(resumed.parameters())
    later.load_state_dict(copy.deepcopy(first.state_dict()))
    assert all(map(torch.equal, train(resumed, later, 13), expected))

    capturable = optimizer_class(on_device.parameters(), preset="auto", capturable=True)
    torch.testing.assert_close(train(on_device, capturable), expected, rtol=1e-4, atol=1e-6)


def test_scheduler_with_auto_sets_rates_relative_to_the_weights() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=123.0)
    scheduler = EmoPulseLR(optimizer, "auto")
    expected = 0.12 * weight_size(model.parameters()).item()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)
    scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=0.1)
