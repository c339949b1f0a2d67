"""Models and configurations from folders and the Hub: fp32, safetensors only, quiet, and with named errors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emomerge import recipe
from emomerge.adapters import is_adapter
from emomerge.errors import BadInput
from emomerge.numerics.seeds import cpu_seed


@contextmanager
def quiet() -> Iterator[None]:
    """Within the block transformers shows neither progress bars nor advice below an error."""
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


def name_classes(config: Any, classes: Sequence[str]) -> None:
    """Write the labels' names into a model's configuration."""
    config.num_labels = len(classes)
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: index for index, name in enumerate(classes)}
    config.problem_type = "single_label_classification"


def load_config(base: recipe.Base) -> Any:
    """The configuration of `base.model`. Raises BadInput where there is none."""
    from transformers import AutoConfig

    import emomerge.tasks.models  # noqa: F401 - the Auto classes learn our own models

    return _call(AutoConfig, base)


def load_tokenizer(base: recipe.Base) -> Any:
    """The tokenizer of `base.model`, with a padding token. Raises BadInput where there is none."""
    from transformers import AutoTokenizer

    tokenizer = _call(AutoTokenizer, base, use_fast=True)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise BadInput("the base's tokenizer has no token to pad with", where=base.model)
    return tokenizer


def input_length(section: recipe.TextClassification | recipe.CausalLanguageModel, tokenizer: Any, config: Any) -> int:
    """Tokens a row may have: `max_length`, by default no more than the base has positions for.

    Args:
        section: the recipe's `task`.
        tokenizer: of the base.
        config: of the base; None for a base that is still to be made.
    """
    wanted = section.max_length
    positions: int = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or wanted)
    if wanted > positions and "max_length" in section.model_fields_set:
        raise BadInput(
            "texts may be longer than the base can read",
            where="task.max_length",
            expected=f"at most {positions}",
            found=wanted,
        )
    return min(wanted, positions)


def load_preprocessor(base: recipe.Base) -> dict[str, Any]:
    """The `preprocessor_config.json` of `base.model`; empty if it has none."""
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
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput("the file is not JSON", where=file, found=error) from None
    if not isinstance(found, dict):
        raise BadInput("the file is no JSON object", where=file)
    return found


def load_classifier(auto_class: Any, base: recipe.Base, classes: Sequence[str]) -> Any:
    """`base.model` with a head for these classes, in fp32 and eval mode; see `Task.new_model`."""
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
            "the base knows these classes in another order",
            where=base.model,
            expected=f"classes: [{', '.join(own)}]",
            found=f"[{', '.join(classes)}]",
        )
    return model.eval()


def load_complete(auto_class: Any, base: recipe.Base, **options: Any) -> nn.Module:
    """A model that lacks nothing, in fp32 and eval mode. Raises BadInput where a tensor is missing or misshapen."""
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
        raise BadInput("tensors are missing or misshapen", where=base.model, found=", ".join(lacking[:4]))
    loaded: nn.Module = model.eval()
    return loaded


def reload_complete(auto_class: Any, folder: str | Path, trust_remote_code: bool) -> nn.Module:
    """A complete model from a folder, in fp32 and eval mode; see `Task.reload_model`."""
    import emomerge.tasks.models  # noqa: F401 - the Auto classes learn our own models

    if not Path(folder).is_dir():
        raise BadInput("no such model folder", where=folder)
    base = recipe.Base(model=str(folder), trust_remote_code=trust_remote_code)
    return load_complete(auto_class, base, local_files_only=True)


def _call(auto_class: Any, base: recipe.Base, **options: Any) -> Any:
    """`auto_class.from_pretrained` of the base, or BadInput."""
    with quiet():
        try:
            return auto_class.from_pretrained(
                _location(base), revision=base.revision, trust_remote_code=base.trust_remote_code, **options
            )
        except BadInput:
            raise
        except Exception as error:  # transformers raises a dozen types for files that are missing, broken or unknown
            raise BadInput("the base cannot be loaded", where=base.model, found=_first_sentence(error)) from None


def _location(base: recipe.Base) -> str:
    """The folder or Hub id of the base. Raises BadInput for a path that is no model folder."""
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
    """The checkpoint must lack no more than a head."""
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
