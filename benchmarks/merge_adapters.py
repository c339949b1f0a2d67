"""Five LoRA adapters merged as they are, against five dense copies baked first.

    python benchmarks/merge_adapters.py                       # 200 M parameters: about 2 minutes
    python benchmarks/merge_adapters.py --millions 1000       # 1 B parameters: 22 GB of temporary files

A Llama-shaped base in bfloat16 and five adapters of rank 16 on its attention and MLP layers. Printed are what each way writes,
its wall time and its peak memory, and how far the two results are apart: the dense copies are float32, so that only the last
bits of their weights are lost; in bfloat16 small changes are lost altogether (the last row). With --store they are written to
results/merge_adapters.json, which `merge_tables.py` puts into the documentation.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from merge_vs_mergekit import RUNS, Row, llama, make_models, run, store
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from emomerge.checkpoints import open_checkpoint

RANK = 16
EMOMERGE = [sys.executable, "-m", "emomerge"]


def make_adapters(folder: Path, millions: int) -> list[str]:
    """Five PEFT adapters; B is as large as a short training makes it."""
    paths = []
    for number in range(RUNS):
        generator = torch.Generator().manual_seed(number)
        tensors = {}
        for name, shape in llama(millions).items():
            if name.endswith("_proj.weight"):
                module = "base_model.model." + name.removesuffix(".weight")
                tensors[f"{module}.lora_A.weight"] = 0.05 * torch.randn(RANK, shape[1], generator=generator)
                tensors[f"{module}.lora_B.weight"] = 0.005 * torch.randn(shape[0], RANK, generator=generator)
        path = folder / f"adapter-{number}"
        path.mkdir()
        save_file(tensors, path / "adapter_model.safetensors")
        projections = sorted({name.split(".")[-2] for name in llama(millions) if name.endswith("_proj.weight")})
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": projections, "task_type": "CAUSAL_LM"}
        (path / "adapter_config.json").write_text(json.dumps(config))
        paths.append(str(path))
    return paths


def size_of(folder: Path) -> float:
    """Gigabytes on disk."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e9


def dense(base: str, adapters: list[str], folder: Path, dtype: str, method: str) -> tuple[float, float, Path]:
    """Bake each adapter, then merge the copies: wall seconds and the largest peak of memory."""
    seconds, peak = 0.0, 0.0
    copies = [str(folder / f"{dtype}-{number}") for number in range(len(adapters))]
    out = folder / f"from-{dtype}"
    bakes = [
        [*EMOMERGE, "bake", base, adapter, "-o", copy, "--dtype", dtype, "--quiet"]
        for adapter, copy in zip(adapters, copies, strict=True)
    ]
    for command in [*bakes, [*EMOMERGE, "merge", base, *copies, "--method", method, "-o", str(out), "--quiet"]]:
        took, memory, _ = run(command)
        seconds, peak = seconds + took, max(peak, memory)
    return seconds, peak, out


def difference(one: Path, other: Path) -> str:
    """Largest difference of the weights, and the share of the weights that differ."""
    ours, theirs = open_checkpoint(one), open_checkpoint(other)
    largest, differing, total = 0.0, 0, 0
    for name in ours:
        gap = (ours[name].float() - theirs[name].float()).abs()
        largest, differing, total = max(largest, float(gap.max())), differing + int(gap.count_nonzero()), total + gap.numel()
    return f"{largest:.1e}, {differing / total:.2%} of the weights"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, default=200, help="50, 100, 200, 400 or 1000")
    parser.add_argument("--method", default="tall-mask")
    parser.add_argument("--store", action="store_true", help="write results/merge_adapters.json")
    options = parser.parse_args()
    table = Table("way", "written GB", "wall s", "peak RSS GB", "largest difference from the first row")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (base, *_), numel = make_models(folder, options.millions, runs=0)
        adapters = make_adapters(folder, options.millions)
        out = folder / "straight"
        took, memory, _ = run([*EMOMERGE, "merge", str(base), *adapters, "--method", options.method, "-o", str(out), "--quiet"])
        rows: list[Row] = [
            {"way": "straight from the adapters", "seconds": took, "peak GB": memory, "written GB": size_of(out)}
        ]
        table.add_row("straight from the adapters", f"{size_of(out):.2f}", f"{took:.1f}", f"{memory:.2f}", "")
        for dtype in ("float32", "bfloat16"):
            before = size_of(folder)
            took, memory, merged = dense(str(base), adapters, folder, dtype, options.method)
            size, way = size_of(folder) - before, f"baked in {dtype} first"
            rows.append({"way": way, "seconds": took, "peak GB": memory, "written GB": size})
            row = f"{size_of(folder) - before:.2f}", f"{took:.1f}", f"{memory:.2f}", difference(out, merged)
            table.add_row(f"baked in {dtype} first", *row)
    table.title = f"{options.method} of {RUNS} adapters of rank {RANK}, base of {numel / 1e6:.0f} M parameters in bfloat16"
    Console(width=120).print(table)
    if options.store:
        store("merge_adapters", rows)


if __name__ == "__main__":
    main()
