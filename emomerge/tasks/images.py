"""What the image tasks share: reading labelled images, and converting them to the inputs that a base takes.

Images come from scikit-learn's digits, IDX files, folders of PNG and JPEG files, or a `datasets` id.
"""

from __future__ import annotations

import gzip
import math
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from emomerge import recipe
from emomerge.checkpoints import write_json
from emomerge.errors import BadInput
from emomerge.extras import needed_by
from emomerge.files import require_regular
from emomerge.tasks import sources
from emomerge.tasks.base import Split, TaskData
from emomerge.tasks.pretrained import TransformersTask, load_config, load_preprocessor


class ImageColumns(recipe.Section):
    """Columns of a `datasets` id."""

    image: str = "image"
    label: str = "label"


class LabelledImages(recipe.DataSection):
    """Fields of the tasks on images with classes.

    Data are `digits` (scikit-learn), an IDX file or folder, a folder with one folder per class, or a `datasets` id.
    """

    bundled = frozenset({"digits"})

    columns: ImageColumns = ImageColumns()
    transform: recipe.Transform = recipe.Transform()
    image_size: int | None = Field(None, ge=4)
    """Pixels per side; images of other sizes are resized (default: the first image's size)."""

    def for_base(self, prepare: recipe.Prepare) -> Self:
        """Return the task on images with the base's shift in place of the runs'."""
        return self.model_copy(update={"transform": prepare.transform})

    def external_sources(self, prepare: recipe.Prepare | None) -> list[str]:
        """Return the given data sources and the label files beside IDX images."""
        named = super().external_sources(prepare)
        return named + [source.replace("images-idx3", "labels-idx1") for source in named if "images-idx3" in source]


class ImageTask(TransformersTask):
    """Base class of tasks on images with classes."""

    def __init__(self, section: LabelledImages) -> None:
        super().__init__(section)
        self._input: ImageInput | None = None

    def load_data(self, base: recipe.Base) -> TaskData:
        """Read, split, resize, transform and normalize all images; see `Task.load_data`."""
        section = self.section
        given = {"train": section.train, "validation": section.validation, "test": section.test}
        given["test"] = section.test or _bundled_test(section.train)
        images = {role: _open(source, role, section.columns) for role, source in given.items() if source is not None}
        classes = sources.distinct_classes(images["train"].labels)
        labels = {role: _numbers(part, classes) for role, part in images.items()}

        picks = sources.split_rows(
            len(labels["train"]), section, validation=given["validation"] is None, test=given["test"] is None
        )
        rows = dict(zip(given, picks, strict=True))
        sources.check_classes(labels["train"][rows["train"]], classes, section.train)
        raw = images["train"].read(rows["train"])
        self._input = image_input(base, section, raw)
        splits = {}
        for role in given:
            own = role if role in images else "train"
            picked = rows[role] if own == "train" else torch.arange(len(labels[own]))
            pixels = raw if role == "train" else images[own].read(picked)
            fields = {
                "pixel_values": self._input.prepare(pixels, section.transform, images[own].source),
                "labels": labels[own][picked],
            }
            splits[role] = Split(fields)
        summary = sources.summarize(list(splits.values()), classes)
        return TaskData(**splits, classes=classes, summary=summary)

    def save_processor(self, folder: str | Path) -> None:
        """Write `preprocessor_config.json`, which does not include the recipe's transform: that belongs to the task."""
        write_json(Path(folder) / "preprocessor_config.json", self.input.config())

    @property
    def input(self) -> ImageInput:
        """The form of images that the model takes; known after `load_data`."""
        if self._input is None:
            raise RuntimeError("call load_data first")
        return self._input


Images = Tensor | Sequence[Tensor]
"""(rows, channels, height, width), or one (channels, height, width) each; uint8, or float in [0, 1]."""


