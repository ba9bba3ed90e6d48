"""What the card at hand can do, measured before anything is compared with it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.bench.timing import measure, program
from pallas_kernels.matmul_a8 import matmul_a8


@dataclasses.dataclass(frozen=True)
class Limits:
    """Ceilings of one card.

    Attributes:
        memory: bytes read plus written per second, by the faster of a large copy and a large sum.
        rates: operations per second of a large product, by type of the operands: "bfloat16",
            "float8_e4m3fn", "int8".
    """

    memory: float
    rates: dict[str, float]

    def floors(self, operations: float, nbytes: float, rate: str) -> tuple[float, float]:
        """Return the least microseconds that the bytes and the operations of a problem take.

        A `rate` of "" counts bytes alone.
        """
        return 1e6 * nbytes / self.memory, 1e6 * operations / self.rates[rate] if rate else 0.0

    def raised(self, rate: str, operations: float, microseconds: float) -> Limits:
        """Return the limits with what a product just reached, where that is higher."""
        if not rate:
            return self
        reached = max(self.rates[rate], operations / microseconds * 1e6)
        return dataclasses.replace(self, rates={**self.rates, rate: reached})


def _rate(dtype: Any, size: int) -> float:
    """Return operations per second of a size^3 product of random operands of a type."""
    keys = jax.random.split(jax.random.key(0))

    def codes(key):
        if dtype == jnp.int8:
            return jax.random.randint(key, (size, size), -127, 128, jnp.int8)
        return jax.random.normal(key, (size, size), jnp.bfloat16).astype(dtype)

    def product(pair):
        if dtype == jnp.bfloat16:
            return lax.dot_general(pair[0], pair[1], (((1,), (1,)), ((), ())))
        scale = jnp.ones((size, 1), jnp.float32)
        return matmul_a8(pair[0], scale, pair[1], scale)

    pair = jax.jit(lambda: (codes(keys[0]), codes(keys[1])))()
    timing = measure(program(product, [pair], 4), [pair], 4)
    return 2.0 * size**3 / timing.kernel * 1e6


def _memory() -> float:
    """Return the highest rate at which XLA's own kernels read and write memory.

    A card may write more slowly than it reads, or cover large arrays badly, so that one kind of
    kernel of one size is no limit of another.
    """
    best = 0.0
    for nbytes in (2**28, 2**30, 2**31):
        words = jnp.zeros(nbytes // 4, jnp.float32)
        kinds = ((lambda x: x + 1, 2), (lambda x: x.reshape(-1, 2**16).sum(1), 1))
        for function, passes in kinds:
            timing = measure(program(function, [words], 2), [words], 2, repeats=3)
            best = max(best, passes * nbytes / timing.kernel * 1e6)
    return best


def measure_limits(size: int = 8192) -> Limits:
    """Measure the memory bandwidth and the dense rates of the first GPU.

    Args:
        size: extent of the square products.
    """
    rates = {jnp.dtype(d).name: _rate(d, size) for d in (jnp.bfloat16, jnp.float8_e4m3fn, jnp.int8)}
    return Limits(_memory(), rates)
