"""Single files of image-model trainers as an adapter format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from emomerge.adapters.images.grammar import is_adapter, read_header

if TYPE_CHECKING:
    from emomerge.adapters.change import Change
    from emomerge.checkpoints import Checkpoint


class _Images:
    """The `AdapterFormat` of kohya, LyCORIS, diffusers, OneTrainer, ai-toolkit, musubi-tuner and SimpleTuner files."""

    layout = "a .safetensors file with the factors (kohya, LyCORIS, diffusers, ComfyUI)"

    def claims(self, path: Path) -> bool:
        """Claim a safetensors file by the names and sizes in its header."""
        header = read_header(path)
        return header is not None and is_adapter(header)

    def files(self, path: Path) -> list[Path]:
        """Return the file itself."""
        return [path]

    def read(self, path: Path, base: Checkpoint, *, allow_unmatched: bool) -> dict[str, Change]:
        """Read every module; see `reader`."""
        from emomerge.adapters.images.reader import read_file

        return read_file(path, base, allow_unmatched=allow_unmatched)

    def facts(self, path: Path) -> dict[str, Any]:
        """Return family, trainer, kinds, ranks, alphas and modules."""
        from emomerge.adapters.images.reader import facts_of

        return facts_of(path)

    def fit(self, path: Path, base: Checkpoint) -> dict[str, Any]:
        """Return the family of the base and how many modules it has of those that the adapter changes."""
        from emomerge.adapters.images.reader import fit_of

        return fit_of(path, base)


IMAGES = _Images()
