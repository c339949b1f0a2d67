"""What a merge costs: emomerge against mergekit, in time and memory.

    pip install torch==2.13.0 -e '.[peers]'
    python benchmarks/merge_vs_mergekit.py                     # 200 M parameters: 2.6 GB on disk, about 5 minutes
    python benchmarks/merge_vs_mergekit.py --millions 50 100 200 400 1000 --peers-up-to 0 --rounds 1 --store-sizes

1000 takes 15 GB on disk, and mergekit's TIES five times as long as at 200.

Makes a base and five Llama-shaped runs in bfloat16 in a temporary folder, merges them with each tool in a process of its own
in turn, and prints the median wall time, the peak resident memory and the ratio. "copy" is the floor: all tensors read and one
model written, with safetensors alone. All times run from the start of a Python process to its end, importing torch included.
Only emomerge waits until its output is on the disk (fsync), and only it hashes the inputs (SHA-256, for merge.json).
TIES has density 0.2; emomerge's preset `mergekit` is mergekit's dialect, `paper` trims over the whole task vector. Without
mergekit its rows are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from bake_images import processor
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

RUNS = 5
COPY = """
import sys
from safetensors import safe_open
from safetensors.torch import save_file
first, *others, out = sys.argv[1:]
tensors = {}
for path in [first, *others]:
    with safe_open(path + "/model.safetensors", "pt") as file:
        for name in file.keys():
            tensor = file.get_tensor(name).clone()
            if path == first:
                tensors[name] = tensor
save_file(tensors, out)
"""


def llama(millions: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama of about so many million parameters."""
    hidden = {50: 512, 100: 768, 200: 1024, 400: 1280, 1000: 2048}.get(millions, 1024)
    inner, vocabulary = hidden * 11 // 4, 32_000
    layer = {
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,), "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
        **{f"self_attn.{kind}_proj": (hidden, hidden) for kind in "qkvo"},
    }  # fmt: skip
    size = sum(torch.Size(shape).numel() for shape in layer.values())
    layers = max((millions * 10**6 - 2 * vocabulary * hidden) // size, 1)
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (vocabulary, hidden) for name in ("model.embed_tokens", "lm_head")}
    shapes |= {f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in layer.items()}
    return shapes | {"model.norm.weight": (hidden,)}


def make_models(folder: Path, millions: int, runs: int = RUNS) -> tuple[list[Path], int]:
    """The base and the runs; and the number of parameters."""
    shapes = llama(millions)
    hidden = shapes["model.norm.weight"][0]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "num_hidden_layers": sum(name.endswith("q_proj.weight") for name in shapes), "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64, "vocab_size": 32_000, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
    }  # fmt: skip
    paths = [folder / name for name in ("base", *(f"run-{number}" for number in range(runs)))]
    for number, path in enumerate(paths):
        if (path / "model.safetensors").exists():  # made before
            continue
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(config))
        tensors = {}
        for index, (name, shape) in enumerate(shapes.items()):
            weights = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(index))
            if number:
                weights += 1e-3 * torch.randn(shape, generator=torch.Generator().manual_seed(1000 * number + index))
            tensors[name] = weights.bfloat16()
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return paths, sum(torch.Size(shape).numel() for shape in shapes.values())


LAUNCH = """
import json, os, resource, subprocess, sys, time
start = time.perf_counter()
process = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
seconds = time.perf_counter() - start
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([process.returncode, seconds, used.ru_maxrss, used.ru_utime + used.ru_stime, process.stderr]))
"""


