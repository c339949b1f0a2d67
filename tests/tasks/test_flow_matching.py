from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
import torch

from emomerge import recipe
from emomerge.errors import BadInput
from emomerge.recipe import Base, Prepare, Transform
from emomerge.reporting import png
from emomerge.tasks import make_task
from emomerge.tasks.flow_matching import FlowMatching

PREPARE = Prepare(model="dit", hidden=32, layers=1, patch_size=2, steps=2)
BASE = Base(prepare=PREPARE)


@pytest.fixture
def digits():
    pytest.importorskip("sklearn")


def task_of(**options):
    settings = {"train": "digits", "limit": 100, "eval_fraction": 0.3, **options}
    return make_task(FlowMatching(kind="flow-matching", **settings))


def learnt(task, data, seed=0):
    """A model whose velocities are not zero, as a new one's are."""
    model = task.new_model(BASE, data)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture
def ready(digits):
    task = task_of(sampling_steps=3)
    data = task.load_data(BASE)
    return task, data, learnt(task, data)


class Seen(torch.nn.Module):
    """A model that remembers what it was asked, and answers with one constant."""

    def forward(self, pixel_values, time, classes):
        self.asked = pixel_values, time, classes
        return type("Output", (), {"velocity": torch.full_like(pixel_values, 0.25)})


@pytest.mark.parametrize("training", [False, True])
def test_the_loss_is_that_of_the_formula(ready, training):
    task, data, _ = ready
    batch = data.train.batch([3, 1, 8, 5])
    model = Seen().train(training)
    torch.manual_seed(0)
    rows = task.row_figures(model, batch)
    x_t, t, classes = model.asked
    assert torch.equal(classes, batch["labels"]) and ((t > 0) & (t < 1)).all()
    for row in range(4):
        x0 = batch["pixel_values"][row]
        noise = (x_t[row] - (1 - t[row]) * x0) / t[row]
        assert float(rows.loss[row]) == pytest.approx(float((0.25 - (noise - x0)).square().mean()), rel=1e-3)
    assert abs(float(noise.std()) - 1) < 0.4 and rows.weight.tolist() == [1] * 4
    assert rows.accuracy is None and rows.entropy is None
    torch.manual_seed(0)
    assert torch.equal(task.loss(model, batch), rows.loss.mean())


def test_in_evaluation_a_row_is_always_the_same_function(ready):
    task, data, model = ready
    with torch.inference_mode():
        whole = task.row_figures(model, data.test.batch(range(10))).loss
        torch.manual_seed(5)
        again = task.row_figures(model, data.test.batch([7, 2])).loss
    torch.testing.assert_close(again, whole[[7, 2]])
    other = task_of(seed=1)
    moved = other.load_data(BASE).test.batch([0]) | {"pixel_values": data.test.batch([0])["pixel_values"]}
    with torch.inference_mode():
        assert float(other.row_figures(model, moved | {"labels": data.test.batch([0])["labels"]}).loss) != float(whole[0])


