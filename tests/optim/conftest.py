"""The two ways in which the rules are computed on the CPU."""

from __future__ import annotations

import pytest
import torch

from emomerge.optim import native


@pytest.fixture(params=["compiled", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test with the compiled kernels, if this machine can have them, and with torch's own operations."""
    if request.param == "torch":
        monkeypatch.setattr(native, "fits", lambda *tensors: False)
    elif not native.fits(torch.ones(1)):
        pytest.skip("no C compiler")
    return str(request.param)
