"""Adding products of a register operand and a shared memory operand, on the device or the host.

The GPU interpreter has no wgmma with its first operand in registers, so under it the same kernel
body adds with a plain dot.  Both classes offer the same four functions over a list of accumulators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.tiles import accumulator


class TensorCores:
    """Accumulators of the wgmma unit, refs of shape `shape`."""

    def __init__(self, shape: tuple[int, int], dtype: Any):
        self.kind = accumulator(shape, dtype)

    def scoped(self, count: int, use: Callable[[list[Any]], Any]) -> Any:
        """Return `use(accumulators)` with `count` accumulators of zeros."""
        return pl.run_scoped(lambda *accs: use(list(accs)), *[self.kind] * count)

    def add(self, accs: list[Any], index: int, operand: jax.Array, other: Any) -> None:
        """Start adding operand [rows, k] times other [columns, k] to an accumulator."""
        plgpu.wgmma(accs[index], operand, other.T)

    def wait(self, pending: int) -> None:
        """Wait until at most `pending` of the additions started are under way."""
        plgpu.wgmma_wait(pending)

    def read(self, acc: Any, start: int, stop: int) -> jax.Array:
        """Return columns of a finished accumulator."""
        return acc[:, start:stop]

    def loop(self, steps: Any, step: Callable[[Any, list[Any]], None], accs: list[Any]) -> list:
        """Run `step(i, accs)` for each step; return the accumulators."""

        def body(i, carry):
            step(i, accs)
            return carry

        lax.fori_loop(0, steps, body, jnp.int32(0))
        return accs


class HostDots:
    """The same with arrays as accumulators."""

    def __init__(self, shape: tuple[int, int], dtype: Any):
        self.shape, self.dtype = shape, dtype

    def scoped(self, count: int, use: Callable[[list[Any]], Any]) -> Any:
        """Return `use(accumulators)` with `count` accumulators of zeros."""
        return use([jnp.zeros(self.shape, self.dtype)] * count)

    def add(self, accs: list[Any], index: int, operand: jax.Array, other: Any) -> None:
        """Add operand [rows, k] times other [columns, k] to an accumulator."""
        pair = (operand.astype(self.dtype), other[...].astype(self.dtype))
        accs[index] = accs[index] + lax.dot_general(*pair, (((1,), (1,)), ((), ())))

    def wait(self, pending: int) -> None:
        """Do nothing: additions are done when started."""

    def read(self, acc: Any, start: int, stop: int) -> jax.Array:
        """Return columns of an accumulator."""
        return acc[:, start:stop]

    def loop(self, steps: Any, step: Callable[[Any, list[Any]], None], accs: list[Any]) -> list:
        """Run `step(i, accs)` for each step; return the accumulators."""

        def body(i, carry):
            accs = list(carry)
            step(i, accs)
            return tuple(accs)

        return list(lax.fori_loop(0, steps, body, tuple(accs)))
