"""The command `push`."""

from __future__ import annotations

from pathlib import Path

import click

from emomerge.cli.command import command, json_option, out_path, quiet_option
from emomerge.cli.printing import console, print_json


@command(
    "push",
    """
    emomerge push out/digits/merges/tall-mask me/digits-merged --dry-run
    emomerge push out/digits/runs/sens-0 me/digits-adapter --dry-run
    emomerge push out/digits me/digits-merged --private
    """,
    extras=("hub",),
)  # fmt: skip
@click.argument("model", type=out_path)
@click.argument("repo")
@click.option(
    "--private", is_flag=True, help="Make a new repository private (default: as your account or organization has it)."
)
@click.option("--revision", metavar="BRANCH", help="Branch to commit to, made if it does not exist (default: main).")
@click.option("--message", default="Upload a model made with emomerge", show_default=True, help="Message of the commit.")
@click.option("--dry-run", "dry", is_flag=True, help="List the files and show the model card; upload nothing.")
@quiet_option
@json_option
def push(
    model: Path, repo: str, private: bool, revision: str | None, message: str, dry: bool, quiet: bool, as_json: bool
) -> None:
    """Upload MODEL to the repository REPO of the Hugging Face Hub, with its model card, in one commit.

    MODEL is a model or adapter, a run directory, or the output folder of a recipe: the model that its report recommends.
    Weights, configuration, tokenizer, card and the record of a merge are uploaded; states of training, logs and ledgers never
    are.
    """
    from emomerge.checkpoints.atomic import size
    from emomerge.cli import publish

    upload = publish.upload_of(model)
    done = {} if dry else publish.push(upload, repo, private=private, revision=revision, message=message)
    if as_json:
        about = {"repo": repo, "revision": revision, "private": private, "dry_run": dry}
        print_json({**about, "url": None, "commit": None, "files": upload.listed, "card": upload.card, **done})
        return
    screen = console()
    if not quiet:
        for file in upload.listed:
            screen.print(f"{file['name']}  {size(file['bytes'])}", highlight=False)
    if dry:
        screen.print(f"\n{upload.card}", highlight=False)
        screen.print(f"Nothing was uploaded to {repo}.", highlight=False)
    else:
        screen.print(done["url"], highlight=False, soft_wrap=True)