@dataclass(frozen=True)
class ImageInput:
    """The form of images that a model takes.

    Attributes:
        size: pixels per side.
        channels: usually 1 or 3.
        mean, std: per channel, or one for all; images become (x − mean)/std.
        processor: name of the image processor of transformers that does the same.
    """

    size: int
    channels: int
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    processor: str = "ViTImageProcessor"

    def prepare(self, images: Images, transform: recipe.Transform, source: str) -> Tensor:
        """Return float32 (rows, channels, size, size): resized, repeated over channels, transformed, normalized."""
        blocks = torch.split(images, 1024) if isinstance(images, Tensor) else [image[None] for image in images]
        pixels = torch.empty(len(images), self.channels, self.size, self.size)
        done = 0
        for block in blocks:
            pixels[done : done + len(block)] = self._fit(block, source)
            done += len(block)
        if transform.rotate:
            pixels = torch.rot90(pixels, transform.rotate // 90, dims=(2, 3)).contiguous()
        if transform.invert:
            torch.sub(1, pixels, out=pixels)
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return pixels.sub_(mean).div_(std)

    def _fit(self, images: Tensor, source: str) -> Tensor:
        """Resize (rows, c, h, w) to (rows, 1 or channels, size, size) in [0, 1]."""
        if images.shape[1] not in (1, self.channels):
            raise BadInput("color images for a model that takes grayscale", where=source, expected=f"{self.channels} channels")
        unit = images.float().div_(255) if images.dtype == torch.uint8 else images.float()
        if unit.shape[2:] == (self.size, self.size):
            return unit
        return F.interpolate(unit, (self.size, self.size), mode="bilinear", antialias=True).clamp_(0, 1)

    def pixels(self, images: Tensor) -> Tensor:
        """Convert normalized images back to uint8 (rows, channels, size, size)."""
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return (images.cpu() * std + mean).clamp(0, 1).mul(255).round().byte()

    def config(self) -> dict[str, Any]:
        """Return the content of the `preprocessor_config.json` that transformers reads."""
        return {
            "image_processor_type": self.processor,
            "do_resize": True,
            "size": {"height": self.size, "width": self.size},
            "resample": 2,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean) * (self.channels // len(self.mean)),
            "image_std": list(self.std) * (self.channels // len(self.std)),
        }


def image_input(base: recipe.Base, section: LabelledImages, images: Images) -> ImageInput:
    """Return the form that the base takes: by its `preprocessor_config.json` and configuration, else that of the images.

    Raises:
        BadInput: the images are not square and no size is given, or the base's files contradict each other.
    """
    height, width = images[0].shape[-2:]
    own_channels = images.shape[1] if isinstance(images, Tensor) else max(len(image) for image in images)
    found = {} if base.prepare else load_preprocessor(base)
    config = None if base.prepare else load_config(base)
    side = section.image_size or _side(found) or getattr(config, "image_size", None) or height
    if not isinstance(side, int) or (side == height != width and not section.image_size):
        raise BadInput(
            "no square size for the images",
            where=section.train,
            found=f"{width}×{height} pixels",
            fix="set task.image_size",
        )
    channels = getattr(config, "num_channels", None) or own_channels
    if not found:
        return ImageInput(side, channels)
    normalised, scale = found.get("do_normalize", True), 255 * found.get("rescale_factor", 1 / 255)
    scale = 1.0 if math.isclose(scale, 1, rel_tol=1e-3) else scale
    mean, std = (
        tuple(float(value) / scale for value in found.get(key, [default])) if normalised else (default / scale,)
        for key, default in (("image_mean", 0.0), ("image_std", 1.0))
    )
    if {len(mean), len(std)} - {1, channels}:
        raise BadInput("preprocessor_config.json does not fit the base", where=base.model, expected=f"{channels} means")
    return ImageInput(side, channels, mean, std, found.get("image_processor_type", ImageInput.processor))


def _side(preprocessor: dict[str, Any]) -> Any:
    """Return the pixels per side in a `preprocessor_config.json`; None if it has none."""
    cropped = preprocessor.get("do_center_crop") and preprocessor.get("crop_size")
    size = cropped or preprocessor.get("size")
    if not isinstance(size, dict):
        return size
    return size.get("height") or size.get("shortest_edge")


# Sources of images


@dataclass(frozen=True)
class _Source:
    """Labelled images that are read on demand.

    Attributes:
        source: name in messages.
        labels: of all images, as text.
        read: returns the images of some row numbers.
    """

    source: str
    labels: list[str]
    read: Callable[[Tensor], Images]


def _open(source: str, role: str, columns: ImageColumns) -> _Source:
    if source == "digits":
        return _digits()
    path = sources.local_path(source)
    if path is None:
        return _hub(source, role, columns)
    if path.is_file():
        return _idx(path)
    found = _idx_in(path, "t10k" if role == "test" else "train") or _idx_in(path, "train")
    return _idx(found) if found else _folder(path)


def _bundled_test(train: str) -> str | None:
    """Return the test images in a folder of IDX files; None if there are none."""
    folder = Path(train).expanduser()
    found = _idx_in(folder, "t10k") if _idx_in(folder, "train") else None
    return str(found) if found else None


def _numbers(images: _Source, classes: Sequence[str]) -> Tensor:
    """Return the class numbers (rows,) of all images."""
    number = {label: sources.class_index(classes)(label, images.source) for label in set(images.labels)}
    return torch.tensor([number[label] for label in images.labels])


def _digits() -> _Source:
    """Return 1,797 handwritten digits of 8×8 pixels, values 0 to 16 (scikit-learn; UCI optdigits test set)."""
    file = _digits_file()
    if file is not None:
        with gzip.open(file, "rt") as rows:
            table = np.loadtxt(rows, delimiter=",", dtype=np.float32)
    else:
        with needed_by("the data set `digits`"):
            from sklearn.datasets import load_digits
        found = load_digits()
        table = np.column_stack([found.data, found.target]).astype(np.float32)
    pixels = torch.from_numpy(table[:, :-1] / 16).view(-1, 1, 8, 8)
    return _Source("digits", [str(int(label)) for label in table[:, -1]], lambda rows: pixels[rows])


def _digits_file() -> Path | None:
    """Return the file in scikit-learn that holds the digits: importing scikit-learn to read it would take a second."""
    package = find_spec("sklearn")
    folders = package.submodule_search_locations or () if package else ()
    files = (Path(folder) / "datasets" / "data" / "digits.csv.gz" for folder in folders)
    return next((file for file in files if file.is_file()), None)


def _idx_in(folder: Path, prefix: str) -> Path | None:
    files = (folder / f"{prefix}-images-idx3-ubyte{ending}" for ending in ("", ".gz"))
    return next((file for file in files if file.is_file()), None)


def _idx(path: Path) -> _Source:
    """Read a pair of IDX files: …images-idx3-ubyte and …labels-idx1-ubyte beside it, each gzipped or not."""
    name = re.sub(r"images([.-])idx3", r"labels\1idx1", path.name)
    if name == path.name:
        raise BadInput("no image data", where=path, expected="an IDX file …images-idx3-ubyte[.gz], or a folder")
    pixels, labels = _read_idx(path, dims=3).unsqueeze(1), _read_idx(path.with_name(name), dims=1)
    if len(pixels) != len(labels):
        raise BadInput("images and labels differ in number", where=path, expected=len(pixels), found=f"{len(labels)} labels")
    return _Source(str(path), [str(label) for label in labels.tolist()], lambda rows: pixels[rows])


def _read_idx(path: Path, dims: int) -> Tensor:
    """Read an IDX file of unsigned bytes with `dims` dimensions: magic 0, 0, 8, dims; big-endian sizes; data."""
    require_regular(path)
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput("the IDX file cannot be read", where=path, found=error) from None
    magic = bytes([0, 0, 8, dims])
    if data[:4] != magic:
        raise BadInput("not an IDX file of this kind", where=path, expected=f"magic {magic.hex()}", found=data[:4].hex())
    header = 4 + 4 * dims
    shape = [int.from_bytes(data[start : start + 4], "big") for start in range(4, header, 4)]
    if len(data) != header + math.prod(shape):
        raise BadInput(
            "the IDX file is truncated or too long",
            where=path,
            expected=f"{header + math.prod(shape):,} bytes for {'×'.join(map(str, shape))}",
            found=f"{len(data):,}",
        )
    if 0 in shape:
        raise BadInput("the IDX file is empty", where=path, found="×".join(map(str, shape)))
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=header).view(shape)


def _folder(path: Path) -> _Source:
    """Read one folder of PNG and JPEG files per class."""
    _pillow()
    endings = {".png", ".jpg", ".jpeg"}
    folders = sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
    files = {child: sorted(f for f in child.iterdir() if f.suffix.lower() in endings) for child in folders}
    if not folders:
        raise BadInput("no image data", where=path, expected="IDX files, or a folder of images for each class")
    for child, images in files.items():
        if not images:
            raise BadInput("class folder without images", where=child, expected="PNG or JPEG files")
    labelled = [(file, child.name) for child, images in files.items() for file in images]
    return _Source(
        str(path),
        [label for _, label in labelled],
        lambda rows: _same_channels([_decode(labelled[row][0]) for row in rows.tolist()]),
    )


def _hub(name: str, split: str, columns: ImageColumns) -> _Source:
    _pillow()
    data = sources.hub_dataset(name, split, [columns.image, columns.label])
    labels = sources.class_names(data, columns.label)
    if None in labels:
        raise BadInput("row without a label", where=f"{name}, split {split}, row {labels.index(None) + 1}")
    return _Source(
        f"{name}, split {split}",
        [sources.label_text(label) for label in labels],
        lambda rows: _same_channels([_tensor(data[row][columns.image]) for row in rows.tolist()]),
    )


def _pillow() -> Any:
    with needed_by("reading image files"):
        from PIL import Image
    return Image


def _decode(file: Path) -> Tensor:
    try:
        with _pillow().open(file) as image:
            return _tensor(image)
    except BadInput:
        raise
    except Exception as error:  # Pillow's plugins raise many types for broken files
        raise BadInput("the image cannot be read", where=file, found=error) from None


def _tensor(image: Any) -> Tensor:
    """Convert a Pillow image to uint8 (1, height, width) if it is grayscale, else (3, height, width)."""
    import numpy as np

    grayscale = image.mode in ("1", "L", "LA")
    pixels = torch.from_numpy(np.array(image.convert("L" if grayscale else "RGB")))
    return pixels[None] if grayscale else pixels.permute(2, 0, 1)


def _same_channels(images: Sequence[Tensor]) -> Sequence[Tensor]:
    """Repeat grayscale images over three channels if any image is in color."""
    channels = max(len(image) for image in images)
    return [image.expand(channels, -1, -1) for image in images]
