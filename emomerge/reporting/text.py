"""Format numbers: a true minus sign, an appropriate number of digits, a dash for unknown values."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

from emomerge.results import Results

UNKNOWN = "–"


def unit(results: Results) -> str:
    """Return the unit of losses."""
    return results.data.unit if results.data else "nats"


def decimals(values: Iterable[float | None], significant: int = 3) -> int:
    """Return the decimal places (0…7) that give the median magnitude `significant` digits; one number for a whole column."""
    magnitudes = [abs(value) for value in values if value]
    if not magnitudes:
        return significant
    return min(max(significant - 1 - math.floor(math.log10(statistics.median(magnitudes))), 0), 7)


def fixed(value: float | None, places: int, *, signed: bool = False) -> str:
    """Format a number with a given number of decimal places: `0.0120`, `−3.1`, `+0.02` if signed."""
    return UNKNOWN if value is None else f"{value:{'+' if signed else ''}.{places}f}".replace("-", "−")


def short(value: float | None, significant: int = 3) -> str:
    """Format a single number with a given number of significant digits: `0.0123`, `1.2e−07`, `128`."""
    if value is None:
        return UNKNOWN
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}".replace(",", " ").replace("-", "−")
    return f"{value:.{significant}g}".replace("-", "−")


def percent(value: float | None, places: int = 1) -> str:
    """Format a share as a percentage: `91.4 %`."""
    return UNKNOWN if value is None else f"{fixed(100 * value, places)} %"


def duration(seconds: float | None) -> str:
    """Format a time span: `0.8 s`, `42 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds is None:
        return UNKNOWN
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
