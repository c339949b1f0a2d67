"""The command `schema`."""

from __future__ import annotations

from pathlib import Path

import click

from emomerge.cli.command import command, force_option, out_path, quiet_option
from emomerge.errors import shown


@command("schema", "emomerge schema -o recipe.schema.json\nemomerge schema results")
@click.argument("what", default="recipe", type=click.Choice(["recipe", "results"]))
@click.option("-o", "--out", type=out_path, help="Output file (default: standard output).")
@force_option
@quiet_option
def schema(what: str, out: Path | None, force: bool, quiet: bool) -> None:
    """Print the JSON schema of recipes, with which editors complete and check them, or of results.json."""
    from emomerge.checkpoints import atomic
    from emomerge.files import to_json
    from emomerge.merging import METHODS
    from emomerge.recipe.schema import recipe_schema
    from emomerge.results import Results

    text = to_json(recipe_schema(METHODS) if what == "recipe" else Results.model_json_schema(mode="serialization"))
    if out is None:
        click.echo(text)
        return
    atomic.refuse_existing(out, force=force)
    atomic.write_text(out, text + "\n")
    if not quiet:
        hint = f"; first line of a recipe: # yaml-language-server: $schema={shown(out)}" if what == "recipe" else ""
        click.echo(f"{shown(out)}{hint}")
