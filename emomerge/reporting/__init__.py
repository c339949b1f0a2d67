"""Reports: the page, its figures, the model cards and the table in the terminal.

Cards and the table need only the core installation; the page and its figures need the extra `report`.
"""

from emomerge.reporting.advice import next_steps
from emomerge.reporting.card import Card, model_card
from emomerge.reporting.figure import Figure
from emomerge.reporting.figures import draw_figures
from emomerge.reporting.pixels import png
from emomerge.reporting.report import write_report
from emomerge.reporting.terminal import figures_table

__all__ = ["Card", "Figure", "draw_figures", "figures_table", "model_card", "next_steps", "png", "write_report"]
