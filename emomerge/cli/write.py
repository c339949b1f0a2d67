"""Write models and adapters for the commands, with a progress bar, a model card and a record."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from emomerge.errors import BadInput

if TYPE_CHECKING:
    from emomerge.checkpoints import Checkpoint, SideFile
    from emomerge.merging import MergedCheckpoint
    from emomerge.merging.image_lora import ImageTruncation
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
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:  # fmt: skip
    """Write a model and return the figures of its rounding loss (see `RoundingLoss.figures`)."""
    from emomerge.adapters.images.targets import is_image_model
    from emomerge.checkpoints import RoundingLoss, write_checkpoint
    from emomerge.progress import Display

    display, loss = Display(quiet=destination.quiet), RoundingLoss(base)
    with display.live():
        line = display.line(title, len(checkpoint))
        write_checkpoint(
            checkpoint, destination.out, dtype=output.dtype, rounding=output.rounding, seed=output.seed, loss=loss,
            max_shard_size=output.max_shard_size, files_from=base.folder, metadata=metadata,
            one_file=base.file is not None and is_image_model(base), beside=side_files,
            extra_files=lambda: texts({"rounding_loss": loss.figures()}),
            force=destination.force, progress=lambda name, _: line.add(1, name), shards_by=shards_by,
            hashed=False,
        )  # fmt: skip
    return loss.figures()


def write_adapter(merged: MergedCheckpoint, destination: Destination, output: Output, *, texts: TextFiles) -> None:
    """Write a merge as an adapter of rank `output.as_lora`, in the format asked for, else in the usual one of its base."""
    from emomerge.adapters.images.targets import is_image_model
    from emomerge.merging.image_lora import ImageTruncation, truncate_images
    from emomerge.merging.lora import Truncation, truncate
    from emomerge.progress import Display

    images = is_image_model(merged.base)
    style = output.format or ("kohya" if images else "peft")
    if (style == "peft") == images:
        what = "an image model has no PEFT folder" if images else "only an image model has such an adapter file"
        raise BadInput(what, found=f"--format {style}", fix=f"give --format {'diffusers' if images else 'peft'}")
    if style == "peft" and destination.out.suffix == ".safetensors":
        raise BadInput("--as-lora writes a folder", found=f"-o {destination.out}")
    display = Display(quiet=destination.quiet)
    options: dict[str, Any] = {
        "rank": output.as_lora or "auto", "energy": output.energy, "max_rank": output.max_rank,
        "allow_partial": output.allow_partial,
    }  # fmt: skip
    truncated: Truncation | ImageTruncation
    with display.live():
        line = display.line("adapter", len(merged))
        options["progress"] = lambda name, _: line.add(1, name)
        if style == "peft":
            truncated = truncate(merged, merged.base, **options)
        else:
            truncated = truncate_images(merged, merged.base, style=style, **options)
    dtype = "float32" if output.dtype == "base" else output.dtype
    files = texts({"adapter": truncated.figures()})
    if isinstance(truncated, ImageTruncation):
        _write_image_adapter(truncated, destination, dtype, files)
        return
    truncated.adapter().write(destination.out, dtype=dtype, extra_files=files, force=destination.force, weights=merged)


def _write_image_adapter(found: ImageTruncation, destination: Destination, dtype: str, files: Mapping[str, str]) -> None:
    """Write an adapter of an image model as one file, or as a folder with that file and the record of the merge."""
    import torch

    from emomerge.checkpoints.atomic import new_path, translate_os_error

    out = destination.out
    title = out.name.removesuffix(".safetensors")
    content = found.adapter.content(getattr(torch, dtype), title=title)
    with translate_os_error(out, needed=len(content)), new_path(out, force=destination.force) as temporary:
        if out.suffix == ".safetensors":
            temporary.write_bytes(content)
            return
        temporary.mkdir()
        (temporary / f"{out.name}.safetensors").write_bytes(content)
        for name, text in files.items():
            (temporary / name).write_text(text, encoding="utf-8", newline="\n")


def header_of(base: Checkpoint, out: Path, sources: Sequence[dict[str, Any]], how: dict[str, Any]) -> dict[str, str]:
    """Return what the header of a single file says about a model made from one; nothing if the base is none.

    Args:
        base: the base.
        out: the output of the command.
        sources: of each adapter or run its path, as the first value, and what else is to be known; what its trainer wrote into
            its own header (`ss_*`) is added.
        how: anything else.
    """
    if base.file is None:
        return {}
    from importlib.metadata import version

    from emomerge.adapters.images.grammar import read_header
    from emomerge.adapters.images.targets import is_image_model
    from emomerge.checkpoints import made_of

    described = []
    for source in sources:
        header = read_header(Path(next(iter(source.values()))))
        trained = {key: text for key, text in (header.metadata if header else {}).items() if key.startswith("ss_")}
        described.append({**source, "metadata": trained} if trained else source)
    return made_of(
        base.file.metadata, title=out.name.removesuffix(".safetensors"),
        sources=[base.file.path, *(next(iter(source.values())) for source in sources)],
        record={"version": version("emomerge"), "base": base.source, "sources": described, **how},
        is_image_model=is_image_model(base),
    )  # fmt: skip


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
