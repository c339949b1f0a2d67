"""The Triton kernel of geom_relation, run by Triton's interpreter on the CPU where triton is installed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CHECK = """
import torch
from emomerge.optim.triton_geometry import BLOCK, PROGRAMS, products

for n in (1, 5, BLOCK, 3 * BLOCK + 7, BLOCK * PROGRAMS // 64 + 1):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        generator = torch.Generator().manual_seed(n)
        w, g = (torch.randn(n, generator=generator).to(dtype) for _ in range(2))
        a, b = w.double(), g.double()
        wanted = torch.stack([(a * b).sum(), (a * a).sum(), (b * b).sum()])
        got = products(w, g)
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        scale = 1e-12 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(got.double(), wanted, atol=scale * n, rtol=scale)
"""


def test_sums_are_those_of_torch() -> None:
    pytest.importorskip("triton")
    subprocess.run([sys.executable, "-c", CHECK], check=True, env={**os.environ, "TRITON_INTERPRET": "1"})
