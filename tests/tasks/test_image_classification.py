from __future__ import annotations

import builtins
import gzip
import json

import pytest
import torch
from torch.nn import functional as F

from emomerge.errors import BadInput, MissingExtra
from emomerge.recipe import Base, Prepare, Transform
from emomerge.tasks import images as reading
from emomerge.tasks.image_classification import ImageClassification
from emomerge.tasks.images import ImageInput

MLP = Base(prepare=Prepare(model="mlp", hidden=8, layers=1))


def idx(tensor) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in tensor.shape)
    return bytes([0, 0, 8, tensor.ndim]) + sizes + tensor.numpy().tobytes()


def pictures(rows: int, side: int = 6, classes: int = 3):
    generator = torch.Generator().manual_seed(rows)
    pixels = torch.randint(256, (rows, side, side), generator=generator, dtype=torch.uint8)
    return pixels, torch.arange(rows, dtype=torch.uint8) % classes


def write_idx(folder, prefix="train", rows=60, ending="", **sizes):
    folder.mkdir(exist_ok=True)
    pixels, labels = pictures(rows, **sizes)
    pack = gzip.compress if ending else bytes
    images = folder / f"{prefix}-images-idx3-ubyte{ending}"
    images.write_bytes(pack(idx(pixels)))
    (folder / f"{prefix}-labels-idx1-ubyte{ending}").write_bytes(pack(idx(labels)))
    return images


def everything(split):
    batch = split.batch(range(len(split)))
    return batch["pixel_values"], batch["labels"]


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_idx_file_and_folder(tmp_path, image_task, ending):
    images = write_idx(tmp_path / "idx", ending=ending)
    data = image_task(images).load_data(MLP)
    assert data.classes == ("0", "1", "2")
    assert data.summary == "60 rows in 3 classes; 54 to train, 3 to validate, 3 to test"
    pixels, labels = everything(data.train)
    assert pixels.dtype == torch.float32 and pixels.shape == (54, 1, 6, 6) and labels.dtype == torch.int64
    raw, numbers = pictures(60)
    for image, label in zip(pixels, labels, strict=True):
        row = next(i for i, r in enumerate(raw) if torch.allclose(image[0], r.float() / 255 * 2 - 1, atol=1e-6))
        assert numbers[row] == label
    assert image_task(tmp_path / "idx").load_data(MLP).train.digest == data.train.digest


def test_t10k_beside_train_is_the_test(tmp_path, image_task):
    write_idx(tmp_path / "idx")
    write_idx(tmp_path / "idx", "t10k", rows=12)
    data = image_task(tmp_path / "idx").load_data(MLP)
    assert (len(data.train), len(data.validation), len(data.test)) == (54, 6, 12)
    named = image_task(tmp_path / "idx", test=str(tmp_path / "idx")).load_data(MLP)
    assert named.test.digest == data.test.digest
    other = write_idx(tmp_path / "other", rows=9)
    assert len(image_task(tmp_path / "idx", test=str(other)).load_data(MLP).test) == 9


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda i, n: i.write_bytes(i.read_bytes()[:-5]), "too long: .*; expected 2,176 bytes for 60×6×6; found 2,171"),
        (lambda i, n: i.write_bytes(i.read_bytes() + b"x"), "truncated or too long"),
        (lambda i, n: i.write_bytes(i.read_bytes()[:9]), "truncated or too long"),
        (lambda i, n: i.write_bytes(b"\x89PNG" + i.read_bytes()), "not an IDX file .*magic 00000803; found 89504e47"),
        (lambda i, n: i.write_bytes(b""), "not an IDX file of this kind"),
        (lambda i, n: n.write_bytes(i.read_bytes()), "not an IDX file .*labels.*expected magic 00000801; found 00000803"),
        (lambda i, n: n.unlink(), "the file cannot be read: .*labels"),
        (lambda i, n: n.write_bytes(idx(torch.zeros(59, dtype=torch.uint8))), "differ in number: .*60; found 59"),
        (lambda i, n: i.write_bytes(idx(torch.zeros(0, 6, 6, dtype=torch.uint8))), "the IDX file is empty"),
    ],
)  # fmt: skip
def test_damaged_idx_files(tmp_path, image_task, damage, message):
    images = write_idx(tmp_path / "idx")
    damage(images, images.with_name("train-labels-idx1-ubyte"))
    with pytest.raises(BadInput, match=message) as caught:
        image_task(images).load_data(MLP)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cut", [lambda b: b[: len(b) // 2], lambda b: b[:20] + b"zzzz" + b[24:], lambda b: b"plain"])
