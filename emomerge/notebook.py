"""HTML for notebooks: tables that take colours and fonts from the page around them, so that they suit light and dark."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from emomerge.errors import shown

LINE = "border-bottom: 1px solid color-mix(in srgb, currentColor 25%, transparent)"
QUIET = "opacity: 0.75"


def paragraph(text: str, *, strong: bool = False, quiet: bool = False) -> str:
    """Return a paragraph; the text is escaped."""
    style = "margin: 0.2em 0" + (f"; {QUIET}" if quiet else "")
    inside = escape(shown(text))
    return f'<p style="{style}">{f"<strong>{inside}</strong>" if strong else inside}</p>'


def facts_table(facts: Mapping[str, str]) -> str:
    """Return a table of names and values."""
    rows = "".join(
        f'<tr><th scope="row" style="text-align: left; font-weight: normal; {QUIET}">{escape(name)}</th>'
        f'<td style="text-align: left">{escape(shown(value))}</td></tr>'
        for name, value in facts.items()
    )
    return f'<table style="background: transparent; color: inherit">{rows}</table>'


def figures_table(headings: Sequence[str], rows: Iterable[tuple[str, Sequence[tuple[str, bool]]]]) -> str:
    """Return a table of figures.

    Args:
        headings: of all columns.
        rows: name of a row, and the text of every other cell with whether it is the best of its column.
    """
    head = "".join(
        f'<th scope="col" style="text-align: {"right" if number else "left"}; {LINE}">{escape(shown(heading))}</th>'
        for number, heading in enumerate(headings)
    )
    body = "".join(
        f'<tr><th scope="row" style="text-align: left">{escape(shown(name))}</th>{"".join(map(_cell, cells))}</tr>'
        for name, cells in rows
    )
    table = '<table style="background: transparent; color: inherit; font-variant-numeric: tabular-nums">'
    return f'<div style="overflow-x: auto">{table}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(cell: tuple[str, bool]) -> str:
    text, best = cell
    weight, star = ("bold", " ★") if best else ("normal", "")
    return f'<td style="text-align: right; font-weight: {weight}">{escape(shown(text))}{star}</td>'
