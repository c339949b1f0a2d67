"""Print results on standard output."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from emomerge.errors import shown

if TYPE_CHECKING:
    from emomerge.merging.record import MergeRecord
    from emomerge.results import Results


def console() -> Any:
    """Return a console for standard output."""
    from emomerge.progress import plain_console

    return plain_console()


def print_json(value: object) -> None:
    """Print a value as JSON."""
    from emomerge.files import to_json

    click.echo(to_json(value))


def print_results(results: Results, report: Path) -> None:
    """Print the figures, the warnings, the verdict and the recommended artefact."""
    from emomerge.reporting import figures_table

    screen = console()
    screen.print(figures_table(results, screen.width))
    for name, warning in ((name, warning) for name, facts in results.merges.items() for warning in facts.warnings):
        screen.print(f"Warning, {name}: {warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    if results.verdict:
        screen.print(results.verdict.sentence, style="bold", markup=False, highlight=False, soft_wrap=True)
        for caveat in results.verdict.caveats:
            screen.print(f"  {caveat}", markup=False, highlight=False, soft_wrap=True)
    if results.selected:
        found = results.selected
        where = found.command or (found.path or "") * (found.kind == "control")
        for line in [found.sentence, *([f"  {where}"] if where else [])]:
            screen.print(line, markup=False, highlight=False, soft_wrap=True)
    click.echo(f"Report: {report}")


def print_diagnostics(diagnostics: dict[str, Any]) -> None:
    """Print the diagnostics of a merge, its warnings on standard error."""
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for key, value in diagnostics.items():
        if isinstance(value, (int, float, str)):
            table.add_row(key, f"{value:.4g}" if isinstance(value, float) else str(value))
        elif isinstance(value, dict):
            pairs = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in value.items())
            table.add_row(key, pairs)
    console().print(table)
    for warning in diagnostics.get("warnings", []):
        click.echo(f"Warning: {shown(warning)}", err=True)


def print_rounding(lost: dict[str, Any] | None) -> None:
    """Print the rounding loss of the task vector, if it was measured."""
    if lost and lost["relative_error"] is not None:
        text = (
            f"rounding left {lost['unchanged']:.1%} of the moved weights at the base's value; relative error of the task vector"
        )
        click.echo(f"{text} {lost['relative_error']:.2g}")


def print_truncation(adapter: dict[str, Any] | None, record: MergeRecord) -> None:
    """Print how much of a merge an adapter holds, layer by layer."""
    from rich.table import Table

    if adapter is None:
        return
    table = Table("tensor", "rank", "energy captured", "share of all energy")
    for name, layer in adapter["layers"].items():
        table.add_row(name, str(layer["rank"]), f"{layer['energy']:.2%}", f"{layer['share']:.2%}")
    for name, share in adapter["saved"].items():
        table.add_row(name, "whole", "", f"{share:.2%}")
    for name, share in adapter["left_out"].items():
        table.add_row(name, "–", "left out", f"{share:.2%}")
    table.add_row("all", "", f"{adapter['energy']:.2%}", "")
    console().print(table)
    limit, wanted = record.output.max_rank, record.output.energy
    short = [name for name, layer in adapter["layers"].items() if layer["energy"] < wanted and layer["rank"] == limit]
    if record.output.as_lora == "auto" and short:
        click.echo(f"Warning: {len(short)} layers hold less than {wanted:.0%} at --max-rank {limit}", err=True)
