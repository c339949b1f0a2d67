"""The command that describes the merge methods."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from emomerge.cli.command import command, json_option, quiet_option
from emomerge.cli.completion import complete_methods
from emomerge.cli.printing import console, print_json

if TYPE_CHECKING:
    from emomerge.merging import MergeMethod


@command(
    "methods",
    """
    emomerge methods
    emomerge methods ties
    """,
)  # fmt: skip
@click.argument("name", required=False, shell_complete=complete_methods)
@quiet_option
@json_option
def methods(name: str | None, quiet: bool, as_json: bool) -> None:
    """List the merge methods; with NAME, describe one and its parameters."""
    from emomerge.merging import METHODS, find_method

    described = [describe_method(method) for method in ([find_method(name)] if name else METHODS.values())]
    if as_json:
        print_json(described[0] if name else described)
    elif name:
        print_method(described[0])
    else:
        print_methods(described)


def describe_method(method: MergeMethod) -> dict[str, Any]:
    """Return the description of a merge method as JSON-compatible data."""
    return {
        "name": method.name,
        "family": method.family,
        "formula": method.formula,
        "source": method.source,
        "runs": method.exact_runs,
        "held_out_loss": "required" if method.needs_loss else "optional",
        "chooses_weights_and_scale": method.tuned,
        "incremental": method.incremental,
        "saves_masks": method.localize is not None,
        "parameters": [vars(parameter) for parameter in method.parameters],
    }


def print_methods(described: list[dict[str, Any]]) -> None:
    """Print a table of the methods, grouped by family."""
    from rich.table import Table

    from emomerge.merging.registry import DEFAULT_METHOD

    table = Table("method", "formula", "source", box=None, pad_edge=False)
    table.columns[0].no_wrap = True
    table.columns[2].max_width = 22
    family = described[0]["family"]
    for method in described:
        if method["family"] != family:
            table.add_section()
            table.add_row()
            family = method["family"]
        table.add_row(method["name"], _plain(method["formula"]), method["source"])
    console().print(table)
    click.echo("\nτ_t: task vector of run t; τ̄: their mean; N: number of runs.")
    click.echo(f"Default: {DEFAULT_METHOD}. Parameters: emomerge methods NAME")


def print_method(method: dict[str, Any]) -> None:
    """Print one method and a table of its parameters."""
    from rich.table import Table

    loss = "required: give a --recipe" if method["held_out_loss"] == "required" else "only for parameters that are `auto`"
    if method["chooses_weights_and_scale"]:
        loss = "chooses weights and scale if there is a --recipe, unless they are given"
    facts = Table(box=None, show_header=False, pad_edge=False)
    for label, value in {
        method["name"]: method["formula"],
        "source": method["source"],
        "runs": f"exactly {method['runs']}" if method["runs"] else "any number",
        "held-out loss": loss,
        "--extend": "merges the same way" if method["incremental"] else "makes its choices from scratch",
        "--save-masks": "yes" if method["saves_masks"] else "no",
    }.items():
        facts.add_row(label, _plain(value))
    table = Table("--set", "value", "default", "meaning", box=None, pad_edge=False)
    table.columns[0].no_wrap = True
    for parameter in method["parameters"]:
        default = json.dumps(parameter["default"]).strip('"') if parameter["default"] not in (None, ()) else "–"
        table.add_row(parameter["name"], parameter["type"], default, _plain(parameter["description"]))
    screen = console()
    screen.print(facts)
    screen.print()
    screen.print(table)
    click.echo("\nA list of numbers is spread evenly over the layers and interpolated;")
    click.echo("[{filter: TEXT, value: …}, …] sets a parameter by tensor name.")


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(text)