def test_damaged_gzip(tmp_path, image_task, cut):
    images = write_idx(tmp_path / "idx", ending=".gz")
    images.write_bytes(cut(images.read_bytes()))
    with pytest.raises(BadInput, match="the IDX file cannot be read"):
        image_task(images).load_data(MLP)


def test_paths_that_hold_no_images(tmp_path, image_task):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(BadInput, match="no image data: .*a.parquet; expected an IDX file"):
        image_task(tmp_path / "a.parquet").load_data(MLP)
    with pytest.raises(BadInput, match="no such data file or folder"):
        image_task(tmp_path / "none").load_data(MLP)


def test_test_labels_must_be_known(tmp_path, image_task):
    train, test = write_idx(tmp_path / "a"), write_idx(tmp_path / "b", classes=5)
    with pytest.raises(BadInput, match="label outside the classes: .*; expected 0, 1, 2; found '[34]'"):
        image_task(train, test=str(test)).load_data(MLP)


def test_transform_shifts_every_split(tmp_path, image_task):
    write_idx(tmp_path / "idx")
    write_idx(tmp_path / "idx", "t10k", rows=12)
    plain = image_task(tmp_path / "idx").load_data(MLP)
    moved = image_task(tmp_path / "idx", transform=Transform(rotate=90, invert=True)).load_data(MLP)
    for name in ("train", "validation", "test"):
        before, labels = everything(getattr(plain, name))
        after, same = everything(getattr(moved, name))
        turned = torch.stack([torch.stack([image[0][:, 5 - r] for r in range(6)]) for image in before])  # counter-clockwise
        torch.testing.assert_close(after[:, 0], -turned)
        assert torch.equal(labels, same)


def test_images_are_resized_by_area(tmp_path, image_task):
    images = write_idx(tmp_path / "idx", side=8)
    data = image_task(images, image_size=4).load_data(MLP)
    pixels, _ = everything(data.train)
    assert pixels.shape[2:] == (4, 4)
    whole, _ = everything(image_task(images).load_data(MLP).train)
    wanted = F.interpolate(whole, (4, 4), mode="bilinear", antialias=True)
    torch.testing.assert_close(pixels, wanted, atol=1e-5, rtol=0)


def test_images_must_be_square_or_sized(tmp_path, image_task):
    images = write_idx(tmp_path / "idx")
    images.write_bytes(idx(torch.zeros(60, 4, 9, dtype=torch.uint8)))
    with pytest.raises(BadInput, match="no square size for the images: .*; found 9×4 pixels; set task.image_size"):
        image_task(images).load_data(MLP)
    assert everything(image_task(images, image_size=5).load_data(MLP).train)[0].shape[2:] == (5, 5)


def test_prepare_repeats_grey_and_normalises_each_channel():
    source = torch.tensor([[[[0, 255], [255, 0]]]], dtype=torch.uint8)
    found = ImageInput(2, 3, mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 2.0)).prepare(source, Transform(), "x")
    assert found[0, :, 0, 0].tolist() == [0, -1, -0.5] and found[0, :, 0, 1].tolist() == [1, 1, 0]
    with pytest.raises(BadInput, match="color images for a model that takes grayscale: x; expected 1 channels"):
        ImageInput(2, 1).prepare(torch.zeros(1, 3, 2, 2), Transform(), "x")


def test_digits(image_task):
    pytest.importorskip("sklearn")
    data = image_task("digits", limit=200, seed=1).load_data(MLP)
    assert data.classes == tuple("0123456789")
    pixels, _ = everything(data.train)
    assert pixels.shape == (180, 1, 8, 8) and pixels.min() == -1 and pixels.max() == 1
    assert image_task("digits", limit=200, seed=1).load_data(MLP).train.digest == data.train.digest
    assert image_task("digits", limit=200, seed=2).load_data(MLP).train.digest != data.train.digest


