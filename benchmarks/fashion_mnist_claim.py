"""Does one setting train all five? The paper's figure: a loss below 0.30 on FashionMNIST within 10,000 steps.

    apt-get install dataset-fashion-mnist              # or --data FOLDER with the four IDX files
    python benchmarks/fashion_mnist_claim.py           # 33 runs, about 6 minutes on one core
    python benchmarks/fashion_mnist_claim.py --presets guarded --optimizers sens void --seeds 1 --steps 4000

An MLP 784-128-10 with ReLU on the pixels scaled to [−1, 1], batches of 64, every optimizer with its defaults and lr = 1, beside
AdamW with a constant rate of 1e-3. Printed for each are the training loss over the last 200 steps, the accuracy on the 10,000
test images (mean ± standard deviation over the seeds), the mean and the last learning rate, and whether the loss is below 0.30.
With --log FILE each finished run is kept as a line of JSON, and a second call takes it from there.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from emomerge import recipe
from emomerge.optim import OPTIMIZERS
from emomerge.optim.base import EmoOptimizer
from emomerge.optim.pulse import PRESETS
from emomerge.tasks.image_classification import ImageClassification, ImageClassificationTask

CLAIM = 0.30
BATCH = 64
TAIL = 200
"""Over how many last steps the training loss is averaged."""
Images = tuple[Tensor, Tensor]
"""Pixels (rows, 784) and classes (rows,)."""


def read(folder: Path) -> tuple[Images, Images]:
    """All 60,000 training images and the 10,000 test images."""
    test = next(folder.glob("t10k-images-idx3-ubyte*"), folder / "t10k-images-idx3-ubyte.gz")
    section = ImageClassification(
        kind="image-classification", train=str(folder), validation=str(test), test=str(test)
    )  # nothing is held out of the training images
    base = recipe.Base(prepare=recipe.Prepare(model="mlp"))
    data = ImageClassificationTask(section).load_data(base)
    batches = (split.batch(range(len(split))) for split in (data.train, data.test))
    train, held_out = ((batch["pixel_values"].flatten(1), batch["labels"]) for batch in batches)
    return train, held_out


def train(preset: str, name: str, seed: int, steps: int, images: Images, test: Images) -> dict[str, Any]:
    """One run; a row of the log."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = (
        torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        if name == "adamw"
        else OPTIMIZERS[name].load()(model.parameters(), preset=preset)
    )
    pixels, classes = images
    order = torch.empty(0, dtype=torch.int64)
    losses, rates = [], []
    for _ in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(len(classes))
        rows, order = order[:BATCH], order[BATCH:]
        loss = F.cross_entropy(model(pixels[rows]), classes[rows])
        optimizer.zero_grad()
        loss.backward()
        if isinstance(optimizer, EmoOptimizer):
            optimizer.observe(loss)
        optimizer.step()
        losses.append(loss.item())
        rates.append(optimizer.pulse.rate if isinstance(optimizer, EmoOptimizer) else 1e-3)
    with torch.no_grad():
        accuracy = (model(test[0]).argmax(1) == test[1]).double().mean()
    figures = {"loss": statistics.fmean(losses[-TAIL:]), "accuracy": float(accuracy)}
    return figures | {"mean_rate": statistics.fmean(rates), "last_rate": rates[-1]}


def spread(values: list[float], form: str) -> str:
    text = format(statistics.fmean(values), form)
    return f"{text} ± {statistics.stdev(values):{form}}" if len(values) > 1 else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="folder of the IDX files")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=["v3.8", "guarded"])
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--log", type=Path, help="JSON lines of finished runs, read and continued")
    args = parser.parse_args()

    torch.set_num_threads(1)  # the products are too small to share
    done: dict[tuple[str, str, int, int], dict[str, Any]] = {}
    if args.log and args.log.exists():
        rows = [json.loads(line) for line in args.log.read_text().splitlines()]
        done = {(row["preset"], row["optimizer"], row["seed"], row["steps"]): row for row in rows}
    images, test = read(args.data)
    runs = [("constant 1e-3", "adamw")] + [(preset, name) for preset in args.presets for name in args.optimizers]
    table = Table("optimizer", "rate", f"loss, last {TAIL}", "test accuracy", "mean η", "last η", f"< {CLAIM:.2f}")
    for preset, name in runs:
        rows = []
        for seed in range(args.seeds):
            key = (preset, name, seed, args.steps)
            if key not in done:
                names = dict(zip(("preset", "optimizer", "seed", "steps"), key, strict=True))
                done[key] = names | train(preset, name, seed, args.steps, images, test)
                if args.log:
                    with args.log.open("a") as log:
                        log.write(json.dumps(done[key]) + "\n")
            rows.append(done[key])
        column = {figure: [row[figure] for row in rows] for figure in ("loss", "accuracy", "mean_rate", "last_rate")}
        verdict = "yes" if max(column["loss"]) < CLAIM else "no" if min(column["loss"]) >= CLAIM else "some seeds"
        table.add_row(
            "AdamW" if name == "adamw" else OPTIMIZERS[name].class_name,
            preset,
            spread(column["loss"], ".3f"),
            spread(column["accuracy"], ".3f"),
            f"{statistics.fmean(column['mean_rate']):.1e}",
            f"{statistics.fmean(column['last_rate']):.1e}",
            verdict,
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
