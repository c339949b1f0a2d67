"""Every kind of task trains as well when runs share their passes: the same losses as one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from emomerge.experiment.pipeline import Pipeline
from emomerge.recipe import load_recipe

RECIPES = Path(__file__).parent.parent.parent / "recipes"
TINY = {
    "causal-lm": [
        "base.prepare.hidden=32", "base.prepare.layers=1", "base.prepare.vocabulary=300", "task.limit=8", "task.max_length=16",
    ],
    "flow-fashion": [
        "task.train=digits", "task.limit=60", "task.label_dropout=0.3", "base.prepare.hidden=32", "base.prepare.layers=1",
    ],
    "autoencoder": [],
}  # fmt: skip


@pytest.mark.parametrize("name", TINY)
def test_stacked_runs_are_those_of_one_by_one(name, tmp_path):
    pytest.importorskip("sklearn")
    torch.set_num_threads(1)
    shared = [
        *TINY[name], "base.prepare.steps=3", "base.prepare.batch_size=8", "runs.steps=4", "runs.batch_size=4",
        "runs.procedure=paper", "runs.preset=guarded", "runs.lr=50",
        "runs.optimizers=[sens, cats, void]", "runs.data_order=different", "adapter.dropout=0.2",
    ]  # fmt: skip
    losses = {}
    for parallel in ("stacked", "sequential"):
        made = Pipeline(load_recipe(RECIPES / f"{name}.yaml", [*shared, f"runs.parallel={parallel}"]), tmp_path / parallel)
        assert made.train_all()
        losses[parallel] = [[row["loss"] for row in made.run_dir(spec).metrics()] for spec in made.specs]
    torch.testing.assert_close(torch.tensor(losses["stacked"]), torch.tensor(losses["sequential"]), rtol=1e-4, atol=1e-5)
    assert len({tuple(run) for run in losses["sequential"]}) == 3
