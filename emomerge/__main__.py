"""Entry point of the console script and of `python -m emomerge`, which torchrun starts."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import sys

from emomerge.cli import main


def entry() -> None:
    """Run the command and exit with its status."""
    gc.set_threshold(50_000)  # importing torch creates millions of objects and little garbage
    try:
        main(prog_name="emomerge")
    except SystemExit as end:
        if not isinstance(end.code, int):
            raise
        atexit._run_exitfuncs()
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(end.code)  # tearing down torch's modules would take half a second


if __name__ == "__main__":
    entry()
