"""The table of adapter formats, and the questions that the rest of the package asks of it.

A new format is one module with an object that satisfies `AdapterFormat`, and one entry in `FORMATS`. The module must not
import torch when it is imported (`read` may): `emomerge merge` hashes weight files while torch is still being imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

if TYPE_CHECKING:
    from emomerge.adapters.change import Change
    from emomerge.checkpoints import Checkpoint

FORMATS = {
    "peft": "emomerge.adapters.peft.format:PEFT",
    "images": "emomerge.adapters.images.format:IMAGES",
}
"""Format name → "module:object", imported on first use. The first format that claims a path reads it."""


class AdapterFormat(Protocol):
    """One way of storing an adapter on disk."""

    @property
    def layout(self) -> str:
        """The files that make up such an adapter, for error messages."""

    def claims(self, path: Path) -> bool:
        """Return whether `path`, a file or a folder, is an adapter of this format. Must be cheap."""

    def files(self, path: Path) -> list[Path]:
        """Return the configuration and weight files that determine the adapter; they may be missing."""

    def read(self, path: Path, base: Checkpoint, *, allow_unmatched: bool) -> dict[str, Change]:
        """Return the changes by base tensor name, in sorted order.

        Args:
            path: an adapter that this format claims.
            base: the model that the adapter was trained on.
            allow_unmatched: skip adapter keys that match no base tensor, with a warning.

        Raises:
            BadInput: the adapter is damaged, unsupported, or does not fit the base.
        """

    def facts(self, path: Path) -> dict[str, Any]:
        """Return what `emomerge inspect` shows about the adapter, ready for JSON. Raises BadInput if it is damaged."""


@runtime_checkable
class Fitting(Protocol):
    """A format that can say how much of an adapter fits a base, without changing anything."""

    def fit(self, path: Path, base: Checkpoint) -> dict[str, Any]:
        """Return what `emomerge inspect ADAPTER BASE` adds to `facts`, ready for JSON."""


def all_formats() -> Iterator[AdapterFormat]:
    """Yield every known format."""
    for entry in FORMATS.values():
        module, _, name = entry.partition(":")
        yield cast(AdapterFormat, getattr(import_module(module), name))


def format_of(path: str | Path) -> AdapterFormat | None:
    """Return the format that claims `path`, or None."""
    return next((form for form in all_formats() if form.claims(Path(path))), None)


def is_adapter(path: str | Path) -> bool:
    """Return whether any format claims `path`."""
    return format_of(path) is not None


def weight_files(source: str | Path) -> list[Path]:
    """Return the files that `source` most likely consists of, without opening them; empty if nothing is there.

    Used to start hashing early: a wrong guess costs time, not correctness.
    """
    path = Path(source)
    if (form := format_of(path)) is not None:
        return [file for file in form.files(path) if file.is_file()]
    if path.is_file():
        return [path]
    whole = path / "model.safetensors"
    return [whole] if whole.is_file() else sorted(path.glob("model-*.safetensors"))
