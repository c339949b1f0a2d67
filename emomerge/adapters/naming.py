"""Where a module's tensor is in the base: names in memory and on disk, with and without a head."""

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


class BaseNames:
    """Finds tensors of a base by the name that they have in a live model of it.

    Adapters carry module names; the base carries those of the disk. Where they differ, the base's `config.json` is
    built as a model without data, once, to learn how transformers renames.
    """

    def __init__(self, base: Checkpoint) -> None:
        self._base = base
        self._by_tail = _index_by_tail(base.names())

    def find(self, name: str) -> str | None:
        """The base's name of a module tensor: the same, else as transformers renames it, else by a leading prefix."""
        if name in self._base:
            return name
        renamed = [self._disk[variant] for variant in _variants(name, self._disk, self._disk_by_tail)]
        direct = _variants(name, self._base, self._by_tail)
        for candidates in (renamed, direct):
            present = sorted({candidate for candidate in candidates if candidate in self._base})
            if len(present) == 1:
                return present[0]
        return None

    def live_name(self, name: str) -> str:
        """The name in a live model of a tensor of the base; its own where the model is not known."""
        found = _variants(name, self._from_disk, self._from_disk_by_tail)
        return self._from_disk[found[0]] if len(found) == 1 else name

    def module(self, name: str) -> nn.Module | None:
        """The module of that name in a model of the base's configuration, without data; None where that is unknown."""
        found = _variants(name, self._modules, self._modules_by_tail)
        return self._modules[found[0]] if len(found) == 1 else None

    def tied_partner(self, name: str) -> str | None:
        """The module tensor that transformers ties to this one, such as a language model's head to its embedding."""
        ties: dict[str, str] = getattr(self.model, "all_tied_weights_keys", None) or {}
        for head, embedding in ties.items():
            for this, other in ((head, embedding), (embedding, head)):
                if this in _variants(name, self._disk, self._disk_by_tail):
                    return other
        return None

    @cached_property
    def config(self) -> dict[str, Any]:
        """The base's `config.json`; empty where there is none."""
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
        """Whether no layer of the base is a Conv1D, which keeps (in, out), as transformers' source of the model says.

        Read, not imported, which would take seconds; False where it builds on other models.
        """
        kind = str(self.config.get("model_type"))
        package = find_spec("transformers")
        if package is None or not package.submodule_search_locations or not kind.isidentifier() or "auto_map" in self.config:
            return False
        source = Path(package.submodule_search_locations[0]) / "models" / kind / f"modeling_{kind}.py"
        return source.is_file() and not re.search(r"Conv1D|AutoModel|from \.\.\w", source.read_text(encoding="utf-8"))

    @cached_property
    def model(self) -> nn.Module | None:
        """A model of the base's configuration on the meta device; None where transformers does not know it."""
        if "model_type" not in self.config:
            return None
        import transformers

        try:
            config = transformers.AutoConfig.from_pretrained(self._base.folder, local_files_only=True)
            architecture = getattr(transformers, (config.architectures or [""])[0], None)
            if not (isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel)):
                architecture = transformers.AutoModel.from_config
            with torch.device("meta"):
                model: nn.Module = architecture(config)
        except (ValueError, OSError, KeyError, AttributeError, ImportError):  # a configuration of someone's own code
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
    """Which of `names` are `name`, or else differ by one leading component such as `bert.`"""
    if name in names:
        return [name]
    head, _, tail = name.partition(".")
    shorter = [tail] if tail and not head.isdigit() and tail in names else []
    return shorter + by_tail.get(name, [])


def _index_by_tail(names: Iterable[str]) -> dict[str, list[str]]:
    """Names by what follows their first component; numbered ones, of a sequence of layers, are no prefix."""
    index: dict[str, list[str]] = defaultdict(list)
    for name in names:
        head, _, tail = name.partition(".")
        if tail and not head.isdigit():
            index[tail].append(name)
    return dict(index)
