"""Files of a run in progress: tensors, and what is none as JSON in the metadata; one safetensors file, replaced whole."""

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
from emomerge.training.sharded import whole


def save_state(file: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write both, replacing `file`; a collective where tensors are cut over ranks."""
    contiguous = {name: whole(tensor.detach()).contiguous() for name, tensor in tensors.items()}
    with atomic.translate_os_error(file), atomic.new_path(file, force=True) as temporary:
        save_file(contiguous, temporary, metadata={"state": json.dumps(header)})


def load_header(file: Path, inputs: str) -> dict[str, Any] | None:
    """The header alone; None if there is no such file, or it was made of other inputs. Raises BadInput: damaged."""
    found = load_state(file, inputs, kinds=())
    return found[0] if found else None


def load_state(
    file: Path, inputs: str | None = None, kinds: Collection[str] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Header and tensors; None if there is no such file, or it was made of other inputs.

    Args:
        inputs: what the header has to say of its inputs, if anything.
        kinds: only tensors of these kinds, which are the first parts of their names; by default all.

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
    except Exception as error:  # safetensors raises its own type, which says nothing of the file
        raise BadInput(
            "the run's checkpoint cannot be read", where=file, found=error, fix="delete it to train this run anew"
        ) from None


def of_kind(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The tensors of a kind, by the rest of their names."""
    return {name.removeprefix(f"{kind}."): tensor for name, tensor in tensors.items() if name.startswith(f"{kind}.")}
