"""Write models and adapters for the commands, with a progress bar, a model card and a record."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emomerge.checkpoints import Checkpoint, SideFile
    from emomerge.merging import MergedCheckpoint
    from emomerge.merging.record import Output
    from emomerge.merging.shards import ShardWriter

TextFiles = Callable[[dict[str, Any]], dict[str, str]]
"""Facts about what was written → the text files of the folder, by name."""


@dataclass(frozen=True)
class Destination:
    """The output of a command, and whether to show progress."""

    out: Path
    force: bool
    """Overwrite an existing output."""
    quiet: bool


def write_model(
    checkpoint: Checkpoint, base: Checkpoint, destination: Destination, output: Output, *, title: str, texts: TextFiles,
    side_files: Mapping[str, SideFile] = MappingProxyType({}), shards_by: ShardWriter | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write a model and return the figures of its rounding loss (see `RoundingLoss.figures`)."""
    from emomerge.checkpoints import RoundingLoss, write_checkpoint
    from emomerge.progress import Display

    display, loss = Display(quiet=destination.quiet), RoundingLoss(base)
    with display.live():
        line = display.line(title, len(checkpoint))
        write_checkpoint(
            checkpoint, destination.out, dtype=output.dtype, rounding=output.rounding, seed=output.seed, loss=loss,
            max_shard_size=output.max_shard_size, files_from=base.folder,
            beside=side_files, extra_files=lambda: texts({"rounding_loss": loss.figures()}),
            force=destination.force, progress=lambda name, _: line.add(1, name), shards_by=shards_by,
        )  # fmt: skip
    return loss.figures()


def write_adapter(merged: MergedCheckpoint, destination: Destination, output: Output, *, texts: TextFiles) -> None:
    """Write a merge as an adapter of rank `output.as_lora`."""
    from emomerge.merging.lora import truncate
    from emomerge.progress import Display

    display = Display(quiet=destination.quiet)
    with display.live():
        line = display.line("adapter", len(merged))
        truncated = truncate(
            merged, merged.base, rank=output.as_lora or "auto", energy=output.energy, max_rank=output.max_rank,
            allow_partial=output.allow_partial, progress=lambda name, _: line.add(1, name),
        )  # fmt: skip
    dtype = "float32" if output.dtype == "base" else output.dtype
    files = texts({"adapter": truncated.figures()})
    truncated.adapter().write(destination.out, dtype=dtype, extra_files=files, force=destination.force, weights=merged)


def card_only(**context: Any) -> TextFiles:
    """Return text files that consist of only a model card with this context."""
    return lambda _: {"README.md": card(context)}


def merge_card(record: dict[str, Any], out: Path) -> str:
    """Render the model card of a merge from the content of its merge.json."""
    context = {**record, "title": out.stem, "name": out.stem, "params": record["diagnostics"]["params"]}
    if "adapter" in record:
        about = f"A LoRA adapter that holds {record['adapter']['energy']:.2%} of the squared length of the merged task vector."
        context |= {"library_name": "peft", "about": about}
    return card(context)


def card(context: dict[str, Any]) -> str:
    """Render a model card that names the command and the version of emomerge."""
    from importlib.metadata import version

    from emomerge.reporting import Card, model_card

    known = {**context, "command": shlex.join(["emomerge", *sys.argv[1:]]), "version": version("emomerge")}
    return model_card(Card.model_validate(known))
