"""The ops on prepacked weights in plain jax.numpy: the same contract on any other device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.grouped_a16 import grouped_a16_problem
from pallas_kernels.matmul_a16 import a16_problem
from pallas_kernels.matmul_w4a8 import w4a8_problem
from pallas_kernels.prepack import Prepacked
from pallas_kernels.record import CHANNELS, DEPTH
from pallas_kernels.record_values import values as record_values
from pallas_kernels.xla import contract


def dequantize(weight: Prepacked) -> jax.Array:
    """Return the weight [*lead, n, k] in float32."""
    lead = weight.records.shape[:-3]
    values = record_values(weight.record, weight.records)
    blocks = values.reshape(*lead, weight.n // CHANNELS, -1, CHANNELS, DEPTH)
    dense = jnp.swapaxes(blocks, -3, -2).reshape(*lead, weight.n, -1)[..., : weight.k]
    dense = dense if weight.factor is None else dense * weight.factor[..., None]
    return dense if weight.offset is None else dense - weight.offset[..., None]


def xla_matmul_a16(
    x: jax.Array,
    weight: Prepacked,
    *,
    bias: jax.Array | None = None,
    perm: jax.Array | None = None,
    out_dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """Do what `matmul_a16` does; the weight is dequantized to the type of x."""
    problem = a16_problem(x, weight, bias=bias, perm=perm, out_dtype=out_dtype)
    if perm is not None:
        # XLA's CPU compiler fails on a dot of bfloat16 whose operand is a gather: keep apart.
        x = lax.optimization_barrier(jnp.take(x, perm, axis=1))
    y = contract(x, dequantize(weight).astype(x.dtype), jnp.float32)
    y = y if bias is None else y + bias.astype(jnp.float32)
    return y.astype(problem.out_dtype)


def xla_matmul_w4a8(
    x_q: jax.Array,
    x_scale: jax.Array,
    weight: Prepacked,
    *,
    bias: jax.Array | None = None,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> jax.Array:
    """Do what `matmul_w4a8` does; both operands become float32."""
    problem = w4a8_problem(x_q, x_scale, weight, bias=bias, out_dtype=out_dtype)
    y = contract(x_q.astype(jnp.float32), dequantize(weight), jnp.float32) * x_scale
    y = y if bias is None else y + bias.astype(jnp.float32)
    return y.astype(problem.out_dtype)


# Rows that the loop of a grouped matmul takes at a time.
_ROWS = 128


def xla_grouped_matmul_a16(
    x: jax.Array,
    weight: Prepacked,
    group_sizes: jax.Array,
    *,
    first: int = 0,
    into: jax.Array | None = None,
    out_dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """Do what `grouped_matmul_a16` does without `layer`, one expert's rows at a time.

    Rows of no expert here keep their values in `into`, and are zero without it.
    """
    problem = grouped_a16_problem(
        x, weight, group_sizes, first=first, into=into, out_dtype=out_dtype
    )
    ends = jnp.cumsum(group_sizes)
    # A piece may reach past the last row.
    padded = jnp.pad(x, ((0, _ROWS), (0, 0)))
    rows = x.shape[0]
    out = jnp.zeros((rows, problem.n), problem.out_dtype) if into is None else into
    out = jnp.pad(out, ((0, _ROWS), (0, 0)))

    def expert(e: jax.Array, out: jax.Array) -> jax.Array:
        one = jax.tree.map(lambda leaf: leaf[e], weight)
        w = dequantize(one).astype(x.dtype)
        end = ends[first + e]
        begin = end - group_sizes[first + e]

        def piece(i: jax.Array, out: jax.Array) -> jax.Array:
            row = begin + i * _ROWS
            y = contract(lax.dynamic_slice_in_dim(padded, row, _ROWS), w, jnp.float32)
            mine = row + jnp.arange(_ROWS) < end
            old = lax.dynamic_slice_in_dim(out, row, _ROWS)
            new = jnp.where(mine[:, None], y.astype(out.dtype), old)
            return lax.dynamic_update_slice_in_dim(out, new, row, 0)

        return lax.fori_loop(0, -(-(end - begin) // _ROWS), piece, out)

    return lax.fori_loop(0, problem.experts, expert, out)[:rows]
