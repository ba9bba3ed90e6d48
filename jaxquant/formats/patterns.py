"""Regular expressions from untrusted files, refused where backtracking could take for ever.

Python's matcher tries one way after the other.  How many there are is bounded from the pattern
alone: alternatives add, parts that follow each other multiply, a repeat can stop at every
character.  A pattern whose bound is too high for a name is refused before it is tried.
"""

from __future__ import annotations

import functools
import math
import re
from typing import NamedTuple

from jaxquant.errors import FormatError

MAX_PATTERN = 2000
MAX_WAYS = 4_000_000
_SATURATED = 1 << 64
_QUANTIFIER = re.compile(r"(?:([*+?])|\{(\d+)\}|\{(\d*),(\d*)\})[?+]?")
_CLASS = re.compile(r"\[\^?\]?(?:[^\]\\]|\\.)*\]", re.DOTALL)
_OPENING = re.compile(r"\((?:\?(?:[:=!>]|<[=!]|P<\w+>|\([^)]*\)|[a-zA-Z-]*:))?")
_VERBOSE = re.compile(r"\(\?[a-zA-Z]*x")
_SILENT = re.compile(r"\(\?(?:#[^)]*|P=\w+|[a-zA-Z]+)\)")


class Ways(NamedTuple):
    """In how many ways a part of a pattern can match at one place.

    Attributes:
        number: from alternatives and bounded repeats.
        repeats: unbounded repeats; ``r`` of them share ``n`` characters in ``comb(n + r, r)`` ways.
    """

    number: int = 1
    repeats: int = 0

    def then(self, other: Ways) -> Ways:
        """Of this part followed by another."""
        return Ways(min(self.number * other.number, _SATURATED), self.repeats + other.repeats)

    def or_else(self, other: Ways) -> Ways:
        """Of this part or another."""
        return Ways(min(self.number + other.number, _SATURATED), max(self.repeats, other.repeats))

    def on(self, length: int) -> int:
        """On a text of ``length`` characters."""
        return self.number * math.comb(length + self.repeats, self.repeats)


class _Endless(Exception):
    """A repeat of something that can match in several ways: exponentially many."""


def _repeated(body: Ways, least: int, most: int | None) -> Ways:
    if body == Ways():
        free = most is None or most - least > 64
        return Ways(1, 1) if free else Ways((most or 0) - least + 1)
    if most is None or most * max(body.number.bit_length(), body.repeats) > 64:
        raise _Endless
    return Ways(body.number**most * (most - least + 1), body.repeats * most)


class _Parser:
    """Finds the structure of a pattern that ``re`` has accepted."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def alternatives(self) -> Ways:
        first = {self.initial()}
        branches = [self.sequence()]
        while self.text.startswith("|", self.at):
            self.at += 1
            first.add(self.initial())
            branches.append(self.sequence())
        if None not in first and len(first) == len(branches):
            # Different first letters: at most one of the branches can match.
            return Ways(max(b.number for b in branches), max(b.repeats for b in branches))
        return functools.reduce(Ways.or_else, branches)

    def initial(self) -> str | None:
        """The letter that a branch has to start with, where that is plain to see."""
        letter = self.text[self.at : self.at + 1]
        optional = _QUANTIFIER.match(self.text, self.at + 1)
        if not letter.isalnum() or (optional and _bounds(optional)[0] == 0):
            return None
        return letter.casefold()

    def sequence(self) -> Ways:
        ways = Ways()
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            start = self.at
            body, single = self.atom()
            atom = self.text[start : self.at]
            if found := _QUANTIFIER.match(self.text, self.at):
                least, most = _bounds(found)
                self.at = found.end()
                body = _repeated(body, least, most)
                # Where the next character cannot belong to the repeat, it has one place to stop.
                if single and body == Ways(1, 1) and self.stops(atom):
                    body = Ways()
            ways = ways.then(body)
        return ways

    def atom(self) -> tuple[Ways, bool]:
        """One group, class or character; whether it is a single character."""
        if silent := _SILENT.match(self.text, self.at):
            self.at = silent.end()
            return Ways(), False
        if self.text[self.at] == "(":
            opening = _OPENING.match(self.text, self.at)
            self.at = opening.end() if opening else self.at + 1
            ways = self.alternatives()
            self.at += 1
            return ways, False
        if found := _CLASS.match(self.text, self.at):
            self.at = found.end()
        else:
            self.at += 2 if self.text[self.at] == "\\" else 1
        return Ways(), True

    def stops(self, atom: str) -> bool:
        """Whether a literal follows that ``atom`` does not match."""
        rest = self.text[self.at : self.at + 2]
        escaped = rest[:1] == "\\"
        letter = rest[1:] if escaped else rest[:1]
        if not letter or letter.isalnum() == escaped or (letter in ".^$*+?{}[]|()" and not escaped):
            return False
        optional = _QUANTIFIER.match(self.text, self.at + 1 + escaped)
        if optional and _bounds(optional)[0] == 0:
            return False
        return not any(re.fullmatch(atom, c) for c in {letter, letter.lower(), letter.upper()})


def _bounds(quantifier: re.Match[str]) -> tuple[int, int | None]:
    sign, exactly, least, most = quantifier.groups()
    if sign:
        return int(sign == "+"), 1 if sign == "?" else None
    if exactly:
        return int(exactly), int(exactly)
    return int(least or 0), int(most) if most else None


@functools.lru_cache(4096)
def compile_pattern(pattern: str, where: str) -> tuple[re.Pattern[str], Ways]:
    """A pattern and the number of ways in which it can match.

    Raises:
        FormatError: no regular expression, too long, or a repeat inside a repeat; ``where`` and
            the pattern are named.
    """
    where = f"{where}: pattern {pattern[:80]!r}"
    if len(pattern) > MAX_PATTERN:
        raise FormatError(where, f"{len(pattern)} characters", f"at most {MAX_PATTERN}")
    try:
        compiled = re.compile(pattern)
        if _VERBOSE.search(pattern):
            raise FormatError(where, "the flag x", "patterns are written without spaces")
        return compiled, _Parser(pattern).alternatives()
    except (re.error, RecursionError, OverflowError) as error:
        raise FormatError(where, f"no regular expression ({error})", "Python's re syntax") from None
    except _Endless:
        raise FormatError(
            where, "a repeat inside a repeat, or of alternatives", "it could match for ever"
        ) from None


def _checked(pattern: str, text: str, where: str) -> re.Pattern[str]:
    compiled, ways = compile_pattern(pattern, where)
    if ways.on(len(text)) > MAX_WAYS:
        raise FormatError(
            f"{where}: pattern {pattern[:80]!r}",
            f"{ways.repeats} repeats that can stop anywhere in {len(text)} characters",
            "it could match for ever",
        )
    return compiled


def match_end(pattern: str, text: str, where: str) -> int | None:
    """End of the match of ``pattern`` at the start of ``text``, or None.

    Raises:
        FormatError: no regular expression, or one that could backtrack for ever.
    """
    found = _checked(pattern, text, where).match(text)
    return None if found is None else found.end()


def matches(pattern: str, text: str, where: str) -> re.Match[str] | None:
    """The match of ``pattern`` with the whole of ``text``, or None.

    Raises:
        FormatError: no regular expression, or one that could backtrack for ever.
    """
    return _checked(pattern, text, where).fullmatch(text)
