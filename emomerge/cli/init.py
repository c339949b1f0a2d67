"""The command `init`."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from emomerge.cli.command import command, force_option, out_path, quiet_option
from emomerge.errors import shown


@command("init", "emomerge init movie-reviews -o my-recipe.yaml")
@click.argument("template", default="digits")
@click.option("-o", "--out", type=out_path, help="Output file (default: <template>.yaml).")
@force_option
@quiet_option
def init(template: str, out: Path | None, force: bool, quiet: bool) -> None:
    """Write a commented recipe to start from: digits, movie-reviews, fashion-mnist, causal-lm, flow-fashion or autoencoder."""
    from emomerge.checkpoints import atomic
    from emomerge.cli.templates import template_file

    source = template_file(template)
    target = out or Path(f"{template}.yaml")
    files = {source: target}
    if source.with_suffix(".py").exists():  # the function of a custom task
        files[source.with_suffix(".py")] = target.with_name(f"{template}.py")
    for copy in files.values():
        atomic.refuse_existing(copy, force=force)
    for original, copy in files.items():
        atomic.write_text(copy, original.read_text(encoding="utf-8"))
    if not quiet:
        click.echo(f"{shown(target)}: run it with `emomerge run {shlex.quote(shown(target))}`")
