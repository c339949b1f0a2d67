"""A custom task: compress a digit of 64 pixels to a few numbers and reconstruct it."""

import torch
from sklearn.datasets import load_digits
from torch import nn


def make(code=12, invert=False):
    """Return model, data and loss for `emomerge run autoencoder.yaml`; see `emomerge.tasks.custom`."""
    pixels = torch.from_numpy(load_digits().data).float() / 16
    pixels = (1 - pixels if invert else pixels)[torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))]
    test = pixels[1500:]

    def loss(model, batch):
        return (model(batch["pixels"]) - batch["pixels"]).square().mean(dim=1)  # one loss per row

    def samples(model):
        pairs = torch.stack([test[:10], model(test[:10].to(next(model.parameters()).device)).cpu()])
        sheet = pairs.clamp(0, 1).mul(255).byte().view(2, 10, 8, 8).permute(0, 2, 1, 3)
        return sheet.reshape(16, 80, 1)

    return {
        "model": nn.Sequential(*_half(64, code), *_half(code, 64)),
        "train": {"pixels": pixels[:1200]},
        "validation": {"pixels": pixels[1200:1500]},
        "test": {"pixels": test},
        "loss": loss,
        "unit": "mean squared error",
        "samples": samples,
    }


def _half(inputs, outputs):
    return nn.Linear(inputs, 64), nn.GELU(), nn.Linear(64, outputs)
