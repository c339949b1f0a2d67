from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from emomerge.errors import BadInput
from emomerge.numerics.hashing import hash_tensors
from emomerge.recipe import Base, Prepare
from emomerge.tasks import Split, TaskData, make_task
from emomerge.tasks.image_classification import ImageClassification

CLASSES = ("no", "perhaps", "yes")


def build(model, seed=0, channels=1, image_size=8, **sizes):
    from emomerge.tasks import models

    options = {"hidden": 16, "layers": 2, **sizes}
    prepare = Prepare(model=model, seed=seed, **options)
    return models.build(prepare, channels=channels, image_size=image_size, classes=CLASSES)


@pytest.fixture
def images():
    return torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["mlp", "cnn", "vit"])
def test_saved_models_come_back_by_the_auto_class(kind, images, tmp_path):
    from transformers import AutoModelForImageClassification

    model = build(kind)
    wanted = model(pixel_values=images).logits
    model.save_pretrained(str(tmp_path))
    task = make_task(ImageClassification(kind="image-classification", train="digits"))
    for again in (AutoModelForImageClassification.from_pretrained(str(tmp_path)), task.reload_model(tmp_path)):
        assert torch.equal(again(pixel_values=images).logits, wanted)
        assert not again.training and again.config.label2id == {"no": 0, "perhaps": 1, "yes": 2}
    assert wanted.shape == (5, 3)


@pytest.mark.parametrize("kind", ["mlp", "cnn", "vit"])
def test_weights_depend_on_the_seed_alone(kind):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = build(kind).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    two, other = build(kind).state_dict(), build(kind, seed=1).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ["mlp", "cnn", "vit"])
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 12), (1, 28)])
def test_models_learn_and_rows_do_not_mix(kind, channels, size):
    model = build(kind, channels=channels, image_size=size)
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(24, channels, size, size, generator=generator), torch.arange(24) % 3
    alone = torch.cat([model(pixel_values=images[i : i + 1]).logits for i in range(24)])
    torch.testing.assert_close(model(pixel_values=images).logits, alone, atol=1e-4, rtol=1e-4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        output = model(pixel_values=images, labels=labels)
        assert torch.equal(output.loss, F.cross_entropy(output.logits, labels))
        optimizer.zero_grad()
        output.loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        losses.append(float(output.loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("kind", ["mlp", "cnn", "vit"])
def test_no_layer_couples_rows_and_linear_layers_abound(kind):
    modules = list(build(kind).modules())
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in modules)
    assert sum(isinstance(m, nn.Linear) for m in modules) >= 2


def test_sizes_that_do_not_fit():
    with pytest.raises(BadInput, match="base.prepare.patch_size; expected a divisor of the images' 8 pixels per side; found 3"):
        build("vit", patch_size=3)
    with pytest.raises(BadInput, match="base.prepare.hidden; expected a multiple of 16; found 50"):
        build("vit", hidden=50)


def test_new_model_takes_its_sizes_from_the_data():
    split = Split({"pixel_values": torch.zeros(4, 3, 12, 12), "labels": torch.zeros(4, dtype=torch.int64)})
    data = TaskData(split, split, split, CLASSES, "")
    task = make_task(ImageClassification(kind="image-classification", train="digits"))
    model = task.new_model(Base(prepare=Prepare(model="cnn", hidden=8)), data)
    assert task.logits(model, split.batch([0, 1])).shape == (2, 3) and not model.training


def test_a_fresh_process_reloads_them(images, tmp_path):
    model = build("cnn")
    model.save_pretrained(str(tmp_path))
    code = f"""
from emomerge.numerics.hashing import hash_tensors
from emomerge.tasks.image_classification import ImageClassification
from emomerge.tasks import make_task
model = make_task(ImageClassification(kind="image-classification", train="digits")).reload_model({str(tmp_path)!r})
print(hash_tensors(model.state_dict().items()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ), check=True)
    assert done.stdout.strip() == hash_tensors(model.state_dict().items())
    assert done.stderr == ""
