"""The one error family of jaxquant.

Every message has the same four parts, so that a reader knows where to look and what to do:
``<where>: <what was found>; <the rule>; <what to do>``.  Tests assert on the fields, not on the
wording.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path


class JaxquantError(ValueError):
    """Base of all errors raised on purpose.

    Attributes:
        where: file, tensor, module path or argument that is at fault.
        found: what was found there.
        rule: the rule that it breaks.
        action: what the user can do about it.
    """

    def __init__(self, where: str, found: str, rule: str = "", action: str = "") -> None:
        self.where = where
        self.found = found
        self.rule = rule
        self.action = action
        super().__init__(f"{where}: " + "; ".join(part for part in (found, rule, action) if part))


class LayoutError(JaxquantError):
    """A structural transform would separate codes from their scales, or shapes break the law."""


class FormatError(JaxquantError):
    """A checkpoint file, tensor or config contradicts its format."""


class ConfigError(JaxquantError):
    """A config, scheme or rule is not valid."""


class KernelError(JaxquantError):
    """No kernel takes a problem although a kernel was demanded.

    Attributes:
        reasons: every kernel's name with its reason for refusing.
    """

    def __init__(self, where: str, reasons: Sequence[tuple[str, str]], action: str = "") -> None:
        self.reasons = tuple(reasons)
        found = (
            "no kernel accepts this problem (" + ", ".join(f"{n}: {r}" for n, r in reasons) + ")"
        )
        super().__init__(where, found, action=action)


class PlanError(JaxquantError):
    """Loading cannot be total: tensors or parameters are missing, left over or contradictory.

    Attributes:
        problems: every single violation, each a full error message.
    """

    def __init__(self, where: str, problems: Sequence[str], action: str = "") -> None:
        self.problems = tuple(problems)
        shown = "\n  - ".join(self.problems)
        super().__init__(where, f"{len(self.problems)} problem(s):\n  - {shown}", action=action)


@contextlib.contextmanager
def within(folder: Path, prefix: str) -> Iterator[None]:
    """Errors raised inside say which file they are about.

    Args:
        folder: the checkpoint; an error that names something in it is complete already.
        prefix: what goes before the place that other errors name.
    """
    try:
        yield
    except (FormatError, ConfigError) as error:
        if error.where.startswith(str(folder)):
            raise
        raise type(error)(prefix + error.where, error.found, error.rule, error.action) from None
