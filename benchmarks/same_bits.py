"""SHA-256 of every merge method on a fixed random input, to compare two versions of emomerge on one machine.

    PYTHONPATH=old/checkout python benchmarks/same_bits.py > old.json
    PYTHONPATH=new/checkout python benchmarks/same_bits.py > new.json && diff old.json new.json

With EMOMERGE_NATIVE=0 the same through torch's own operations. Hashes depend on the processor and on torch's version, so they
are compared, never recorded.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

import emomerge
from emomerge.merging import METHODS

SHAPES = {
    "embed.weight": (301, 64),
    "layer.weight": (257, 130),
    "layer.bias": (257,),
    "norm.weight": (130,),
    "conv.weight": (9, 5, 3, 3),
}
RUNS = 5


def main() -> None:
    """Print a JSON object: method → dtype of the input → SHA-256 over the merged tensors."""
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for dtype in (torch.float32, torch.bfloat16):
            base, runs = written_inputs(Path(scratch) / str(dtype), dtype)
            for method in sorted(METHODS):
                found[f"{method}, {dtype}"] = merged_hash(base, runs, method)
    print(json.dumps(found, indent=1))


def written_inputs(folder: Path, dtype: torch.dtype) -> tuple[Path, list[Path]]:
    """A base and its runs as files, each run with the squared gradients that `fisher` reads."""
    generator = torch.Generator().manual_seed(7)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    shared = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    places = [folder / name for name in ("base", *(f"run-{number}" for number in range(RUNS)))]
    for number, place in enumerate(places):
        place.mkdir(parents=True)
        step = {n: 0.02 * (shared[n] + torch.randn(s, generator=generator)) if number else 0 for n, s in SHAPES.items()}
        tensors = {name: (base[name] + step[name]).to(dtype).contiguous() for name in SHAPES}
        save_file(tensors, place / "model.safetensors")
        save_file({n: torch.rand(s, generator=generator) for n, s in SHAPES.items()}, place / "fisher.safetensors")
    return places[0], places[1:]


def merged_hash(base: Path, runs: list[Path], method: str) -> str:
    """SHA-256 over the names and bytes of one merge; its choices are made by a loss that any weights have."""
    target = emomerge.open_checkpoint(runs[0])

    def loss(checkpoint: emomerge.Checkpoint) -> float:  # type: ignore[name-defined]
        return sum(float((checkpoint[n].double() - 0.7 * target[n].double()).square().sum()) for n in SHAPES)

    given = [str(run) for run in (runs[:2] if method in ("slerp", "nuslerp") else runs)]
    needs_loss = method in ("greedy-soup", "metrics-weighted", "positioning", "tall-mask")
    options = {"held_out_loss": loss} if needs_loss else {}
    if method == "fisher":
        options["information"] = [str(Path(run) / "fisher.safetensors") for run in given]
    merged = emomerge.merge(str(base), given, method=method, **options)
    total = hashlib.sha256()
    for name in merged:
        total.update(name.encode() + merged[name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


if __name__ == "__main__":
    main()
