"""Data, tokenizers, new weights and evaluation noise are the same bits for any thread count and hash seed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import sys, torch
torch.set_num_threads(int(sys.argv[1]))
from emomerge.checkpoints import model_checkpoint
from emomerge.experiment.measure import fingerprint
from emomerge.recipe import parse_recipe
from emomerge.tasks import make_task

language = {"kind": "causal-lm", "train": "python-docs", "limit": 12, "max_length": 64, "packing": "separate"}
flow = {"kind": "flow-matching", "train": "digits", "limit": 60}
sizes = {"hidden": 32, "layers": 1}
for prepare, task in (({"model": "llama", "vocabulary": 600}, language), ({"model": "dit"}, flow)):
    recipe = parse_recipe({"name": "r", "base": {"prepare": prepare | sizes}, "task": task})
    task = make_task(recipe.task)
    data = task.load_data(recipe.base)
    new = task.new_model(recipe.base, data)
    print(data.train.digest, data.test.digest, fingerprint(model_checkpoint(new, source="new")))
    print(task.loss(new, data.test.batch([0])).item())
"""


def test_threads_and_hash_seeds_change_nothing():
    pytest.importorskip("sklearn")
    settings = (("1", "1"), ("2", "2"))
    running = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, threads],
            env={**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads}, stdout=subprocess.PIPE, text=True,
        )
        for threads, seed in settings
    ]  # fmt: skip
    one, two = (process.communicate()[0] for process in running)
    assert one == two and len(one.splitlines()) == 4
