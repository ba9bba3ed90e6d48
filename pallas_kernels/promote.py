"""Promotion: products of single steps of K, scaled and added in float32 registers.

Each step has a fresh accumulator, so that scales may vary along K; it also makes the sum immune to
the reduced precision in which the tensor cores add fp8 products.  The price is that a warpgroup
adds where it could multiply.  With two products under way, the tensor cores work on one while the
other is added, at the cost of a second accumulator's registers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.tiles import release


@dataclasses.dataclass(frozen=True)
class Ring:
    """Slots of shared memory that a producer fills in turn.

    Attributes:
        full, empty: a barrier for each slot, for its being filled and read.
        slots: how many there are.
        interpret: whether the interpreter runs this.
    """

    full: Any
    empty: Any
    slots: int
    interpret: bool

    def after(self, s: jax.Array) -> jax.Array:
        """Return the slot that follows slot s; cheaper than a remainder of the step."""
        return lax.select(s == self.slots - 1, jnp.int32(0), s + 1)


def start_product(kind: Any, left: Any, right: Any) -> jax.Array:
    """Start left [rows, k] times right [k, columns]; return it, not to be read before a wait."""

    def start(acc):
        plgpu.wgmma(acc, left, right)
        return plgpu.wgmma_accumulator_load(acc, wait_n=None)

    return pl.run_scoped(start, kind)


def sum_steps(
    start: Callable[[Any, jax.Array], tuple[jax.Array, Any]],
    add: Callable[[list[jax.Array], jax.Array, Any], list[jax.Array]],
    totals: list[jax.Array],
    *,
    steps: int,
    unroll: int,
    first_slot: jax.Array,
    ring: Ring,
) -> list[jax.Array]:
    """Return the totals after `steps` steps of K.

    Args:
        start: called with a step and its slot; starts the product (see `start_product`) and returns
            it with whatever `add` needs besides.
        add: called with the totals, a finished product in float32 and what came with it.
        totals: float32 registers to begin with.
        steps: steps of K.
        unroll: steps in a row in which the next product starts before the last is added.  A product
            cannot be under way from one iteration of a loop to the next, so the row is unrolled.
        first_slot: slot of the first step.
        ring: the slots; each is given back as soon as its product is finished.
    """

    def run(i, count: int, carry):
        s, totals = carry

        def finish(totals, product, extra):
            # The barrier keeps the compiler from reading the product before the wait.
            product = lax.optimization_barrier(product).astype(jnp.float32)
            return add(totals, product, extra)

        plgpu.barrier_wait(ring.full.at[s])
        product, extra = start(i, s)
        for ahead in range(1, count):
            following = ring.after(s)
            plgpu.barrier_wait(ring.full.at[following])
            started = start(i + ahead, following)
            plgpu.wgmma_wait(1)
            release(ring.empty.at[s], ring.interpret)
            totals = finish(totals, product, extra)
            (product, extra), s = started, following
        plgpu.wgmma_wait(0)
        release(ring.empty.at[s], ring.interpret)
        return ring.after(s), finish(totals, product, extra)

    rows, rest = divmod(steps, unroll)
    carry = lax.fori_loop(
        0, rows, lambda row, carry: run(row * unroll, unroll, carry), (first_slot, totals)
    )
    return (run(jnp.int32(rows * unroll), rest, carry) if rest else carry)[1]
