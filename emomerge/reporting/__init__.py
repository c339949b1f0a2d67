"""What a reader sees: the page, its figures, the model cards and the table on the terminal."""

from emomerge.reporting.card import model_card
from emomerge.reporting.figure import Figure
from emomerge.reporting.figures import figures
from emomerge.reporting.pixels import png
from emomerge.reporting.report import write_report
from emomerge.reporting.terminal import figures_table

__all__ = ["Figure", "figures", "figures_table", "model_card", "png", "write_report"]
