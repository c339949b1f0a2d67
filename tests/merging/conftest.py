import pytest
import torch

from emomerge.checkpoints import MemoryCheckpoint


class ExactRun(MemoryCheckpoint):
    """θ₀ + τ whose τ is known exactly, as a baked adapter's is; None in a tensor that it leaves alone."""

    def __init__(self, base, taus, source="run"):
        moved = {name: base[name] + taus[name] for name in taus if taus[name] is not None}
        super().__init__({**dict(base), **moved}, source=source)
        self.taus = taus

    def delta(self, name, base):
        return self.taus[name]


@pytest.fixture(scope="session")
def exact_run():
    return ExactRun


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