def test_digits_are_read_as_scikit_learn_reads_them_without_importing_it(image_task, monkeypatch):
    pytest.importorskip("sklearn")
    read = image_task("digits").load_data(MLP)
    with monkeypatch.context() as patched:
        without(patched, "sklearn")
        assert image_task("digits").load_data(MLP).train.digest == read.train.digest
    monkeypatch.setattr(reading, "find_spec", lambda name: None)
    imported = image_task("digits").load_data(MLP)
    assert [getattr(imported, split).digest for split in ("train", "validation", "test")] == [
        getattr(read, split).digest for split in ("train", "validation", "test")
    ]


def without(monkeypatch, package):
    real = builtins.__import__

    def guarded(name, *args, **kwargs):
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(name, name=package)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", guarded)


def test_missing_extras_are_named(tmp_path, image_task, monkeypatch):
    monkeypatch.setattr(reading, "find_spec", lambda name: None)
    without(monkeypatch, "sklearn")
    with pytest.raises(MissingExtra, match=r"`digits` needs scikit-learn; pip install 'emomerge\[demo\]'"):
        image_task("digits").load_data(MLP)
    without(monkeypatch, "PIL")
    with pytest.raises(MissingExtra, match=r"image files needs pillow; pip install 'emomerge\[images\]'"):
        image_task(tmp_path).load_data(MLP)


def write_folder(folder, image_module, rows=24, mode="L", size=(6, 6)):
    for number in range(rows):
        name = ("cat", "dog")[number % 2]
        (folder / name).mkdir(parents=True, exist_ok=True)
        image_module.new(mode, size, number * 5 if mode == "L" else (number * 5, 0, 255)).save(
            folder / name / f"{number:02}.png"
        )
    return folder


def test_folder_of_class_folders(tmp_path, image_task):
    pil = pytest.importorskip("PIL.Image")
    folder = write_folder(tmp_path / "pets", pil)
    (folder / "cat" / "notes.txt").write_text("not an image")
    (folder / ".cache").mkdir()
    data = image_task(folder, eval_fraction=0.25).load_data(MLP)
    assert data.classes == ("cat", "dog") and len(data.train) == 18
    pixels, labels = everything(data.train)
    assert pixels.shape == (18, 1, 6, 6)
    values = ((pixels[:, 0, 0, 0] + 1) / 2 * 255 / 5).round()
    assert torch.equal(values % 2, labels.float())
    pil.new("RGB", (9, 3), (255, 0, 0)).save(folder / "cat" / "00.png")
    colour = image_task(folder, image_size=6).load_data(MLP)
    assert everything(colour.train)[0].shape[1:] == (3, 6, 6)
    (folder / "dog" / "01.png").write_bytes(b"no png")
    with pytest.raises(BadInput, match=r"the image cannot be read: .*01.png"):
        image_task(folder).load_data(MLP)
    (folder / "emu").mkdir()
    with pytest.raises(BadInput, match="class folder without images: .*emu"):
        image_task(folder).load_data(MLP)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="no image data: .*expected IDX files, or a folder of images for each class"):
        image_task(tmp_path / "empty").load_data(MLP)


def test_a_datasets_id(monkeypatch, image_task):
    pil = pytest.importorskip("PIL.Image")
    import datasets

    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]))
    rows = {"image": [pil.new("RGB", (5, 5), (n, n, n)) for n in range(40)], "label": [0, 1] * 20}
    stored = datasets.Dataset.from_dict(rows, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: stored)
    data = image_task("user/pets").load_data(MLP)
    assert data.classes == ("cat", "dog") and everything(data.train)[0].shape == (36, 3, 5, 5)
    with pytest.raises(BadInput, match="no column 'img': user/pets; found columns image, label; did you mean 'image'"):
        image_task("user/pets", columns={"image": "img"}).load_data(MLP)


def tiny_vit(folder, preprocessor=None, channels=3, size=8):
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    torch.manual_seed(0)
    config = ViTConfig(**sizes, image_size=size, patch_size=4, num_channels=channels, num_labels=7)
    ViTForImageClassification(config).save_pretrained(str(folder))
    if preprocessor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return Base(model=str(folder))


OWN = {
    "image_processor_type": "ViTImageProcessor",
    "size": {"height": 8, "width": 8},
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.2, 0.25, 0.5],
}


