"""Opening models and runs: a dense checkpoint, an adapter over its base, or a run directory that says which."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from pydantic import BaseModel

from emomerge.adapters.aligned import aligned, distinct
from emomerge.adapters.baked import BakedCheckpoint, ChangedCheckpoint
from emomerge.adapters.combined import CombinedCheckpoint, Strong
from emomerge.adapters.formats import all_formats, format_of, is_adapter
from emomerge.adapters.unsupported import dequantized, refuse_adapter
from emomerge.checkpoints import Checkpoint, open_checkpoint
from emomerge.checkpoints.reader import inside
from emomerge.errors import BadInput
from emomerge.files import read_json


class _State(BaseModel):
    """What is read of run.json."""

    artefact: str


def bake(base: Checkpoint | str | Path, adapter: str | Path, *, allow_unmatched: bool = False) -> BakedCheckpoint:
    """Merge an adapter into its base, lazily.

    Args:
        base: the model that the adapter was trained on.
        adapter: an adapter of a known format (see `adapters.formats`), or a run directory that holds one.
        allow_unmatched: skip adapter keys that match no base tensor, with a warning.

    Raises:
        BadInput: the adapter is damaged, unsupported, or does not fit the base.
    """
    if not isinstance(base, Checkpoint) and is_adapter(artefact_of(base)) and not is_adapter(artefact_of(adapter)):
        what, found = "the base comes first, then the adapter", f"the adapter {base} first"
        raise BadInput(what, found=found, fix=f"exchange them: {adapter} {base}")
    base = distinct(base if isinstance(base, Checkpoint) else open_dense(base))
    path = artefact_of(adapter)
    form = format_of(path)
    if form is None:
        if path.is_file():
            refuse_adapter(open_checkpoint(path), where=path)
        raise BadInput("no adapter here", where=path, expected=" or ".join(known.layout for known in all_formats()))
    return BakedCheckpoint(
        base,
        form.read(path, base, allow_unmatched=allow_unmatched),
        source=str(adapter),
        adapter_folder=path if path.is_dir() else path.parent,
        reopen=partial(bake, base, path.absolute(), allow_unmatched=allow_unmatched),
    )


def bake_several(
    base: Checkpoint | str | Path, adapters: Sequence[Strong], *, allow_unmatched: bool = False
) -> ChangedCheckpoint:
    """Merge adapters into their base, each with a strength, lazily; see `CombinedCheckpoint` for what that means.

    Args:
        base: the model that they were trained on.
        adapters: the adapters, in the order of the sum, as for `bake`.
        allow_unmatched: as in `bake`.

    Raises:
        BadInput: as `bake`; or there is no adapter.
    """
    if not adapters:
        raise BadInput("no adapters to merge", expected="at least one")
    first = bake(base, adapters[0].adapter, allow_unmatched=allow_unmatched)
    if len(adapters) == 1 and adapters[0].strength == 1:
        return first
    others = [bake(first.base, each.adapter, allow_unmatched=allow_unmatched) for each in adapters[1:]]
    return CombinedCheckpoint(
        first.base, [(baked, each.strength) for baked, each in zip([first, *others], adapters, strict=True)]
    )


def open_run(base: Checkpoint, run: Checkpoint | str | Path, *, allow_unmatched: bool = False) -> Checkpoint:
    """Open the weights of a run over `base`, lazily, with the base's names (see `adapters.aligned`).

    Args:
        base: the model that the run started from.
        run: a Checkpoint; a run directory, whose `run.json` names the `artefact` in it; an
            adapter; or anything that `open_dense` accepts.
        allow_unmatched: as in `bake`.

    Raises:
        BadInput: it is none of these, or damaged.
    """
    if isinstance(run, Checkpoint):
        return aligned(base, run)
    path = artefact_of(run)
    if is_adapter(path):
        return bake(base, path, allow_unmatched=allow_unmatched)
    return aligned(base, _open_whole(path if path.exists() else run))


def open_dense(source: str | Path) -> Checkpoint:
    """Open a whole model; `open_checkpoint` for sources that a user names. Tied tensors have one name.

    Raises:
        BadInput: as `open_checkpoint`; or `source` is an adapter.
    """
    return distinct(_open_whole(source))


def _open_whole(source: str | Path) -> Checkpoint:
    checkpoint = open_checkpoint(source)
    paths = set(checkpoint.paths)
    if paths and (form := format_of(source)) is not None and paths <= set(form.files(Path(source))):
        raise BadInput(
            "this is an adapter, not a whole model", where=source, fix="name its base first: emomerge bake BASE ADAPTER"
        )
    refuse_adapter(checkpoint, where=source)
    return dequantized(checkpoint, where=source)


def input_files(source: str | Path) -> dict[str, Path]:
    """Return the files that a base or a run is read from, by their names relative to its folder, sorted by path."""
    path = artefact_of(source)
    if (form := format_of(path)) is not None:
        return {file.name: file for file in form.files(path)}
    checkpoint = _open_whole(path if path.exists() else source)
    folder = checkpoint.folder or Path()
    return {file.relative_to(folder).as_posix(): file for file in checkpoint.paths}


def artefact_of(run: str | Path) -> Path:
    """Return the subfolder of a run directory that holds its weights; any other path unchanged.

    Raises:
        BadInput: the run has no weights yet, or they are missing.
    """
    folder, path = Path(run), Path(run) / "run.json"
    if not path.is_file():
        return folder
    name = read_json(path, _State, what="the run has no weights yet", fix="finish it first").artefact
    artefact = inside(folder, name, named_by=path)
    if not artefact.is_dir():
        raise BadInput("the run's weights are missing", where=path, expected=f"a folder {name}")
    return artefact
