"""Write low-rank factors as a folder that `peft.PeftModel.from_pretrained` loads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from emomerge.adapters.low_rank import LowRank, Target
from emomerge.adapters.naming import BaseNames
from emomerge.adapters.peft.files import CONFIG, PREFIX, WEIGHTS
from emomerge.checkpoints import Checkpoint, all_finite, new_folder
from emomerge.checkpoints.companions import take_tokenizer
from emomerge.errors import BadInput


class Task(NamedTuple):
    """What `AutoPeftModel…` needs to know to load an adapter together with its base."""

    kind: str | None = None
    """PEFT's `task_type`."""
    auto_mapping: dict[str, str] | None = None
    """The class of the base and its module, for a model that belongs to no task type of PEFT."""
    heads: tuple[str, ...] = ()
    """Modules that PEFT itself adds to `modules_to_save` for this task type; in the file, they would be listed twice."""


@dataclass(frozen=True)
class PeftAdapter:
    """A LoRA adapter, ready to be written; s = α/r is 1 in every layer."""

    factors: tuple[LowRank, ...]
    base: str
    """The base, as the configuration names it."""
    modules: frozenset[str]
    """All modules of the base that have a weight, so that no other module is targeted by accident."""
    heads: tuple[str, ...] = ()
    """Modules that are stored whole, as PEFT's `modules_to_save`."""
    head_tensors: tuple[tuple[str, Tensor], ...] = ()
    """Their tensors, by their names in the live model."""
    task: Task | None = None
    """The task type of the base, if it is known."""

    def config(self) -> dict[str, Any]:
        """Return the content of the configuration file."""
        most = max(pair.rank for pair in self.factors)
        # PEFT reads the keys as regular expressions and takes the first that matches the end of a name.
        task = self.task or Task()
        ranks = {f"^{re.escape(pair.target.module)}": pair.rank for pair in self.factors if pair.rank != most}
        return {
            "peft_type": "LORA", "task_type": task.kind, "auto_mapping": task.auto_mapping,
            "base_model_name_or_path": self.base, "inference_mode": True,
            "r": most, "lora_alpha": most, "rank_pattern": ranks, "alpha_pattern": ranks, "use_rslora": False,
            "lora_dropout": 0.0, "bias": "none", "init_lora_weights": True,
            "modules_to_save": [head for head in self.heads if head not in task.heads] or None,
            "fan_in_fan_out": any(pair.target.kind == "conv1d" for pair in self.factors),
            "target_modules": self._target_modules(),
        }  # fmt: skip

    def _target_modules(self) -> list[str] | str:
        """Return the modules; as one regular expression, which PEFT matches in full, if another module's name ends in one."""
        targets = {pair.target.module: None for pair in self.factors}
        for module in self.modules - targets.keys():
            parts = module.split(".")
            if any(".".join(parts[start:]) in targets for start in range(1, len(parts))):
                return "|".join(map(re.escape, targets))
        return list(targets)

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the content of the weight file. Raises BadInput if a value is too large for `dtype`."""
        tensors = {f"{PREFIX}{name}": tensor.to("cpu", dtype).contiguous() for name, tensor in self.head_tensors}
        for target, a, b in self.factors:
            # PEFT applies BA to (out, in), the layout of a Linear; Conv1D and Embedding store the transpose.
            first, second = (a, b) if target.kind == "linear" else (b.mT, a.mT)
            names = ("lora_A.weight", "lora_B.weight")
            if target.kind == "embedding":
                names = ("lora_embedding_A", "lora_embedding_B")
            for name, factor in zip(names, (first, second), strict=True):
                tensors[f"{PREFIX}{target.module}.{name}"] = factor.to("cpu", dtype).contiguous()
        for name, tensor in tensors.items():
            if not all_finite(tensor):
                raise BadInput(f"values too large for {dtype}", where=name, fix="write it as bfloat16 or float32")
        return tensors

    def write(
        self, out: str | Path, *, dtype: str = "float32", extra_files: Mapping[str, str] | None = None, force: bool = False,
        weights: Checkpoint | None = None,
    ) -> None:  # fmt: skip
        """Write the folder.

        Args:
            out: the folder.
            dtype: of the stored tensors: "float32", "bfloat16" or "float16".
            extra_files: file name → text, written beside the weights.
            force: replace an existing `out`.
            weights: what the adapter was made from; a tokenizer in its folders that is not the base's is copied.

        Raises:
            BadInput: `out` exists, or a value is too large for `dtype`.
        """
        tensors = self.tensors(getattr(torch, dtype))
        with new_folder(out, force=force) as folder:
            save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
            for name, text in {CONFIG: json.dumps(self.config(), indent=2) + "\n", **(extra_files or {})}.items():
                (folder / name).write_text(text, encoding="utf-8", newline="\n")
            if weights is not None:
                take_tokenizer(weights.folder, folder, weights.tokenizers_from)


def target_of(base: Checkpoint, names: BaseNames, name: str) -> Target | str:
    """Return the module to which PEFT attaches factors for a base tensor, or the reason why it cannot."""
    live = names.live_name(name)
    module, _, leaf = live.rpartition(".")
    dimensions = len(base.info(name).shape)
    if names.is_stacked(name):
        return "one of stacked experts"
    if dimensions != 2 or leaf != "weight" or not module:
        return f"{dimensions} dimensions" if dimensions != 2 else "not the weight of a layer"
    if names.find(f"{module.rpartition('.')[0]}.in_proj_weight") is not None:
        return "a part of nn.MultiheadAttention"
    partner = names.tied_partner(live)
    if partner is not None and names.find(partner) is None:
        return f"tied to {partner}"
    layer = names.module(module)
    if layer is None or isinstance(layer, nn.Linear):
        return Target(module, "linear")
    if isinstance(layer, nn.Embedding):
        return Target(module, "embedding")
    return Target(module, "conv1d") if type(layer).__name__ == "Conv1D" else f"in a {type(layer).__name__}"


_TASKS = (
    ("SEQ_CLS", "SEQUENCE_CLASSIFICATION", ("classifier", "score")),
    ("TOKEN_CLS", "TOKEN_CLASSIFICATION", ("classifier", "score")),
    ("QUESTION_ANS", "QUESTION_ANSWERING", ("qa_outputs",)),
    ("SEQ_2_SEQ_LM", "SEQ_TO_SEQ_CAUSAL_LM", ()),
    ("CAUSAL_LM", "CAUSAL_LM", ()),
)
"""PEFT's task types: name, the table of transformers' auto classes, and the modules that PEFT always saves in full."""


def task_of(names: BaseNames) -> Task:
    """Return the task type of a base, from the auto class of transformers that loads it."""
    model = names.model
    if model is None:
        return Task()
    from transformers.models.auto import modeling_auto

    own = type(model)
    for kind, table, heads in _TASKS:
        if own.__name__ in getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES").values():
            return Task(kind, heads=heads)
    if own.__name__ in modeling_auto.MODEL_MAPPING_NAMES.values() and getattr(model, "main_input_name", "") == "input_ids":
        return Task("FEATURE_EXTRACTION")
    return Task(auto_mapping={"base_model_class": own.__name__, "parent_library": own.__module__})


def head_of(names: BaseNames, name: str) -> str | None:
    """Return the Linear directly below the root of a known model that a base tensor belongs to, or None."""
    module = names.live_name(name).rpartition(".")[0]
    return module if module and "." not in module and isinstance(names.module(module), nn.Linear) else None
