"""A tiny base with a tokenizer, and a small data file, made afresh."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from emomerge.tasks import Task, make_task
from emomerge.tasks.image_classification import ImageClassification
from emomerge.tasks.text_classification import TextClassification

# words that `tiny_bert` knows
GOOD = ["good", "fine", "lovely", "bright"]
BAD = ["bad", "dull", "awful", "grey"]
FILLER = ["the", "film", "a", "story", "is", "and", "very", "quite"]


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def sentences(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(text, label) pairs of 2 to 11 words."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        label, words = (("pos", GOOD), ("neg", BAD))[number % 2]
        text = [*rng.choices(FILLER, k=rng.randint(1, 10)), rng.choice(words)]
        rows.append((" ".join(text), label))
    return rows


@pytest.fixture
def reviews(tmp_path) -> Path:
    """80 labelled sentences as TSV with a header."""
    path = tmp_path / "reviews.tsv"
    path.write_text("text\tlabel\n" + "".join(f"{t}\t{n}\n" for t, n in sentences(80)), encoding="utf-8")
    return path


@pytest.fixture
def text_task() -> Callable[..., Task]:
    def build(train: object, **options: Any) -> Task:
        return make_task(TextClassification(kind="text-classification", train=str(train), **options))

    return build


@pytest.fixture
def image_task() -> Callable[..., Task]:
    def build(train: object, **options: Any) -> Task:
        return make_task(ImageClassification(kind="image-classification", train=str(train), **options))

    return build
