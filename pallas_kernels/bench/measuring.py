"""One problem of the bench: compiled, then timed when the GPU is free.

Not in `__main__`: a spawned process does not import that of a package.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable

from pallas_kernels.bench.bars import Row
from pallas_kernels.bench.cases import CASES, Case
from pallas_kernels.bench.limits import Limits
from pallas_kernels.bench.timing import copies, measure, program
from pallas_kernels.problem import select

Size = tuple[int, int, int]

# Floors are of measured limits and expected numbers of experts: a kernel may seem a little faster.
MERGED = 1.15


class ImpossibleError(Exception):
    """A time that cannot be that of the work."""


@dataclasses.dataclass(frozen=True)
class Calls:
    """How often a problem is run: operand sets, calls in turn over them, passes of a program, and
    programs that are queued for one measurement of the wall time."""

    sets: int
    calls: int
    loops: int
    queued: int


def calls_of(case: Case, size: Size) -> Calls:
    """Return how often to run a problem: programs of 1 ms, so that the host is not what is timed,
    queued for 4 ms, as long as the peers' graphs are replayed for."""
    operations, nbytes = case.work(*size)
    sets = copies(nbytes)
    calls = max(sets, 8 if size[0] <= 512 else 2)
    expected = max(nbytes / 4e12, operations / 1.5e15) * calls
    loops = math.ceil(1e-3 / expected)
    loops = 3 if loops == 2 else loops  # `program` makes no two
    return Calls(sets, calls, loops, math.ceil(4e-3 / (expected * loops)))


def prepare(
    limits: Limits, repeats: int, deadline: float, problem: tuple[str, Size]
) -> Callable[[], Row]:
    """Compile a problem, and return what times it.

    Args:
        limits: of the card.
        repeats: programs timed for each median.
        deadline: time of the clock after which no problem is begun.
        problem: name of the case, and size.

    Raises:
        TimeoutError: too late.  The function that is returned raises it too.
    """

    def in_time() -> None:
        if time.time() > deadline:
            raise TimeoutError("no time left")

    in_time()
    name, size = problem
    case = next(case for case in CASES if case.name == name)
    compiled = compile_problem(case, size)

    def timed() -> Row:
        in_time()
        return run(case, size, compiled, limits, repeats)

    return timed


def compile_problem(case: Case, size: Size) -> tuple[Callable, Callable]:
    """Compile a problem: seed -> operands, and the program; nothing is put on the device yet."""
    count = calls_of(case, size)
    make = case.operands.lower(*size, 0)
    shapes = [make.out_info] * count.sets
    call = program(lambda given: case.call(given, None), shapes, count.calls, count.loops)
    return make.compile(), call


def run(
    case: Case, size: Size, compiled: tuple[Callable, Callable], limits: Limits, repeats: int
) -> Row:
    """Time one problem with the config that selection chooses.

    Raises:
        ImpossibleError: faster than the card can be.
    """
    count = calls_of(case, size)
    make, call = compiled
    sets = [make(seed) for seed in range(count.sets)]
    operations, nbytes = case.work(*size)
    kernel, config = select(case.kernels, case.problem(sets[0]))
    timing = measure(call, sets, count.calls * count.loops, repeats, count.queued)
    floors = limits.floors(operations, nbytes, case.rate)
    if max(floors) > MERGED * timing.kernel:
        raise ImpossibleError(
            f"{timing.kernel:.1f} us where the card needs {max(floors):.1f}: "
            "XLA has removed some of the calls, or the limits were measured wrong"
        )
    return {
        "op": case.name,
        "shape": "x".join(map(str, size)),
        "us": round(timing.kernel, 2),
        "wall_us": round(timing.wall, 2),
        "tflops": round(operations / timing.kernel * 1e-6, 1),
        "tb_s": round(nbytes / timing.kernel * 1e-6, 3),
        "bytes_us": round(floors[0], 2),
        "operations_us": round(floors[1], 2),
        "of_floor": round(max(floors) / timing.kernel, 3),
        "of_memory": round(floors[0] / timing.kernel, 3),
        "kernel": kernel.name,
        "config": str(config),
    }