def test_a_given_base_says_how_images_are_prepared(tmp_path, image_task):
    images, base = write_idx(tmp_path / "idx"), tiny_vit(tmp_path / "vit", OWN)
    task = image_task(images, test=str(images))
    data = task.load_data(base)
    grey = ImageInput(8, 1, (0.0,), (1.0,)).prepare(pictures(60)[0].unsqueeze(1), Transform(), "x")
    wanted = (grey - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.25, 0.5]).view(3, 1, 1)
    torch.testing.assert_close(everything(data.test)[0], wanted)
    model = task.new_model(base, data)
    assert model.config.num_labels == 3 and model.config.id2label[2] == "2"
    model.save_pretrained(str(tmp_path / "out"))
    task.save_processor(tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert saved["image_mean"] == [0.4, 0.5, 0.6] and saved["size"] == {"height": 8, "width": 8}
    again = image_task(images, test=str(images)).load_data(Base(model=str(tmp_path / "out")))
    assert again.test.digest == data.test.digest


@pytest.mark.parametrize(
    ("change", "mean", "std", "size"),
    [
        ({}, (0.4, 0.5, 0.6), (0.2, 0.25, 0.5), 8),
        ({"do_normalize": False}, (0.0,), (1.0,), 8),
        ({"rescale_factor": 1 / 127.5}, (0.2, 0.25, 0.3), (0.1, 0.125, 0.25), 8),
        ({"size": 8}, (0.4, 0.5, 0.6), (0.2, 0.25, 0.5), 8),
        ({"size": {"shortest_edge": 12}}, (0.4, 0.5, 0.6), (0.2, 0.25, 0.5), 12),
        (
            {"size": {"shortest_edge": 12}, "do_center_crop": True, "crop_size": {"height": 8, "width": 8}},
            (0.4, 0.5, 0.6),
            (0.2, 0.25, 0.5),
            8,
        ),
    ],
)
def test_forms_of_preprocessor_config(tmp_path, change, mean, std, size):
    from emomerge.tasks.images import image_input

    base = tiny_vit(tmp_path / "vit", OWN | change)
    section = ImageClassification(kind="image-classification", train="digits")
    found = image_input(base, section, torch.zeros(2, 1, 6, 6))
    assert (found.size, found.channels) == (size, 3)
    assert found.mean == pytest.approx(mean) and found.std == pytest.approx(std)


def test_what_a_base_does_not_take(tmp_path, image_task):
    images = write_idx(tmp_path / "idx")
    base = tiny_vit(tmp_path / "vit", OWN)
    task = image_task(images, image_size=16)
    data = task.load_data(base)
    with pytest.raises(BadInput, match="the base does not take images of 3×16×16"):
        task.new_model(base, data)
    base = tiny_vit(tmp_path / "grey", OWN, channels=1)
    with pytest.raises(BadInput, match="preprocessor_config.json does not fit the base: .*; expected 1 means"):
        image_task(images).load_data(base)
    (tmp_path / "grey" / "preprocessor_config.json").write_text("{")
    with pytest.raises(BadInput, match="not valid JSON: .*preprocessor_config.json"):
        image_task(images).load_data(base)


def test_processor_loads_with_transformers(tmp_path, image_task):
    pil = pytest.importorskip("PIL.Image")
    from transformers import AutoImageProcessor

    images = write_idx(tmp_path / "idx")
    base = Base(prepare=Prepare(model="vit", hidden=16, layers=1))
    task = image_task(images, test=str(images))
    data = task.load_data(base)
    task.new_model(base, data).save_pretrained(str(tmp_path / "out"))
    task.save_processor(tmp_path / "out")
    processor = AutoImageProcessor.from_pretrained(str(tmp_path / "out"), backend="pil")
    picture = pil.fromarray(pictures(60)[0][7].numpy()).convert("RGB")
    theirs = processor(picture, return_tensors="pt", image_mean=[0.5] * 3, image_std=[0.5] * 3)["pixel_values"]
    torch.testing.assert_close(theirs[:, :1], data.test.batch([7])["pixel_values"], atol=1e-5, rtol=0)


def test_prepared_base_read_back_from_its_folder_gives_the_same_data(tmp_path, image_task):
    images = write_idx(tmp_path / "idx")
    task = image_task(images)
    data = task.load_data(MLP)
    task.new_model(MLP, data).save_pretrained(str(tmp_path / "base"))
    task.save_processor(tmp_path / "base")
    base = Base(model=str(tmp_path / "base"))
    assert image_task(images).load_data(base).train.digest == data.train.digest
    assert task.new_model(base, data).config.model_type == "emomerge_mlp"
