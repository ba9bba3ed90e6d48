"""Typed access to a JSON object from a file that nobody has checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxquant.errors import ConfigError

MAX_COUNT = 1 << 31


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1e30


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_COUNT


class Fields:
    """The values of one JSON object.  null is as good as absent; everything else has a type.

    Args:
        values: the object.
        where: what it is, for messages: ``"config.json"``.
        needs: who needs the values that have no default, for messages: ``"llama models"``.
    """

    def __init__(self, values: Mapping[str, Any], where: str, needs: str = "") -> None:
        self.values = values
        self.where = where
        self.needs = needs

    def error(self, name: str, found: str, rule: str) -> ConfigError:
        """An error about one value."""
        return ConfigError(f"{self.where}: {name}", found[:200], rule)

    def get(self, *names: str) -> tuple[str, Any]:
        """The first of several spellings that is there, and its value; None where none is."""
        for name in names:
            if self.values.get(name) is not None:
                return name, self.values[name]
        return names[0], None

    def number(self, *names: str, default: float | None = None, least: float = -math.inf) -> float:
        """A finite number, of at least ``least``.

        Raises:
            ConfigError: of another type or range, or absent without a default.
        """
        name, value = self.get(*names)
        if value is None:
            if default is None:
                raise self.error(" or ".join(names), "absent", f"{self.needs} need it")
            return default
        # An integer may be too large for a float.
        if type(value) not in (int, float) or abs(value) > 1e30 or not value >= least:
            rule = "a number" if least == -math.inf else f"a number of at least {least:g}"
            raise self.error(name, repr(value)[:80], rule)
        return value

    def positive(self, *names: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self.number(*names, default=default)
        if value <= 0:
            raise self.error(self.get(*names)[0], repr(value), "a positive number")
        return value

    def count(
        self, *names: str, default: int | None = None, least: int = 1, most: int = MAX_COUNT
    ) -> int:
        """A whole number from ``least`` to ``most``."""
        value = self.number(*names, default=default)
        if value != int(value) or not least <= value <= most:
            rule = f"a whole number from {least} to {most}"
            raise self.error(self.get(*names)[0], repr(value)[:80], rule)
        return int(value)

    def flag(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self.get(name)[1]
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, repr(value)[:80], "true or false")
        return value

    def numbers(self, name: str, most: int) -> tuple[float, ...]:
        """A list of at most ``most`` positive numbers, () where absent."""
        return self._list(name, most, "positive numbers", _is_positive)

    def counts(self, name: str, most: int) -> tuple[int, ...]:
        """A list of at most ``most`` whole numbers of at least 0, () where absent."""
        return self._list(name, most, "whole numbers", _is_count)

    def _list(
        self, name: str, most: int, what: str, fits: Callable[[Any], bool]
    ) -> tuple[Any, ...]:
        value = self.get(name)[1]
        if value is None:
            return ()
        if not isinstance(value, list | tuple) or len(value) > most or not all(map(fits, value)):
            raise self.error(name, repr(value)[:80], f"at most {most} {what}")
        return tuple(value)

    def object(self, *names: str) -> dict[str, Any]:
        """The first of several objects that is there, {} where none is."""
        name, value = self.get(*names)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.error(name, repr(value)[:80], "an object")
        return value
