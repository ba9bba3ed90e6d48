"""Two kernels that are wrong on purpose: what compute-sanitizer must see in the same run."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.launch import WARPGROUP, launch
from pallas_kernels.tiles import load, load_global, store_global

_VALUES = 128
_LAYOUT = plgpu.Layout.WG_STRIDED((_VALUES,), vec_size=1)
# Far behind any allocation of this process.
_OUTSIDE = 1 << 28


def out_of_bounds() -> jax.Array:
    """Write a number 1 GiB behind the result."""

    def body(index_gm, out_gm):
        out_gm[index_gm[0]] = jnp.float32(1)

    return launch(
        body,
        jnp.array([_OUTSIDE], jnp.int32),
        out=jax.ShapeDtypeStruct((_VALUES,), jnp.float32),
        scratch={},
        grid=1,
        warpgroups=1,
        name="out_of_bounds",
    )


def race() -> jax.Array:
    """Read shared memory that another warpgroup writes, without a barrier between."""

    def body(x_gm, out_gm, shared):
        warpgroup = lax.axis_index(WARPGROUP)

        @pl.when(warpgroup == 0)
        def _():
            shared[...] = load_global(x_gm, _LAYOUT)

        @pl.when(warpgroup == 1)
        def _():
            store_global(out_gm, load(shared, _LAYOUT))

    return launch(
        body,
        jnp.ones(_VALUES, jnp.float32),
        out=jax.ShapeDtypeStruct((_VALUES,), jnp.float32),
        scratch={"shared": plgpu.SMEM((_VALUES,), jnp.float32)},
        grid=1,
        warpgroups=2,
        name="race",
    )


# Tool of compute-sanitizer -> the kernel in which it must find an error.
FAULTS = {"memcheck": out_of_bounds, "racecheck": race}
