"""The errors a user can meet. Each message is one line: what, where, expected, found, what to do."""

from __future__ import annotations

import re
from collections.abc import Sequence

_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
LONGEST = 1000
"""Characters of a value that an error quotes, such as a name of a file."""


def shown(text: object) -> str:
    """Return a text for display: escape sequences, changes of direction and lone surrogates appear as `\\x1b`, not as effects.

    Names of tensors, runs and files come from outside; they pass through here before they reach a terminal, card or page.
    """
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


def shown_lines(text: str) -> str:
    """Return a text of several lines for display; see `shown`."""
    return "\n".join(shown(line.expandtabs(8)) for line in text.split("\n"))


def _quoted(value: object) -> str:
    text = " ".join(str(value).split())
    return shown(text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(text)} characters)")


class EmomergeError(Exception):
    """A failure inside the work; the command line ends with exit status 1."""

    exit_status = 1

    @property
    def parts(self) -> dict[str, str | None]:
        """The parts of the message: `what`, `where`, `expected`, `found` and `fix`; None where it has none."""
        return {"what": shown(self), "where": None, "expected": None, "found": None, "fix": None}


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
        known = {"where": where, "expected": expected, "found": found, "fix": fix}
        self._parts = {"what": shown(what), **{key: None if part is None else _quoted(part) for key, part in known.items()}}
        parts = [what if where is None else f"{what}: {_quoted(where)}"]
        if expected is not None:
            parts.append(f"expected {_quoted(expected)}")
        if found is not None:
            parts.append(f"found {_quoted(found)}")
        if fix is not None:
            parts.append(fix)
        super().__init__(" ".join("; ".join(parts).split()))

    @property
    def parts(self) -> dict[str, str | None]:
        """The parts of the message."""
        return self._parts


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
        self.fix = f"pip install 'emomerge[{','.join(extras)}]'"
        super().__init__(f"{feature} needs {', '.join(packages)}; {self.fix}")

    @property
    def parts(self) -> dict[str, str | None]:
        """The parts of the message; `fix` is the command that installs the packages."""
        return {**super().parts, "what": f"{self.feature} needs {', '.join(self.packages)}", "fix": self.fix}


class MissingLossError(EmomergeError, RuntimeError):
    """`step()` was called on an emo optimizer that observed no loss since its last step."""


class NonFiniteLossError(EmomergeError, ArithmeticError):
    """The loss is NaN or infinite; the optimizer's state is as it was before."""


class RunFailed(EmomergeError):
    """One or more runs could not finish; the others did."""
