"""Match the regular expressions of adapter configurations in linear time.

Python's own engine tries alternatives one after the other, which takes for ever on patterns such as `(a+)+b`. Here the pattern
becomes an automaton whose states are followed all at once.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from functools import cache
from importlib import import_module
from typing import Any

from emomerge.errors import BadInput

MOST_STATES = 20_000
Test = Callable[[str], bool]
_PARSER: Any = import_module("re._parser")
_REFUSED = "a pattern that is not supported"
_NAME = re.compile(r"\^?(?:[\w.]|\\[.-])*")  # a plain name, as most patterns are: Python's engine is linear on it, and faster


class _Automaton:
    """States with edges that consume a character, and free edges that may require a position within the text."""

    def __init__(self) -> None:
        self.consume: list[tuple[Test, int] | None] = []
        self.free: list[list[tuple[str, int]]] = []

    def state(self) -> int:
        """Add a state."""
        if len(self.free) >= MOST_STATES:
            raise ValueError("it repeats too much")
        self.consume.append(None)
        self.free.append([])
        return len(self.free) - 1

    def add(self, items: Iterable[tuple[Any, Any]], start: int) -> int:
        """Add a parsed sequence after a state; return the state behind it."""
        for kind, argument in items:
            start = self._add_one(str(kind), argument, start)
        return start

    def _add_one(self, kind: str, argument: Any, start: int) -> int:
        end = self.state()
        if kind in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            self.consume[start] = (_test(kind, argument), end)
        elif kind == "BRANCH":
            for branch in argument[1]:
                self._join(branch, start, end)
        elif kind == "SUBPATTERN" and not argument[1] and not argument[2]:
            self._join(argument[3], start, end)
        elif kind in ("MAX_REPEAT", "MIN_REPEAT"):
            self._repeat(argument, start, end)
        elif kind == "AT":
            self.free[start].append((str(argument), end))
        else:
            raise ValueError(f"{kind.lower().replace('_', ' ')} in it")
        return end

    def _join(self, items: Any, start: int, end: int) -> None:
        first = self.state()
        self.free[start].append(("", first))
        self.free[self.add(items, first)].append(("", end))

    def _repeat(self, argument: tuple[int, int, Any], start: int, end: int) -> None:
        least, most, items = argument
        for _ in range(least):
            behind = self.state()
            self._join(items, start, behind)
            start = behind
        self.free[start].append(("", end))
        if most == _PARSER.MAXREPEAT:
            self._join(items, start, start)
            return
        for _ in range(most - least):
            behind = self.state()
            self._join(items, start, behind)
            self.free[behind].append(("", end))
            start = behind

    def accepts(self, text: str, start: int, end: int) -> bool:
        """Return whether a path that consumes exactly `text` leads from `start` to `end`."""
        current = self._reach([start], text, 0)
        for position, character in enumerate(text, start=1):
            edges = [edge for state in current if (edge := self.consume[state]) is not None]
            current = self._reach([target for test, target in edges if test(character)], text, position)
        return end in current

    def _reach(self, states: list[int], text: str, position: int) -> set[int]:
        """Return the states that free edges lead to."""
        found, waiting = set(states), list(states)
        while waiting:
            for condition, target in self.free[waiting.pop()]:
                if target not in found and _holds(condition, text, position):
                    found.add(target)
                    waiting.append(target)
        return found


def matches_end(pattern: str, name: str, *, where: object) -> bool:
    """Return whether a pattern matches a dotted name, or the components at its end, as `peft.utils.get_pattern_key` does.

    Raises:
        BadInput: the pattern is invalid, or holds something that depends on more than the current character, such as a
            back-reference.
    """
    if _NAME.fullmatch(pattern):
        return re.match(rf"(.*\.)?({pattern})$", name) is not None
    automaton, start, end = _compiled(rf"(?:.*\.)?(?:{pattern})", pattern, where)
    return automaton.accepts(name, start, end)


def matches_all(pattern: str, name: str, *, where: object) -> bool:
    """Return whether a pattern matches a whole name, as `re.fullmatch` does. Raises BadInput as `matches_end` does."""
    automaton, start, end = _compiled(f"(?:{pattern})", pattern, where)
    return automaton.accepts(name, start, end)


@cache
def _compiled(whole: str, pattern: str, where: object) -> tuple[_Automaton, int, int]:
    automaton = _Automaton()
    try:
        with warnings.catch_warnings(action="ignore"):
            _PARSER.parse(pattern)  # by itself: its parentheses must not close those around it
            parsed = _PARSER.parse(whole)
        if parsed.state.flags & ~re.UNICODE:
            raise ValueError("flags in it")
        start = automaton.state()
        return automaton, start, automaton.add(parsed, start)
    except (re.error, ValueError, OverflowError, RecursionError) as error:
        raise BadInput(_REFUSED, where=where, found=f"{pattern[:80]}: {error}") from None


def _holds(condition: str, text: str, position: int) -> bool:
    if condition in ("", "AT_BEGINNING", "AT_BEGINNING_STRING"):
        return not condition or position == 0
    if condition in ("AT_END", "AT_END_STRING"):
        return position == len(text)
    before, after = text[position - 1 : position], text[position : position + 1]
    boundary = _is_word(before) != _is_word(after)
    return boundary if condition == "AT_BOUNDARY" else not boundary


def _is_word(character: str) -> bool:
    return re.fullmatch(r"\w", character) is not None


def _test(kind: str, argument: Any) -> Test:
    """Return the test of one character that a parsed node stands for."""
    if kind == "ANY":
        return lambda character: character != "\n"
    if kind in ("LITERAL", "NOT_LITERAL"):
        return lambda character: (ord(character) == argument) == (kind == "LITERAL")
    negated = bool(argument) and str(argument[0][0]) == "NEGATE"
    tests = [_member(str(each), value) for each, value in argument[negated:]]
    return lambda character: any(test(character) for test in tests) != negated


def _member(kind: str, value: Any) -> Test:
    if kind == "LITERAL":
        return lambda character: ord(character) == value
    if kind == "RANGE":
        return lambda character: value[0] <= ord(character) <= value[1]
    letter = {"DIGIT": "d", "SPACE": "s", "WORD": "w"}[str(value).rpartition("_")[2]]
    category = re.compile("\\" + (letter.upper() if "NOT" in str(value) else letter))
    return lambda character: category.fullmatch(character) is not None
