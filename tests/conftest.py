import os
import tempfile

os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="emomerge-state-")  # where commands note the folders that were used
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported; the workers have a core each

import pytest
import torch
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


GOOD, BAD = ["good", "fine", "lovely", "bright"], ["bad", "dull", "awful", "grey"]
FILLER = ["the", "film", "a", "story", "is", "and", "very", "quite"]


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory):
    """A BERT encoder without a head, and its tokenizer of a few words."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tiny-bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *FILLER]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    transformers.BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=32).save_pretrained(str(folder))
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(words), max_position_embeddings=32, **sizes)
    transformers.BertModel(config).save_pretrained(str(folder))
    return folder


@pytest.fixture
def recipe_file(tiny_recipe, tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(tiny_recipe))
    return file
