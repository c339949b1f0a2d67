"""The command that merges adapters into their base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from emomerge.cli.command import DTYPES, command, force_option, json_option, out_path, quiet_option, rounding_option
from emomerge.cli.printing import print_json, print_rounding
from emomerge.cli.write import Destination, card_only, header_of, write_model
from emomerge.errors import shown
from emomerge.watch import watched_inputs


@command(
    "bake",
    """
    emomerge bake out/digits/base out/digits/runs/sens-0/adapter -o baked.safetensors
    emomerge bake sd_xl_base_1.0.safetensors style.safetensors=0.8 pose.safetensors=0.5 -o baked.safetensors
    emomerge bake base run-a --dtype bfloat16 --rounding stochastic --seed 1 -o baked
    """,
)  # fmt: skip
@click.argument("base")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[=STRENGTH]...")
@click.option("-o", "--out", type=out_path, required=True, help="A folder, or one file ending in .safetensors.")
@click.option("--dtype", type=DTYPES, default="base", show_default=True)
@rounding_option
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of stochastic rounding.")
@click.option("--max-shard-size", default="5GB", show_default=True)
@click.option(
    "--allow-unmatched",
    is_flag=True,
    help="Warn about adapter tensors that match no tensor of BASE, instead of refusing them.",
)
@force_option
@quiet_option
@json_option
@watched_inputs()
def bake(
    base: str, adapters: Sequence[str], out: Path, dtype: str, rounding: str, seed: int, max_shard_size: str,
    allow_unmatched: bool, force: bool, quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """Write BASE with each ADAPTER merged into its weights: computed in float32, rounded once.

    A STRENGTH s adds s times what the adapter changes in BASE, of every kind of adapter; by default it is 1.
    """
    from emomerge.adapters import Strong, bake_several
    from emomerge.files import to_json
    from emomerge.merging.record import Output

    given = [Strong.parse(adapter) for adapter in adapters]
    baked = bake_several(base, given, allow_unmatched=allow_unmatched)
    opened = baked.base
    output = Output(dtype=dtype, rounding=rounding, seed=seed, max_shard_size=max_shard_size)
    record: list[dict[str, Any]] = [each._asdict() for each in given]
    strengths = ", ".join(f"`{each.adapter}`" + ("" if each.strength == 1 else f" × {each.strength:g}") for each in given)
    about = f"{strengths} merged into the weights of {'its' if len(given) == 1 else 'their'} base."
    card = card_only(title=out.stem, about=about, base=base)
    lost = write_model(
        baked, opened, Destination(out, force, quiet), output, title="bake",
        texts=lambda facts: {"bake.json": to_json({"base": base, "adapters": record}) + "\n", **card(facts)},
        metadata=header_of(opened, out, record, {}),
    )  # fmt: skip
    if as_json:
        print_json({"out": str(out), "base": base, "adapters": record, "rounding_loss": lost})
        return
    if not quiet:
        print_rounding(lost)
    click.echo(shown(out))
