"""LoRA: two factors of each weight, with every option of PEFT that changes the result.

Δ = s·BA,  s = α/r, or α/√r with rsLoRA        (Hu et al. 2021; Kalajdzievski 2023)
W′ = m·(W + Δ)/‖W + Δ‖ by output row, with DoRA  (Liu et al. 2024)
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from emomerge.adapters.change import Change
from emomerge.adapters.formulas.dora import decomposed
from emomerge.adapters.low_rank import product
from emomerge.adapters.peft.adapter import PeftReader, Shape, without_wrappers
from emomerge.adapters.peft.kind import Count, Number, Settings
from emomerge.adapters.peft.patterns import matches_end
from emomerge.checkpoints import Checkpoint, Piece, working_dtype
from emomerge.checkpoints.factors import Factors, Term
from emomerge.errors import BadInput

_FACTOR = re.compile(r"(.+)\.(lora_(?:embedding_)?[AB])(?:\.default)?(?:\.(weight|bias))?")
_MAGNITUDE = re.compile(r"(.+)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?")


class LoraSettings(Settings):
    """The types of the fields that are read here."""

    r: Count
    lora_alpha: Annotated[Number, Field(gt=0)]
    rank_pattern: dict[str, Count] | None = None
    alpha_pattern: dict[str, Number] | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
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


class LoraReader(PeftReader):
    """Reads a LoRA adapter."""

    def __init__(self, folder: Path, config: Mapping[str, Any], base: Checkpoint, allow_unmatched: bool) -> None:
        super().__init__(folder, config, base, allow_unmatched)
        self.magnitudes: dict[str, str] = {}
        self.factors: dict[tuple[str, bool], dict[str, str]] = defaultdict(dict)

    def claim(self, name: str, key: str) -> bool:
        """Take factors and magnitudes. Raises BadInput for any other tensor of a LoRA."""
        if match := _FACTOR.fullmatch(name):
            module, factor, leaf = match[1], match[2], match[3] or "weight"
            self.factors[module, "embedding" in factor]["bias" if leaf == "bias" else factor[-1]] = key
        elif match := _MAGNITUDE.fullmatch(name):
            self.magnitudes[match[1]] = key
        elif ".lora_" in name:
            raise BadInput("this kind of LoRA is not supported", where=f"{self.file}, {key}")
        else:
            return False
        return True

    def add_modules(self) -> None:
        """Add the change of every module that has factors."""
        for (module, embedding), keys in sorted(self.factors.items()):
            self._add_low_rank(module, embedding, keys)
        for module in sorted(self.magnitudes.keys() - {module for module, _ in self.factors}):
            raise BadInput("a magnitude without its LoRA factors", where=f"{self.file}, {self.magnitudes[module]}")

    def _add_low_rank(self, module: str, embedding: bool, keys: dict[str, str]) -> None:
        """Add s·BA of one module, and s·b of its bias."""
        key = next(iter(keys.values()))
        for factor in ("A", "B"):
            if factor not in keys:
                raise BadInput("a LoRA factor is missing", where=f"{self.file}, {module}", expected=f"lora_{factor}", found=key)
        pair = self._pair(module, embedding, keys["A"])
        self.refuse_tied(pair.tensor, key)
        for name, piece in self.targets(pair.tensor, pair.key):
            shape = self.shape(name, pair.tensor, piece)
            scale = self._scale(pair, self._rank(pair, shape, keys))
            change = self._low_rank(pair, name, shape, piece, keys, scale)
            decomposition = self._decomposition(self.magnitudes.get(module), pair, keys, name, piece, change)
            self.add(name, pair.key, change if decomposition is None else Change(replace=decomposition))
        bias_name = self.find(f"{pair.module}.bias", keys["bias"]) if "bias" in keys else None
        if bias_name is not None:
            bias = self.tensors[keys["bias"]]
            self.require_shape(bias_name, keys["bias"], self.base.info(bias_name).shape, tuple(bias.shape))
            self.add(bias_name, keys["bias"], Change(delta=lambda dtype: bias.to(dtype) * scale))

    def _pair(self, module: str, embedding: bool, key: str) -> _Pair:
        """Return the tensor that a pair of factors changes."""
        plain = without_wrappers(module)
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

    def _rank(self, pair: _Pair, shape: Shape, keys: dict[str, str]) -> int:
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
            if matches_end(pattern, target, where=f"{self.config_file}, {patterns}"):
                return value
        return self.config[default]

    def _low_rank(
        self, pair: _Pair, name: str, shape: Shape, piece: Piece | None, keys: dict[str, str], scale: float
    ) -> Change:
        """Return Δ = s·BA in the layout of the base tensor, or the piece of Δ that it holds."""
        a, b = self.tensors[keys["A"]], self.tensors[keys["B"]]
        if pair.parameter and len(shape) == 3:
            return Change(delta=self._expert_delta(pair, name, shape, piece, a, b, scale))
        if piece is not None:
            whole = self._low_rank(pair, name, shape, None, keys, scale).delta
            assert whole is not None
            return Change(delta=lambda dtype: piece.of(whole(dtype)))
        if a.ndim > 2:  # convolutions: B is 1×1, so that BA has the kernel of A
            self.require_shape(name, pair.key, shape, (b.shape[0], *a.shape[1:]))
            return _product(a.flatten(1), b.flatten(1), scale, shape)
        out_in = (b.shape[0], a.shape[1])
        transposed = pair.embedding or self._is_transposed(pair, shape, out_in)
        self.require_shape(name, pair.key, shape, out_in[::-1] if transposed else out_in)
        return _product(b.mT, a.mT, scale, shape) if transposed else _product(a, b, scale, shape)

    def _decomposition(
        self, key: str | None, pair: _Pair, keys: dict[str, str], name: str, piece: Piece | None,
        change: Change,
    ) -> Callable[[Tensor], Tensor] | None:  # fmt: skip
        """Return a function that computes m·(W + Δ)/‖W + Δ‖ of DoRA, with m at `key`; None for plain LoRA."""
        if (key is not None) != bool(self.config.get("use_dora")):
            found = f"no lora_magnitude_vector of {pair.module}" if key is None else key
            raise BadInput("half a DoRA adapter", where=f"{self.config_file}, use_dora", found=found)
        if key is None:
            return None
        if pair.parameter or piece is not None:
            raise BadInput("DoRA of a part of a tensor cannot be baked", where=f"{self.file}, {key}")
        magnitude, shape = self.tensors[key], self.base.info(name).shape
        out_in = (self.tensors.info(keys["B"]).shape[0], self.tensors.info(keys["A"]).shape[1])
        axis = int(len(shape) == 2 and (pair.embedding or self._is_transposed(pair, shape, out_in)))
        if max(magnitude.shape, default=1) != magnitude.numel() or magnitude.numel() != out_in[0]:
            self.require_shape(name, key, (out_in[0],), tuple(magnitude.shape))

        delta = change.delta
        assert delta is not None

        def replace(base: Tensor) -> Tensor:
            dtype = working_dtype(base.dtype)
            return decomposed(base.to(dtype) + delta(dtype).to(base.device), magnitude, axis)

        return replace

    def _expert_delta(
        self, pair: _Pair, name: str, shape: Shape, piece: Piece | None, a: Tensor, b: Tensor, scale: float
    ) -> Callable[[torch.dtype], Tensor]:
        """Return a function that computes Δ of stacked experts, or the piece of it that a base tensor holds.

        A (experts·r, in), B (out, r·experts) → (experts, out, in) or (experts, in, out).
        """
        outs, ins, experts = b.shape[0], a.shape[1], shape[0]
        live = self.names.module(pair.module) if outs == ins else None
        in_out = getattr(live, "is_transposed", False) if outs == ins else shape == (experts, ins, outs)
        self.require_shape(name, pair.key, shape, (experts, ins, outs) if in_out else (experts, outs, ins))
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

    def _is_transposed(self, pair: _Pair, shape: Shape, out_in: tuple[int, int]) -> bool:
        """Return whether the base stores (in, out), as GPT-2's Conv1D does. The file's flag describes its last module only."""
        if out_in[0] != out_in[1]:
            return shape == out_in[::-1]
        found = self.is_conv1d(pair.module)
        return bool(self.config.get("fan_in_fan_out")) if found is None else found


def _product(a: Tensor, b: Tensor, scale: float, shape: Shape) -> Change:
    """Return s·BA, in a shape."""
    factors = Factors(shape, (Term(a, b, scale),))
    return Change(delta=lambda dtype: product(a, b, scale, dtype).reshape(shape), factors=lambda: factors)
