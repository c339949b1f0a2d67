"""Models of transformers as tasks use them: loaded in float32 from safetensors only, quietly, with one-line errors."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from emomerge import recipe
from emomerge.adapters import is_adapter
from emomerge.errors import BadInput
from emomerge.files import JsonObject, read_json
from emomerge.numerics.seeds import cpu_seed
from emomerge.tasks.base import Batch, Task, TaskData, inputs_of


class TransformersTask(Task):
    """Base class of tasks whose models are transformers': loaded by an Auto class and saved with their configuration.

    A subclass sets `auto_class` and implements `load_data`, `new_model` and `save_processor`.
    """

    auto_class: ClassVar[str]
    """Name of the Auto class of transformers that loads the task's models."""

    @property
    def loader(self) -> Any:
        """The Auto class, which also knows emomerge's own networks."""
        return _auto_class(self.auto_class)

    @abstractmethod
    def new_model(self, base: recipe.Base, data: TaskData) -> nn.Module:
        """Return the base in float32 and eval mode; see `Task.new_model`.

        A head that the checkpoint lacks, or has for another number of classes, is drawn with `base.seed`.
        """

    @abstractmethod
    def save_processor(self, folder: str | Path) -> None:
        """Write the files that convert raw data to model inputs (tokenizer, image sizes) beside a model.

        Call after `load_data`.
        """

    def reload_model(self, folder: str | Path, *, trust_remote_code: bool = False) -> nn.Module:
        """Return a saved model; see `Task.reload_model`."""
        if not Path(folder).is_dir():
            raise BadInput("no such model folder", where=folder)
        base = recipe.Base(model=str(folder), trust_remote_code=trust_remote_code)
        return load_complete(self.loader, base, local_files_only=True)

    def save_files(self, model: nn.Module, folder: str | Path) -> None:
        """Write configuration and processor; see `Task.save_files`."""
        saved: Any = model
        saved.config.architectures = [type(model).__name__]
        saved.config.save_pretrained(str(folder))
        if saved.can_generate():
            saved.generation_config.save_pretrained(str(folder))
        self.save_processor(folder)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the scores (rows, classes) of a batch on the model's device."""
        scores: Tensor = model(**inputs_of(batch)).logits
        return scores


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers within the block: no progress bars, and no messages below errors."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _auto_class(name: str) -> Any:
    import transformers

    import emomerge.tasks.models  # noqa: F401 - registers our networks with the Auto classes

    return getattr(transformers, name)


def load_config(base: recipe.Base) -> Any:
    """Return the configuration of `base.model`.

    Raises:
        BadInput: there is none.
    """
    return _call(_auto_class("AutoConfig"), base)


def load_tokenizer(base: recipe.Base) -> Any:
    """Return the tokenizer of `base.model`, with a padding token.

    Raises:
        BadInput: there is none.
    """
    from transformers import AutoTokenizer

    tokenizer = _call(AutoTokenizer, base, use_fast=True)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise BadInput("the base's tokenizer has no token to pad with", where=base.model)
    return tokenizer


def load_preprocessor(base: recipe.Base) -> dict[str, Any]:
    """Return the content of `preprocessor_config.json` of `base.model`; empty if it has none."""
    from transformers.utils import cached_file

    with quiet():
        file = cached_file(
            _location(base),
            "preprocessor_config.json",
            revision=base.revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    if file is None:
        return {}
    return read_json(Path(file), JsonObject)


def load_classifier(auto_class: Any, base: recipe.Base, classes: Sequence[str]) -> Any:
    """Return `base.model` with a head for these classes, in float32 and eval mode.

    Raises:
        BadInput: the base is missing or not of its architecture, or has these classes in another order.
    """
    from emomerge.tasks.models import name_classes

    config = load_config(base)
    own = sorted(config.label2id, key=config.label2id.__getitem__)
    name_classes(config, classes)
    with cpu_seed(base.seed):
        model, report = _call(
            auto_class,
            base,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    _check_fit(model, report, base)
    has_head = not report["missing_keys"] and not report["mismatched_keys"]
    if has_head and set(own) == set(classes) and own != list(classes):
        raise BadInput(
            "the base has these classes in another order",
            where=base.model,
            expected=f"classes: [{', '.join(own)}]",
            found=f"[{', '.join(classes)}]",
        )
    return model.eval()


def load_complete(auto_class: Any, base: recipe.Base, **options: Any) -> nn.Module:
    """Return a model whose checkpoint is complete, in float32 and eval mode.

    Raises:
        BadInput: a tensor is missing or has another shape than the configuration says.
    """
    model, report = _call(
        auto_class,
        base,
        dtype=torch.float32,
        use_safetensors=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **options,
    )
    lacking = sorted(report["missing_keys"]) + sorted(name for name, *_ in report["mismatched_keys"])
    if lacking:
        raise BadInput("tensors are missing or have the wrong shape", where=base.model, found=", ".join(lacking[:4]))
    loaded: nn.Module = model.eval()
    return loaded


def _call(auto_class: Any, base: recipe.Base, **options: Any) -> Any:
    """Call `auto_class.from_pretrained` for the base; every failure becomes BadInput."""
    with quiet():
        try:
            return auto_class.from_pretrained(
                _location(base), revision=base.revision, trust_remote_code=base.trust_remote_code, **options
            )
        except BadInput:
            raise
        except Exception as error:  # transformers raises a dozen types for missing, broken or unknown files
            raise BadInput("the base cannot be loaded", where=base.model, found=_first_sentence(error)) from None


def _location(base: recipe.Base) -> str:
    """Return the folder or Hub id of the base.

    Raises:
        BadInput: the path is not a model folder.
    """
    assert base.model is not None
    path = Path(base.model).expanduser()
    if path.is_dir():
        # transformers would follow an adapter to the base that its configuration names, wherever that is.
        if is_adapter(path):
            raise BadInput("an adapter is not a base", where=path, fix="bake it into its base first: `emomerge bake`")
        return str(path)
    if path.exists() or base.model.count("/") > 1 or base.model[:1] in (".", "~", "/") or "\\" in base.model:
        raise BadInput("no such model folder", where=base.model, expected="a folder or a Hub id")
    return base.model


def _check_fit(model: Any, report: dict[str, Any], base: recipe.Base) -> None:
    """Check that the checkpoint lacks nothing but a head."""
    own: dict[str, Tensor] = model.state_dict()
    for name, stored, wanted in sorted(report["mismatched_keys"]):
        if tuple(stored)[1:] != tuple(wanted)[1:] or wanted[0] != model.config.num_labels:
            raise BadInput(
                "a tensor of the base has another shape than its configuration says",
                where=f"{name} in {base.model}",
                expected=tuple(wanted),
                found=tuple(stored),
            )
    absent = sum(own[name].numel() for name in report["missing_keys"] if name in own)
    if absent > sum(tensor.numel() for tensor in own.values()) / 2:
        raise BadInput(
            "the base's weights are not those of its architecture",
            where=base.model,
            expected=type(model).__name__,
            found=f"{len(report['missing_keys'])} of {len(own)} tensors missing",
        )


def _first_sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:200]
