"""The ops on prepacked weights in plain jax.numpy: the same contract on any other device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.matmul_a16 import a16_problem
from pallas_kernels.matmul_w4a8 import w4a8_problem
from pallas_kernels.prepack import Prepacked
from pallas_kernels.record import CHANNELS, DEPTH, code_values, read_codes, read_scales, read_zeros


def dequantize(weight: Prepacked) -> jax.Array:
    """Return the weight [*lead, n, k] in float32."""
    record = weight.record
    lead = weight.records.shape[:-3]
    zeros = read_zeros(record, weight.records) if record.zero else None
    values = code_values(record, read_codes(record, weight.records), zeros)
    scales = read_scales(record, weight.records).astype(jnp.float32)
    values = values * jnp.repeat(scales, record.group, axis=-1)
    blocks = values.reshape(*lead, weight.n // CHANNELS, -1, CHANNELS, DEPTH)
    return jnp.swapaxes(blocks, -3, -2).reshape(*lead, weight.n, -1)[..., : weight.k]


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    return lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


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
        x = jnp.take(x, perm, axis=1)
    y = _dot(x, dequantize(weight).astype(x.dtype))
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
    y = _dot(x_q.astype(jnp.float32), dequantize(weight)) * x_scale
    y = y if bias is None else y + bias.astype(jnp.float32)
    return y.astype(problem.out_dtype)
