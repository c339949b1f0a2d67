"""The commands that make models from models: bake, merge, reconstruct."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from emomerge.cli.command import (
    DTYPES,
    command,
    engine_of,
    executor_option,
    force_option,
    json_option,
    out_path,
    quiet_option,
    rounding_option,
    setting_option,
)  # fmt: skip
from emomerge.cli.printing import print_rounding

if TYPE_CHECKING:
    from emomerge.training.engines import EngineName


@command(
    "bake",
    """
    emomerge bake out/digits/base out/digits/runs/sens-0/adapter -o baked.safetensors
    emomerge bake base run --dtype bfloat16 --rounding stochastic --seed 1 -o baked
    """,
)  # fmt: skip
@click.argument("base")
@click.argument("adapter")
@click.option("-o", "--out", type=out_path, required=True, help="A folder, or one file ending in .safetensors.")
@click.option("--dtype", type=DTYPES, default="base", show_default=True)
@rounding_option
@click.option("--seed", type=int, default=0, show_default=True, help="Of stochastic rounding.")
@click.option("--max-shard-size", default="5GB", show_default=True)
@click.option(
    "--allow-unmatched",
    is_flag=True,
    help="Warn about adapter tensors that BASE has no place for, instead of refusing.",
)
@force_option
@quiet_option
def bake(
    base: str, adapter: str, out: Path, dtype: str, rounding: str, seed: int, max_shard_size: str, allow_unmatched: bool,
    force: bool, quiet: bool,
) -> None:  # fmt: skip
    """Write BASE with ADAPTER merged into its weights: computed in float32, rounded once."""
    from emomerge import adapters
    from emomerge.cli.merge_command import only_a_card, write_model
    from emomerge.merging.record import Output

    opened = adapters.open_dense(base)
    baked = adapters.bake(opened, adapter, allow_unmatched=allow_unmatched)
    context = {"title": out.stem, "about": f"`{adapter}` merged into the weights of its base.", "base": base}
    output = Output(dtype=dtype, rounding=rounding, seed=seed, max_shard_size=max_shard_size)
    lost = write_model(baked, opened, out, "bake", output, force=force, quiet=quiet, papers=lambda _: only_a_card(context))
    if not quiet:
        print_rounding(lost)
    click.echo(str(out))


@command(
    "merge",
    """
    emomerge merge base runs/sens-0 runs/airy-0 runs/cats-0 --method tall-mask -o merged
    emomerge merge base run-a run-b --method ties --density 0.3 -o merged.safetensors
    emomerge merge base run-a run-b --method slerp --set 't=[0.2, 0.8]' -o merged
    emomerge merge base run-a run-b --dtype bfloat16 --rounding stochastic --seed 1 -o merged
    emomerge merge base run-a run-b --method mean --as-lora auto --energy 0.99 -o adapter
    emomerge merge base run-a run-b --save-masks -o merged
    emomerge merge --config mergekit.yaml -o merged
    emomerge merge --again merged/merge.json -o same
    emomerge merge --extend merged run-c -o of-three
    """,
)  # fmt: skip
@click.argument("base", required=False)
@click.argument("runs", nargs=-1)
@click.option("--config", type=out_path, help="A mergekit configuration, instead of BASE, RUNS and --method.")
@click.option("--again", type=out_path, metavar="MERGE.JSON", help="Repeat the merge that this records, instead of all else.")
@click.option(
    "--extend", type=out_path, metavar="FOLDER", help="Repeat the merge in FOLDER with RUNS besides its own; no BASE."
)
@click.option("--method", help="How to merge (default: tall-mask): any of the methods above.")
@click.option("-o", "--out", type=out_path, required=True, help="A folder, or one file ending in .safetensors.")
@click.option("--weight", "weights", type=float, multiple=True, help="Weight of a run; give one for each run, in their order.")
@click.option("--scale", help="Factor on the merged task vector, or `auto` (needs --recipe).")
@click.option("--density", type=float, help="ties, dare, della, breadcrumbs: the share of each task vector that is kept.")
@click.option("--lambda", "lambda_", help="tall-mask: λ, or `auto` (needs --recipe).")
@click.option("--k", type=int, help="tall-mask: runs that must agree on a weight.")
@click.option("--reference", type=click.Choice(["mean", "sum", "ties"]), help="tall-mask: what the masks are measured against.")
@click.option("--preset", type=click.Choice(["paper", "mergekit", "peft"]), help="ties: whose reading of the method.")
@click.option("--trim", type=click.Choice(["global", "tensor", "touched"]), help="ties: over what the density is taken.")
@click.option("--aggregate", help="ties, dare, della, breadcrumbs: mean, sum, count or max of agreeing weights.")
@click.option("--seed", type=int, help="dare, della: of the random masks; --rounding stochastic: of its draws (default: 0).")
@click.option("--dtype", type=DTYPES, help="What is written (default: base; of an adapter float32).")
@rounding_option
@click.option("--max-shard-size", default="5GB", show_default=True)
@click.option(
    "--save-masks",
    is_flag=True,
    help="tall-mask: keep each run's mask and their reference in OUT/masks, for `emomerge reconstruct`.",
)
@click.option(
    "--as-lora",
    metavar="RANK|auto",
    help="Write a PEFT adapter of this rank instead of a model; auto: of the smallest that captures --energy, by layer.",
)
@click.option("--energy", type=float, help="--as-lora auto: share of each layer's squared length (default: 0.99).")
@click.option("--max-rank", type=int, help="--as-lora auto: the largest rank (default: 256).")
@click.option("--allow-partial", is_flag=True, help="--as-lora: leave out and list what no adapter holds: biases, norms, …")
@click.option("--recipe", "recipe_path", help="A recipe; its validation data decides what is `auto`, greedy-soup, positioning.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="A parameter of the method, in YAML: one number, a list spread over the layers, or a list of {filter, value}; "
    "with --recipe also a field of the recipe.",
)
@click.option("--device", default="cpu", show_default=True, help="Where tensors are merged: cpu, cuda, auto …")
@executor_option(help="Who writes the files, where --max-shard-size makes several: this process, or a worker each.")
@setting_option
@force_option
@quiet_option
@json_option
def merge(
    out: Path, base: str | None, runs: Sequence[str], again: Path | None, extend: Path | None, weights: Sequence[float],
    device: str, executor: EngineName, settings: Sequence[str], force: bool, quiet: bool, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Merge RUNS (dense checkpoints, adapters or run directories) into BASE.

    Methods: mean, task-arithmetic, greedy-soup, positioning, fisher; ties, dare-linear, dare-ties, della, della-linear,
    breadcrumbs, breadcrumbs-ties, sce; tall-mask; model-stock, slerp, nuslerp, karcher, multislerp; tsv, iso-c.
    """
    from emomerge.adapters.formats import weight_files
    from emomerge.numerics.hashing import Digests

    given = [*([base] if base else []), *runs]
    digest = Digests(file for source in given for file in weight_files(source))  # while torch is being imported
    from emomerge.cli.merge_command import asked_for, merge_record, recorded

    if again is not None or extend is not None:
        record = recorded(again, extend, given, weights)
    else:
        record = asked_for(base, runs, weights, **options)
    engine = engine_of(out.parent, executor, None, settings) if settings or executor != "local" else None
    merge_record(record, out, digest, device=device, engine=engine, force=force, quiet=quiet, as_json=as_json)


