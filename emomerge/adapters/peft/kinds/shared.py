"""VeRA and RandLoRA: random matrices that all modules share, scaled by trained vectors.

Kopiczko et al. 2024; Albert et al. 2025.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from emomerge.adapters.formulas.formula import Formula
from emomerge.adapters.formulas.lora import LowRankProduct
from emomerge.adapters.peft.kind import Count, Kind, Module, Number, Settings
from emomerge.errors import BadInput

Seed = Annotated[int, Field(ge=0, lt=2**63)]


class VeraSettings(Settings):
    """The rank, and the seed of the shared matrices where the file lacks them."""

    r: Count
    projection_prng_key: Seed
    save_projection: bool | None = None


def _uniform(shape: tuple[int, ...], gain: float, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return random numbers as PEFT draws them: uniform, with a bound of √(gain/the number of inputs)."""
    bound = math.sqrt(gain / math.prod(shape[1:]))
    return torch.empty(shape, dtype=dtype).uniform_(-bound, bound, generator=generator)


def _projections(module: Module) -> tuple[Tensor, Tensor]:
    """Return A (r, in) and B (out, r) of VeRA, large enough for every module."""
    rank: int = module.setting("r")
    if module.shared:
        return module.take_shared("vera_A", rank, None), module.take_shared("vera_B", None, rank)
    out, features = module.largest
    generator = torch.Generator().manual_seed(module.setting("projection_prng_key"))
    return _uniform((rank, features), 6, torch.float32, generator), _uniform((out, rank), 6, torch.float32, generator)


def _vera(module: Module) -> Mapping[str, Formula]:
    module.require_dimensions(2)
    a, b = _projections(module)
    if b.shape[0] < module.out or a.shape[1] < module.columns:
        raise BadInput(
            "the shared matrices are too small for a module", where=module.where, found=f"{tuple(a.shape)}, {tuple(b.shape)}",
            expected=f"at least {(len(a), module.columns)} and {(module.out, len(a))}",
        )  # fmt: skip
    inner, outer = module.take("vera_lambda_d", len(a)), module.take("vera_lambda_b", module.out)
    up = outer.double()[:, None] * b[: module.out].double()
    down = inner.double()[:, None] * a[:, : module.columns].double()
    return {"weight": LowRankProduct(up, down, 1.0)}


VERA = Kind(
    "VeRA", ("vera_lambda_b", "vera_lambda_d"), _vera, VeraSettings,
    frozenset({"vera_dropout", "d_initial", "init_weights"}), shared=("vera_A", "vera_B"), conv1d=True,
)  # fmt: skip


class RandLoraSettings(Settings):
    """Rank and α, and how the shared matrices are drawn where the file lacks them."""

    r: Count
    randlora_alpha: Number
    projection_prng_key: Seed
    save_projection: bool | None = None
    sparse: bool | None = None
    very_sparse: bool | None = None


def _bases(module: Module) -> tuple[Tensor, Tensor]:
    """Return A (r, 1, the smaller side) and B (the larger side, bases, r) of RandLoRA, large enough for every module."""
    rank: int = module.setting("r")
    if module.has("randlora_A") or module.has("randlora_B"):  # PEFT saves a copy of them for each module, too
        return module.take("randlora_A", rank, 1, None), module.take("randlora_B", None, None, rank)
    if module.shared:
        return module.take_shared("randlora_A", rank, 1, None), module.take_shared("randlora_B", None, None, rank)
    small, large = min(module.largest), max(module.largest)
    generator = torch.Generator().manual_seed(module.setting("projection_prng_key"))
    bases = -(-small // rank)
    if module.setting("very_sparse", False) or module.setting("sparse", False):
        share = math.sqrt(small) if module.setting("very_sparse", False) else 3
        a, b = (_signs(torch.rand(shape, generator=generator), share) for shape in ((rank, 1, small), (large, bases, rank)))
    else:
        a = _uniform((rank, 1, small), 1, torch.bfloat16, generator)  # in half precision, as PEFT draws these
        b = torch.cat([_uniform((large, 1, rank), 1, torch.bfloat16, generator) for _ in range(bases)], dim=1)
    return a / a.std(), b / b.std()


def _signs(uniform: Tensor, share: float) -> Tensor:
    """Return −1 and 1, each for a share 1/(2·share) of the numbers, and 0 for the others."""
    bound = 1 / (2 * share)
    return (uniform > 1 - bound).float() - (uniform < bound).float()


def _randlora(module: Module) -> Mapping[str, Formula]:
    module.require_dimensions(2)
    rank: int = module.setting("r")
    small, large = min(module.out, module.columns), max(module.out, module.columns)
    bases = -(-small // rank)
    a, b = _bases(module)
    if a.shape[2] < small or b.shape[0] < large or b.shape[1] < bases:
        raise BadInput(
            "the shared matrices are too small for a module", where=module.where, found=f"{tuple(a.shape)}, {tuple(b.shape)}",
            expected=f"at least {(rank, 1, small)} and {(large, bases, rank)}",
        )  # fmt: skip
    scales, columns = module.take("randlora_lambda", rank, bases), module.take("randlora_gamma", bases, small)
    narrow = (scales.double()[:, :, None] * a[:, :, :small].double() * columns.double()[None]).flatten(0, 1)
    wide = b[:large, :bases].double().flatten(1)
    # The trained vectors always scale the smaller side, which is the output of a layer with fewer rows than columns.
    up, down = (wide, narrow) if small == module.columns else (narrow.T, wide.T)
    return {"weight": LowRankProduct(up, down, float(module.setting("randlora_alpha")) / rank)}


RANDLORA = Kind(
    "RandLoRA", ("randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B"), _randlora, RandLoraSettings,
    frozenset({"randlora_dropout", "init_weights"}), shared=("randlora_A", "randlora_B"), conv1d=True,
)  # fmt: skip
