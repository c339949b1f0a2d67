"""The command line in a process of its own: the console script, and `python -m emomerge`, which torchrun starts."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import sys

from emomerge.cli import main


def entry() -> None:
    """Run the command and end the process with its exit status."""
    gc.set_threshold(50_000)  # importing torch makes objects by the million and hardly any garbage
    try:
        main(prog_name="emomerge")
    except SystemExit as end:
        if not isinstance(end.code, int):
            raise
        atexit._run_exitfuncs()
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(end.code)  # what Python does else, taking torch's modules apart one by one, takes half a second


if __name__ == "__main__":
    entry()
