"""What a row of the bench table consists of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels.problem import Config, Kernel, Problem

Operands = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the bench table.

    Attributes:
        name: the `--op` of the command line.
        op: the public function, whose tuned entries this case writes.
        kernels: the kernels to choose from.
        operands: (m, n, k, seed) -> arrays on the device; jitted, sizes static.
        call: (operands, config or None) -> result.
        reference: operands -> the same result by XLA.
        problem: operands -> problem; shapes and dtypes suffice.
        tolerance: relative error allowed between `call` and `reference`.
        sizes: the (m, n, k) to run.
        work: (m, n, k) -> operations, bytes; the fewest that the op needs.
        rate: type of the product whose measured rate is the ceiling; "" where bytes alone count.
        peers: names of other libraries' kernels in the file given by `--against`.
    """

    name: str
    op: str
    kernels: tuple[Kernel, ...]
    operands: jax.stages.Wrapped
    call: Callable[[Operands, Config | None], Any]
    reference: Callable[[Operands], Any]
    problem: Callable[[Operands], Problem]
    tolerance: float
    sizes: tuple[tuple[int, int, int], ...]
    work: Callable[[int, int, int], tuple[float, float]]
    rate: str
    peers: tuple[str, ...]
