"""The claim about retraining a VAE while the models on its latents stay as they are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from claims_core import Arm, Effort, Figures, Units, Verdict, claim, counted, interval_text, worded
from claims_generative import AUTO, PIXELS, at_equal, change, finite, follow, path_chart, small_fashion, stored, usual_lines
from claims_training import (
    Rows,
    Trainer,
    accuracy_of,
    batches,
    emo_arms,
    mlp,
    rival_arms,
    rule_title,
    train_classifier,
)
from evidence_tables import Cells
from torch import Tensor, nn

LATENT = 16
NEW = (5, 7, 8, 9)
"""Shoes and bags: the VAE is retrained on these. The VAE and all models on its latents were trained on clothes alone."""
MARGIN = 0.05
"""The largest loss of accuracy that counts as consistent."""
ADAMW = rival_arms("adamw")


class Vae(nn.Module):
    """A variational autoencoder of MLPs."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = mlp(PIXELS, 256, 2 * LATENT), mlp(LATENT, 256, PIXELS)

    def encode(self, x: Tensor) -> Tensor:
        """Return the means of the latents."""
        return self.encoder(x)[:, :LATENT]  # type: ignore[no-any-return]

    def loss(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return the squared error of a pixel plus 0.002 times the divergence from the standard normal."""
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        z = mean + (log_variance / 2).exp() * torch.randn(mean.shape, generator=generator)
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean() / 2
        return F.mse_loss(self.decoder(z), x) + 0.002 * divergence


class LatentFlow(nn.Module):
    """Flow matching on latents: the velocity at (latent, time, class)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(LATENT + 11, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, LATENT))

    def forward(self, z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Return velocities."""
        return self.net(torch.cat([z, t[:, None], F.one_hot(y, 10)], dim=1))  # type: ignore[no-any-return]

    @torch.no_grad()
    def sample(self, y: Tensor) -> Tensor:
        """Return latents of these classes by Euler's method in 20 steps."""
        z = torch.randn(len(y), LATENT, generator=torch.Generator().manual_seed(5))
        for step in range(20, 0, -1):
            z = z - self(z, torch.full((len(y),), step / 20), y) / 20
        return z


@dataclass(frozen=True)
class World:
    """Data, and the models that stay as they are."""

    old: dict[str, Rows]
    new: dict[str, Rows]
    latents: dict[str, Tensor]
    """Of the old images, by the encoder as it was."""
    classifier: nn.Module
    """Of latents."""
    judge: nn.Module
    """A classifier of images."""
    drawn: Rows
    """Latents that the flow generates, and their classes."""


@lru_cache(maxsize=1)
def world(effort: Effort) -> World:
    """Train the VAE on clothes and the models on its latents, once for all units."""
    data = small_fashion(effort)
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    is_new = {name: torch.isin(rows.y, torch.tensor(NEW)) for name, rows in splits.items()}
    new = {name: rows.of(is_new[name]) for name, rows in splits.items()}
    old = {name: rows.of(~is_new[name]) for name, rows in splits.items()}
    vae = base(effort)
    with torch.no_grad():
        latents = {name: vae.encode(rows.x) for name, rows in old.items()}
    codes = Rows(latents["train"], old["train"].y)

    def classify(rows: Rows) -> Any:
        return lambda model: train_classifier(model, Trainer("adamw", model.parameters(), effort.steps(3000), 3e-3), rows)

    classifier = stored(effort, "vae-classifier", mlp(LATENT, 64), classify(codes))
    judge = stored(effort, "vae-judge", mlp(PIXELS, 128), classify(old["train"]))
    flow = stored(effort, "vae-flow", LatentFlow(), lambda model: _train_flow(model, codes, effort.steps(6000)))
    y = torch.tensor([number for number in range(10) if number not in NEW]).repeat(100)
    assert isinstance(flow, LatentFlow)
    return World(old, new, latents, classifier, judge, Rows(flow.sample(y), y))


def base(effort: Effort) -> Vae:
    """Return the VAE that was trained on clothes, for 6,000 steps of 64 images."""

    def train(model: nn.Module) -> None:
        assert isinstance(model, Vae)
        clothes = small_fashion(effort).train
        clothes = clothes.of(~torch.isin(clothes.y, torch.tensor(NEW)))
        trainer, generator = Trainer("adamw", model.parameters(), effort.steps(6000), 3e-3), torch.Generator().manual_seed(0)
        for batch in batches(len(clothes), 64, trainer.steps, 0):
            trainer.step(model.loss(clothes.x[batch], generator))

    torch.manual_seed(0)
    vae = stored(effort, "vae", Vae(), train)
    assert isinstance(vae, Vae)
    return vae


def _train_flow(model: nn.Module, codes: Rows, steps: int) -> None:
    trainer, generator = Trainer("adamw", model.parameters(), steps, 3e-3), torch.Generator().manual_seed(0)
    for batch in batches(len(codes), 128, steps, 0):
        z, t = codes.x[batch], torch.rand(len(batch), generator=generator)
        noise = torch.randn(z.shape, generator=generator)
        at = (1 - t[:, None]) * z + t[:, None] * noise
        trainer.step(F.mse_loss(model(at, t, codes.y[batch]), noise - z))


@torch.no_grad()
def consistency(vae: Vae, about: World) -> Figures:
    """Return how well the retrained VAE fits the new images, and what the frozen models make of it; all lower is better."""
    old, new = about.old, about.new
    return {
        "new": float(F.mse_loss(vae.decoder(vae.encode(new["test"].x)), new["test"].x)),
        "encoder": 1 - accuracy_of(about.classifier, Rows(vae.encode(old["test"].x), old["test"].y)),
        "decoder": float(F.mse_loss(vae.decoder(about.latents["test"]), old["test"].x)),
        "generation": 1 - accuracy_of(about.judge, Rows(vae.decoder(about.drawn.x), about.drawn.y)),
        "validation": float(F.mse_loss(vae.decoder(about.latents["validation"]), old["validation"].x)),
    }


READ = ("encoder", "decoder", "generation")


def judge_vae(units: Units) -> Verdict:
    published, ours = emo_arms("v3.8"), AUTO
    start = units.all[0].figures["path"][0]
    table: Cells = [["", "reconstruction, new images", "classifier's error", "decoding old latents", "generation's error",
                     *(f"{name}, at equal reconstruction: it − AdamW" for name in READ)]]  # fmt: skip
    table.append(["before", *(f"{start[name]:.3f}" for name in ("new", *READ)), "", "", ""])
    best = min(ADAMW, key=lambda arm: change(units, arm, "new").mean)
    for arm in (*published, *ours, {"rule": "prodigy", "rate": 1.0}, *ADAMW):
        equal = [None if arm in ADAMW else at_equal(units, arm, ADAMW, "new", name, "validation") for name in READ]
        ends = [sum(unit.figures["path"][-1][name] for unit in units.of(**arm)) / units.seeds for name in ("new", *READ)]
        name = rule_title(arm["rule"]) + (f", rate {arm['rate']:g}" if arm in ADAMW else "")
        table.append([name, *(f"{end:.3f}" for end in ends),
                      *("–" if each is None else interval_text(each.difference) for each in equal)])  # fmt: skip

    def consistent(arm: Arm) -> bool:
        return (
            not any(unit.figures["diverged"] for unit in units.of(**arm))
            and change(units, arm, "new").sign < 0
            and all(change(units, arm, name).mean <= MARGIN for name in ("encoder", "generation"))
        )

    safe = [consistent(arm) for arm in published]
    equal = [at_equal(units, arm, ADAMW, "new", name, "validation") for arm in published for name in READ]
    better = [each is not None and each.difference.sign < 0 for each in equal]
    worse = [each is not None and each.difference.sign > 0 for each in equal]
    rises = [change(units, arm, name).mean for arm in published for name in ("encoder", "generation")]
    text = (
        f"With `v3.8`, {counted(safe)} stay consistent while they learn the new images; the errors of the frozen models rise "
        f"by {100 * min(rises):.0f} to {100 * max(rises):.0f} points. At equal reconstruction of the new images, "
        f"{counted(better)} figures of consistency are better than AdamW's and {counted(worse)} are worse. With `auto`, "
        f"{counted([consistent(arm) for arm in ours])} stay consistent, and of AdamW's rates "
        f"{counted([consistent(arm) for arm in ADAMW])}."
    )
    notes = (
        "The VAE has 0.1 million weights and 16 latents, and was trained on clothes; it is retrained on shoes and bags for 600 "
        "steps. Classifier's error: of latents of old images by the retrained encoder. Decoding old latents: squared error. "
        "Generation's error: images from the frozen flow's latents, decoded by the retrained decoder, that a classifier of "
        f"images does not see as their class. AdamW fits the new images best at rate {best['rate']:g}."
    )
    return Verdict(worded([*safe, sum(better) > len(better) / 2]), text, table, notes)


def figure(units: Units) -> Any:
    panels = (("encoder", "classifier's error on old images"), ("generation", "error of generation"))
    return path_chart(
        units,
        usual_lines(),
        ("new", "squared error on new images"),
        panels,
        "A retrained VAE: the better it fits the new images, the less the frozen models fit it",
    )


@claim(
    name="vae",
    says="Retraining all layers of a VAE, encoder and decoder, keeps it consistent with the model on its latents.",
    source="paper, “The True Nature of Loss-Saturated Learning Progress”",
    control="AdamW at five rates, and AdamW stopped where it reconstructs the new images equally well, at the rate that is "
    "best there by validation. A rule is consistent if it learns the new images while the frozen classifier's error and the "
    "error of generation rise by at most 5 points. “Holds” needs that of all five, and that most of 5 × 3 figures are better "
    "than AdamW's at equal reconstruction (interval below 0); any part alone would be “holds in part”.",
    taught="No default follows. Retraining moves the latents with every optimizer, and the more the better the new images are "
    "fitted. EmoSens decodes old latents somewhat better than AdamW at equal reconstruction, with both presets, and EmoCats "
    "everything worse. Who retrains a VAE should train the models on its latents along, or keep the encoder.",
    arms=(*emo_arms("v3.8"), *AUTO, *ADAMW, *rival_arms("prodigy")),
    quick_arms=({"rule": "sens/v3.8"}, {"rule": "adamw", "rate": 1e-3}),
    judge=judge_vae,
    figure=figure,
)
def vae_claim(arm: Arm, seed: int, effort: Effort) -> Figures:
    """600 steps of 32 shoes and bags."""
    about, vae = world(effort), base(effort)
    trainer, generator = Trainer(arm["rule"], vae.parameters(), effort.steps(600), arm.get("rate")), torch.Generator()
    generator.manual_seed(seed)
    order = batches(len(about.new["train"]), 32, trainer.steps, seed)
    path, diverged = follow(
        trainer, lambda: vae.loss(about.new["train"].x[next(order)], generator), lambda: consistency(vae, about)
    )
    return {"path": finite(path), "diverged": diverged}
