"""What a Gaussian direction costs in memory and time: weights swapped in per module, against weights moved in place.

    python benchmarks/probe_memory.py                 # 2 minutes on one core
    python benchmarks/probe_memory.py --out benchmarks/results/probe_memory.json

Twelve linear layers of 2048 × 2048 (192 MiB in float32), 128 tokens, 2 batches, 3 radii, 2 directions. `redrawn` is what
models above `KEPT_BYTES` get, `kept` what smaller ones do, `in place` what models get whose modules read each other's weights.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from stacked_training import machine
from torch import nn

from emomerge.probing import Perturbable, perturb, rms, sharpness

WAYS = ("in place", "kept", "redrawn")


def measure(way: str, width: int = 2048, layers: int = 12, tokens: int = 128) -> dict[str, str | float]:
    """CPU seconds, and by how much the process grows at its peak, as a multiple of the model."""
    torch.manual_seed(0)
    model = nn.Sequential(*[module for _ in range(layers) for module in (nn.Linear(width, width), nn.Tanh())])
    batches = [torch.randn(tokens, width) for _ in range(2)]
    probe = Perturbable(model, lambda m, x: (m(x).square().mean(), 1.0), batches, rms(model))
    perturb.KEPT_BYTES = 0 if way == "redrawn" else 2**40
    if way == "in place":
        vars(probe)["is_swappable"] = False
    assert probe.is_swappable is (way != "in place")
    probe.center_losses()
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    sharpness.gaussian(probe, (0.1, 0.2, 0.3), directions=2)
    seconds = time.process_time() - start
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 1024
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / size
    return {"way": way, "cpu": seconds, "grown": grown}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", choices=WAYS, help="only this, in this process")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options.way)))
        return
    rows = []
    for way in WAYS:
        command = [sys.executable, __file__, "--way", way]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows.append(json.loads(said.splitlines()[-1]))
        print(f"{way:10} {rows[-1]['cpu']:5.1f} CPU s   peak memory + {rows[-1]['grown']:.2f} × the model", flush=True)
    if options.out:
        facts = {"machine": machine(), "load": os.getloadavg()[0], "torch": torch.__version__, "rows": rows}
        options.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
