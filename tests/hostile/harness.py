"""What a hostile file is, and the bounds within which a reader has to refuse it.

One table a reader: ``NAME_cases.py`` has ``CASES``, the case ``GOOD`` that they are lies about, and
``read``, which reads a folder by jaxquant's public functions.
"""

from __future__ import annotations

import gc
import os
import threading
import time
import tracemalloc
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from jaxquant.errors import JaxquantError

SECONDS = 1.0
MEMORY = 64 << 20


class Link(NamedTuple):
    """A symbolic link in place of a file."""

    target: str


class Case(NamedTuple):
    """A folder with a lie in it.

    Attributes:
        files: name in the folder -> content; ``../NAME`` lies beside the folder.
        file: the file that the error has to name.
        found: a part of the message.
        subject: the tensor or key that the error has to name, if there is one.
    """

    files: Mapping[str, bytes | Link]
    file: str
    found: str = ""
    subject: str = ""


def write(case: Case, folder: Path) -> Path:
    """Write a case; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in case.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Link):
            os.symlink(content.target, path)
        else:
            path.write_bytes(content)
    return folder


def _peak_memory(reset: bool = False) -> int:
    """Peak resident bytes of this process since the last reset; 0 where Linux does not say."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def _remains(folder: Path) -> tuple[list[str], int, int]:
    """What a reader could leave behind: files, open files, threads."""
    fds = Path("/proc/self/fd")
    count = len(list(fds.iterdir())) if fds.is_dir() else 0
    return sorted(map(str, folder.parent.rglob("*"))), count, threading.active_count()


def refused(read: Callable[[Path], Any], folder: Path) -> JaxquantError:
    """The one error of a read that has to fail within the bounds and leave nothing behind."""

    def attempt() -> JaxquantError:
        with pytest.raises(JaxquantError) as caught, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(folder)
        error = caught.value.with_traceback(None)
        # What it came from holds frames, and those hold files.
        error.__cause__ = error.__context__ = None
        return error

    # Once for time and resident memory, once for allocations: tracing is slow.
    before = _remains(folder)
    resident = _peak_memory(reset=True)
    # The collection looks at what the attempt made, not at the whole process.
    gc.freeze()
    start = time.process_time()
    error = attempt()
    assert time.process_time() - start < SECONDS
    assert _peak_memory() - resident < MEMORY
    gc.collect()
    gc.unfreeze()
    files, handles, threads = _remains(folder)
    assert files == before[0] and handles <= before[1] and threads <= before[2]
    tracemalloc.start()
    try:
        again = attempt()
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()
    assert str(again) == str(error)
    return error
