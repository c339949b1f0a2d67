"""A run, whatever it left: an adapter, a dense model, or a run directory that says which."""

from __future__ import annotations

import json
from pathlib import Path

from emomerge.adapters.bake import bake
from emomerge.adapters.peft import CONFIG
from emomerge.checkpoints import Checkpoint, open_checkpoint
from emomerge.checkpoints.reader import inside
from emomerge.errors import BadInput


def open_run(base: Checkpoint, run: Checkpoint | str | Path, *, allow_unmatched: bool = False) -> Checkpoint:
    """The weights of a run over `base`, lazily.

    Args:
        base: what the run started from.
        run: a Checkpoint, which is passed through; a run directory, whose `run.json` names the `artefact` in it; an
            adapter folder; or anything that `open_checkpoint` takes.

    Raises:
        BadInput: it is none of these, or damaged.
    """
    if isinstance(run, Checkpoint):
        return run
    path = Path(run)
    if (path / "run.json").is_file():
        path = _artefact(path)
    if (path / CONFIG).is_file():
        return bake(base, path, allow_unmatched=allow_unmatched)
    return open_checkpoint(path if path.exists() else run)


def _artefact(folder: Path) -> Path:
    """The subfolder of a run directory that holds its weights."""
    path = folder / "run.json"
    try:
        name = json.loads(path.read_text(encoding="utf-8"))["artefact"]
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(
            "a run that has left no weights yet", where=path, expected='"artefact"', fix="finish it first"
        ) from error
    artefact = inside(folder, str(name), named_by=path)
    if not artefact.is_dir():
        raise BadInput("the run's weights are missing", where=path, expected=f"a folder {name}")
    return artefact
