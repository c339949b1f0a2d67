"""The comparison in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emomerge.reporting.comparison.compared import Contender, Group
from emomerge.reporting.text import UNKNOWN, decimals, fixed, short

if TYPE_CHECKING:
    from rich.table import Table


def comparison_table(group: Group) -> Table:
    """Return a table of the model that each experiment recommends, best first."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=group.about, title_justify="left", box=None, pad_edge=False)
    table.add_column("rank", no_wrap=True)
    for heading in ("experiment", "model"):
        table.add_column(heading, overflow="fold")
    for heading in ("test loss", f"− the first ({group.unit})", "CPU s"):
        table.add_column(heading, justify="right", no_wrap=True)
    places = decimals([found.test_loss for found in group.recommended], 4)
    for found in group.recommended:
        cells = [rank_of(found), found.run, found.model, fixed(found.test_loss, places), difference_of(found, places)]
        cells.append(short(found.cpu_seconds))
        table.add_row(*(Text(cell, style="bold" if found.rank_low == 1 else "") for cell in cells))
    return table


def rank_of(found: Contender) -> str:
    """Return the rank with its interval: `2 (1–3)`; the rank alone where the rows leave no other."""
    if found.rank is None:
        return "diverged"
    return f"{found.rank}" if found.rank_low == found.rank_high else f"{found.rank} ({found.rank_low}–{found.rank_high})"


def difference_of(found: Contender, places: int) -> str:
    """Return the difference to the first with its interval."""
    if not found.difference:
        return UNKNOWN
    low, high = (fixed(bound, places, signed=True) for bound in (found.difference_low, found.difference_high))
    return f"{fixed(found.difference, places, signed=True)} [{low}, {high}]"
