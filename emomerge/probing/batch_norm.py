"""Re-estimation of batch norm statistics, which after a merge are those of the runs and not of the merged weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from emomerge.probing.perturb import Batch, LossFunction


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, loss: LossFunction, batches: Iterable[Batch]) -> int:
    """Set the running mean and variance of every batch norm layer to averages over batches of training data.

    Merging weights does not merge activation statistics (Jordan et al. 2023, "REPAIR"); call this once before a merge is
    measured or saved. All other modules stay in eval mode. Cost: one forward pass per batch.

    Args:
        model: changed in place; after an exception it is as it was before.
        loss: (model, batch) → anything; called for its forward pass.
        batches: training data; all batches have equal weight.

    Returns:
        Number of layers that were re-estimated.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not layers:
        return 0
    modes = {module: module.training for module in model.modules()}
    momenta = [layer.momentum for layer in layers]
    buffers = [{name: buffer.clone() for name, buffer in layer.named_buffers()} for layer in layers]
    try:
        model.eval()
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # a plain average over batches
            layer.train()
        for batch in batches:
            loss(model, batch)
    except BaseException:
        for layer, kept in zip(layers, buffers, strict=True):
            for name, buffer in layer.named_buffers():
                buffer.copy_(kept[name])
        raise
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for module, training in modes.items():
            module.training = training
    return len(layers)
