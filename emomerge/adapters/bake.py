"""An adapter over its base as a checkpoint: each tensor is baked when it is asked for."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from emomerge.adapters.peft import Change, read_peft
from emomerge.checkpoints import Checkpoint, TensorInfo, open_checkpoint, working_dtype
from emomerge.checkpoints.reader import inside
from emomerge.errors import BadInput


class BakedCheckpoint(Checkpoint):
    """θ = θ₀ + Δ, tensor by tensor, in fp32 (float64 where the base is).

    `info` gives the base's dtypes, so that a writer rounds θ once; `delta` gives Δ itself, which no rounding touches:
    of bf16 weights of RMS 0.02 and Δ of RMS 1e-4, a third does not move at all when baked.
    """

    def __init__(self, base: Checkpoint, changes: dict[str, Change], *, source: str) -> None:
        self._base = base
        self._changes = changes
        self.source = source
        self.folder = base.folder

    def names(self) -> tuple[str, ...]:
        """The base's names."""
        return self._base.names()

    def info(self, name: str) -> TensorInfo:
        """The base's shape and dtype."""
        return self._base.info(name)

    def touched(self) -> tuple[str, ...]:
        """Names of the tensors that the adapter changes, sorted."""
        return tuple(self._changes)

    def __getitem__(self, name: str) -> Tensor:
        base = self._base[name]
        change = self._changes.get(name)
        if change is None:
            return base
        dtype = working_dtype(base.dtype)
        tensor = (base if change.replace is None else change.replace(base)).to(dtype)
        return tensor if change.delta is None else tensor + change.delta(dtype).to(tensor.device)

    def delta(self, name: str, base: Checkpoint) -> Tensor | None:
        """Δ exactly, None for a tensor left alone; over any base but its own, the plain difference."""
        if base is not self._base:
            return super().delta(name, base)
        change = self._changes.get(name)
        if change is None:
            return None
        if change.replace is not None or change.delta is None:
            return super().delta(name, base)
        return change.delta(working_dtype(base.info(name).dtype))


def bake(base: Checkpoint | str | Path, adapter: str | Path, *, allow_unmatched: bool = False) -> BakedCheckpoint:
    """Put an adapter into its base, lazily.

    Args:
        base: the model that the adapter was trained on.
        adapter: a PEFT LoRA folder, or a run directory that holds one.
        allow_unmatched: leave out, with a warning, adapter keys that find no base tensor.

    Raises:
        BadInput: the adapter is damaged, cannot be expressed, or does not fit the base.
    """
    base = base if isinstance(base, Checkpoint) else open_checkpoint(base)
    return BakedCheckpoint(base, read_peft(artefact_of(adapter), base, allow_unmatched=allow_unmatched), source=str(adapter))


def artefact_of(run: str | Path) -> Path:
    """The subfolder of a run directory that holds its weights; any other path as it is."""
    folder, path = Path(run), Path(run) / "run.json"
    if not path.is_file():
        return folder
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
