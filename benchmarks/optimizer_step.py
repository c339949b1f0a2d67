"""What a step costs: the five emo optimizers against AdamW and the optimizers people would use instead.

    pip install torch==2.13.0 -e '.[peers]'
    python benchmarks/optimizer_step.py                 # about 3 minutes on 2 cores; run it on a quiet machine
    python benchmarks/optimizer_step.py --out benchmarks/results/optimizer_step.json

Two sets of float32 parameters on the CPU: 64 matrices of 512 × 512, and 400 of the size of LoRA factors (16 × 512). All
optimizers step the same parameters with the same gradients, in random order, so that a slow moment of the machine hits all
alike. Printed are the median nanoseconds per parameter, the median over the rounds of the ratio to torch's fused AdamW in the
same round, and the bytes of tensor state per parameter. Peers that are not installed are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from stacked_training import machine
from torch.optim.optimizer import Optimizer

from emomerge.optim import OPTIMIZERS
from emomerge.optim.base import EmoOptimizer

SETS: dict[str, list[tuple[int, int]]] = {
    "64 matrices of 512 × 512": [(512, 512)] * 64,
    "400 LoRA factors of 16 × 512": [(16, 512), (512, 16)] * 200,
}
LIMITS = {"EmoSens": 1.05, "EmoAiry": 0.9, "EmoVoid": 0.9, "EmoCats": 1.0, "EmoTion": 1.0}
"""What we hold ourselves to on one thread with the matrices; 1.3 for each with the LoRA factors."""
BASELINE = "AdamW fused"


def peers(params: list[torch.nn.Parameter]) -> Iterator[tuple[str, Optimizer]]:
    yield BASELINE, torch.optim.AdamW(params, lr=1e-6, fused=True)
    yield "AdamW foreach", torch.optim.AdamW(params, lr=1e-6, foreach=True)
    yield "AdamW loop", torch.optim.AdamW(params, lr=1e-6, foreach=False)
    if find_spec("schedulefree"):
        import schedulefree

        free = schedulefree.AdamWScheduleFree(params, lr=1e-6)
        free.train()
        yield "schedule-free AdamW", free
    if find_spec("prodigyopt"):
        import prodigyopt

        yield "Prodigy", prodigyopt.Prodigy(params, lr=1e-6)
    if find_spec("pytorch_optimizer"):
        import pytorch_optimizer

        yield "pytorch-optimizer Lion", pytorch_optimizer.Lion(params, lr=1e-6)
        yield "pytorch-optimizer EmoNavi", pytorch_optimizer.EmoNavi(params, lr=1e-6)


def steps(params: list[torch.nn.Parameter]) -> dict[str, tuple[Optimizer, Callable[[], Any]]]:
    table: dict[str, tuple[Optimizer, Callable[[], Any]]] = {}
    for name, optimizer in peers(params):
        closure = (lambda: torch.tensor(1.0)) if "EmoNavi" in name else None
        table[name] = optimizer, lambda optimizer=optimizer, closure=closure: optimizer.step(closure)
    for entry in OPTIMIZERS.values():
        emo = entry.load()(params, lr=1e-3)
        table[entry.class_name] = emo, lambda emo=emo: observed_step(emo)
    return table


def observed_step(optimizer: EmoOptimizer) -> None:
    optimizer.observe(1.0)
    optimizer.step()


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of the state tensors that grow with the parameters; counters do not."""
    tensors = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor))
    return sum(t.numel() * t.element_size() for t in tensors if t.numel() > 1)


def measure(shapes: list[tuple[int, int]], threads: int, rounds: int) -> tuple[list[dict[str, Any]], float]:
    """A row per optimizer, and the cost of the exact geometry as a share of EmoTion's step."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(0.02 * torch.randn(shape, generator=generator)) for shape in shapes]
    for p in params:
        p.grad = 0.01 * torch.randn(p.shape, generator=generator)
    numel = sum(p.numel() for p in params)
    table = steps(params)
    functions = {name: step for name, (_, step) in table.items()}
    with torch.no_grad():
        seconds = timed(functions, rounds, params)
        tion, cats = seconds["EmoTion"], seconds["EmoCats"]  # the same traffic and arithmetic, but for the geometry
    rows = [
        {
            "name": name,
            "ns": statistics.median(seconds[name]) * 1e9 / numel,
            "ratio": statistics.median(a / b for a, b in zip(seconds[name], seconds[BASELINE], strict=True)),
            "bytes": state_bytes(optimizer) / numel,
        }
        for name, (optimizer, _) in table.items()
    ]
    return rows, statistics.median(1 - b / a for a, b in zip(tion, cats, strict=True))


def timed(functions: dict[str, Callable[[], Any]], rounds: int, params: list[torch.nn.Parameter]) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 2):
        for name, function in random.sample(list(functions.items()), len(functions)):
            torch._foreach_norm([*params, *(p.grad for p in params)])  # leaves the caches alike, as a backward pass does
            start = time.perf_counter()
            function()
            if number >= 2:  # the first steps make their state
                seconds[name].append(time.perf_counter() - start)
    return seconds


def limit_of(name: str, title: str, threads: int) -> float | None:
    if "LoRA" in title:
        return 1.3 if name in LIMITS else None
    return LIMITS.get(name) if threads == 1 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    console = Console(width=110)
    stored: list[dict[str, Any]] = []
    for title, shapes in SETS.items():
        for threads in options.threads:
            rows, geometry = measure(shapes, threads, options.rounds)
            stored += [{"set": title, "threads": threads, **row} for row in rows]
            heads = ("optimizer", "ns/parameter", f"ratio to {BASELINE}", "limit", "state bytes/parameter")
            table = Table(*heads, title=f"{title}, threads: {threads}")
            for row in rows:
                limit = limit_of(row["name"], title, threads)
                kept = "" if limit is None else f"{limit:.2f} {'kept' if row['ratio'] <= limit else 'MISSED'}"
                table.add_row(row["name"], f"{row['ns']:.2f}", f"{row['ratio']:.2f}", kept, f"{row['bytes']:.2f}")
            console.print(table)
            console.print(f"exact geometry: {geometry:.0%} of EmoTion's step\n")
    if options.out:
        facts = {"machine": machine(), "load": os.getloadavg()[0], "torch": torch.__version__, "rounds": options.rounds}
        options.out.write_text(json.dumps({**facts, "rows": stored}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
