"""What the claims about generative models share: a small flow of 14 × 14 images, LoRA, and figures along training.

A *path* is a list of figures at some steps of a training. From the paths of a rival's runs follows what it had given up, or
kept, when its loss was that of another run: the control at equal loss.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from claims_core import Arm, Effort, Figures, Units
from claims_training import FIVE, RATES, Diverged, Images, Rows, Trainer, batches, emo_arms, fashion
from evidence_tables import Estimate
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SIDE = 14
PIXELS = SIDE * SIDE
LEFT_OUT = 8
"""The class that the base has not seen, bags. In pretraining its label stands for any class."""
RANK = ALPHA = 8
AUTO = emo_arms("auto", names=("sens", "cats"))
"""The arms with `auto`, where two of the five tell enough."""
TIMES = 32
"""Number of features of the time."""


@lru_cache(maxsize=1)
def small_fashion(effort: Effort) -> Images:
    """Return FashionMNIST at half the side: each pixel is the mean of four."""
    full = fashion(effort)
    return Images(*(_halved(rows) for rows in (full.train, full.validation, full.test)))


def _halved(rows: Rows) -> Rows:
    return Rows(F.avg_pool2d(rows.x.view(-1, 1, 2 * SIDE, 2 * SIDE), 2).flatten(1), rows.y)


def of_class(rows: Rows, number: int, other: bool = False) -> Rows:
    """Return the rows of a class, or all others."""
    return rows.of(((rows.y == number) != other).nonzero()[:, 0])


class Flow(nn.Module):
    """A residual MLP that predicts the velocity ε − x₀ at x_t = (1 − t)·x₀ + t·ε, given the class."""

    def __init__(self, width: int = 160, depth: int = 2) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(PIXELS, width), nn.Linear(width, PIXELS)
        self.time, self.skip = nn.Linear(TIMES, width), nn.Linear(TIMES, 1)
        self.classes = nn.Embedding(10, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
            for _ in range(depth)
        )

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Return velocities (rows, pixels) at images of that shape, times (rows,) and classes (rows,)."""
        angles = t[:, None] * torch.pi * torch.arange(1, TIMES // 2 + 1)
        time = torch.cat([angles.cos(), angles.sin()], dim=1)
        hidden = self.enter(x) + self.time(time) + self.classes(y)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.leave(hidden) + self.skip(time) * x  # type: ignore[no-any-return]


class Draws:
    """Rows with fixed times and noise, on which the loss of flow matching is one function of the weights.

    Args:
        rows: the images.
        seed: of the draws.
        of_each: number of draws of each image.
    """

    def __init__(self, rows: Rows, seed: int, of_each: int = 1) -> None:
        self.rows = Rows(rows.x.repeat(of_each, 1), rows.y.repeat(of_each))
        generator = torch.Generator().manual_seed(seed)
        self.t, self.noise = draw(self.rows.x, generator)

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float:
        """Return the mean squared error."""
        return float(flow_loss(model, self.rows, self.t, self.noise))


def draw(x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return times, the logistic function of standard normals, and noise."""
    return torch.randn(len(x), generator=generator).sigmoid(), torch.randn(x.shape, generator=generator)


def flow_loss(model: nn.Module, rows: Rows, t: Tensor, noise: Tensor, disturbance: Tensor | float = 0.0) -> Tensor:
    """Return the mean squared error of the velocity; `disturbance` is added to the targets."""
    at = (1 - t[:, None]) * rows.x + t[:, None] * noise
    return F.mse_loss(model(at, t, rows.y), noise - rows.x + disturbance)


@torch.no_grad()
def sample(model: nn.Module, y: Tensor, seed: int, steps: int = 20) -> Tensor:
    """Return images of these classes by Euler's method."""
    x = torch.randn(len(y), PIXELS, generator=torch.Generator().manual_seed(seed))
    for step in range(steps, 0, -1):
        x = x - model(x, torch.full((len(y),), step / steps), y) / steps
    return x


class Lora(nn.Module):
    """A linear layer with W + (α/r)·B·A, of which A and B are trained; B starts at zero."""

    def __init__(self, layer: nn.Linear, generator: torch.Generator) -> None:
        super().__init__()
        self.layer = layer
        bound = 1 / math.sqrt(layer.in_features)
        self.down = nn.Parameter(bound * (2 * torch.rand(RANK, layer.in_features, generator=generator) - 1))
        self.up = nn.Parameter(torch.zeros(layer.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer and its change."""
        return self.layer(x) + F.linear(F.linear(x, self.down), self.up) * (ALPHA / RANK)  # type: ignore[no-any-return]

    def change(self) -> Tensor:
        """Return (α/r)·B·A."""
        return self.up.detach() @ self.down.detach() * (ALPHA / RANK)


def add_lora(model: nn.Module, seed: int) -> list[Lora]:
    """Freeze a model and wrap each of its linear layers. Return the wrappers."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    added = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                added.append(Lora(child, generator))
                setattr(parent, name, added[-1])
    return added


def trained(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are trained."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def stored(effort: Effort, name: str, model: nn.Module, train: Callable[[nn.Module], object]) -> nn.Module:
    """Load a model that units share from the cache, or train it and store it."""
    effort.cache.mkdir(parents=True, exist_ok=True)
    file = effort.cache / f"{name}{'-quick' if effort.quick else ''}.safetensors"
    if file.exists():
        model.load_state_dict(load_file(file))
        return model
    train(model)
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    save_file(model.state_dict(), temporary)
    temporary.replace(file)
    return model


def flow_base(effort: Effort) -> nn.Module:
    """Return a flow trained by AdamW on nine classes for 5,000 steps of 128 images."""

    def train(model: nn.Module) -> None:
        rows = of_class(small_fashion(effort).train, LEFT_OUT, other=True)
        generator = torch.Generator().manual_seed(0)
        trainer = Trainer("adamw", model.parameters(), effort.steps(5000), 3e-3)
        for batch in batches(len(rows), 128, trainer.steps, 0):
            some = rows.of(batch)
            any_class = torch.rand(len(batch), generator=generator) < 0.1
            some = Rows(some.x, some.y.masked_fill(any_class, LEFT_OUT))
            trainer.step(flow_loss(model, some, *draw(some.x, generator)))

    torch.manual_seed(0)
    return stored(effort, "flow", Flow(), train)


# Paths ----------------------------------------------------------------------------------------------------------------------


def follow(
    trainer: Trainer, loss: Callable[[], Tensor], measure: Callable[[], Figures], points: int = 16
) -> tuple[list[Figures], bool]:
    """Train for the trainer's steps. Return figures at about `points` steps, dense at the start, and whether it diverged."""
    at = {round(trainer.steps * (k / points) ** 2) for k in range(points + 1)}
    path = [{"step": 0, **_rounded(measure())}]
    try:
        for step in range(1, trainer.steps + 1):
            trainer.step(loss())
            if step in at:
                path.append({"step": step, **_rounded(measure())})
    except Diverged:
        return path, True
    trainer.finish()
    return path, not all(math.isfinite(value) for value in path[-1].values())


def _rounded(figures: Figures) -> Figures:
    return {name: float(f"{value:.6g}") for name, value in figures.items()}


def finite(path: Sequence[Figures]) -> list[Figures]:
    """Return the points of a path whose figures are finite, which JSON can hold."""
    return [point for point in path if all(math.isfinite(value) for value in point.values())]


def crossing(path: Sequence[Figures], name: str, level: float) -> Figures | None:
    """Return the figures where a path's figure first falls to a level, interpolated between steps; None if it never does."""
    if path[0][name] <= level:
        return path[0]
    for here, there in pairwise(path):
        if there[name] <= level:
            share = (here[name] - level) / (here[name] - there[name])
            return {key: here[key] + share * (there[key] - here[key]) for key in here}
    return None


@dataclass(frozen=True)
class AtEqual:
    """A run minus the rival's runs at equal loss."""

    rival: Arm
    difference: Estimate


def at_equal(units: Units, arm: Arm, rivals: Sequence[Arm], level: str, read: str, choose: str) -> AtEqual | None:
    """Compare the end of an arm's runs with the rivals where these first reach the same loss, paired by seed.

    Args:
        units: have the figure "path".
        arm: whose end is compared.
        rivals: of which the one with the lowest mean of `choose` there is taken.
        level: the figure that is equal, such as the training loss.
        read: the figure that is compared.
        choose: a figure of the validation split.

    Returns:
        None if no rival reaches the level with every seed.
    """
    ends = {unit.seed: unit.figures["path"][-1] for unit in units.of(**arm)}
    found = []
    for rival in rivals:
        points = {unit.seed: crossing(unit.figures["path"], level, ends[unit.seed][level]) for unit in units.of(**rival)}
        if all(point is not None for point in points.values()):
            there: dict[int, Any] = dict(points)
            chosen = sum(point[choose] for point in there.values())
            found.append((chosen, rival, Estimate(tuple(ends[seed][read] - there[seed][read] for seed in sorted(there)))))
    if not found:
        return None
    _, rival, difference = min(found, key=lambda each: each[0])
    return AtEqual(rival, difference)


def change(units: Units, arm: Arm, name: str, relative: bool = False) -> Estimate:
    """Return end − start of a figure along the paths of an arm; with `relative` divided by the start."""
    ends = [(unit.figures["path"][0][name], unit.figures["path"][-1][name]) for unit in units.of(**arm)]
    return Estimate(tuple((end - start) / (start if relative else 1.0) for start, end in ends))


def usual_lines() -> dict[str, tuple[Arm, str]]:
    """Return the lines of a chart of paths: the five with `v3.8`, one with `auto`, and three rates of AdamW."""
    lines: dict[str, tuple[Arm, str]] = {f"{name}, v3.8": ({"rule": f"{name}/v3.8"}, name) for name in FIVE}
    lines["sens, auto"] = {"rule": "sens/auto"}, "other"
    for rate, colour in zip(RATES["adamw"][1:4], ("muted", "adamw", "ink"), strict=True):
        lines[f"AdamW, {rate:g}"] = {"rule": "adamw", "rate": rate}, colour
    return lines


def path_chart(
    units: Units,
    lines: dict[str, tuple[Arm, str]],
    x: tuple[str, str],
    y: Sequence[tuple[str, str]],
    title: str,
    log: bool = False,
) -> Any:
    """Return a chart of paths, averaged over seeds: one panel for each figure of `y` over the figure `x`.

    Args:
        units: have the figure "path".
        lines: name in the legend → arm, and colour of the palette.
        x: a figure and the title of its axis, which is logarithmic.
        y: the same for each panel.
        title: says what is to be seen.
        log: whether the other axis is logarithmic, too.
    """
    import altair as alt

    from emomerge.reporting.palette import LIGHT

    rows = []
    for name, (arm, _) in lines.items():
        paths = [unit.figures["path"] for unit in units.of(**arm)]
        for points in zip(*paths, strict=False):
            values = {key: sum(point[key] for point in points) / len(points) for key in points[0]}
            rows.append({"rule": name, "last": len(rows), **values})
    colour = alt.Color(
        "rule:N", title=None, sort=list(lines),
        scale=alt.Scale(domain=list(lines), range=[LIGHT[colour] for _, colour in lines.values()]),
    )  # fmt: skip
    data = alt.Chart(alt.InlineData(values=rows))
    panels = []
    for field, axis in y:
        panel = data.mark_line(point=alt.OverlayMarkDef(size=22), strokeWidth=1.6, opacity=0.85).encode(
            x=alt.X(f"{x[0]}:Q", title=x[1], scale=alt.Scale(type="log", nice=False)),
            y=alt.Y(f"{field}:Q", title=axis, scale=alt.Scale(type="log", nice=False) if log else alt.Scale(zero=False)),
            order="step:Q", color=colour,
        )  # fmt: skip
        panels.append(panel.properties(width=330 if len(y) > 1 else 560, height=280))
    return alt.hconcat(*panels).properties(title=title, background="white")
