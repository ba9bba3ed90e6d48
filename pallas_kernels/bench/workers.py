"""Problems spread over processes: they compile side by side, and then use the GPU one at a time.

Processes, because lowering a kernel is Python: threads would take turns.  While one uses the GPU
none compiles, because a busy host delays launches, and a process that is done ends, because memory
of the GPU that a process once had stays with it.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

Prepare = Callable[[Any], Callable[[], Any]]
Found = tuple[int, Any, str]


def share_memory() -> None:
    """Let other processes have memory of the GPU; to be called before anything is computed."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"


def _why(error: Exception) -> str:
    traceback.print_exc()
    message = (str(error).splitlines() or [""])[0][:160]
    return f"{type(error).__name__} {message}"


def _worker(prepare: Prepare, tasks: list[tuple[int, Any]], path: str, results: Connection) -> None:
    share_memory()
    # The lock is free again when this process has ended, and its memory with it.
    lock = os.open(path, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_SH)
    ready = []
    for index, problem in tasks:
        try:
            ready.append((index, prepare(problem)))
        except Exception as error:
            results.send((index, None, _why(error)))
    fcntl.flock(lock, fcntl.LOCK_EX)
    for index, run in ready:
        try:
            results.send((index, run(), ""))
        except Exception as error:
            results.send((index, None, _why(error)))


def in_processes(
    prepare: Prepare, problems: Sequence[Any], processes: int, at_once: int
) -> Iterator[Found]:
    """Yield (index, result, "") of each problem, or (index, None, why there is none), as they come.

    Args:
        prepare: problem -> function that uses the GPU and returns the result.  It can be pickled,
            as problems and results can; the function need not.
        problems: what to work on, dealt out to the processes in turn.
        processes: how many there are in all; a process prepares all its problems first.
        at_once: how many of them exist at the same time.
    """
    context = multiprocessing.get_context("spawn")
    shares = [range(i, len(problems), processes) for i in range(min(processes, len(problems)))]
    running: dict[Connection, tuple[BaseProcess, set[int]]] = {}
    with tempfile.NamedTemporaryFile() as file:
        while shares or running:
            while shares and len(running) < at_once:
                share = shares.pop(0)
                results, sender = context.Pipe(duplex=False)
                tasks = [(i, problems[i]) for i in share]
                process = context.Process(target=_worker, args=(prepare, tasks, file.name, sender))
                process.start()
                sender.close()  # so that the end of the process is the end of what it sends
                running[results] = process, {*share}
            ready = wait(running)
            for results in [results for results in running if results in ready]:
                process, left = running[results]
                try:
                    index, result, why = results.recv()
                    left.discard(index)
                    yield index, result, why
                except EOFError:
                    process.join()
                    del running[results]
                    # A process that a kernel took down with it leaves problems behind.
                    for index in sorted(left):
                        yield index, None, "its process ended"
