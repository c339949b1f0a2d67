"""What an emo optimizer refuses: options out of range, a rate changed from outside, unusable gradients, foreign state."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from emomerge.errors import BadInput
from emomerge.optim.batches import State
from emomerge.optim.native import REPLACED
from emomerge.optim.rule import Group, Rule


def check_options(group: Group, capturable: bool) -> None:
    """Raise BadInput for hyper-parameters out of range."""
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise BadInput("option out of range", where="betas", expected="two numbers, β₁ and β₂", found=repr(betas))
    limits = {"lr": math.inf, "eps": math.inf, "weight_decay": math.inf, "betas[0]": 1.0, "betas[1]": 1.0}
    values = {**group, "betas[0]": betas[0], "betas[1]": betas[1]}
    for name, limit in limits.items():
        value = values[name]
        if not isinstance(value, (int, float)) or not 0 <= value < limit:
            raise BadInput("option out of range", where=name, expected=f"a number in [0, {limit})", found=repr(value))
    for name in ("use_shadow", "stochastic_rounding"):
        if capturable and group[name]:
            raise BadInput(f"`capturable` keeps the step off the host, where `{name}` runs", fix="use only one of the two")


def check_rates(groups: Sequence[Group]) -> None:
    """Raise BadInput if `lr` of a group was changed after it was added, except to 0."""
    for number, group in enumerate(groups):
        if group["lr"] not in (0, group["scope"]):
            raise BadInput(
                "`lr` was changed, perhaps by a scheduler; emoPulse sets the rate itself and `lr` only multiplies it",
                where=f"param_groups[{number}]['lr']",
                expected=group["scope"],
                found=group["lr"],
                fix="use a constant schedule; to rescale on purpose, set group['scope'] to the same value",
            )


def check_gradients(optimizer: str, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Raise BadInput for a sparse or complex gradient among (parameter, gradient) pairs."""
    for p, grad in pairs:
        if grad.is_sparse or grad.is_complex():
            kind = "sparse" if grad.is_sparse else "complex"
            raise BadInput(
                f"{optimizer} cannot use a {kind} gradient",
                where=f"parameter of shape {tuple(p.shape)}",
                fix="train with sparse=False" if kind == "sparse" else "use torch.view_as_real",
            )


def explain_failure(rule: Rule, pairs: Iterable[tuple[Tensor, State]], group: Group) -> BadInput | None:
    """Return the error about state that no longer fits its parameter, if that is why an update failed."""
    for p, state in pairs:
        wanted = {name: tuple(t.shape) for name, t in rule.init_state(torch.empty_like(p, device="meta"), group).items()}
        found = {name: tuple(t.shape) for name, t in state.items() if name in wanted}
        if found != wanted and not hasattr(p, "to_local"):
            what = "the state of a parameter has another shape than the parameter"
            return BadInput(what, where=f"parameter of shape {tuple(p.shape)}", expected=wanted, found=found, fix=REPLACED)
    return None


def check_state(rule: Rule, key: object, p: Tensor, saved: State, group: Group) -> None:
    """Raise BadInput if this rule does not create such state for such a parameter."""
    if hasattr(p, "to_local"):  # DTensor: torch.distributed.checkpoint checks and reshards its state
        return
    wanted = {name: tuple(t.shape) for name, t in rule.init_state(torch.empty_like(p, device="meta"), group).items()}
    if "shadow" in saved:
        wanted["shadow"] = tuple(p.shape)
    found = {name: tuple(t.shape) for name, t in saved.items()}
    if found != wanted:
        raise BadInput(
            "the state belongs to another optimizer or to a parameter of another shape",
            where=f"state of parameter {key}",
            expected=wanted,
            found=found,
            fix=f"load the state that {type(rule).__name__} saved for this model",
        )
