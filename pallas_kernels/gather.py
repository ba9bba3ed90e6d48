"""Gathering rows: what brings the tokens of every expert together before a grouped matmul.

A block moves a row through registers, so that a gate on the way costs nothing, and rows that nobody
asks for cost nothing either.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.launch import GRID, launch
from pallas_kernels.problem import KernelError, Shaped, current_device
from pallas_kernels.tiles import load_global, silu, store_global

_THREADS = 128
# Values that a thread holds: 16 bytes at a time, as many times as leave room for other blocks.
_MOST = 32


def gather_rows_refusal(x: Shaped, *, gated: bool = False) -> str | None:
    """Return why `gather_rows` does not take x, or None."""
    if current_device().capability != "9.0":
        return "needs compute capability 9.0"
    if len(x.shape) != 2 or x.dtype.itemsize != 2:
        return f"x is {x.dtype}{x.shape}; it must be a matrix of 16-bit numbers"
    if x.shape[1] % (_THREADS * (1 + gated)):
        return f"rows of {x.shape[1]} are no multiple of {_THREADS * (1 + gated)}"
    return None


def _cut(width: int) -> tuple[int, int]:
    """Return the values of a row that one block moves, and those that a thread moves at a time."""
    parts = next(
        p
        for p in range(1, width + 1)
        if not width % (p * _THREADS) and p * _MOST * _THREADS >= width
    )
    share = width // parts
    return share, next(v for v in (8, 4, 2, 1) if share % (v * _THREADS) == 0)


@functools.partial(jax.jit, static_argnames=("gated", "interpret"))
def gather_rows(
    x: jax.Array, index: jax.Array, *, gated: bool = False, interpret: bool = False
) -> jax.Array:
    """Return x[index], one row of x for each number, or the gated product of its halves.

    XLA's own gather moves 16-bit numbers one or two at a time, and takes twice the time of a copy.

    Args:
        x: [M, width] bfloat16 or float16; width a multiple of 128, or of 256 when `gated`.
        index: [rows] int32, below M; rows of a negative index are left undefined and cost nothing.
        gated: return silu(x[index, :half]) * x[index, half:], half as wide, made in float32.
        interpret: run under the GPU interpreter on the host (jax 0.11 and later).

    Raises:
        KernelError: an operand breaks the contract.
    """
    if reason := gather_rows_refusal(x, gated=gated):
        raise KernelError(f"gather_rows: {reason}")
    if index.ndim != 1 or index.dtype != jnp.int32:
        raise KernelError(
            f"gather_rows: index is {index.dtype}{index.shape}; it must be [rows] int32"
        )
    rows, width = index.shape[0], x.shape[1] // (1 + gated)
    share, vector = _cut(width)
    parts = width // share
    layout = plgpu.Layout.WG_STRIDED((share,), vec_size=vector)

    def body(x_gm: Any, index_gm: Any, out_gm: Any):
        block = lax.axis_index(GRID)
        row, part = lax.div(block, jnp.int32(parts)), lax.rem(block, jnp.int32(parts))
        source = index_gm[row]

        @pl.when(source >= 0)
        def _():
            values = load_global(x_gm.at[source, part], layout)
            if gated:
                up = load_global(x_gm.at[source, parts + part], layout)
                product = silu(values.astype(jnp.float32)) * up.astype(jnp.float32)
                values = product.astype(x.dtype)
            store_global(out_gm.at[row, part], values)

    out = launch(
        body,
        x.reshape(-1, parts * (1 + gated), share),
        index,
        out=jax.ShapeDtypeStruct((rows, parts, share), x.dtype),
        scratch={},
        grid=rows * parts,
        warpgroups=1,
        name="gather_gated" if gated else "gather_rows",
        interpret=interpret,
    )
    return out.reshape(rows, width)
