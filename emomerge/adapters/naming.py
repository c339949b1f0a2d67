"""Map the names of modules in memory to the tensor names of a base on disk, with and without a head."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from emomerge.checkpoints import Checkpoint, Layout, Piece
from emomerge.checkpoints.names import index_by_tail, unwrapped, variants
from emomerge.extras import installed, require_module
from emomerge.files import JsonObject, read_json_or

CONV1D_MODELS = {"clvp", "decision_transformer", "gpt2", "imagegpt", "openai-gpt"}
"""The `model_type`s of transformers with layers of type Conv1D; newer models have none."""


MOST_LAYERS = 100_000


class BaseNames:
    """Find tensors of a base by their names in a live model.

    Adapters use module names, a base the names on disk. If they differ, a model without data is built once from the base's
    `config.json` to learn how transformers renames them. Without transformers, only names that are equal up to a leading prefix
    are found.
    """

    def __init__(self, base: Checkpoint) -> None:
        self._base = base
        self._by_tail = index_by_tail(base.names())

    def find(self, name: str) -> str | None:
        """Return the base's name of a module tensor: equal, renamed by transformers, or with another prefix; or None."""
        if name in self._base:
            return name
        name = unwrapped(name)
        direct = variants(name, self._base, self._by_tail)
        if self.known_layout is None:
            return direct[0] if len(direct) == 1 else None
        piece = self.known_layout.find(name)
        whole = [stored for stored, part in self.parts(name) if part == piece]
        return whole[0] if len(whole) == 1 else direct[0] if len(direct) == 1 else None

    def parts(self, name: str) -> list[tuple[str, Piece]]:
        """Return the base tensors that hold parts of a module tensor, such as the single experts of a stack."""
        piece = self.known_layout.find(name) if self.known_layout is not None else None
        return self._holders.get(piece.live, []) if piece is not None else []

    def holds(self, name: str) -> bool:
        """Return whether the base has a module tensor, whole or in parts."""
        return self.find(name) is not None or bool(self.parts(name))

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a module tensor; None if it is unknown."""
        piece = self._piece(name)
        return piece.shape if piece is not None else None

    def _piece(self, name: str) -> Piece | None:
        return self.layout.find(name) if self.layout is not None else None

    def live_name(self, name: str) -> str:
        """Return the name of a base tensor in a live model; its own name if the model is unknown."""
        piece = self._piece(name)
        return name if piece is None or self.is_stacked(name) else piece.live

    def is_stacked(self, name: str) -> bool:
        """Return whether a base tensor is only a part of one in a live model."""
        piece = self._piece(name)
        return self.layout is not None and piece is not None and not self.layout.is_whole(piece)

    def module(self, name: str) -> nn.Module | None:
        """Return the module of that name in a model of the base's configuration, without data; None if it is unknown."""
        found = variants(name, self._modules, self._modules_by_tail)
        return self._modules[found[0]] if len(found) == 1 else None

    def tied_partner(self, name: str) -> str | None:
        """Return another module tensor that the model ties to this one, such as a head to its embedding; None if it has none.

        Without transformers, heads and embeddings are told by their usual names and by `tie_word_embeddings`.
        """
        layout = self.known_layout
        if layout is None:
            return usual_partner(name, self.config)
        piece = layout.find(name)
        if piece is None:
            return None
        first = layout.ties.get(piece.live, piece.live)
        tied = [first, *(alias for alias, owner in layout.ties.items() if owner == first)]
        return next((other for other in tied if other != piece.live), None)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The base's `config.json`; empty if there is none."""
        path = self._base.folder / "config.json" if self._base.folder is not None else None
        if path is None or not path.is_file():
            return {}
        return read_json_or(path, JsonObject, {})

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
        if "model_type" not in self.config or _is_absurd(self.config):
            return None
        require_module(f"an adapter over this {self.config['model_type']} model", "transformers")
        import transformers

        try:  # without a refusal, transformers would ask on the terminal whether to run the code that `auto_map` names
            config = transformers.AutoConfig.from_pretrained(self._base.folder, local_files_only=True, trust_remote_code=False)
            architecture = getattr(transformers, (config.architectures or [""])[0], None)
            with torch.device("meta"), _bounded(len(self._base)):
                if isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel):
                    model: nn.Module = architecture(config)
                else:
                    model = transformers.AutoModel.from_config(config, trust_remote_code=False)
        except Exception:  # a custom model, or values that its class does not expect: any type of error
            return None
        return model

    @cached_property
    def layout(self) -> Layout | None:
        """How the tensors of such a model are stored; None if transformers does not know it.

        Raises:
            MissingExtra: as for `model`.
        """
        return None if self.model is None else Layout(self.model)

    @property
    def known_layout(self) -> Layout | None:
        """The layout; None also where transformers is not installed."""
        return None if self.needs_transformers else self.layout

    @cached_property
    def _holders(self) -> dict[str, list[tuple[str, Piece]]]:
        """Module tensor → the base tensors that hold parts of it."""
        found: dict[str, list[tuple[str, Piece]]] = defaultdict(list)
        for name in self._base.names():
            if self.layout is not None and (piece := self.layout.find(name)) is not None:
                found[piece.live].append((name, piece))
        return dict(found)

    @cached_property
    def _modules(self) -> dict[str, nn.Module]:
        return dict(self.model.named_modules()) if self.model is not None else {}

    @cached_property
    def _modules_by_tail(self) -> dict[str, list[str]]:
        return index_by_tail(self._modules)


_HEADS = re.compile(r"(?:.+\.)?(?:lm_head|embed_out|output_layer|cls\.predictions\.decoder|lm_head\.decoder)\.weight")
_EMBEDDINGS = re.compile(r"(?:.+\.)?(?:embed_tokens|wte|word_embeddings|shared|embed_in|tok_embeddings)\.weight")


def _is_absurd(config: object) -> bool:
    """Return whether a configuration asks for more layers than any model has, lists of which would fill the memory."""
    if isinstance(config, dict):
        return any(
            (isinstance(value, int) and value > MOST_LAYERS and re.search("layers?$|depth|blocks", str(key)) is not None)
            or _is_absurd(value)
            for key, value in config.items()
        )
    return isinstance(config, list) and any(map(_is_absurd, config))


@contextmanager
def _bounded(tensors: int) -> Iterator[None]:
    """Stop the construction of a model in this block that has far more tensors than the weights that it is for."""
    left = 10_000 + 20 * tensors

    def count(*_: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError("the configuration describes a larger model than its weights")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def usual_partner(name: str, config: Mapping[str, Any]) -> str | None:
    """Return what a head or an embedding is tied to according to the configuration alone; None if it is neither, or untied."""
    texts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    ties = [part["tie_word_embeddings"] for part in texts if "tie_word_embeddings" in part]
    if not any(ties):
        return None
    if _HEADS.fullmatch(name):
        return "the input embedding"
    return "lm_head.weight" if _EMBEDDINGS.fullmatch(name) else None
