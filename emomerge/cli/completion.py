"""What shells suggest for arguments and options whose values have names: recipes, merge methods, metrics."""

from __future__ import annotations

from collections.abc import Iterable

import click
from click.shell_completion import CompletionItem

from emomerge.cli.templates import templates


def complete_templates(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the bundled recipes that begin with what was typed."""
    return _items(templates(), incomplete)


def complete_recipes(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the bundled recipes that begin with what was typed, and let the shell add its files.

    Files come first, as click's script for bash forgets what precedes them; bash completes files only where no recipe matches.
    """
    return [CompletionItem(incomplete, type="file"), *_items(templates(), incomplete)]


def complete_methods(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the merge methods that begin with what was typed."""
    from emomerge.merging import METHODS  # loads torch: only those who ask wait for it

    return _items(METHODS, incomplete)


def complete_metrics(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the metrics of the probe that begin with what was typed."""
    from emomerge.probing.registry import METRICS

    return _items(METRICS, incomplete)


def _items(names: Iterable[str], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in sorted(names) if name.startswith(incomplete)]
