"""Dropout within attention, once for all runs: torch's own result and gradients, run by run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from emomerge.training.stacked.randomness import Streams, Widths, runwise_dropout

RUNS, ROWS, HEADS, TO, OF, WIDTH = 3, 2, 2, 4, 5, 3


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(TO, WIDTH), (OF, WIDTH), (OF, WIDTH + 1)]
    return [
        torch.randn(RUNS * ROWS, HEADS, *shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes
    ]


def masks() -> dict[str, Tensor | None]:
    seen = torch.rand(RUNS * ROWS, 1, TO, OF, generator=torch.Generator().manual_seed(1)) > 0.4
    seen[0, 0, 1] = False  # a position that sees nothing
    return {"none": None, "bool": seen, "float": torch.where(seen, 0.3, -2.0).double(), "shared": seen[:1, :, 2:3]}


def attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, run: int) -> Tensor:
    """One run alone, by torch."""
    rows = slice(run * ROWS, (run + 1) * ROWS)
    own = mask[rows] if mask is not None and len(mask) == len(q) else mask
    return F.scaled_dot_product_attention(q[rows], k[rows], v[rows], own, 0.4, scale=0.7)


@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("keys", ["aaa", "aba"])
def test_attention_draws_as_each_run_alone(mask: str, keys: str) -> None:
    streams, given, sizes = Streams(keys, torch.device("cpu")), masks()[mask], Widths([0] * len(set(keys)))
    with torch.random.fork_rng():
        streams.start(lambda run: torch.manual_seed(ord(keys[run])))
        together = inputs()
        with runwise_dropout(streams, ROWS, sizes):
            found = F.scaled_dot_product_attention(*together, given, 0.4, scale=0.7)
        after = torch.rand(1)
        alone, parts = inputs(), []
        for run, key in reversed(list(enumerate(keys))):
            torch.manual_seed(ord(key))
            parts.insert(0, attended(*alone, given, run))
        assert torch.equal(after, torch.rand(1))  # the first run's stream stands where its generator does
    wanted = torch.cat(parts)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    for tensor in (found, wanted):
        (tensor * torch.arange(tensor.numel()).view_as(tensor)).sum().backward()
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-12)


def test_causal_attention_stays_with_torch() -> None:
    streams = Streams("aaa", torch.device("cpu"))
    q, k, v = inputs()
    with torch.random.fork_rng(), runwise_dropout(streams, ROWS, Widths([0])):
        streams.start(lambda run: torch.manual_seed(0))
        found = F.scaled_dot_product_attention(q, k, v, dropout_p=0.4, is_causal=True)
    factor = (found / v[..., :1, :])[:, :, 0].detach()  # the first position sees the first key alone
    torch.testing.assert_close(factor, factor[..., :1].expand_as(factor))
    assert set(factor.flatten().tolist()) > {0.0}
