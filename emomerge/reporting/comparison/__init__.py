"""Compare finished experiments: `emomerge report A B C`."""

from emomerge.reporting.comparison.compared import Comparison, compare
from emomerge.reporting.comparison.page import write_comparison
from emomerge.reporting.comparison.terminal import comparison_table

__all__ = ["Comparison", "compare", "comparison_table", "write_comparison"]
