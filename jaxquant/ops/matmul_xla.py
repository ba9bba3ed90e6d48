"""The XLA path of ``matmul``: every layout and scheme, on every device, in a few ops.

Where the scales go follows from the layout alone.  A scale whose step covers the whole contracted
axis multiplies the result (the codes then enter the dot exactly); any other scale multiplies the
codes before the dot.  The dense weight exists only inside the jitted program.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.arrays.layout import WHOLE
from jaxquant.arrays.qtensor import QTensor
from jaxquant.ops.activations import ExactCodes, QActivation, quantize_activation
from jaxquant.transforms.numeric import code_values, dequantize, expand


def _dot(x: jax.Array, w: jax.Array, in_axis: int) -> jax.Array:
    """``[..., in] x w -> [..., out]`` accumulated in float32."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = (((x.ndim - 1,), (in_axis,)), ((), ()))
    return lax.dot_general(x, w, dims, precision=precision, preferred_element_type=jnp.float32)


def _integer_dot(x: jax.Array, w: jax.Array, in_axis: int) -> jax.Array:
    """Dot of int8-valued float32 operands.

    The CPU multiplies integers one by one but float32 in vectors, where products of 8-bit codes
    are exact and sums are to 24 bits; other devices have 8-bit dots.
    """

    def native(a: jax.Array, b: jax.Array) -> jax.Array:
        dims = (((a.ndim - 1,), (in_axis,)), ((), ()))
        a8, b8 = a.astype(jnp.int8), b.astype(jnp.int8)
        return lax.dot_general(a8, b8, dims, preferred_element_type=jnp.int32).astype(jnp.float32)

    return lax.platform_dependent(x, w, cpu=lambda a, b: _dot(a, b, in_axis), default=native)


def _row(leaf: jax.Array, q: QTensor) -> jax.Array:
    """A scale that is WHOLE along ``in`` as ``[out]`` (or ``[1]``), float32."""
    grid = q.layout.scales[0]
    flat = expand(leaf.astype(jnp.float32), grid, q.shape)
    return flat.reshape(-1)


def _epilogue(q: QTensor) -> bool:
    """Whether the scale can multiply the result instead of the codes."""
    scales, i = q.layout.scales, q.layout.index("in")
    return len(scales) == 1 and scales[0][i] == WHOLE and q.layout.affine != "offset"


def _code_matrix(q: QTensor) -> jax.Array:
    """Codes minus zero points as float32, ``q.axes`` order."""
    values = code_values(q)
    if q.layout.affine == "zero_point":
        values = values - expand(q.zeros[0].astype(jnp.float32), q.layout.zeros[0], q.shape)
    return values


def matmul_xla(x: jax.Array | QActivation, q: QTensor, dtype: Any = None) -> jax.Array:
    """``[..., in] x q -> [..., out]``; see :func:`jaxquant.ops.matmul.matmul`.

    ``dtype`` is that of the result, None for ``x.dtype``; up to it the arithmetic is float32.
    """
    in_axis = q.layout.index("in")
    if q.pre_scale is not None and not isinstance(x, QActivation):
        x = x * q.pre_scale.reshape(-1).astype(x.dtype)
    if isinstance(x, QActivation):
        y = _quantized(x.exact(), q, in_axis)
    elif q.act is not None:
        y = _quantized(quantize_activation(x, q), q, in_axis)
    else:
        y = _weight_only(x, q, in_axis)
    return y.astype(x.dtype if dtype is None else dtype)


def _quantized(act: ExactCodes, q: QTensor, in_axis: int) -> jax.Array:
    if q.perm is not None:
        act, q = _gather(act, q.perm), dataclasses.replace(q, perm=None)
    if _epilogue(q) and not act.group:
        return _both_in_epilogue(act, q, in_axis)
    return _dot(act.dequantize(), dequantize(q, axes=q.axes), in_axis)


def _gather(act: ExactCodes, perm: jax.Array) -> ExactCodes:
    """Bring activations into the order of act-order weight rows."""
    if act.group:
        value = jnp.take(act.dequantize(), perm, axis=-1)
        return ExactCodes(value, jnp.ones((*value.shape[:-1], 1), jnp.float32), None, 0)
    return dataclasses.replace(act, codes=jnp.take(act.codes, perm, axis=-1))


def _weight_only(x: jax.Array, q: QTensor, in_axis: int) -> jax.Array:
    if q.perm is not None:
        # XLA's CPU compiler fails on a dot of bfloat16 whose operand is a gather: keep apart.
        x = lax.optimization_barrier(jnp.take(x, q.perm, axis=-1))
        q = dataclasses.replace(q, perm=None)
    if not _epilogue(q):
        return _dot(x, dequantize(q, x.dtype, axes=q.axes), in_axis)
    # Codes of at most 8 bits are exact in bfloat16 and float16 alike (float16 holds e5m2 too).
    return _dot(x, _code_matrix(q).astype(x.dtype), in_axis) * _row(q.scales[0], q)


def _both_in_epilogue(act: ExactCodes, q: QTensor, in_axis: int) -> jax.Array:
    weight = _code_matrix(q)
    assert q.act is not None
    # Codes minus zero points need a bit more than codes, which int8 may not have.
    integers = q.layout.code.kind == "int" and q.layout.affine == "symmetric"
    if q.act.code.name == "int8" and integers:
        y = _integer_dot(act.codes, weight, in_axis)
    else:
        y = _dot(act.codes, weight, in_axis)
    if act.zero is not None:
        y = y - act.zero * jnp.sum(weight, axis=in_axis)
    return y * act.scale * _row(q.scales[0], q)