@command(
    "reconstruct",
    """
    emomerge merge base runs/sens-0 runs/cats-0 --method tall-mask --save-masks -o merged
    emomerge reconstruct merged sens-0 -o sens-0-again
    """,
)  # fmt: skip
@click.argument("folder", type=out_path)
@click.argument("run")
@click.option("-o", "--out", type=out_path, required=True, help="A folder, or one file ending in .safetensors.")
@click.option("--dtype", type=DTYPES, default="base", show_default=True)
@rounding_option
@click.option("--seed", type=int, default=0, show_default=True, help="Of stochastic rounding.")
@click.option("--max-shard-size", default="5GB", show_default=True)
@force_option
@quiet_option
def reconstruct(
    folder: Path, run: str, out: Path, dtype: str, rounding: str, seed: int, max_shard_size: str, force: bool, quiet: bool
) -> None:
    """Turn the masks that `merge --save-masks` left in FOLDER back into the single run RUN: base + mask ⊙ reference."""
    from emomerge.adapters import open_dense
    from emomerge.cli.merge_command import only_a_card, write_model
    from emomerge.merging import masks
    from emomerge.merging.record import Output, read_record

    record = read_record(folder)
    record.check_base()
    base = open_dense(record.base)
    rebuilt = masks.reconstruct(folder, run, base)
    context = {"title": out.stem, "about": f"{run}, reconstructed from the masks in {folder}.", "base": record.base}
    output = Output(dtype=dtype, rounding=rounding, seed=seed, max_shard_size=max_shard_size)
    write_model(
        rebuilt, base, out, f"reconstruct {run}", output, force=force, quiet=quiet, papers=lambda _: only_a_card(context)
    )
    click.echo(str(out))
