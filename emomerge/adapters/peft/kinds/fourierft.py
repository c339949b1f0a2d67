"""FourierFT: a sparse spectrum whose inverse transform is added to the weight (Gao et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from emomerge.adapters.formulas.formula import Additive, Formula, require_shape
from emomerge.adapters.peft.kind import Count, Kind, Module, Settings


class FourierSettings(Settings):
    """The number of frequencies, the seed that chooses them, and the scale."""

    n_frequency: Count
    scaling: Annotated[float, Field(allow_inf_nan=False)]
    random_loc_seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    n_frequency_pattern: dict[str, Count] | None = None


@dataclass(frozen=True)
class Spectrum(Additive):
    """ΔW = s·Re F⁻¹(S), where S has the stored numbers at random places and zeros elsewhere.

    Args:
        values: (n,).
        shape: (out, in).
        seed: of the places, which are drawn on the CPU.
        scale: s.
    """

    values: Tensor
    shape: tuple[int, int]
    seed: int
    scale: float

    @property
    def rows(self) -> int:
        """Output rows."""
        return self.shape[0]

    def check(self, shape: tuple[int, ...], *, where: object) -> None:
        """Accept the shape for which the places were drawn."""
        require_shape(shape, self.shape, where=where)

    def _delta(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        places = torch.randperm(shape[0] * shape[1], generator=generator)[: len(self.values)]
        spectrum = torch.zeros(shape[0] * shape[1], dtype=dtype)
        spectrum[places] = self.values.to(dtype)
        found: Tensor = torch.fft.ifft2(spectrum.reshape(shape)).real * self.scale
        return found


def _fourier(module: Module) -> Mapping[str, Formula]:
    module.require_dimensions(2)
    values = module.take("fourierft_spectrum", int(module.pattern("n_frequency_pattern", "n_frequency", 1000)))
    seed = int(module.setting("random_loc_seed", 777))
    shape = (module.out, module.columns)
    if len(values) > shape[0] * shape[1]:
        module.take("fourierft_spectrum", shape[0] * shape[1])
    return {"weight": Spectrum(values, shape, seed, float(module.setting("scaling")))}


FOURIERFT = Kind("FourierFT", ("fourierft_spectrum",), _fourier, FourierSettings, frozenset({"init_weights"}), conv1d=True)
