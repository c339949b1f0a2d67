"""The command line. Each module registers one group of commands with `main`: it parses, calls and prints."""

from emomerge.cli import bake, init, inspect, merge, methods, probe, push, run, schema, train_commands  # noqa: F401  (registers the commands)
from emomerge.cli.command import main

__all__ = ["main"]
