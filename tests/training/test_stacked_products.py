"""The two ways to compute a stacked LoRA layer agree, and the shorter one is taken."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from emomerge.training.stacked import model as stacked
from emomerge.training.stacked.model import Gradient, LoraProduct, MergedProduct, StackedModel, Window, pays_to_merge


def problem(runs: int, *, bias: bool = True) -> SimpleNamespace:
    """Return x, W, b, A and B of some runs, in float64, and the gradient of y."""
    generator = torch.Generator().manual_seed(runs)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return SimpleNamespace(
        x=draw(runs * 4, 3, 6), weight=draw(5, 6), bias=draw(5) if bias else None, a=draw(runs, 2, 6), b=draw(runs, 5, 2),
        of_y=draw(runs * 4, 3, 5),
    )  # fmt: skip


def computed(product: Any, given: SimpleNamespace, window: Window) -> list[Tensor]:
    """Return y and the gradients of x, A and B by one of the two products."""
    a, b = nn.Parameter(given.a.clone()), nn.Parameter(given.b.clone())
    gradients = Gradient(a), Gradient(b)
    rows = slice(4 * window.first, 4 * window.end)
    x = given.x[rows].clone().requires_grad_()
    inputs = (x, None, b) if product is LoraProduct else (x, b)
    y = product.apply(*inputs, (given.weight, given.bias, a.detach(), 0.7, window), gradients)
    y.backward(given.of_y[rows])
    assert x.grad is not None
    return [y.detach(), x.grad, gradients[0].total, gradients[1].total]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("runs", "first", "end"), [(1, 0, 1), (3, 0, 3), (3, 1, 2), (3, 1, 3)])
def test_factors_multiplied_first_give_the_same(runs: int, first: int, end: int, bias: bool) -> None:
    given = problem(runs, bias=bias)
    for one, other in zip(*(computed(p, given, Window(first, end)) for p in (LoraProduct, MergedProduct)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_gradients_of_several_passes_add_up() -> None:
    given = problem(2)
    a, b = nn.Parameter(given.a), nn.Parameter(given.b)
    gradients = Gradient(a), Gradient(b)
    others = (given.weight, given.bias, a.detach(), 0.7, Window(0, 2))
    once = computed(MergedProduct, given, Window(0, 2))[2:]
    for _ in range(2):
        MergedProduct.apply(given.x, b, others, gradients).backward(given.of_y)  # type: ignore[no-untyped-call]
    for gradient, single in zip(gradients, once, strict=True):
        torch.testing.assert_close(gradient.total, 2 * single)


@pytest.mark.parametrize(
    ("rows", "wide", "out", "rank", "pays"),
    [
        (544, 48, 48, 8, True),
        (544, 48, 192, 8, True),
        (544, 192, 48, 8, True),
        (16, 48, 48, 8, False),  # few rows: the change itself would cost more than all else
        (544, 128, 128, 8, False),  # the gradient of W would
        (4096, 384, 384, 16, False),
        (544, 128, 128, 16, True),
    ],
)
def test_factors_are_multiplied_first_where_it_pays(rows: int, wide: int, out: int, rank: int, pays: bool) -> None:
    assert pays_to_merge(rows, wide, out, rank) is pays


class Net(nn.Module):
    """Two layers, one of them with transposed weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), Conv1D(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.tanh(self.first(x)))
        return y


@pytest.mark.parametrize(
    ("dropout", "dtype", "autocast", "merged"),
    [
        (0.0, torch.float32, False, True),
        (0.1, torch.float32, False, False),
        (0.0, torch.float64, False, False),
        (0.0, torch.float32, True, False),  # in bfloat16 the change would be lost in W
    ],
)
def test_only_plain_layers_in_float32_are_merged(
    dropout: float, dtype: torch.dtype, autocast: bool, merged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=8, target_modules=["first", "second"], lora_dropout=dropout)
    net = get_peft_model(Net().to(dtype), config)  # type: ignore[arg-type]
    start = {name: torch.randn_like(p) for name, p in net.named_parameters() if p.requires_grad}
    taken = []
    for name in ("MergedProduct", "LoraProduct"):
        product = getattr(stacked, name)
        apply = lambda *args, product=product, name=name: taken.append(name) or product.apply(*args)  # noqa: E731
        monkeypatch.setattr(stacked, name, SimpleNamespace(apply=apply))
    model = StackedModel(net, [start, start])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model.model(torch.randn(2 * 32, 16, dtype=dtype))
    assert set(taken) == {"MergedProduct" if merged else "LoraProduct"}
    assert y.isfinite().all()
