"""The command `schema`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from emomerge.cli.command import command, force_option, json_option, out_path, quiet_option
from emomerge.cli.printing import print_json
from emomerge.errors import BadInput, shown


@command("schema", "emomerge schema -o recipe.schema.json\nemomerge schema results\nemomerge schema merge")
@click.argument("what", default="recipe", metavar="[recipe|results|error|COMMAND]")
@click.option("-o", "--out", type=out_path, help="Output file (default: standard output).")
@force_option
@quiet_option
@json_option
def schema(what: str, out: Path | None, force: bool, quiet: bool, as_json: bool) -> None:
    """Print a JSON schema: of recipes, with which editors complete and check them; of results.json; of what a COMMAND prints
    with --json; or of the error that it then prints on standard error if it fails.
    """
    from emomerge.checkpoints import atomic
    from emomerge.files import to_json

    text = to_json(schema_of(what))
    if out is None:
        click.echo(text)
        return
    atomic.refuse_existing(out, force=force)
    atomic.write_text(out, text + "\n")
    if as_json:
        print_json({"out": str(out), "of": what})
    elif not quiet:
        hint = f"; first line of a recipe: # yaml-language-server: $schema={shown(out)}" if what == "recipe" else ""
        click.echo(f"{shown(out)}{hint}")


def schema_of(what: str) -> dict[str, Any]:
    """Return a JSON schema by its name.

    Raises:
        BadInput: nothing of that name has one.
    """
    from emomerge.cli.outputs import DIALECT, OUTPUTS, output_schema

    if what == "recipe":
        from emomerge.merging import METHODS
        from emomerge.recipe.schema import recipe_schema

        return recipe_schema(METHODS)
    if what == "results":
        from emomerge.results import Results

        return {"$schema": DIALECT, **Results.model_json_schema(mode="serialization")}
    if what != "error" and what not in OUTPUTS:
        raise BadInput(
            "nothing of this name has a schema", found=what, expected=f"recipe, results, error, {', '.join(OUTPUTS)}"
        )
    return output_schema(what)
