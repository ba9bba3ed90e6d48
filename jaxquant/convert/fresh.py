"""A directory that appears under its name only when it is complete."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jaxquant.errors import FormatError


def refuse_existing(path: Path) -> None:
    """Stop where something exists already.

    Raises:
        FormatError: ``path`` exists, or is a link to nowhere.
    """
    if path.exists() or path.is_symlink():
        raise FormatError(str(path), "it exists", "nothing is overwritten", "choose another name")


@contextlib.contextmanager
def fresh_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory beside ``path``, renamed to it at the end, removed on failure.

    Raises:
        FormatError: ``path`` exists, or its parent cannot be written.
    """
    refuse_existing(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        found, rule = f"it cannot be made ({error.strerror})", "a directory that can be written"
        raise FormatError(str(path), found, rule, "choose another place") from None
    try:
        yield temporary
        # mkdtemp makes directories private; a checkpoint has the permissions of any other.
        temporary.chmod(0o755)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
