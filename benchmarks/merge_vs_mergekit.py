"""What a merge costs: emomerge against mergekit, in time and memory.

    pip install torch==2.13.0 -e '.[peers]'
    python benchmarks/merge_vs_mergekit.py                     # 200 M parameters: 2.6 GB on disk, about 5 minutes
    python benchmarks/merge_vs_mergekit.py --millions 1000     # 13 GB on disk

Makes a base and five Llama-shaped runs in bfloat16 in a temporary folder, merges them with each tool in a process of its own
(start-up included) in turn, and prints the median wall time, the peak resident memory and the ratio. "copy" is the floor: all
tensors read and one model written, with safetensors alone. TIES has density 0.2; emomerge's preset `mergekit` is mergekit's
dialect, `paper` trims over the whole task vector. Without mergekit its rows are left out.
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
import time
from importlib.util import find_spec
from pathlib import Path

import torch
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
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config))
        tensors = {}
        for index, (name, shape) in enumerate(shapes.items()):
            weights = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(index))
            if number:
                weights += 1e-3 * torch.randn(shape, generator=torch.Generator().manual_seed(1000 * number + index))
            tensors[name] = weights.bfloat16()
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return paths, sum(torch.Size(shape).numel() for shape in shapes.values())


def run(command: list[str]) -> tuple[float, float]:
    """Wall seconds, and the peak resident memory in GB."""
    start = time.perf_counter()
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    assert process.stderr is not None
    message = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}\n{message}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024 / 1e9


def commands(paths: list[Path], folder: Path) -> dict[str, list[str]]:
    base, *runs = map(str, paths)
    out = str(folder / "out")
    ours = [str(Path(sys.executable).with_name("emomerge")), "merge", base, *runs, "-o", out, "--quiet"]
    table = {"copy": [sys.executable, "-c", COPY, base, *runs, str(folder / "copy.safetensors")]}
    for method, extra in (
        ("mean", []), ("tall-mask", []), ("ties mergekit", ["--set", "preset=mergekit", "--set", "density=0.2"]),
        ("ties paper", ["--set", "density=0.2"]),
    ):  # fmt: skip
        table[f"emomerge {method}"] = [*ours, "--method", method.split()[0], *extra]
    if find_spec("mergekit"):
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, nargs="+", default=[200], help="sizes: 50, 100, 200, 400, 1000")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    for millions in options.millions:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            paths, numel = make_models(folder, millions)
            measured: dict[str, list[tuple[float, float]]] = {name: [] for name in commands(paths, folder)}
            for _ in range(options.rounds):
                for name, command in commands(paths, folder).items():
                    shutil.rmtree(folder / "out", ignore_errors=True)
                    measured[name].append(run(command))
        title = f"{RUNS} runs of {numel / 1e6:.0f} M parameters, bfloat16"
        table = Table("", "wall s", "times the copy", "peak RSS GB", title=title)
        floor = statistics.median(seconds for seconds, _ in measured["copy"])
        for name, rows in measured.items():
            seconds, memory = (statistics.median(column) for column in zip(*rows, strict=True))
            table.add_row(name, f"{seconds:.2f}", f"{seconds / floor:.2f}", f"{memory:.2f}")
        Console().print(table)


if __name__ == "__main__":
    main()
