"""Trainable tokens and tuned norms: adapters of nothing but replacements, which every reader adds."""

from __future__ import annotations

from collections.abc import Mapping

from emomerge.adapters.formulas.formula import Formula
from emomerge.adapters.peft.kind import Kind, Module, Settings


class TokenSettings(Settings):
    """The rows of the embedding."""

    token_indices: list[int]


def _nothing(_: Module) -> Mapping[str, Formula]:
    return {}


TRAINABLE_TOKENS = Kind("trainable tokens", (), _nothing, TokenSettings, frozenset({"init_weights"}))
LN_TUNING = Kind("LN tuning", (), _nothing)
