"""A run, whatever it left: an adapter, a dense model, or a run directory that says which."""

from __future__ import annotations

from pathlib import Path

from emomerge.adapters.bake import artefact_of, bake
from emomerge.adapters.peft import CONFIG
from emomerge.checkpoints import Checkpoint, open_checkpoint


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
    path = artefact_of(run)
    if (path / CONFIG).is_file():
        return bake(base, path, allow_unmatched=allow_unmatched)
    return open_checkpoint(path if path.exists() else run)
