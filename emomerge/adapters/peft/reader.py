"""Read PEFT's LoRA folders: the change of each base tensor.

    Δ = s·BA,  s = α/r, or α/√r with rsLoRA        (Hu et al. 2021; Kalajdzievski 2023)
    W′ = m·(W + Δ)/‖W + Δ‖ by output row, with DoRA  (Liu et al. 2024)

PEFT's own `merge` is the reference; any adapter with an effect other than this formula or a replacement is refused by name.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from emomerge.adapters.change import Change
from emomerge.adapters.formulas.dora import decomposed
from emomerge.adapters.low_rank import product
from emomerge.adapters.naming import BaseNames
from emomerge.adapters.peft.files import CONFIG, PICKLE, PREFIX, WEIGHTS, load_config
from emomerge.adapters.peft.patterns import matches_end
from emomerge.checkpoints import Checkpoint, Piece, all_finite, open_checkpoint, working_dtype
from emomerge.checkpoints.names import MAYBE_TIED
from emomerge.errors import BadInput
from emomerge.files import check_type

_FACTOR = re.compile(r"(.+)\.(lora_(?:embedding_)?[AB])(?:\.default)?(?:\.(weight|bias))?")
_MAGNITUDE = re.compile(r"(.+)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?")
_TOKENS = re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta(?:\.default)?")
_INITS = (True, False, "gaussian", "eva", "orthogonal")  # those that leave the base unchanged
# Fields that are read here, or that only matter in training. Any other field that is set changes the formula.
_UNDERSTOOD = frozenset(
    """
    alpha_pattern auto_mapping base_model_name_or_path bias ensure_weight_tying eva_config exclude_modules
    fan_in_fan_out inference_mode init_lora_weights layers_pattern layers_to_transform lora_alpha lora_bias lora_dropout
    megatron_core modules_to_save peft_type peft_version qalora_group_size r rank_pattern revision target_modules
    target_parameters task_type trainable_token_indices use_dora use_rslora
    """.split()  # noqa: SIM905
)


_Count = Annotated[int, Field(gt=0, lt=2**31)]
_Number = Annotated[float, Field(ge=0, lt=1e30, allow_inf_nan=False)]


class _Config(BaseModel):
    """The types of the fields that are read here."""

    peft_type: str
    r: _Count
    lora_alpha: Annotated[_Number, Field(gt=0)]
    rank_pattern: dict[str, _Count] | None = None
    alpha_pattern: dict[str, _Number] | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    fan_in_fan_out: bool | None = None
    ensure_weight_tying: bool | None = None
    target_parameters: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None


@dataclass(frozen=True)
class _Pair:
    """A pair of factors in the file, and the tensor of the live model that it changes."""

    module: str
    tensor: str
    key: str
    """Its key in the file, for error messages."""
    embedding: bool = False
    parameter: bool = False
    """Whether `target_parameters` names the tensor."""


def read_peft(folder: Path, base: Checkpoint, *, allow_unmatched: bool = False) -> dict[str, Change]:
    """Read a PEFT LoRA folder; see `AdapterFormat.read`.

    Args:
        folder: the adapter.
        base: the model that it was trained on. Its tensors may have the names on disk or in memory, with or without a head.
        allow_unmatched: skip adapter keys that match no base tensor, with a warning.

    Raises:
        BadInput: the adapter is damaged, of another kind or model, or not expressible by the LoRA formula.
    """
    return _Reader(Path(folder), base, allow_unmatched).changes()


class _Reader:
    """One adapter over one base."""

    def __init__(self, folder: Path, base: Checkpoint, allow_unmatched: bool) -> None:
        self.config = read_config(folder)
        self.file = folder / WEIGHTS
        self.base = base
        self.names = BaseNames(base)
        self.allow_unmatched = allow_unmatched
        self.unmatched: list[str] = []
        self.magnitudes: dict[str, str] = {}
        self.tensors = open_weights(folder)

    def changes(self) -> dict[str, Change]:
        """Return all changes; see `read_peft`."""
        factors: dict[tuple[str, bool], dict[str, str]] = defaultdict(dict)
        changes: dict[str, Change] = {}
        for key in sorted(self.tensors, key=lambda key: "modules_to_save" in key):  # these override a trained bias
            name = key.removeprefix(PREFIX)
            dtype = self.tensors.info(key).dtype
            if not dtype.is_floating_point or dtype.itemsize == 1:
                raise BadInput("an adapter tensor of a dtype that cannot be added", where=f"{self.file}, {key}", found=dtype)
            if not all_finite(self.tensors[key]):
                raise BadInput("NaN or infinity in an adapter", where=f"{self.file}, {key}", fix="train it again")
            if match := _FACTOR.fullmatch(name):
                module, factor, leaf = match[1], match[2], match[3] or "weight"
                factors[module, "embedding" in factor]["bias" if leaf == "bias" else factor[-1]] = key
            elif match := _MAGNITUDE.fullmatch(name):
                self.magnitudes[match[1]] = key
            elif match := _TOKENS.fullmatch(name):
                self._add_token_rows(changes, match[1], key)
            elif ".lora_" in name:
                raise BadInput("this kind of LoRA is not supported", where=f"{self.file}, {key}")
            else:
                self._add_replacement(changes, _without_wrappers(name), key)
        for (module, embedding), keys in sorted(factors.items()):
            self._add_low_rank(changes, module, embedding, keys)
        for module in sorted(self.magnitudes.keys() - {module for module, _ in factors}):
            raise BadInput("a magnitude without its LoRA factors", where=f"{self.file}, {self.magnitudes[module]}")
        self._report_unmatched(nothing_matched=not changes)
        return {name: changes[name] for name in sorted(changes)}

    def _add(self, changes: dict[str, Change], name: str, key: str, change: Change) -> None:
        earlier = changes.get(name, Change())
        if change.delta is not None and earlier.delta is not None:
            raise BadInput("two adapter keys change one base tensor", where=f"{self.file}, {key}", found=name)
        changes[name] = Change(change.replace or earlier.replace, change.delta or earlier.delta)

    def _add_replacement(self, changes: dict[str, Change], tensor: str, key: str) -> None:
        """Add a tensor that replaces one of the base."""
        value = self.tensors[key]
        self._refuse_tied(tensor, key)
        for name, piece in self._targets(tensor, key):
            self._require_shape(name, key, self._shape(name, tensor, piece), tuple(value.shape))
            part = value if piece is None else piece.of(value)
            self._add(changes, name, key, Change(replace=partial(_first, part)))

    def _add_low_rank(self, changes: dict[str, Change], module: str, embedding: bool, keys: dict[str, str]) -> None:
        """Add s·BA of one module, and s·b of its bias."""
        key = next(iter(keys.values()))
        for factor in ("A", "B"):
            if factor not in keys:
                raise BadInput("a LoRA factor is missing", where=f"{self.file}, {module}", expected=f"lora_{factor}", found=key)
        pair = self._pair(module, embedding, keys["A"])
        self._refuse_tied(pair.tensor, key)
        for name, piece in self._targets(pair.tensor, pair.key):
            shape = self._shape(name, pair.tensor, piece)
            scale = self._scale(pair, self._rank(pair, shape, keys))
            delta = self._low_rank(pair, name, shape, piece, keys, scale)
            decomposition = self._decomposition(self.magnitudes.get(module), pair, keys, name, piece, delta)
            self._add(changes, name, pair.key, Change(delta=delta) if decomposition is None else Change(replace=decomposition))
        bias_name = self._find(f"{pair.module}.bias", keys["bias"]) if "bias" in keys else None
        if bias_name is not None:
            bias = self.tensors[keys["bias"]]
            self._require_shape(bias_name, keys["bias"], self.base.info(bias_name).shape, tuple(bias.shape))
            self._add(changes, bias_name, keys["bias"], Change(delta=lambda dtype: bias.to(dtype) * scale))

    def _pair(self, module: str, embedding: bool, key: str) -> _Pair:
        """Return the tensor that a pair of factors changes."""
        plain = _without_wrappers(module)
        depth = sum(1 for _ in takewhile("base_layer".__eq__, reversed(module.split("."))))
        parameters = self._target_parameters(plain)
        if parameters:  # the wrappers of several parameters are nested, the first defined innermost
            if depth >= len(parameters):
                raise BadInput("target_parameters does not name this parameter", where=f"{self.file}, {key}")
            return _Pair(plain, f"{plain}.{parameters[-1 - depth]}", key, parameter=True)
        if f"{plain}.weight" not in self.base and self.names.find(f"{plain}.in_proj_weight") is not None:
            # PEFT 0.21 adds Δ of the output projection twice, so the effect of such an adapter depends on the version
            raise BadInput("LoRA of nn.MultiheadAttention cannot be baked", where=f"{self.file}, {key}")
        return _Pair(plain, f"{plain}.weight", key, embedding=embedding)

    def _target_parameters(self, module: str) -> list[str]:
        """Return the parameters of a module that `target_parameters` names, in the order of their definition."""
        targets = self.config.get("target_parameters") or []
        last = {
            target.rpartition(".")[2]
            for target in targets
            if f".{module}.{target.rpartition('.')[2]}".endswith(f".{target}")
            and self.names.holds(f"{module}.{target.rpartition('.')[2]}")
        }
        live = self.names.module(module) if last else None
        if live is not None:
            return [name for name, _ in live.named_parameters(recurse=False) if name in last]
        if len(last) > 1:
            raise BadInput(
                "the order of the adapter's target_parameters is unknown",
                where=f"{self.file}, {module}",
                fix="put the base's config.json beside its weights",
            )
        return sorted(last)

    def _rank(self, pair: _Pair, shape: tuple[int, ...], keys: dict[str, str]) -> int:
        """Return r of a pair by PEFT's patterns, checked against the factors."""
        rank = int(self._pattern("rank_pattern", "r", pair))
        experts = shape[0] if pair.parameter and len(shape) == 3 else 1
        a, b = (self.tensors.info(keys[factor]).shape for factor in ("A", "B"))
        if not 2 <= len(a) == len(b) or math.prod(b[2:]) != 1 or not a[0]:
            raise BadInput("not the shapes of LoRA factors", where=f"{self.file}, {pair.key}", found=f"A {a}, B {b}")
        found, other = a[0], b[1]
        if found != other and len(shape) > 2 and not pair.parameter:
            raise BadInput("LoRA of a grouped convolution is not a change of its weight", where=f"{self.file}, {pair.key}")
        if not found == other == rank * experts:
            raise BadInput(
                "a LoRA factor has another rank than the adapter's configuration says",
                where=f"{self.file}, {pair.key}",
                expected=rank * experts,
                found=f"{found} rows of A, {other} columns of B",
            )
        return rank

    def _scale(self, pair: _Pair, rank: int) -> float:
        alpha = self._pattern("alpha_pattern", "lora_alpha", pair)
        return float(alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank)

    def _pattern(self, patterns: str, default: str, pair: _Pair) -> Any:
        """Return the value of the first pattern that matches the module's name or its end (`peft.utils.get_pattern_key`)."""
        target = pair.tensor if pair.parameter else pair.module
        for pattern, value in (self.config.get(patterns) or {}).items():
            if matches_end(pattern, target, where=f"{self.file.with_name(CONFIG)}, {patterns}"):
                return value
        return self.config[default]

    def _low_rank(
        self, pair: _Pair, name: str, shape: tuple[int, ...], piece: Piece | None, keys: dict[str, str], scale: float
    ) -> Callable[[torch.dtype], Tensor]:
        """Return a function that computes Δ = s·BA in the layout of the base tensor, or the piece of Δ that it holds."""
        a, b = self.tensors[keys["A"]], self.tensors[keys["B"]]
        if pair.parameter and len(shape) == 3:
            return self._expert_delta(pair, name, shape, piece, a, b, scale)
        if piece is not None:
            whole = self._low_rank(pair, name, shape, None, keys, scale)
            return lambda dtype: piece.of(whole(dtype))
        if a.ndim > 2:  # convolutions: B is 1×1, so that BA has the kernel of A
            self._require_shape(name, pair.key, shape, (b.shape[0], *a.shape[1:]))
            return lambda dtype: product(a.flatten(1), b.flatten(1), scale, dtype).reshape(shape)
        out_in = (b.shape[0], a.shape[1])
        transposed = pair.embedding or self._is_transposed(pair, shape, out_in)
        self._require_shape(name, pair.key, shape, out_in[::-1] if transposed else out_in)
        if transposed:
            return lambda dtype: product(a, b, scale, dtype).T
        return lambda dtype: product(a, b, scale, dtype)

    def _decomposition(
        self, key: str | None, pair: _Pair, keys: dict[str, str], name: str, piece: Piece | None,
        delta: Callable[[torch.dtype], Tensor],
    ) -> Callable[[Tensor], Tensor] | None:  # fmt: skip
        """Return a function that computes m·(W + Δ)/‖W + Δ‖ of DoRA, with m at `key`; None for plain LoRA."""
        if (key is not None) != bool(self.config.get("use_dora")):
            found = f"no lora_magnitude_vector of {pair.module}" if key is None else key
            raise BadInput("half a DoRA adapter", where=f"{self.file.with_name(CONFIG)}, use_dora", found=found)
        if key is None:
            return None
        if pair.embedding or pair.parameter or piece is not None:
            raise BadInput("DoRA of an embedding or of a part of a tensor cannot be baked", where=f"{self.file}, {key}")
        magnitude, shape = self.tensors[key], self.base.info(name).shape
        out_in = (self.tensors.info(keys["B"]).shape[0], self.tensors.info(keys["A"]).shape[1])
        axis = int(len(shape) == 2 and self._is_transposed(pair, shape, out_in))
        if max(magnitude.shape, default=1) != magnitude.numel() or magnitude.numel() != out_in[0]:
            self._require_shape(name, key, (out_in[0],), tuple(magnitude.shape))

        def replace(base: Tensor) -> Tensor:
            dtype = working_dtype(base.dtype)
            return decomposed(base.to(dtype) + delta(dtype).to(base.device), magnitude, axis)

        return replace

    def _expert_delta(
        self, pair: _Pair, name: str, shape: tuple[int, ...], piece: Piece | None, a: Tensor, b: Tensor, scale: float
    ) -> Callable[[torch.dtype], Tensor]:
        """Return a function that computes Δ of stacked experts, or the piece of it that a base tensor holds.

        A (experts·r, in), B (out, r·experts) → (experts, out, in) or (experts, in, out).
        """
        outs, ins, experts = b.shape[0], a.shape[1], shape[0]
        live = self.names.module(pair.module) if outs == ins else None
        in_out = getattr(live, "is_transposed", False) if outs == ins else shape == (experts, ins, outs)
        self._require_shape(name, pair.key, shape, (experts, ins, outs) if in_out else (experts, outs, ins))
        some = slice(None)
        if piece is not None and piece.offset % (outs * ins) + piece.extent <= outs * ins:  # of one expert
            expert, offset = divmod(piece.offset, outs * ins)
            some, piece = slice(expert, expert + 1), piece._replace(offset=offset)

        def delta(dtype: torch.dtype) -> Tensor:
            first, second = a.reshape(experts, -1, ins)[some], b.reshape(outs, -1, experts)[..., some]
            stack = second.to(dtype).permute(2, 0, 1) @ first.to(dtype)
            whole = (stack.mT if in_out else stack) * scale
            return whole if piece is None else piece.of(whole)

        return delta

    def _is_transposed(self, pair: _Pair, shape: tuple[int, ...], out_in: tuple[int, int]) -> bool:
        """Return whether the base stores (in, out), as GPT-2's Conv1D does. The file's flag describes its last module only."""
        if out_in[0] != out_in[1]:
            return shape == out_in[::-1]
        if self.names.without_conv1d:
            return False
        live = self.names.module(pair.module)
        return type(live).__name__ == "Conv1D" if live is not None else bool(self.config.get("fan_in_fan_out"))

    def _add_token_rows(self, changes: dict[str, Change], module: str, key: str) -> None:
        """Add the rows of an embedding, given by `trainable_token_indices`, that replace those of the base."""
        name = self._find(f"{module}.weight", key)
        if name is None:
            return
        indices = self.config.get("trainable_token_indices")
        if isinstance(indices, dict):
            indices = next((rows for target, rows in indices.items() if f".{module}".endswith(f".{target}")), None)
        rows = self.tensors[key]
        vocabulary, *features = self.base.info(name).shape
        fits = isinstance(indices, list) and all(type(i) is int and 0 <= i < vocabulary for i in indices)
        if not fits or tuple(rows.shape) != (len(indices or ()), *features):
            raise BadInput(
                "the token rows do not match trainable_token_indices or the base",
                where=f"{self.file}, {key}",
                expected=f"rows of {self.base.info(name).shape} at {indices}",
                found=tuple(rows.shape),
            )

        def replace(base: Tensor) -> Tensor:
            dtype = torch.promote_types(base.dtype, rows.dtype)
            where = torch.tensor(indices, device=base.device)
            return base.to(dtype).index_copy(0, where, rows.to(base.device, dtype))

        self._add(changes, name, key, Change(replace=replace))

    def _find(self, tensor: str, key: str) -> str | None:
        """Return the base's name of a module tensor; None, after noting the key as unmatched, if there is none."""
        name = self.names.find(tensor)
        if name is None:
            if self.config.get("ensure_weight_tying") and self.names.tied_partner(tensor):
                return None  # the partner has an entry of its own with the same content
            self.unmatched.append(key)
            return None
        self._refuse_quantized(name)
        return name

    def _refuse_quantized(self, name: str) -> None:
        dtype = self.base.info(name).dtype
        if not dtype.is_floating_point or dtype.itemsize == 1:
            raise BadInput(
                "the base tensor is quantized",
                where=f"{self.base.source}, {name}",
                found=dtype,
                fix="bake into the unquantized base",
            )

    def _report_unmatched(self, *, nothing_matched: bool) -> None:
        if not self.unmatched:
            return
        if not nothing_matched:
            fix = "give the base that the adapter was trained on, or --allow-unmatched to skip them"
        elif self.names.needs_transformers:
            fix = "pip install 'emomerge[train]', which resolves names, or give the base that the adapter was trained on"
        else:
            fix = "give the base that the adapter was trained on"
        error = BadInput(
            "the adapter is of another model" if nothing_matched else "an adapter key matches no base tensor",
            where=f"{self.file}, {self.unmatched[0]}",
            expected=f"a tensor of {self.base.source}",
            found="none for any key" if nothing_matched else f"none for {len(self.unmatched)} of its tensors",
            fix=fix,
        )
        if nothing_matched or not self.allow_unmatched:
            raise error
        warnings.warn(str(error), stacklevel=2)

    def _targets(self, tensor: str, key: str) -> list[tuple[str, Piece | None]]:
        """Return the base tensor of a module tensor, or those that hold its pieces; notes the key if there is none."""
        parts = [] if self.names.find(tensor) is not None else self.names.parts(tensor)
        if not parts:
            return [(name, None)] if (name := self._find(tensor, key)) is not None else []
        for name, _ in parts:
            self._refuse_quantized(name)
        return list(parts)

    def _shape(self, name: str, tensor: str, piece: Piece | None) -> tuple[int, ...]:
        """Return the shape of a module tensor that `name` of the base holds, or a piece of it."""
        shape = self.base.info(name).shape
        if piece is None:
            return shape
        self._require_shape(name, name, shape, piece.shape)
        return self.names.shape(tensor) or shape

    def _require_shape(self, name: str, key: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        if found != wanted:
            raise BadInput(
                "the base tensor has another shape than the adapter expects",
                where=f"{self.file}, {key}",
                expected=wanted,
                found=f"{found} in {name} of {self.base.source}",
                fix="give the base that the adapter was trained on",
            )

    def _refuse_tied(self, tensor: str, key: str) -> None:
        """Refuse to change one of two tied tensors, as a live adapter does: a dense checkpoint has only one tensor for both."""
        if not MAYBE_TIED.search(tensor):  # no need to build the model
            return
        if self.config.get("ensure_weight_tying") or not tensor.endswith((".weight", ".bias")):
            return
        partner = self.names.tied_partner(tensor)
        if partner is not None and (self.names.find(tensor) is None or self.names.find(partner) is None):
            raise BadInput(
                "the base ties this tensor to another, which the adapter does not change",
                where=f"{self.file}, {key}",
                found=f"tied to {partner}",
                fix="train with ensure_weight_tying=True or untie the base first",
            )


def read_config(folder: Path) -> dict[str, Any]:
    """Return the configuration of an adapter, after checking that the LoRA formula expresses it.

    Raises:
        BadInput: it is not JSON, or a field says that the adapter has another effect.
    """
    path, config = folder / CONFIG, load_config(folder)
    if "peft_type" not in config:
        raise BadInput("not a PEFT configuration", where=path, expected="peft_type")
    if config["peft_type"] != "LORA":
        raise BadInput(
            "this kind of adapter is not supported",
            where=f"{path}, peft_type",
            expected="LORA",
            found=config["peft_type"],
        )
    check_type(config, _Config, where=path, what="a wrong value in the adapter's configuration")
    if config.get("init_lora_weights", True) not in _INITS:
        raise BadInput(
            "this initialization changed the base",
            where=f"{path}, init_lora_weights",
            found=config["init_lora_weights"],
            fix="save it with PEFT's path_initial_model_for_weight_conversion, which converts it into plain LoRA",
        )
    for field, value in config.items():
        if value and field not in _UNDERSTOOD:
            raise BadInput("this kind of LoRA is not supported", where=f"{path}, {field}", found=value)
    return config


def open_weights(folder: Path) -> Checkpoint:
    """Open the tensors of an adapter folder. Raises BadInput if they are missing or a pickle."""
    path = folder / WEIGHTS
    pickle = folder / PICKLE
    if not path.is_file() and pickle.is_file():
        raise BadInput(
            "the adapter is a pickle, which is never loaded",
            where=pickle,
            expected=WEIGHTS,
            fix="if you trust it, load it in PEFT and save_pretrained",
        )
    if not path.is_file():
        raise BadInput("the adapter's weights are missing", where=path)
    tensors = open_checkpoint(path)
    if not tensors:
        raise BadInput("the adapter holds no tensors", where=path)
    return tensors


def _first(value: Tensor, _: Tensor) -> Tensor:
    return value


def _without_wrappers(name: str) -> str:
    """Return a module's own name, without the components that PEFT's wrappers add."""
    wrappers: Iterable[str] = ("base_layer", "modules_to_save", "original_module")
    return ".".join(part for part in name.split(".") if part not in wrappers)
