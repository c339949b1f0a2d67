"""emoPulse: a learning rate computed from the loss alone (paper, chapters 2–4 and supplementary material 1).

All values are IEEE doubles: Python floats, or (`device_pulse.py`) 0-d tensors. The order of operations is part of the
definition, because σ compares two quantities that differ only by rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from types import MappingProxyType
from typing import Any, Literal

from emomerge.errors import BadInput, NonFiniteLossError


@dataclass(frozen=True)
class Preset:
    """The constants of one version of emoPulse."""

    grow: float = 1.50
    """Largest factor by which a trusted step raises dNR_hist."""
    decay: float = 0.80
    """Brake of the hesitation band |trust| ≤ 0.5."""
    noise_floor: float = 1e-10
    base_scale: float = 1e-4
    """η_base: the rate at dNR_hist = 1 and emoScope = 1."""
    min_rate: float = 1e-7
    max_rate: float = 3e-3
    hold_first: bool = False
    """Whether the first step leaves dNR_hist unchanged."""
    span: float = 0.0
    """If above 0, dNR_hist follows span^(c/w), where c and w are slow EMAs of σ and |σ|."""
    chained: bool = False
    """Whether emoScope is multiplied by 100^c, where c is a short EMA of σ, and the largest rate scales with emoScope."""
    stop: Literal["v3.7", "v3.8", "v3.9"] = "v3.8"
    """The rule for `should_stop`."""
    top: float = math.inf
    """The largest dNR_hist."""
    calm: float = 0.0
    """Initial value of w: while the loss has moved less than this on average, c/w stays near 0."""
    sized: bool = False
    """Whether the rate is relative to the weights: η_base is multiplied by `weight_size`, and by `lr` only as far as a schedule
    has changed it since the start."""

    def next_dnr(self, dnr: Any, goal: Any, trust: Any, do: Operations) -> Any:
        """Return dNR_hist after a step (paper 3.2), rising slowly and falling fast. `goal` is the value it moves towards."""
        grown = do.minimum(goal, dnr * self.grow)
        hesitant = (trust >= -0.5) & (trust <= 0.5)
        if self.span:  # does not rise in the band; while the loss rises, falls towards its minimum
            held = do.minimum(dnr, do.where(trust > 0, goal, 1 / self.span))
            return do.maximum(do.where(hesitant, held, grown), dnr * self.decay)
        return do.where((goal >= dnr) & (trust >= 0.5), grown, do.where(hesitant, goal * self.decay, dnr))


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "v3.7": Preset(grow=1.05, decay=0.98, noise_floor=1e-3, min_rate=1e-6, hold_first=True, stop="v3.7"),
        "v3.8": Preset(),
        "v3.8-fft": Preset(base_scale=1e-5, min_rate=1e-8, max_rate=3e-4),
        "v3.9": Preset(min_rate=1e-8, chained=True, stop="v3.9"),
        "guarded": Preset(grow=1.10, span=10.0),
        "auto": Preset(grow=1.10, span=3.0, top=1.0, calm=0.02, base_scale=0.12, max_rate=1.0, sized=True),
    }
)
"""Every preset by name; `v3.8-fft` is for full fine-tuning.

`guarded` is not from the paper. The published rules raise dNR_hist while the loss falls steeply and do not lower it again once
the loss hardly moves. `guarded` follows 10^(c/w): up to 10 while the loss keeps falling, 1 while it fluctuates, 0.1 while it
rises.

