"""The ops on plain operands in jax.numpy, on any device: what kernels are compared with."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.a8_problem import GROUP
from pallas_kernels.grouped_a8 import grouped_a8_problem
from pallas_kernels.matmul_a8 import a8_problem
from pallas_kernels.quantize import Quantized, ScaleLayout, quantize_problem
from pallas_kernels.quantize_rows import LARGEST, LEAST_SCALE


def contract(x: jax.Array, w: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Return x @ w.T, added in `dtype`."""
    return lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=dtype)


def _spread(scale: jax.Array, steps: tuple[int, int], shape: tuple[int, ...]) -> jax.Array:
    """Repeat each scale over its block and cut the last, partial blocks."""
    scale = jnp.repeat(jnp.repeat(scale, steps[0], axis=0), steps[1], axis=1)
    return scale[: shape[0], : shape[1]]


def matmul_a8(
    x_q: jax.Array,
    x_scale: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    *,
    w_block: tuple[int, int] | None = None,
    bias: jax.Array | None = None,
    x_zero: jax.Array | None = None,
    w_sum: jax.Array | None = None,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> jax.Array:
    """Multiply quantized activations by quantized weights: y = x @ w.T + bias.

    The contract is that of `pallas_kernels.matmul_a8`, without limits on N and K.  Scales along K
    are applied to operands rounded to bfloat16, so that one matmul does the work.
    """
    problem = a8_problem(
        x_q,
        x_scale,
        w,
        w_scale,
        w_block=w_block,
        bias=bias,
        x_zero=x_zero,
        w_sum=w_sum,
        out_dtype=out_dtype,
    )
    m = problem.m
    if problem.x_scale == "1x128" or w_block is not None:
        if problem.x_scale == "1x128":
            x_scale = _spread(x_scale[:, :m].T, (1, GROUP), x_q.shape)
        if w_block is not None:
            w_scale = _spread(w_scale, w_block, w.shape)
        x = (x_q.astype(jnp.float32) * x_scale).astype(jnp.bfloat16)
        y = contract(x, (w.astype(jnp.float32) * w_scale).astype(jnp.bfloat16), jnp.float32)
    else:
        y = contract(x_q, w, jnp.int32 if x_q.dtype == jnp.int8 else jnp.float32)
        if x_zero is not None and w_sum is not None:
            y = y - x_zero * w_sum
        y = y.astype(jnp.float32) * x_scale * w_scale.T
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(out_dtype)


def grouped_matmul_a8(
    x_q: jax.Array,
    x_scale: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    group_sizes: jax.Array,
    *,
    w_block: tuple[int, int] | None = None,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> jax.Array:
    """Multiply each expert's rows by its weights: y[r] = x[r] @ w[expert of r].T.

    The contract is that of `pallas_kernels.grouped_matmul_a8` for a weight that has all experts,
    without limits on N and K, and rows of no expert are zero.  Products are of bfloat16 operands
    and added in float32.
    """
    problem = grouped_a8_problem(
        x_q, x_scale, w, w_scale, group_sizes, w_block=w_block, out_dtype=out_dtype
    )
    x, scaled = x_q.astype(jnp.float32), w.astype(jnp.float32)
    if problem.x_scale == "1x128":
        x = x * _spread(x_scale[:, : problem.m].T, (1, GROUP), x_q.shape)
    if w_block is not None:
        spread = jax.vmap(lambda scale: _spread(scale, w_block, w.shape[1:]))
        scaled = scaled * spread(w_scale)
    y = lax.ragged_dot(
        x.astype(jnp.bfloat16),
        scaled.astype(jnp.bfloat16).swapaxes(1, 2),
        group_sizes,
        preferred_element_type=jnp.float32,
    )
    if problem.x_scale != "1x128":
        y = y * x_scale
    if w_block is None:
        experts = jnp.arange(problem.experts)
        expert = jnp.repeat(experts, group_sizes, total_repeat_length=problem.m)
        y = y * w_scale[expert, :, 0]
    return y.astype(out_dtype)


def quantize(
    x: jax.Array,
    *,
    dtype: jax.typing.DTypeLike,
    layout: ScaleLayout,
    scale: jax.Array | None = None,
    zero: jax.Array | None = None,
    symmetric: bool = True,
    rms_weight: jax.Array | None = None,
    rms_epsilon: float = 1e-6,
    gated: bool = False,
) -> Quantized:
    """Quantize activations, after RMSNorm or a gate where asked.

    The contract is that of `pallas_kernels.quantize` without `source`, for any K (a last group may
    be partial).
    """
    problem = quantize_problem(
        x,
        dtype=dtype,
        layout=layout,
        scale=scale,
        zero=zero,
        symmetric=symmetric,
        rms_weight=rms_weight,
        gated=gated,
    )
    m, k, largest = problem.m, problem.k, LARGEST[problem.out_dtype]
    x = x.astype(jnp.float32)
    if gated:
        x = jax.nn.silu(x[:, :k]) * x[:, k:]
    if rms_weight is not None:
        mean_square = jnp.mean(x * x, axis=1, keepdims=True)
        x = x * lax.rsqrt(mean_square + rms_epsilon) * rms_weight.astype(jnp.float32)
    if layout == "1x128":
        groups = jnp.pad(jnp.abs(x), ((0, 0), (0, -k % GROUP))).reshape(m, -1, GROUP)
        spread = scale = jnp.maximum(groups.max(2) / largest, LEAST_SCALE)
        spread = jnp.repeat(spread, GROUP, axis=1)[:, :k]
        scale = jnp.pad(scale.T, ((0, 0), (0, -m % 4)))
    elif not symmetric:
        low = jnp.minimum(x.min(1, keepdims=True), 0)
        high = jnp.maximum(x.max(1, keepdims=True), 0)
        spread = scale = jnp.maximum((high - low) / (2 * largest + 1), LEAST_SCALE)
        zero = jnp.round(-largest - 1 - low / scale).astype(jnp.int32)
    elif scale is None:
        spread = scale = jnp.maximum(jnp.abs(x).max(1, keepdims=True) / largest, LEAST_SCALE)
    else:
        spread = scale
    x = x / spread
    if problem.out_dtype == "int8":
        x = jnp.round(x) if zero is None else jnp.round(x) + zero
    x = jnp.clip(x, -largest if zero is None else -largest - 1, largest)
    return Quantized(x.astype(dtype), scale, zero)
