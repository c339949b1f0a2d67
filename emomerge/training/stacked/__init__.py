"""Several adapters trained at once: one frozen base, one forward and one backward pass for all runs.

model.py        the trained layers, with the weights of all runs
losses.py       each run's own loss from the rows that are its own
randomness.py   each run's own dropout
estimate.py     whether it pays
loop.py         training
"""

from __future__ import annotations

from emomerge.training.stacked.loop import prepare_stack, train_stacked
from emomerge.training.stacked.model import StackedModel, Unstackable

__all__ = ["StackedModel", "Unstackable", "prepare_stack", "train_stacked"]