`auto` is not from the paper either. It takes the scale of the rate from the weights, so that there is none to tune: η =
0.12 · `weight_size` · dNR_hist, with dNR_hist between 1/3 and 1. A step of the sign rules changes every element of a matrix
by η, and so its spectral norm by at most η·√(fan_out·fan_in); relative to that of the weights, about RMS(W)·√max(fan_out,
fan_in), this is η·√min(fan_out, fan_in)/RMS(W). `auto` sets this ratio instead of η. That relative spectral change is what
transfers between widths is the point of Yang, Simon and Bernstein (2023), "A Spectral Condition for Feature Learning"; 0.12
was chosen by validation loss on four small tasks of `benchmarks/evidence.py` (mild, strong, cnn, vit), training seed 0.
dNR_hist starts at 1, stays there while the loss falls or is flat, and brakes while it rises; above 1 it overshot on vit.
"""


@dataclass
class EmoPulse:
    """The controller: one loss in, one learning rate out.

    Args:
        preset: a name in `PRESETS`.
        scope: emoScope, the user's multiplier of the rate.
        cautious: start with N = d = 0.2, for small or noisy data (paper, chapter 4, "Implementation Considerations").
        size: for `auto`, `weight_size` of the parameters; optimizers measure it at their first step.

    Raises:
        BadInput: an unknown preset, or a scope or size that is negative or not finite.

    Example:
        >>> pulse = EmoPulse()
        >>> pulse.update(2.5)
        0.0001
    """

    preset: str = "v3.8"
    scope: float = 1.0
    cautious: bool = False
    size: float = 0.0

    steps: int = field(default=0, init=False)
    """Number of losses seen."""
    loss: float = field(default=0.0, init=False)
    """The last loss."""
    short: float = field(default=0.0, init=False)
    """The fast EMA of the loss; all three start at the first loss."""
    medium: float = field(default=0.0, init=False)
    long: float = field(default=0.0, init=False)
    noise: float = field(default=1.0, init=False)
    """N, the EMA of |σ|."""
    distance: float = field(default=0.02, init=False)
    """d, the EMA of |trust|."""
    chain: float = field(default=0.0, init=False)
    """c, the EMA of σ: short in v3.9, slow in `guarded` and `auto`."""
    swing: float = field(default=0.0, init=False)
    """w, the slow EMA of |σ| (`guarded` and `auto`)."""
    dnr_now: float = field(default=0.0, init=False)
    """dNR_now of the last step."""
    dnr: float = field(default=1.0, init=False)
    """dNR_hist, the signal-to-noise ratio; the rate is proportional to it."""
    sigma: float = field(default=0.0, init=False)
    """σ in [−1, 1]: above 0 while the loss falls."""
    trust: float = field(default=1.0, init=False)
    """sgn(σ)·(1 − |σ|)."""
    gain: float = field(default=1.0, init=False)
    """The factor of the version on emoScope: 100^c (v3.9), or 0.1 once the loss has converged (v3.8)."""
    rate: float = field(default=0.0, init=False)
    """η of the last step; before the first step, the rate at dNR_hist = 1."""
    stop_steps: int = field(default=0, init=False)
    """Number of consecutive steps for which `should_stop` has been true."""

    def __post_init__(self) -> None:
        _require_preset(self.preset)
        if not 0 <= self.scope < math.inf:
            raise BadInput("emoScope (`lr`, `scope`) out of range", expected="a finite number ≥ 0", found=self.scope)
        if not 0 <= self.size < math.inf:
            raise BadInput("size of the weights out of range", expected="a finite number ≥ 0", found=self.size)
        if self.cautious:
            self.noise = self.distance = 0.2
        self.swing = PRESETS[self.preset].calm
        vars(self).update(asdict(self))  # class-level defaults become instance attributes
        self.rate = self.rate_at(self.scope)

    @property
    def sized(self) -> bool:
        """Whether the preset takes the scale of the rate from the size of the weights."""
        return PRESETS[self.preset].sized

    @property
    def should_stop(self) -> bool:
        """The early-stop signal: the loss has converged. Only a hint; nothing stops by itself."""
        return self.stop_steps > 0

    @property
    def purity(self) -> float:
        """(d_base / noise_base)³, the paper's meta-indicator of pure progress (last chapter). Does not affect the rate."""
        return math.sqrt(self.dnr_now) ** 3

    def figures(self) -> dict[str, Any]:
        """Return the values of the last step for a log."""
        names = ("loss", "rate", "sigma", "trust", "dnr", "purity", "should_stop")
        return {"step": self.steps, **{name: getattr(self, name) for name in names}}

    def update(self, loss: float) -> float:
        """Update with the loss of a step and return its learning rate η.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite; the state is unchanged. Catch the error to skip the step.
            BadInput: the preset needs the size of the weights.
        """
        if PRESETS[self.preset].sized and not self.size:
            raise BadInput(
                f"the preset {self.preset} needs the size of the weights",
                fix=f'pass `EmoPulse("{self.preset}", size=weight_size(parameters))`',
            )
        loss = float(loss)
        if not math.isfinite(loss):
            raise NonFiniteLossError(f"the loss is {loss}; weights and optimizer state are as they were before this step")
        for name, value in advance(PRESETS[self.preset], vars(self), loss, FLOATS).items():
            setattr(self, name, value)
        return self.rate

    def rate_at(self, scope: float) -> float:
        """Return η of the last step for another emoScope, such as that of another parameter group (paper 3.2)."""
        return float(rate_at(PRESETS[self.preset], vars(self), scope, FLOATS))

    def state_dict(self) -> dict[str, Any]:
        """Return all values as plain numbers and one string, always under the same keys."""
        return {name: getattr(self, name) for name in _NAMES}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a `state_dict()`, including preset and scope, to continue with the same bits.

        Raises:
            BadInput: a value is missing, or the preset is unknown; the state is unchanged.
        """
        state = {"size": 0.0, **state}  # written before there was a size
        missing = [name for name in _NAMES if name not in state]
        if missing:
            raise BadInput("not the state of an emoPulse", found=f"no {', '.join(missing)}")
        _require_preset(state["preset"])
        for name in _NAMES:
            setattr(self, name, state[name])


_NAMES = tuple(part.name for part in fields(EmoPulse))


def _require_preset(name: str) -> None:
    if name not in PRESETS:
        raise BadInput("unknown preset", expected=" | ".join(PRESETS), found=repr(name))


@dataclass(frozen=True)
class Operations:
    """Operations beyond arithmetic, so that the formulas are written once for numbers and tensors."""

    where: Callable[[Any, Any, Any], Any]
    maximum: Callable[[Any, Any], Any]
    minimum: Callable[[Any, Any], Any]
    tanh: Callable[[Any], Any]
    copysign: Callable[[Any, Any], Any]


FLOATS = Operations(
    where=lambda condition, yes, no: yes if condition else no,
    maximum=max,
    minimum=min,
    tanh=math.tanh,
    copysign=math.copysign,
)
"""Operations on Python floats."""


def advance(preset: Preset, s: Mapping[str, Any], loss: Any, do: Operations) -> dict[str, Any]:
    """Compute one step of the controller (paper, chapters 2 and 3): the values of `EmoPulse` after a loss.

    Args:
        preset: constants of the version.
        s: values before the step, by the names of `EmoPulse`'s fields: numbers, or 0-d float64 tensors.
        loss: a finite loss of the same type.
        do: operations of that type.
    """
    first = s["steps"] == 0
    short = 0.30 * loss + 0.70 * do.where(first, loss, s["short"])
    medium = 0.05 * loss + 0.95 * do.where(first, loss, s["medium"])
    long = 0.01 * loss + 0.99 * do.where(first, loss, s["long"])
    sigma, sigma_long = _sigma(short, medium, long, do)
    trust = do.copysign(1 - abs(sigma), sigma)

    noise = 0.97 * s["noise"] + 0.03 * abs(sigma)
    distance = 0.97 * s["distance"] + 0.03 * abs(trust)
    noise_base = abs(sigma - trust) + 0.1
    d_base = abs(do.maximum(noise, preset.noise_floor) - distance) + 0.1
    goal = dnr_now = snr(d_base, noise_base)
    chain, swing, gain = s["chain"], s["swing"], s["gain"]
    if preset.span:
        chain = 0.997 * chain + 0.003 * sigma
        swing = 0.997 * swing + 0.003 * abs(sigma)
        goal = do.minimum(preset.span ** (chain / do.maximum(swing, preset.noise_floor)), preset.top)
    dnr = preset.next_dnr(s["dnr"], goal, trust, do)
    if preset.hold_first:
        dnr = do.where(first, s["dnr"], dnr)

    if preset.chained:
        chain = 0.7 * chain + 0.3 * sigma
        gain = do.maximum(100**chain, 1e-2)
    elif preset.stop == "v3.8" and not preset.span:  # judged after the rate of its step, so it slows the next one
        gain = do.where(s["stop_steps"] > 0, 0.1, 1.0)
    after = {
        "steps": s["steps"] + 1, "loss": loss, "short": short, "medium": medium, "long": long, "noise": noise,
        "distance": distance, "chain": chain, "swing": swing, "dnr_now": dnr_now, "dnr": dnr, "sigma": sigma, "trust": trust,
        "gain": gain, "size": s["size"],
    }  # fmt: skip
    after["rate"] = rate_at(preset, after, s["scope"], do)
    rest = _at_rest(preset, after, sigma_long, noise_base - d_base)
    after["stop_steps"] = do.where(rest, s["stop_steps"] + 1, 0)
    return after


def snr(d_base: Any, noise_base: Any) -> Any:
    """dNR_now = (d_base / noise_base)² (paper 3.2)."""
    return (d_base / noise_base) ** 2


def rate_at(preset: Preset, s: Mapping[str, Any], scope: float, do: Operations) -> Any:
    """η = clamp(dNR_hist · emoScope · base_scale, min, max) (paper 3.2); with `sized`, base_scale is relative to the size."""
    max_rate = preset.max_rate * scope if preset.chained else preset.max_rate
    if preset.sized:
        return do.maximum(do.minimum(s["dnr"] * (scope * preset.base_scale) * s["size"], max_rate), preset.min_rate)
    return do.maximum(do.minimum(s["dnr"] * (scope * s["gain"] * preset.base_scale), max_rate), preset.min_rate)


def _at_rest(preset: Preset, s: Mapping[str, Any], sigma_long: Any, imbalance: Any) -> Any:
    """Return whether the loss has converged, by the rule of the version (paper, supplementary material 1)."""
    if preset.stop == "v3.7":
        return (abs(sigma_long) <= 1e-6) & (abs(imbalance) <= 1e-7)
    if preset.stop == "v3.8":
        still = preset.min_rate * 0.3
        return (abs(s["sigma"]) <= still) & (abs(imbalance) <= still)
    return (s["distance"] - s["noise"] >= 0.3) & (s["medium"] <= 0.04)


def _sigma(short: Any, medium: Any, long: Any, do: Operations) -> tuple[Any, Any]:
    """Return σ, the compressed relative decrease of the loss (paper 2.1), and σ_long, the same from the long EMA alone.

    Both sides of the second test equal |long − short| up to rounding; it is kept as published.
    """
    diff = long - short
    scale_long, scale_medium = do.maximum(long, 1e-5), do.maximum(medium, 1e-5)
    d_long, d_medium = diff / scale_long, diff / scale_medium
    by_medium = (abs(d_long) >= 0.05) & (abs(d_medium) * scale_medium < abs(d_long) * scale_long)
    return do.tanh(do.where(by_medium, d_medium, d_long)), do.tanh(d_long)
