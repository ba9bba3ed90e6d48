"""Timing of a function on the GPU: kernel time by CUPTI and wall time of queued programs."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.experimental.mosaic.gpu import profiler

# Operands are rotated over more bytes than this, several times the L2 cache of an H200.
ROTATE_BYTES = 240e6


@dataclasses.dataclass(frozen=True)
class Timing:
    """Microseconds per call.

    Attributes:
        kernel: time that kernels ran, launch gaps excluded; median over the programs.
        wall: wall time per call when programs are queued without waiting for each.
    """

    kernel: float
    wall: float


def copies(nbytes: float) -> int:
    """Return how many operand sets of a size to rotate over."""
    return int(min(24, max(2, ROTATE_BYTES // nbytes + 1)))


def program(
    function: Callable[[Any], jax.Array], sets: Sequence[Any], calls: int, loops: int = 1
) -> Callable:
    """Return a jitted program that makes `calls` calls in turn over the sets, `loops` times.

    All results of a pass are returned: XLA removes a call whose result nobody reads.  Shapes and
    dtypes of the sets suffice.  Many passes in one program keep the host out of the measurement.

    Raises:
        ValueError: two loops.  XLA inlines the loop of one pass that follows the first, drops the
            barriers, and merges its calls with those of the first pass.
    """
    if loops == 2:
        raise ValueError("two passes would be merged into one: make it one or three")

    def once(sets, results):
        made = []
        for i in range(calls):
            operands, before = sets[i % len(sets)], made[-1:] or results[-1:]
            operands, before = lax.optimization_barrier((operands, before))
            made[-1:] = before if made else []
            made.append(function(operands))
        return made

    def run(sets):
        # The first pass stands before the loop: results to begin with, filled with zeros and copied
        # for each call, would be timed as well.
        results = once(sets, [])
        return lax.fori_loop(1, loops, lambda _, results: once(sets, results), results)

    return jax.jit(run).lower(list(sets)).compile()


def kernel_time(compiled: Callable, sets: Sequence[Any], calls: int, repeats: int) -> float:
    """Return the microseconds of kernels a call of a program made by `program`: the median.

    Starting and ending the profiler takes a quarter of a second.
    """
    _, timings = profiler.measure(compiled, aggregate=True, iterations=repeats)(list(sets))
    milliseconds = timings if isinstance(timings, list) else [timings or 0.0]
    return statistics.median(milliseconds) * 1e3 / calls


def wall_time(
    compiled: Callable, sets: Sequence[Any], calls: int, repeats: int, queued: int
) -> float:
    """Return the microseconds a call when programs are queued without waiting for each.

    Args:
        compiled: the program.
        sets: its operands.
        calls: calls it makes in all.
        repeats: how often each queue is timed.  The shortest time counts: a host that wakes late
            makes a queue seem longer, never shorter, and would make a difference either.
        queued: executions by which the two queues differ whose times are compared: what passes
            before the first program starts falls out.
    """
    sets = list(sets)

    def queue(count: int) -> float:
        start = time.perf_counter()
        last = None
        for _ in range(count):
            # An execution that finds the results of the last one gone writes to the same addresses,
            # and XLA replays the CUDA graph as it is.
            del last
            last = compiled(sets)
        jax.block_until_ready(last)
        return time.perf_counter() - start

    times = [(queue(queued), queue(2 * queued)) for _ in range(repeats)]
    short, long = (min(each) for each in zip(*times, strict=True))
    return (long - short) / queued / calls * 1e6


def measure(
    compiled: Callable, sets: Sequence[Any], calls: int, repeats: int = 5, queued: int = 1
) -> Timing:
    """Time a program made by `program`, with the arguments of `kernel_time` and `wall_time`."""
    jax.block_until_ready(compiled(list(sets)))
    # Kernels first, because a card that has been busy for long lowers its clock.
    kernel = kernel_time(compiled, sets, calls, repeats)
    return Timing(kernel, wall_time(compiled, sets, calls, repeats, queued))