def test_in_training_noise_comes_from_the_generator(ready):
    task, data, model = ready
    batch = data.train.batch([0, 1])
    model.train()
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(float(task.loss(model, batch).detach()))
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(("time", "quartiles"), [("uniform", (0.25, 0.75)), ("logit-normal", (0.3375, 0.6625))])
def test_times_have_their_distribution(digits, time, quartiles):
    task = task_of(time=time)
    data = task.load_data(BASE)
    model = Seen()
    torch.manual_seed(0)
    batch = data.train.batch(torch.zeros(8000, dtype=torch.int64))
    task.row_figures(model.train(), batch)
    found = model.asked[1].quantile(torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(found, torch.tensor(quartiles), atol=0.02, rtol=0)


def test_classes_are_withheld_in_training_alone(digits):
    task = task_of(label_dropout=0.3)
    data = task.load_data(BASE)
    model, batch = Seen(), data.train.batch(torch.arange(4000) % 70)
    torch.manual_seed(0)
    task.row_figures(model.train(), batch)
    withheld = model.asked[2] == 10
    assert 0.27 < float(withheld.float().mean()) < 0.33
    assert torch.equal(model.asked[2][~withheld], batch["labels"][~withheld])
    task.row_figures(model.eval(), data.train.batch(range(70)))
    assert int(model.asked[2].max()) < 10


class Line(torch.nn.Module):
    """The exact velocity towards one image: straight lines, which every solver follows exactly."""

    def __init__(self, image):
        super().__init__()
        self.image = image

    def forward(self, pixel_values, time, classes):
        return type("Output", (), {"velocity": (pixel_values - self.image) / time.view(-1, 1, 1, 1)})


class Decay(torch.nn.Module):
    """dx/dt = x: from 1 at t = 1 to 1/e at t = 0."""

    def forward(self, pixel_values, time, classes):
        return type("Output", (), {"velocity": pixel_values})


def test_samplers_follow_the_flow(ready):
    task, _, _ = ready
    image, noise = torch.randn(1, 1, 8, 8), torch.randn(2, 1, 8, 8)
    made = task.sample(Line(image), torch.tensor([0, 1]), noise)
    torch.testing.assert_close(made, image.expand_as(made), atol=1e-5, rtol=1e-5)
    errors = {}
    for sampler in ("euler", "heun"):
        for steps in (10, 20):
            flow = task_of(sampler=sampler, sampling_steps=steps)
            end = flow.sample(Decay(), torch.tensor([0]), torch.ones(1, 1, 2, 2))
            errors[sampler, steps] = abs(float(end[0, 0, 0, 0]) - np.exp(-1))
    assert 1.7 < errors["euler", 10] / errors["euler", 20] < 2.3  # first order
    assert errors["heun", 20] < errors["euler", 20] / 5


def test_guidance_goes_on_from_no_class_to_the_class(digits):
    class Numbers(torch.nn.Module):
        def forward(self, pixel_values, time, classes):
            return type("Output", (), {"velocity": classes.float().view(-1, 1, 1, 1).expand_as(pixel_values)})

    task = task_of(label_dropout=0.1, guidance=3.0, sampling_steps=1, sampler="euler")
    task.load_data(BASE)
    made = task.sample(Numbers(), torch.tensor([4]), torch.zeros(1, 1, 2, 2))
    assert made.unique().tolist() == [-(10 + 3 * (4 - 10))]
    with pytest.raises(BadInput, match="`guidance` needs `label_dropout`"):
        recipe.parse_recipe(
            {"name": "f", "base": {"model": "x"}, "task": {"kind": "flow-matching", "train": "digits", "guidance": 2}}
        )


def test_the_report_gets_a_grid(ready):
    task, _, model = ready
    made = task.samples(model)
    assert made.picture.shape == (10 * 10, 8 * 10, 1) and made.picture.dtype == torch.uint8
    assert made.about.startswith("One row a class (0, 1, 2,") and "heun, 3 steps" in made.about
    assert torch.equal(task.samples(model).picture, made.picture)
    classes = torch.arange(10).repeat_interleave(8)
    noise = torch.randn((80, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    tile = task.sample(model, classes, noise)[3 * 8 + 5, 0]  # class 3, draw 5
    wanted = ((tile + 1) / 2).clamp(0, 1).mul(255).round().byte()
    assert torch.equal(made.picture[31:39, 51:59, 0], wanted)


def test_a_png_holds_its_pixels():
    for channels in (1, 3):
        pixels = np.arange(5 * 4 * channels, dtype=np.uint8).reshape(5, 4, channels) * 3
        data = png(pixels)
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        start = data.index(b"IDAT")
        length = int.from_bytes(data[start - 4 : start], "big")
        rows = zlib.decompress(data[start + 4 : start + 4 + length])
        assert rows == b"".join(b"\0" + row.tobytes() for row in pixels)
        image = pytest.importorskip("PIL.Image")
        found = np.array(image.open(io.BytesIO(data))).reshape(5, 4, channels)
        assert np.array_equal(found, pixels)


def test_a_new_dit_answers_nothing_and_learns(ready):
    task, data, _ = ready
    model = task.new_model(BASE, data)
    batch = data.train.batch(range(70))
    first = task.row_figures(model, batch).loss
    images = batch["pixel_values"]
    silent = model(pixel_values=images, time=torch.rand(70), classes=batch["labels"]).velocity
    assert silent.shape == images.shape and not silent.any()  # adaLN-Zero
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = task.loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.75 * float(first.mean().detach())
    assert all(p.grad is not None for p in model.parameters())
    alone = torch.cat(
        [
            model(pixel_values=images[i : i + 1], time=torch.tensor([0.3]), classes=batch["labels"][i : i + 1]).velocity
            for i in range(3)
        ]
    )
    together = model(pixel_values=images[:3], time=torch.full((3,), 0.3), classes=batch["labels"][:3]).velocity
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_images_of_any_size_and_colour(digits):
    from emomerge.tasks import models

    for channels, size, patch in ((1, 28, 4), (3, 12, 3)):
        prepare = Prepare(model="dit", hidden=64, layers=2, patch_size=patch)
        model = models.build_dit(prepare, channels=channels, image_size=size, classes=("a", "b"))
        images = torch.randn(2, channels, size, size)
        assert model(pixel_values=images, time=torch.rand(2), classes=torch.tensor([0, 2])).velocity.shape == images.shape
    with pytest.raises(BadInput, match="patch_size; expected a divisor of the images' 8 pixels per side; found 3"):
        models.build_dit(Prepare(model="dit", hidden=32, patch_size=3), channels=1, image_size=8, classes="ab")
    with pytest.raises(BadInput, match="hidden; expected a multiple of 32; found 48"):
        models.build_dit(Prepare(model="dit", hidden=48), channels=1, image_size=8, classes="ab")


def test_a_saved_dit_comes_back(ready, tmp_path):
    task, data, model = ready
    model.save_pretrained(str(tmp_path))
    task.save_files(model, tmp_path)
    batch = data.test.batch([0, 1])
    again = task.reload_model(tmp_path)
    assert torch.equal(task.loss(again, batch), task.loss(model, batch)) and not again.training
    given = Base(model=str(tmp_path))
    shifted = task_of(transform=Transform(invert=True))
    shifted_data = shifted.load_data(given)
    assert torch.equal(shifted_data.test.batch([0])["pixel_values"], -batch["pixel_values"][:1])
    assert torch.equal(shifted.new_model(given, shifted_data).positions, model.positions)


def test_unusable_bases_are_named(ready, tmp_path):
    from transformers import ViTConfig, ViTModel

    task, data, model = ready
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    ViTModel(ViTConfig(image_size=8, patch_size=4, num_channels=1, **sizes)).save_pretrained(str(tmp_path / "vit"))
    with pytest.raises(BadInput, match="not a flow of emomerge: .*vit; expected emomerge_dit; found ViTModel"):
        task.new_model(Base(model=str(tmp_path / "vit")), data)
    model.save_pretrained(str(tmp_path / "dit"))
    two = type(data)(data.train, data.validation, data.test, ("a", "b"), "")
    with pytest.raises(BadInput, match="the base has other classes: .*; expected 10; found 2"):
        task.new_model(Base(model=str(tmp_path / "dit")), two)
    with pytest.raises(BadInput, match="no such model folder"):
        task.reload_model(tmp_path / "none")
