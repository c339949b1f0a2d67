import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import yaml
from hypothesis import settings

settings.register_profile("unhurried", deadline=None)  # a busy machine is no failure
settings.load_profile("unhurried")


@pytest.fixture(scope="session")
def tiny_recipe():
    """The digits recipe at the size of a toy: every stage in a second or two."""
    pytest.importorskip("sklearn")
    return {
        "name": "tiny",
        "base": {"prepare": {"model": "vit", "hidden": 16, "layers": 1, "patch_size": 4, "steps": 20, "learning_rate": 0.01}},
        "task": {
            "kind": "image-classification",
            "train": "digits",
            "transform": {"invert": True},
            "limit": 160,
            "eval_fraction": 0.5,
        },
        "adapter": {"kind": "lora", "rank": 2, "alpha": 4, "dropout": 0.1},
        "runs": {"procedure": "paper", "preset": "guarded", "steps": 6, "batch_size": 8, "checkpoint_every": 2, "lr": 20.0},
        "merge": [{"method": "tall-mask"}, {"method": "ties"}, {"method": "mean"}, {"method": "greedy-soup"}],
        "rival": {"learning_rates": [0.001], "snapshots": 3},
        "probe": {"preset": "quick", "batches": 1, "batch_size": 32, "directions": 2},
    }


@pytest.fixture
def recipe_file(tiny_recipe, tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(tiny_recipe))
    return file
