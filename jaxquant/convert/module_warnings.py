"""One warning for all modules of a checkpoint that have the same oddity.

A large model has tens of thousands of linears, and what is odd about one mostly is of all.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

from jaxquant.formats.base import FormatWarning


class _Current:
    """The module that is looked at."""

    path = ""

    def __init__(self) -> None:
        self.found: dict[str, tuple[str, set[str]]] = {}

    def note(self, text: str) -> None:
        rest = text.partition(f"{self.path}.")[2] or text
        self.found.setdefault(rest, (text, set()))[1].add(self.path)


@contextlib.contextmanager
def warn_once(stacklevel: int) -> Iterator[_Current]:
    """Warnings that differ in the module only are one, given at the end with their number.

    Set ``path`` of the value to the module whose warnings come next.

    Args:
        stacklevel: as for ``warnings.warn`` in the body.
    """
    current = _Current()
    show = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always", FormatWarning)

        def take(message: Warning | str, category: type[Warning], *where: Any) -> None:
            if issubclass(category, FormatWarning):
                current.note(str(message))
            else:
                show(message, category, *where)

        warnings.showwarning = take
        yield current
    for text, paths in current.found.values():
        more = f" (and {len(paths) - 1} more modules like it)" if len(paths) > 1 else ""
        warnings.warn(text + more, FormatWarning, stacklevel=stacklevel + 2)
