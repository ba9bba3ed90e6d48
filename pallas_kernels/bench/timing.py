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


def program(function: Callable[[Any], jax.Array], sets: Sequence[Any], calls: int) -> Callable:
    """Return a jitted program that makes `calls` calls, one after the other, over the sets.

    All results are returned: XLA removes a call whose result nobody reads.  Shapes and dtypes of
    the sets suffice.
    """

    def run(sets):
        results = []
        for i in range(calls):
            operands = sets[i % len(sets)]
            if results:
                operands, results[-1] = lax.optimization_barrier((operands, results[-1]))
            results.append(function(operands))
        return results

    return jax.jit(run).lower(list(sets)).compile()


def measure(compiled: Callable, sets: Sequence[Any], calls: int, repeats: int = 5) -> Timing:
    """Time a program made by `program`."""
    sets = list(sets)
    jax.block_until_ready(compiled(sets))
    start = time.perf_counter()
    jax.block_until_ready([compiled(sets) for _ in range(repeats)])
    wall = (time.perf_counter() - start) / repeats / calls
    _, timings = profiler.measure(compiled, aggregate=True, iterations=repeats)(sets)
    milliseconds = timings if isinstance(timings, list) else [timings or 0.0]
    return Timing(statistics.median(milliseconds) * 1e3 / calls, wall * 1e6)
