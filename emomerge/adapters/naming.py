"""Map the names of modules in memory to the tensor names of a base on disk, with and without a head."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Container, Iterable
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from emomerge.checkpoints import Checkpoint, disk_names
from emomerge.extras import installed, require_module

CONV1D_MODELS = {"clvp", "decision_transformer", "gpt2", "imagegpt", "openai-gpt"}
"""The `model_type`s of transformers with layers of type Conv1D; newer models have none."""


class BaseNames:
    """Find tensors of a base by their names in a live model.

    Adapters use module names, a base the names on disk. If they differ, a model without data is built once from the base's
    `config.json` to learn how transformers renames them. Without transformers, only names that are equal up to a leading prefix
    are found.
    """

    def __init__(self, base: Checkpoint) -> None:
        self._base = base
        self._by_tail = _index_by_tail(base.names())

    def find(self, name: str) -> str | None:
        """Return the base's name of a module tensor: equal, renamed by transformers, or with another prefix; or None."""
        if name in self._base:
            return name
        direct = _variants(name, self._base, self._by_tail)
        if self.needs_transformers:
            return direct[0] if len(direct) == 1 else None
        renamed = [self._disk[variant] for variant in _variants(name, self._disk, self._disk_by_tail)]
        for candidates in (renamed, direct):
            present = sorted({candidate for candidate in candidates if candidate in self._base})
            if len(present) == 1:
                return present[0]
        return None

    def live_name(self, name: str) -> str:
        """Return the name of a base tensor in a live model; its own name if the model is unknown."""
        found = _variants(name, self._from_disk, self._from_disk_by_tail)
        return self._from_disk[found[0]] if len(found) == 1 else name

    def module(self, name: str) -> nn.Module | None:
        """Return the module of that name in a model of the base's configuration, without data; None if it is unknown."""
        found = _variants(name, self._modules, self._modules_by_tail)
        return self._modules[found[0]] if len(found) == 1 else None

    def tied_partner(self, name: str) -> str | None:
        """Return the module tensor that transformers ties to this one, such as a language model's head to its embedding."""
        ties: dict[str, str] = getattr(self.model, "all_tied_weights_keys", None) or {}
        for head, embedding in ties.items():
            for this, other in ((head, embedding), (embedding, head)):
                if this in _variants(name, self._disk, self._disk_by_tail):
                    return other
        return None

    @cached_property
    def config(self) -> dict[str, Any]:
        """The base's `config.json`; empty if there is none."""
        path = self._base.folder / "config.json" if self._base.folder is not None else None
        if path is None or not path.is_file():
            return {}
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            return {}
        return config if isinstance(config, dict) else {}

    @cached_property
    def without_conv1d(self) -> bool:
        """Whether no layer of the base is a Conv1D, which stores (in, out), according to transformers' source of the model.

        The source is read, not imported, which would take seconds; False if it builds on other models.
        """
        kind = str(self.config.get("model_type"))
        if self.needs_transformers and "auto_map" not in self.config:
            return kind not in CONV1D_MODELS
        package = find_spec("transformers")
        if package is None or not package.submodule_search_locations or not kind.isidentifier() or "auto_map" in self.config:
            return False
        source = Path(package.submodule_search_locations[0]) / "models" / kind / f"modeling_{kind}.py"
        return source.is_file() and not re.search(r"Conv1D|AutoModel|from \.\.\w", source.read_text(encoding="utf-8"))

    @cached_property
    def needs_transformers(self) -> bool:
        """Whether names of this base cannot be resolved only because transformers is missing or too old."""
        return "model_type" in self.config and not installed("transformers")

    @cached_property
    def model(self) -> nn.Module | None:
        """A model of the base's configuration on the meta device; None if transformers does not know it.

        Raises:
            MissingExtra: the base is a model of transformers, which is not installed.
        """
        if "model_type" not in self.config:
            return None
        require_module(f"an adapter over this {self.config['model_type']} model", "transformers")
        import transformers

        try:
            config = transformers.AutoConfig.from_pretrained(self._base.folder, local_files_only=True)
            architecture = getattr(transformers, (config.architectures or [""])[0], None)
            if not (isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel)):
                architecture = transformers.AutoModel.from_config
            with torch.device("meta"):
                model: nn.Module = architecture(config)
        except (ValueError, OSError, KeyError, AttributeError, ImportError):  # the configuration of a custom model
            return None
        return model

    @cached_property
    def _disk(self) -> dict[str, str]:
        return disk_names(self.model) if self.model is not None else {}

    @cached_property
    def _disk_by_tail(self) -> dict[str, list[str]]:
        return _index_by_tail(self._disk)

    @cached_property
    def _from_disk(self) -> dict[str, str]:
        return {on_disk: live for live, on_disk in self._disk.items()}

    @cached_property
    def _from_disk_by_tail(self) -> dict[str, list[str]]:
        return _index_by_tail(self._from_disk)

    @cached_property
    def _modules(self) -> dict[str, nn.Module]:
        return dict(self.model.named_modules()) if self.model is not None else {}

    @cached_property
    def _modules_by_tail(self) -> dict[str, list[str]]:
        return _index_by_tail(self._modules)


def _variants(name: str, names: Container[str], by_tail: dict[str, list[str]]) -> list[str]:
    """Return `name` if it is among `names`, else those of `names` that differ by one leading component such as `bert.`."""
    if name in names:
        return [name]
    head, _, tail = name.partition(".")
    shorter = [tail] if tail and not head.isdigit() and tail in names else []
    return shorter + by_tail.get(name, [])


def _index_by_tail(names: Iterable[str]) -> dict[str, list[str]]:
    """Index names by the rest after their first component; a number, as in a sequence of layers, is not a prefix."""
    index: dict[str, list[str]] = defaultdict(list)
    for name in names:
        head, _, tail = name.partition(".")
        if tail and not head.isdigit():
            index[tail].append(name)
    return dict(index)
