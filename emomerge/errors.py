"""The errors a user can meet. Each message is one line: what, where, expected, found, what to do."""

from __future__ import annotations

from collections.abc import Sequence


class EmomergeError(Exception):
    """A failure inside the work; the command line ends with exit status 1."""

    exit_status = 1


class BadInput(EmomergeError, ValueError):
    """Something the user gave cannot be used; the command line ends with exit status 2 and nothing half-written.

    Args:
        what: the diagnosis, a short phrase without a full stop.
        where: the file, field, tensor or row that it is about.
        expected: what would have been right.
        found: what is there instead.
        fix: what to do about it, in the imperative.
    """

    exit_status = 2

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        found: object = None,
        fix: str | None = None,
    ) -> None:
        parts = [what if where is None else f"{what}: {where}"]
        if expected is not None:
            parts.append(f"expected {expected}")
        if found is not None:
            parts.append(f"found {found}")
        if fix is not None:
            parts.append(fix)
        super().__init__(" ".join("; ".join(parts).split()))


class Note(UserWarning):
    """Something that the user of an output should know; commands print it on standard error as one line."""


class MissingExtra(EmomergeError, ImportError):
    """A command or function needs a package that the installation lacks; exit status 2.

    Args:
        feature: what needs the packages, such as `emomerge run`.
        packages: the missing packages, as pip names them.
        extras: the extras of emomerge that install them.
    """

    exit_status = 2

    def __init__(self, feature: str, packages: Sequence[str], extras: Sequence[str]) -> None:
        self.feature, self.packages, self.extras = feature, tuple(packages), tuple(extras)
        super().__init__(f"{feature} needs {', '.join(packages)}; pip install 'emomerge[{','.join(extras)}]'")


class MissingLossError(EmomergeError, RuntimeError):
    """`step()` was called on an emo optimizer that observed no loss since its last step."""


class NonFiniteLossError(EmomergeError, ArithmeticError):
    """The loss is NaN or infinite; the optimizer's state is as it was before."""


class RunFailed(EmomergeError):
    """One or more runs could not finish; the others did."""
