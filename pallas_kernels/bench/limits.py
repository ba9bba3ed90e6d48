"""What the card at hand can do, measured before anything is compared with it."""

from __future__ import annotations

import dataclasses
import time
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
        copy: bytes read plus written per second by a large copy.
        rates: operations per second of a large product, by type of the operands: "bfloat16",
            "float8_e4m3fn", "int8".
    """

    copy: float
    rates: dict[str, float]

    def floor(self, operations: float, nbytes: float, rate: str) -> float:
        """Return the least time of a problem, in microseconds; `rate` "" counts bytes alone."""
        seconds = nbytes / self.copy
        return 1e6 * (max(seconds, operations / self.rates[rate]) if rate else seconds)

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


def measure_limits(size: int = 8192, copied: int = 2**31) -> Limits:
    """Measure the copy bandwidth and the dense rates of the first GPU.

    Args:
        size: extent of the square products.
        copied: bytes of the array that is copied.
    """
    x = jnp.zeros(copied // 2, jnp.bfloat16)
    copy = jax.jit(lambda x: x + 1).lower(x).compile()
    jax.block_until_ready(copy(x))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready([copy(x) for _ in range(4)])
        seconds.append((time.perf_counter() - start) / 4)
    rates = {jnp.dtype(d).name: _rate(d, size) for d in (jnp.bfloat16, jnp.float8_e4m3fn, jnp.int8)}
    return Limits(2.0 * copied / min(seconds), rates)
