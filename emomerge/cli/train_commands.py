"""The command that prints command lines for trainers of image models."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from emomerge.cli.command import command, json_option, out_path, quiet_option
from emomerge.cli.printing import print_json

SCRIPTS = {"sdxl": "sdxl_train_network.py"}
"""Kind of model → the script of kohya's sd-scripts that trains an adapter of it."""


@command(
    "train-commands",
    """
    emomerge train-commands sdxl --base sd_xl_base_1.0.safetensors --data dataset.toml -o out/sdxl
    emomerge train-commands sdxl --base sd_xl_base_1.0.safetensors --data dataset.toml -o out/sdxl > train.sh && bash train.sh
    """,
)  # fmt: skip
@click.argument("kind", type=click.Choice([*SCRIPTS]))
@click.option("--base", required=True, help="The checkpoint to train on: a file, a diffusers folder or a Hub id.")
@click.option("--data", required=True, type=out_path, help="The dataset definition of sd-scripts (TOML).")
@click.option("-o", "--out", required=True, type=out_path, help="Folder for the five adapters and the merge.")
@click.option("--rank", type=click.IntRange(min=1), default=16, show_default=True, help="Rank of every layer.")
@click.option("--alpha", type=click.FloatRange(min=0, min_open=True), help="Alpha of every layer (default: half the rank).")
@click.option("--steps", type=click.IntRange(min=1), default=2000, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="The same for all runs, so that they see the same data.")
@click.option("--preset", default="auto", show_default=True, help="Preset of emoPulse.")
@quiet_option
@json_option
def train_commands(
    kind: str, base: str, data: Path, out: Path, rank: int, alpha: float | None, steps: int, seed: int, preset: str,
    quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """Print the command lines of sd-scripts for five runs that differ in the optimizer only, and that of their merge.

    Run them in the folder of sd-scripts, in an environment that has emomerge too. The adapters are of all linear layers and
    convolutions of the UNet.
    """
    from emomerge.merging.registry import DEFAULT_METHOD
    from emomerge.optim import OPTIMIZERS

    names = [name for name, entry in OPTIMIZERS.items() if entry.default]
    alpha = rank / 2 if alpha is None else alpha
    runs = [str(out / f"{name}.safetensors") for name in names]
    training = [_training(kind, name, base, data, out, rank, alpha, steps, seed, preset) for name in names]
    merging = ["emomerge", "merge", base, *runs, "--method", DEFAULT_METHOD, "-o", str(out / "merged.safetensors")]
    if as_json:
        print_json({"train": training, "merge": merging})
        return
    for words in [*training, merging]:
        click.echo(shlex.join(words))


def _training(
    kind: str, name: str, base: str, data: Path, out: Path, rank: int, alpha: float, steps: int, seed: int, preset: str
) -> list[str]:
    """Return one command line of sd-scripts."""
    from emomerge.optim import OPTIMIZERS

    options = {
        "pretrained_model_name_or_path": base, "dataset_config": data, "output_dir": out, "output_name": name,
        "save_model_as": "safetensors", "network_module": "networks.lora", "network_dim": rank, "network_alpha": f"{alpha:g}",
        "max_train_steps": steps, "seed": seed, "mixed_precision": "bf16", "lr_scheduler": "constant", "learning_rate": "1.0",
        "optimizer_type": f"emomerge.optim.{OPTIMIZERS[name].class_name}",
    }  # fmt: skip
    flags = ["network_train_unet_only", "gradient_checkpointing", "cache_latents", "cache_text_encoder_outputs", "sdpa"]
    return [
        "accelerate", "launch", "--num_cpu_threads_per_process", "1", SCRIPTS[kind],
        *(f"--{option}={value}" for option, value in options.items()),
        "--network_args", f"conv_dim={rank}", f"conv_alpha={alpha:g}",
        "--optimizer_args", "capture_loss=True", f"preset={preset!r}",
        *(f"--{flag}" for flag in flags),
    ]  # fmt: skip
