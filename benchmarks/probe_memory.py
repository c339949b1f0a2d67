"""What a Gaussian direction costs in memory and time: weights swapped in per module, against weights moved in place.

    python benchmarks/probe_memory.py                 # 2 minutes on one core

Twelve linear layers of 2048 × 2048 (192 MiB in float32), 128 tokens, 2 batches, 3 radii, 2 directions. `redrawn` is what
models above `KEPT_BYTES` get, `kept` what smaller ones do, `in place` what models get whose modules read each other's weights.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

import torch
from torch import nn

from emomerge.probing import Perturbable, perturb, rms, sharpness

WAYS = ("in place", "kept", "redrawn")


def measure(way: str, width: int = 2048, layers: int = 12, tokens: int = 128) -> str:
    torch.manual_seed(0)
    model = nn.Sequential(*[module for _ in range(layers) for module in (nn.Linear(width, width), nn.Tanh())])
    batches = [torch.randn(tokens, width) for _ in range(2)]
    probe = Perturbable(model, lambda m, x: (m(x).square().mean(), 1.0), batches, rms(model))
    perturb.KEPT_BYTES = 0 if way == "redrawn" else 2**40
    if way == "in place":
        vars(probe)["is_swappable"] = False
    assert probe.is_swappable is (way != "in place")
    probe.center_losses()
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    sharpness.gaussian(probe, (0.1, 0.2, 0.3), directions=2)
    seconds = time.perf_counter() - start
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 1024
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / size
    return f"{way:10} {seconds:5.1f} s   peak memory + {grown:.2f} × the model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", choices=WAYS, help="only this, in this process")
    way = parser.parse_args().way
    if way:
        print(measure(way), flush=True)
    else:
        for each in WAYS:
            subprocess.run([sys.executable, __file__, "--way", each], check=True)


if __name__ == "__main__":
    main()
