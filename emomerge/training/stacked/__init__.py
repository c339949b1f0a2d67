"""Training several adapters at once: one frozen base, one forward and one backward pass for all runs.

model.py        the trained layers, with the weights of all runs
losses.py       each run's own loss, from its own rows
randomness.py   each run's own dropout
estimate.py     expected speed and memory
group.py        the runs that share a pass
loop.py         the training loop
"""

from __future__ import annotations

from emomerge.training.stacked.loop import StackedPasses, prepare_stack, train_stacked
from emomerge.training.stacked.model import StackedModel, Unstackable

__all__ = ["StackedModel", "StackedPasses", "Unstackable", "prepare_stack", "train_stacked"]
