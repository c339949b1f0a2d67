"""Numbers as a reader wants them: a true minus, fitting digits, a dash for what is not known."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

UNKNOWN = "–"


def unit(results: Mapping[str, Any]) -> str:
    """What losses are counted in."""
    return str((results.get("data") or {}).get("unit") or "nats")


def finite(value: object) -> float | None:
    """The value as a float, or None where it is missing, no number, NaN or infinite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def decimals(values: Iterable[object], significant: int = 3) -> int:
    """Decimal places (0…7) that give the median magnitude `significant` digits; one figure for a whole column."""
    magnitudes = [abs(v) for v in map(finite, values) if v]
    if not magnitudes:
        return significant
    return min(max(significant - 1 - math.floor(math.log10(statistics.median(magnitudes))), 0), 7)


def fixed(value: object, places: int, *, signed: bool = False) -> str:
    """A number with that many decimal places: `0.0120`, `−3.1`, `+0.02` if signed."""
    number = finite(value)
    if number is None:
        return UNKNOWN
    return f"{number:{'+' if signed else ''}.{places}f}".replace("-", "−")


def short(value: object, significant: int = 3) -> str:
    """One number alone, with that many significant digits: `0.0123`, `1.2e−07`, `128`."""
    number = finite(value)
    if number is None:
        return UNKNOWN
    if number == int(number) and abs(number) < 1e6:
        return f"{int(number):,}".replace(",", " ").replace("-", "−")
    return f"{number:.{significant}g}".replace("-", "−")


def percent(value: object, places: int = 1) -> str:
    """A share as a percentage: `91.4 %`."""
    number = finite(value)
    return UNKNOWN if number is None else f"{fixed(100 * number, places)} %"


def duration(seconds: object) -> str:
    """A time span: `0.8 s`, `42 s`, `3 min 20 s`, `2 h 5 min`."""
    number = finite(seconds)
    if number is None:
        return UNKNOWN
    if number < 10:
        return f"{number:.1f} s"
    whole = round(number)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
