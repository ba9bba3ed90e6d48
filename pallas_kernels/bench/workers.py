"""Problems spread over processes, which compile side by side and use the GPU one at a time.

Processes, because lowering a kernel is Python: threads would take turns.
"""

from __future__ import annotations

import dataclasses
import fcntl
import multiprocessing
import os
import queue
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# Bytes of one operand set above which a problem goes to the first process: memory that a process
# once had stays with it, and the card does not hold the largest problems of all processes.
HEAVY = 5e8


@dataclasses.dataclass
class Turn:
    """A lock between processes, free again when its holder dies: `with turn:`."""

    path: str

    def __enter__(self) -> None:
        self._file = open(self.path)
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        self._file.close()


Work = Callable[[Any, Turn], Any]
Found = tuple[int, Any, str]


def share_memory() -> None:
    """Let other processes have memory of the GPU; to be called before anything is computed."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"


def shares_of(nbytes: Sequence[float], jobs: int) -> list[list[int]]:
    """Return the indices of the problems of each process, the large ones all in one."""
    heavy = [i for i, size in enumerate(nbytes) if size > HEAVY]
    light = [i for i, size in enumerate(nbytes) if size <= HEAVY]
    others = max(jobs - bool(heavy), 1)
    shares = [light[i::others] for i in range(others)]
    if heavy:
        shares = [heavy + shares[0]] if jobs == 1 else [heavy, *shares]
    return [share for share in shares if share]


def _worker(work: Work, tasks: list[tuple[int, Any]], turn: Turn, results: Any) -> None:
    share_memory()
    for index, problem in tasks:
        try:
            results.put((index, work(problem, turn), ""))
        except Exception as error:
            traceback.print_exc()
            message = (str(error).splitlines() or [""])[0][:160]
            results.put((index, None, f"{type(error).__name__} {message}"))


def in_processes(
    work: Work, problems: Sequence[Any], nbytes: Sequence[float], jobs: int
) -> Iterator[Found]:
    """Yield (index, result, "") of each problem, or (index, None, why there is none), as they come.

    Args:
        work: (problem, turn) -> result; uses the GPU inside `with turn:` alone.  It can be pickled,
            as problems and results can.
        problems: what to work on.
        nbytes: of one operand set of each problem.
        jobs: processes.
    """
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    shares = shares_of(nbytes, jobs)
    with tempfile.NamedTemporaryFile() as file:
        turn = Turn(file.name)
        processes = [
            context.Process(
                target=_worker, args=(work, [(i, problems[i]) for i in share], turn, results)
            )
            for share in shares
        ]
        for process in processes:
            process.start()
        left = {i for share in shares for i in share}
        while left:
            # A process that a kernel took down with it leaves problems behind.
            ended = [s for s, p in zip(shares, processes, strict=True) if p.exitcode]
            try:
                found = [results.get(timeout=5)]
            except queue.Empty:
                found = [(i, None, "its process ended") for share in ended for i in share]
            for index, result, why in found:
                if index in left:
                    left.discard(index)
                    yield index, result, why
        for process in processes:
            process.join()
