"""The commands `inspect` and `status`."""

from __future__ import annotations

from pathlib import Path

import click

from emomerge.cli.command import command, json_option, out_path, quiet_option
from emomerge.cli.printing import console, print_json
from emomerge.errors import BadInput, shown
from emomerge.watch import watched_inputs


@command(
    "inspect",
    """
    emomerge inspect out/digits/base out/digits/runs/sens-0
    emomerge inspect run-a run-b --base base --top 10
    emomerge inspect style.safetensors sd_xl_base_1.0.safetensors
    """,
)  # fmt: skip
@click.argument("path")
@click.argument("other", required=False)
@click.option("--base", help="Base of PATH and OTHER: compare their task vectors instead of their weights.")
@click.option("--top", type=click.IntRange(min=0), default=40, show_default=True, help="Tensors to show; 0 shows all.")
@quiet_option
@json_option
def inspect(path: str, other: str | None, base: str | None, top: int, quiet: bool, as_json: bool) -> None:
    """Describe PATH, a checkpoint or an adapter; with OTHER, list the tensors that differ, largest differences first.

    If PATH is an adapter and OTHER a model, say how much of the adapter fits the model.
    """
    from emomerge.cli.inspection import compare, describe, fits, kernels, show_comparison, show_description

    if other is None or (base is None and fits(path, other)):
        if base is not None:
            raise BadInput("--base belongs to a comparison", found=base, fix="name two paths")
        with watched_inputs():
            described = {**describe(path, other), "kernels": kernels()}
        print_json(described) if as_json else console().print(show_description(described))
    else:
        with watched_inputs():
            compared = compare(path, other, base=base)
        print_json(compared) if as_json else console().print(show_comparison(compared, top=top))


@command("status", "emomerge status\nemomerge status out/digits --watch")
@click.argument("folder", required=False, type=out_path)
@click.option("--watch", is_flag=True, help="Keep updating the table while a process works in FOLDER.")
@quiet_option
@json_option
def status(folder: Path | None, watch: bool, quiet: bool, as_json: bool) -> None:
    """Show the runs and stages in FOLDER: their progress, and the machine and process that trains each run.

    Without FOLDER: the output folder that changed last, of those around or below the current folder, or else of those that were
    used last.
    """
    if folder is None:
        from emomerge.cli.recent import find_outputs

        found = find_outputs(Path())
        if not found:
            raise BadInput("no output folder here, and none that was used before", where=Path.cwd(), fix="name one")
        folder = found[0]
        if found[1:] and not quiet:
            click.echo(f"Others: {', '.join(shown(other) for other in found[1:])}", err=True)
    if watch and not as_json:
        from emomerge.cli.status import watch_status

        watch_status(folder, console())
    else:
        print_status(folder, as_json)


def print_status(folder: Path, as_json: bool) -> None:
    """Print the runs and stages of an output folder."""
    from emomerge.cli.status import show_status, status_of

    found = status_of(folder)
    print_json(found) if as_json else console().print(show_status(found))
