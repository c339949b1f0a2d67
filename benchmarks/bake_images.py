"""An adapter baked into a checkpoint of SDXL's size, and five merged into it, against copying the file with safetensors.

    python benchmarks/bake_images.py                          # 21 GB of temporary files, about 5 minutes
    python benchmarks/bake_images.py --folder /mnt/big        # where they are written

The base has the names, shapes and dtypes of SDXL 1.0 as one file (2,515 tensors, 6.9 GB in float16) with random values, and
five LoRAs of rank 16 on all 794 layers of its UNet, as sd-scripts writes them. All processes run on this machine one after the
other, each measured several times in turn; the fastest counts, as whatever else runs only adds. A copy is measured as it is and
with the flush to the disk that emomerge always does before it renames a finished file. Written to results/bake_images.json,
which `docs_tables.py` puts into the documentation.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests/adapters/images"))
import image_models  # noqa: E402

FLUSH = "import os; file = open(sys.argv[2], 'rb'); os.fsync(file.fileno())"
RANK, ALPHA, RUNS = 16, 8.0, 5
RESULTS = Path(__file__).parent / "results" / "bake_images.json"
COPY = "import sys; from safetensors.torch import load_file, save_file; save_file(load_file(sys.argv[1]), sys.argv[2])"


def shapes() -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor of SDXL."""
    image_models.CONTEXT, image_models.TIME, image_models.ADDED = 2048, 1280, 2816
    image_models.VOCABULARY, image_models.POSITIONS = 49408, 77
    with torch.device("meta"):
        found = image_models.sdxl((320, 640, 1280), (768, 1280), (128, 256, 512, 512), 2)
    found = {name: tuple(tensor.shape) for name, tensor in found.items() if name not in ("v_pred", "ztsnr")}
    return found | {"conditioner.embedders.1.model.text_projection": (1280, 1280)}


def write_base(path: Path) -> None:
    """Write the base tensor by tensor: values of the size of trained weights, the same in every row of a tensor's noise."""
    infos = shapes()
    noise = (0.02 * torch.randn(2**24, generator=torch.Generator().manual_seed(0))).half()
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "modelspec.title": "synthetic SDXL"}}
    position, sizes = 0, {}
    for name in sorted(infos, key=lambda name: ("position_ids" not in name, name)):  # wider dtypes first
        count = int(torch.Size(infos[name]).numel())
        sizes[name] = count * (8 if "position_ids" in name else 2)
        dtype = "I64" if "position_ids" in name else "F16"
        header[name] = {"dtype": dtype, "shape": list(infos[name]), "data_offsets": [position, position + sizes[name]]}
        position += sizes[name]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, size in sizes.items():
            if "position_ids" in name:
                file.write(torch.arange(size // 8).numpy().tobytes())
            else:
                repeated = noise.repeat(-(-size // (2 * len(noise))))[: size // 2]
                file.write(repeated.numpy().tobytes())


def write_adapter(path: Path, seed: int) -> None:
    """Write a LoRA on every linear and convolutional layer of the UNet."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes().items():
        if name.startswith(image_models.UNET) and name.endswith(".weight") and len(shape) > 1:
            module = "lora_unet_" + name.removeprefix(image_models.UNET).removesuffix(".weight").replace(".", "_")
            up = (shape[0], RANK, *(1,) * (len(shape) - 2))
            tensors[f"{module}.lora_down.weight"] = (0.05 * torch.randn(RANK, *shape[1:], generator=generator)).half()
            tensors[f"{module}.lora_up.weight"] = (0.005 * torch.randn(up, generator=generator)).half()
            tensors[f"{module}.alpha"] = torch.tensor(ALPHA).half()
    save_file(
        tensors, path, {"ss_network_dim": str(RANK), "ss_network_alpha": str(ALPHA), "ss_network_module": "networks.lora"}
    )


def measure(command: list[str]) -> dict[str, float]:
    """Run a process: wall seconds, CPU seconds and its peak of memory beyond the mapped pages of the base, in GB."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    private = 0
    while process.poll() is None:
        private = max(private, _private_memory(process.pid))
        time.sleep(0.02)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{command} failed")
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": seconds,
        "cpu": usage.ru_utime + usage.ru_stime - before.ru_utime - before.ru_stime,
        "memory": private / 1e9,
    }


def _private_memory(process: int) -> int:
    """Return the bytes of a process that are not pages of files."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")), 0)


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    """Make the files, measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="a folder for the temporary files, made if it is missing")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--keep", action="store_true", help="keep base and adapters for the next time")
    options = parser.parse_args()
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="bake-images-", dir=options.folder)) if not options.keep else options.folder
    base, adapters = folder / "base.safetensors", [folder / f"lora-{number}.safetensors" for number in range(RUNS)]
    if not base.exists():
        write_base(base)
        for seed, adapter in enumerate(adapters):
            write_adapter(adapter, seed)
    out = folder / "out.safetensors"
    emomerge = [sys.executable, "-m", "emomerge"]
    commands = {
        "copy": [sys.executable, "-c", COPY, str(base), str(out)],
        "copy, flushed to the disk": [sys.executable, "-c", f"{COPY}; {FLUSH}", str(base), str(out)],
        "bake": [*emomerge, "bake", str(base), str(adapters[0]), "-o", str(out), "--quiet"],
        "tall-mask of five": [
            *emomerge, "merge", str(base), *map(str, adapters), "--method", "tall-mask", "-o", str(out), "--quiet",
        ],
    }  # fmt: skip
    load = os.getloadavg()[1]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for _ in range(options.repeats):
        for name, command in commands.items():
            out.unlink(missing_ok=True)
            os.sync()
            found[name].append(measure(command))
            print(name, {key: round(value, 2) for key, value in found[name][-1].items()}, flush=True)
    if not options.keep:
        shutil.rmtree(folder)
    best = {name: min(rows, key=lambda row: row["seconds"]) for name, rows in found.items()}
    results = {
        "machine": f"{processor()}, {os.cpu_count()} cores", "threads": torch.get_num_threads(), "load": load,
        "versions": {name: version(name) for name in ("emomerge", "torch", "safetensors")},
        "parameters": sum(torch.Size(shape).numel() for shape in shapes().values()), "tensors": len(shapes()),
        "rank": RANK, "runs": found, "best": best,
        "times a copy": {name: row["seconds"] / best["copy"]["seconds"] for name, row in best.items()},
    }  # fmt: skip
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results["times a copy"], indent=2))


if __name__ == "__main__":
    main()
