"""The click group of all commands, their error handling, and the options that several of them share.

Exit status: 0 success, 1 failure during the work, 2 bad input. Heavy libraries are imported inside the commands to keep
`--help` fast.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from emomerge.errors import BadInput, EmomergeError, Note, shown
from emomerge.extras import needed_by, require

if TYPE_CHECKING:
    from emomerge.training.engines import Engine, EngineName

out_path = click.Path(path_type=Path)
DTYPES = click.Choice(["base", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])


class Command(click.Command):
    """A command whose help ends with an example."""

    def __init__(self, *args: Any, example: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.example = example

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Append the example."""
        if self.example:
            with formatter.section("Example"):
                for line in self.example.strip().splitlines():
                    formatter.write_text(line.strip())


class Main(click.Group):
    """The group of all commands. With --json, wrong options are reported as JSON, too."""

    def main(self, args: Sequence[str] | None = None, *, standalone_mode: bool = True, **options: Any) -> Any:  # type: ignore[override]
        """Run a command; see `click.Command.main`."""
        words = list(sys.argv[1:] if args is None else args)
        if not standalone_mode or "--json" not in words:
            return super().main(words, standalone_mode=standalone_mode, **options)
        try:
            status = super().main(words, standalone_mode=False, **options)
        except click.ClickException as error:
            fail(BadInput(error.format_message().rstrip(".")), as_json=True)
        except click.Abort:
            fail(Interrupted("aborted", 1), as_json=True)
        sys.exit(status if isinstance(status, int) else 0)


class Interrupted(EmomergeError):
    """The user or the system ended the command."""

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


def fail(error: EmomergeError, *, as_json: bool = False) -> NoReturn:
    """Print an error in one line, on request as JSON, and exit with its status."""
    about = {**error.parts, "exit_status": error.exit_status}
    text = json.dumps({"error": about}) if as_json else f"emomerge: {shown(error)}"
    click.echo(text, err=True)
    sys.exit(error.exit_status)


@contextlib.contextmanager
def _explained(where: Path) -> Iterator[None]:
    """Apply `translate_os_error`, which imports torch, only if there is an error."""
    try:
        yield
    except Exception:
        from emomerge.checkpoints.atomic import translate_os_error

        with translate_os_error(where):
            raise


@contextlib.contextmanager
def _shown_notes() -> Iterator[None]:
    """Print each `Note` as one line, and other warnings as Python does."""
    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, Note):
                click.echo(f"Note: {shown(message)}", err=True)
            else:
                others(message, category, *where, **more)

        warnings.showwarning = show
        warnings.simplefilter("always", Note)
        yield


class _Terminated(KeyboardInterrupt):
    """The system asked the process to end; temporaries are removed on the way out."""


@contextlib.contextmanager
def _termination() -> Iterator[None]:
    """Raise _Terminated on SIGTERM within the block, in the main thread of a program that does not handle it itself."""

    def stop(*_: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # cleaning up is not interrupted again
        raise _Terminated

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _guard(function: Callable[..., None], name: str, extras: Sequence[str], resumes: bool) -> Callable[..., None]:
    """Check that the extras are installed, and turn every expected error into one line and an exit status."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        as_json = bool(kwargs.get("as_json"))
        try:
            require(name, *extras)
            with _termination(), _shown_notes(), needed_by(name), _explained(kwargs.get("out") or Path.cwd()):
                function(*args, **kwargs)
        except EmomergeError as error:
            fail(error, as_json=as_json)
        except KeyboardInterrupt as stop:
            terminated = isinstance(stop, _Terminated)
            left = "the same command resumes" if resumes else "nothing was written"
            text = f"{'terminated' if terminated else 'interrupted'}; {left}"
            fail(Interrupted(text, 143 if terminated else 130), as_json=as_json)

    return guarded


quiet_option = click.option("--quiet", is_flag=True, help="Show only errors and results.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON (see `emomerge schema`).")
set_option = click.option("--set", "overrides", multiple=True, metavar="KEY.SUB=VALUE", help="Override a field of the recipe.")
stacking_option = click.option(
    "--parallel",
    type=click.Choice(["auto", "stacked", "sequential"]),
    help="Train all adapters in one pass over the base, or one run after the other (default: the recipe's runs.parallel).",
)
rounding_option = click.option(
    "--rounding",
    type=click.Choice(["nearest", "stochastic"]),
    default="nearest",
    show_default=True,
    help="Rounding to bfloat16 and float16: to the nearest value, or randomly up or down without bias (see --seed).",
)
executor_option = functools.partial(
    click.option, "--executor", type=click.Choice(["local", "ray", "slurm"]), default="local", show_default=True
)
parallel_option = click.option(
    "--max-parallel",
    type=click.IntRange(min=1),
    help="Concurrent workers (default: for local as suits the work, else unlimited).",
)
setting_option = click.option(
    "--executor-set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="An option for the executor: num_gpus=1 for Ray tasks; slurm_partition=gpu or timeout_min=60 for submitit.",
)
log_option = click.option(
    "--log-with",
    "trackers",
    multiple=True,
    type=click.Choice(["tensorboard", "wandb", "trackio"]),
    help="Also log every step to this tracker; short for --set runs.log_with=[…].",
)
force_option = click.option("--force", is_flag=True, help="Overwrite an existing output.")


@click.group(cls=Main, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="emomerge")
def main() -> None:
    """Train five short runs with loss-driven learning rates, merge them into one model, and measure the result.

    Start with `emomerge run digits`, which needs no download.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages: half the time of a new tensor of 50 MB is page faults
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is imported


def command(
    name: str, example: str, *, extras: Sequence[str] = (), cls: type[Command] = Command, resumes: bool = False
) -> Callable[[Callable[..., None]], click.Command]:
    """Register a function as a command of `main`. Errors become one line, and the help ends with the example.

    Args:
        name: name of the command.
        example: one or more command lines.
        extras: extras of emomerge that the command requires.
        cls: class of the command.
        resumes: whether the command continues where it was interrupted if it is given again.
    """

    def decorate(function: Callable[..., None]) -> click.Command:
        return main.command(name, cls=cls, example=example)(_guard(function, f"emomerge {name}", extras, resumes))

    return decorate


def engine_of(folder: Path, executor: EngineName, max_parallel: int | None, settings: Sequence[str]) -> Engine | None:
    """Return the engine described by --executor, --max-parallel and --executor-set; None if this process does the work."""
    from emomerge.experiment.workspace import Workspace
    from emomerge.files import parse_yaml
    from emomerge.training import open_engine

    given = {}
    for setting in settings:
        key, sign, text = setting.partition("=")
        if not sign:
            raise BadInput("--executor-set wants KEY=VALUE", found=repr(setting))
        given[key] = parse_yaml(text, what="not a value in YAML", where=f"--executor-set {key}")
    return open_engine(executor, max_parallel=max_parallel, settings=given, folder=Workspace(folder).slurm)


def default_out(name: str) -> Path:
    """Return the output folder of a recipe if none is given."""
    return Path("out") / name