def run(command: list[str]) -> tuple[float, float, float]:
    """Wall seconds, the peak resident memory in GB and CPU seconds; by way of a small process, as a peak is handed on."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    launch = [sys.executable, "-S", "-c", LAUNCH, *command]
    printed = subprocess.run(launch, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    status, seconds, peak, cpu, message = json.loads(printed)
    if status:
        raise SystemExit(f"{' '.join(command)}\n{message}")
    return seconds, peak * 1024 / 1e9, cpu


def commands(paths: list[Path], folder: Path, *, peers: bool) -> dict[str, list[str]]:
    base, *runs = map(str, paths)
    out = str(folder / "out")
    ours = [sys.executable, "-m", "emomerge", "merge", base, *runs, "-o", out, "--quiet"]
    table = {"copy": [sys.executable, "-c", COPY, base, *runs, str(folder / "copy.safetensors")]}
    for method, extra in (
        ("mean", []), ("tall-mask", []), ("ties mergekit", ["--set", "preset=mergekit", "--set", "density=0.2"]),
        ("ties paper", ["--set", "density=0.2"]),
    ):  # fmt: skip
        table[f"emomerge {method}"] = [*ours, "--method", method.split()[0], *extra]
    if peers and find_spec("mergekit"):
        for method in ("linear", "ties"):
            parameters = {"weight": 1.0, "density": 0.2} if method == "ties" else {"weight": 0.2}
            models = [{"model": path, "parameters": parameters} for path in runs]
            config: dict[str, object] = {"merge_method": method, "dtype": "bfloat16", "models": models}
            if method == "ties":
                config["base_model"] = base
            file = folder / f"{method}.yaml"
            file.write_text(json.dumps(config))  # JSON is YAML
            table[f"mergekit {method}"] = [
                sys.executable,
                "-m",
                "mergekit.scripts.run_yaml",
                str(file),
                out,
                "--no-copy-tokenizer",
            ]
    return table


Row = dict[str, str | float]


def measure(folder: Path, millions: int, rounds: int, *, peers: bool) -> list[Row]:
    """A row for each command: parameters in millions, wall seconds and peak GB, medians of the rounds."""
    paths, numel = make_models(folder, millions)
    table = commands(paths, folder, peers=peers)
    measured: dict[str, list[tuple[float, float, float]]] = {name: [] for name in table}
    for _ in range(rounds):
        for name, command in table.items():
            shutil.rmtree(folder / "out", ignore_errors=True)
            measured[name].append(run(command))
    rows: list[Row] = []
    for name, pairs in measured.items():
        seconds, memory, cpu = (statistics.median(column) for column in zip(*pairs, strict=True))
        rows.append({"way": name, "millions": numel / 1e6, "seconds": seconds, "peak GB": memory, "cpu": cpu})
    return rows


def show(rows: list[Row]) -> None:
    """A table for each size."""
    for size in sorted({row["millions"] for row in rows}):
        table = Table("", "wall s", "times the copy", "peak RSS GB", title=f"{RUNS} runs of {size:.0f} M parameters, bfloat16")
        some = [row for row in rows if row["millions"] == size]
        floor = next(float(row["seconds"]) for row in some if row["way"] == "copy")
        for row in some:
            seconds = float(row["seconds"])
            table.add_row(str(row["way"]), f"{seconds:.2f}", f"{seconds / floor:.2f}", f"{row['peak GB']:.2f}")
        Console().print(table)


def store(name: str, rows: list[Row]) -> None:
    """Write rows to the results, with the machine, its load and the versions."""
    known = {package: version(package) for package in ("emomerge", "torch", "safetensors", "mergekit") if find_spec(package)}
    found = {"machine": f"{processor()}, {os.cpu_count()} cores", "load": os.getloadavg()[1], "versions": known, "rows": rows}
    (Path(__file__).parent / "results" / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n")


def draw(rows: list[Row], file: Path) -> None:
    """Peak memory against the size of the model. Times depend on what else the disk and the machine do; memory hardly does."""
    import altair as alt

    points = alt.Chart(alt.Data(values=rows)).mark_line(point=True).properties(width=480, height=260)
    scale = alt.Scale(type="log", nice=False, padding=8)
    size = alt.X("millions:Q", title="parameters, millions", scale=scale)
    memory = alt.Y("peak GB:Q", title="peak resident memory, GB", scale=scale)
    points.encode(size, memory, alt.Color("way:N", title=None)).save(str(file))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, nargs="+", default=[200], help="sizes: 50, 100, 200, 400, 1000")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers-up-to", type=int, default=1000, metavar="MILLIONS", help="leave mergekit out beyond this size")
    parser.add_argument("--folder", type=Path, help="where the models are made, and left; else a temporary one")
    parser.add_argument("--rows", type=Path, help="a JSON file of rows, which those measured now are added to")
    parser.add_argument("--store", action="store_true", help="write results/merge_vs_mergekit.json")
    parser.add_argument("--store-sizes", action="store_true", help="write results/merge_sizes.json and docs/merge-sizes.png")
    options = parser.parse_args()
    rows: list[Row] = json.loads(options.rows.read_text()) if options.rows and options.rows.exists() else []
    for millions in options.millions:
        with tempfile.TemporaryDirectory() as temporary:
            folder = (options.folder or Path(temporary)) / f"{millions}M"
            rows += measure(folder, millions, options.rounds, peers=millions <= options.peers_up_to)
        if options.rows:
            options.rows.write_text(json.dumps(rows, indent=1) + "\n")
    show(rows)
    if options.store:
        store("merge_vs_mergekit", [row for row in rows if 150 < float(row["millions"]) < 250])
    if options.store_sizes:
        store("merge_sizes", rows)
        draw(rows, Path(__file__).parent.parent / "docs" / "merge-sizes.png")


if __name__ == "__main__":
    main()
