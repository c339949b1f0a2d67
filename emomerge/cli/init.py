"""The command `init`."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from emomerge.cli.command import command, force_option, json_option, out_path, quiet_option
from emomerge.cli.completion import complete_templates
from emomerge.cli.printing import print_json
from emomerge.errors import BadInput, shown


@command("init", "emomerge init movie-reviews -o my-recipe.yaml\nemomerge init --from reviews.tsv -o reviews.yaml")
@click.argument("template", required=False, shell_complete=complete_templates)
@click.option(
    "--from",
    "data",
    type=click.Path(path_type=Path),
    metavar="DATA",
    help="Look at this CSV, TSV or JSONL file, or folder of images or texts, and write a recipe for it.",
)
@click.option("--base", help="The model to fine-tune, a Hub id or a folder (with --from; default: a small one of the Hub).")
@click.option("-o", "--out", type=out_path, help="Output file (default: <template>.yaml, or the data's name).")
@force_option
@quiet_option
@json_option
def init(
    template: str | None, data: Path | None, base: str | None, out: Path | None, force: bool, quiet: bool, as_json: bool
) -> None:
    """Write a commented recipe to start from: digits, movie-reviews, fashion-mnist, causal-lm, flow-fashion or autoencoder;
    or, with --from, one for data of your own."""
    from emomerge.checkpoints import atomic

    if data is not None:
        if template is not None:
            raise BadInput("give a template or --from, not both", found=template)
        _from_data(data, base, out or Path(f"{data.stem}.yaml"), force=force, quiet=quiet, as_json=as_json)
        return
    if base is not None:
        raise BadInput("--base goes with --from", fix="set base.model in the recipe that init writes")
    from emomerge.cli.templates import template_file

    source = template_file(template or "digits")
    target = out or Path(f"{source.stem}.yaml")
    files = {source: target}
    if source.with_suffix(".py").exists():  # the function of a custom task
        files[source.with_suffix(".py")] = target.with_name(f"{source.stem}.py")
    for copy in files.values():
        atomic.refuse_existing(copy, force=force)
    for original, copy in files.items():
        atomic.write_text(copy, original.read_text(encoding="utf-8"))
    if as_json:
        print_json({"out": str(target), "files": [str(copy) for copy in files.values()]})
    elif not quiet:
        click.echo(f"{shown(target)}: run it with `emomerge run {shlex.quote(shown(target))}`")


def _from_data(data: Path, base: str | None, out: Path, *, force: bool, quiet: bool, as_json: bool) -> None:
    from emomerge.checkpoints import atomic
    from emomerge.cli.look import look_at, recipe_text

    atomic.refuse_existing(out, force=force)
    look = look_at(data)
    atomic.write_text(out, recipe_text(look, data, out, base))
    if as_json:
        seen = {"task": look.kind, "rows": look.rows, "facts": list(look.facts)}
        print_json({"out": str(out), "files": [str(out)], **seen})
    elif not quiet:
        click.echo(f"{shown(data)}: {look.rows:,} rows, taken for {look.kind}")
        for fact in look.facts:
            click.echo(f"  {shown(fact)}")
        click.echo(f"{shown(out)}: check it, then run it with `emomerge run {shlex.quote(shown(out))}`")
