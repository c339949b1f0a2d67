"""VeRA and RandLoRA: random matrices that all modules share, scaled by trained vectors.

Kopiczko et al. 2024; Albert et al. 2025.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from emomerge.adapters.formulas.formula import Additive, Formula, require_shape
from emomerge.adapters.low_rank import product
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


@dataclass(frozen=True)
class SharedProduct(Additive):
    """ΔW = s·BA, with factors that are made of the shared matrices when they are needed: all of them would fill the memory.

    Args:
        shape: (out, in).
        make: returns A (r, in) and B (out, r) in a dtype.
        scale: s.
    """

    shape: tuple[int, int]
    make: Callable[[torch.dtype], tuple[Tensor, Tensor]]
    scale: float

    @property
    def rows(self) -> int:
        """Rows of B."""
        return self.shape[0]

    def check(self, shape: tuple[int, ...], *, where: object) -> None:
        """Accept the shape for which the shared matrices were cut."""
        require_shape(shape, self.shape, where=where)

    def _delta(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return product(*self.make(dtype), self.scale, dtype)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return A and s·B."""
        a, b = self.make(dtype)
        return a, b * self.scale


def _require_size(module: Module, a: Tensor, b: Tensor, least: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """Raise BadInput if the shared matrices are smaller than a module needs."""
    for matrix, shape in zip((a, b), least, strict=True):
        if any(size < needed for size, needed in zip(matrix.shape, shape, strict=True)):
            raise BadInput(
                "the shared matrices are too small for a module", where=module.where,
                found=f"{tuple(a.shape)} and {tuple(b.shape)}", expected=f"at least {least[0]} and {least[1]}",
            )  # fmt: skip


@lru_cache(maxsize=1)
def _drawn(rank: int, out: int, features: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return A (r, in) and B (out, r) of VeRA from the seed."""
    generator = torch.Generator().manual_seed(seed)
    return _uniform((rank, features), 6, torch.float32, generator), _uniform((out, rank), 6, torch.float32, generator)


def _vera(module: Module) -> Mapping[str, Formula]:
    module.require_dimensions(2)
    rank: int = module.setting("r")
    out, features = module.out, module.columns
    inner, outer = module.take("vera_lambda_d", rank), module.take("vera_lambda_b", out)
    if module.shared:
        a, b = module.take_shared("vera_A", rank, None), module.take_shared("vera_B", None, rank)
    else:
        a, b = _drawn(rank, *module.largest, module.setting("projection_prng_key"))
    _require_size(module, a, b, ((rank, features), (out, rank)))

    def make(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return inner.to(dtype)[:, None] * a[:, :features].to(dtype), outer.to(dtype)[:, None] * b[:out].to(dtype)

    return {"weight": SharedProduct((out, features), make, 1.0)}


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


@lru_cache(maxsize=1)
def _drawn_bases(rank: int, small: int, large: int, seed: int, share: float | None) -> tuple[Tensor, Tensor]:
    """Return A (r, 1, the smaller side) and B (the larger side, bases, r) of RandLoRA from the seed.

    Args:
        rank: r.
        small: the smaller side.
        large: the larger side.
        seed: of the random numbers.
        share: of the numbers of the sparse variants, 1/share are not zero; None for dense numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    bases = -(-small // rank)
    if share is not None:
        a, b = (_signs(torch.rand(shape, generator=generator), share) for shape in ((rank, 1, small), (large, bases, rank)))
    else:  # in half precision, as PEFT draws these
        a = _uniform((rank, 1, small), 1, torch.bfloat16, generator)
        b = torch.cat([_uniform((large, 1, rank), 1, torch.bfloat16, generator) for _ in range(bases)], dim=1)
    return a / a.std(), b / b.std()


def _signs(uniform: Tensor, share: float) -> Tensor:
    """Return −1 and 1, each for a share 1/(2·share) of the numbers, and 0 for the others."""
    bound = 1 / (2 * share)
    return (uniform > 1 - bound).float() - (uniform < bound).float()


def _bases(module: Module, rank: int) -> tuple[Tensor, Tensor]:
    if module.shared:
        return module.take_shared("randlora_A", rank, 1, None), module.take_shared("randlora_B", None, None, rank)
    if module.has("randlora_A") or module.has("randlora_B"):  # PEFT saves a copy of them for each module, too
        return module.take("randlora_A", rank, 1, None), module.take("randlora_B", None, None, rank)
    small, large = min(module.largest), max(module.largest)
    sparse, very_sparse = module.setting("sparse", False), module.setting("very_sparse", False)
    share = math.sqrt(small) if very_sparse else 3.0 if sparse else None
    return _drawn_bases(rank, small, large, module.setting("projection_prng_key"), share)


def _randlora(module: Module) -> Mapping[str, Formula]:
    module.require_dimensions(2)
    rank: int = module.setting("r")
    small, large = min(module.out, module.columns), max(module.out, module.columns)
    bases = -(-small // rank)
    scales, columns = module.take("randlora_lambda", rank, bases), module.take("randlora_gamma", bases, small)
    a, b = _bases(module, rank)
    _require_size(module, a, b, ((rank, 1, small), (large, bases, rank)))
    wide_output = small == module.columns

    def make(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        narrow = (scales.to(dtype)[:, :, None] * a[:, :, :small].to(dtype) * columns.to(dtype)).flatten(0, 1)
        wide = b[:large, :bases].to(dtype).flatten(1)
        # The trained vectors always scale the smaller side, which is the output of a layer with fewer rows than columns.
        return (narrow, wide) if wide_output else (wide.T, narrow.T)

    scale = float(module.setting("randlora_alpha")) / rank
    return {"weight": SharedProduct((module.out, module.columns), make, scale)}


RANDLORA = Kind(
    "RandLoRA", ("randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B"), _randlora, RandLoraSettings,
    frozenset({"randlora_dropout", "init_weights"}), shared=("randlora_A", "randlora_B"), conv1d=True,
)  # fmt: skip
