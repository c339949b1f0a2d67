"""Checkpoint files of a run in progress: one safetensors file with tensors, and a JSON header in its metadata."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from emomerge.checkpoints import atomic
from emomerge.errors import BadInput
from emomerge.training.sharded import unshard


def save_state(file: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and header, replacing `file`; a collective operation if tensors are sharded over ranks."""
    contiguous = {name: unshard(tensor.detach()).contiguous() for name, tensor in tensors.items()}
    with atomic.translate_os_error(file), atomic.new_path(file, force=True) as temporary:
        save_file(contiguous, temporary, metadata={"state": json.dumps(header)})


def load_header(file: Path, inputs: str) -> dict[str, Any] | None:
    """Return the header; None if there is no file or it has other inputs. Raises BadInput if the file is damaged."""
    found = load_state(file, inputs, kinds=())
    return found[0] if found else None


def load_state(
    file: Path, inputs: str | None = None, kinds: Collection[str] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Return header and tensors; None if there is no file or it has other inputs.

    Args:
        inputs: the inputs hash that the header must have; None accepts any.
        kinds: load only tensors whose names begin with `<kind>.`; by default all.

    Raises:
        BadInput: the file is damaged.
    """
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            header: dict[str, Any] = json.loads(opened.metadata()["state"])
            if inputs not in (None, header["inputs"]):
                return None
            names = [name for name in opened.keys() if kinds is None or name.partition(".")[0] in kinds]  # noqa: SIM118
            return header, {name: opened.get_tensor(name) for name in names}
    except Exception as error:  # safetensors raises its own type, whose message does not name the file
        raise BadInput(
            "the run's checkpoint cannot be read", where=file, found=error, fix="delete it to train this run from scratch"
        ) from None


def of_kind(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Return the tensors named `<kind>.…`, without that prefix."""
    return {name.removeprefix(f"{kind}."): tensor for name, tensor in tensors.items() if name.startswith(f"{kind}.")}
