"""What the claims on few and small data share: FashionMNIST at 14 × 14 pixels, and tasks with few rows."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from claims_core import Arm, Effort
from claims_training import Rows, fashion, rule_title

PIXELS = 14 * 14


def pooled(effort: Effort) -> tuple[Rows, Rows, Rows]:
    """Return 20,000 rows to train, 2,000 to choose by and 4,000 test rows, with 2 × 2 pixels averaged."""
    return _pooled(effort.fashion)


@lru_cache(maxsize=1)
def _pooled(folder: Path) -> tuple[Rows, Rows, Rows]:
    images = fashion(Effort(fashion=folder))

    def half(rows: Rows, count: int) -> Rows:
        small = F.avg_pool2d(rows.x[:count].view(-1, 1, 28, 28), 2)
        return Rows(small.flatten(1), rows.y[:count])

    return half(images.train, 20_000), half(images.validation, 2000), half(images.test, 4000)


def few(rows: Rows, count: int, seed: int, wrong: float = 0.0) -> Rows:
    """Return some rows by chance, of which a share has a random class."""
    generator = torch.Generator().manual_seed(7000 + seed)
    found = rows.of(torch.randperm(len(rows), generator=generator)[:count])
    guesses = torch.randint(10, (count,), generator=generator)
    flip = torch.rand(count, generator=generator) < wrong
    return Rows(found.x, torch.where(flip, guesses, found.y))


def named(arm: Arm) -> str:
    """Return an arm's name in tables and figures: the rule, and a rival's rate."""
    rate = arm.get("rate")
    return rule_title(arm["rule"]) + ("" if rate is None else f", lr {rate:g}" if "/" in arm["rule"] else f", {rate:g}")
