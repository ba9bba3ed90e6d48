"""Numeric transforms: between dense arrays and QTensors.  Pure, traceable, any layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.arguments import float_dtype
from jaxquant.arrays.codes import CODES, Code
from jaxquant.arrays.layout import WHOLE, Grid, Layout, packed_grids
from jaxquant.arrays.qtensor import QTensor, dense, require_qtensor
from jaxquant.arrays.scheme import Scheme
from jaxquant.errors import ConfigError, LayoutError
from jaxquant.transforms.repack import pack_codes, unpack_codes
from jaxquant.transforms.structure import to_axes

E2M1_THRESHOLDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)

LEAST_SCALE = 2.0**-126
"""The smallest normal float32.  Devices flush smaller ones to zero, and 0 / 0 is no code."""
LEAST_TENSOR_SCALE = LEAST_SCALE * 2**9
"""Least upper scale of two levels: its product with the least e4m3 number is normal too."""


def code_values(q: QTensor, dtype: Any = jnp.float32) -> Any:
    """The codes of ``q`` as numbers, without scales or zeros: ``[*lead, *axes]``."""
    code = q.layout.code
    patterns = unpack_codes(q.data, code, q.layout.data)
    if code.kind == "table":
        return jnp.asarray(code.table, dtype)[patterns]
    values = patterns.astype(dtype)
    return values - code.bias if code.bias else values


def expand(leaf: Any, grid: Grid, extents: Sequence[int]) -> Any:
    """Repeat the cells of a scale or zero leaf to full extents; WHOLE axes stay 1 wide."""
    rank = len(grid)
    for i, (step, extent) in enumerate(zip(grid, extents, strict=True)):
        if step not in (WHOLE, 1):
            axis = leaf.ndim - rank + i
            leaf = jnp.repeat(leaf, step, axis=axis)
            if leaf.shape[axis] != extent:
                leaf = jax.lax.slice_in_dim(leaf, 0, extent, axis=axis)
    return leaf


def dequantize(
    q: QTensor, dtype: Any = jnp.float32, axes: Sequence[str] = ("out", "in")
) -> jax.Array:
    """Return the dense weight.

    The arithmetic is float32, scales multiplied one after the other in their stored order, and is
    rounded to ``dtype`` last.  ``pre_scale`` belongs to the activation and is not applied.

    Args:
        q: ``[*lead, *q.axes]`` in any layout.
        dtype: result type, of floats.
        axes: order of the trailing axes of the result.
    Returns:
        ``[*lead, *axes]``.
    Raises:
        LayoutError: ``axes`` is not an order of ``q.axes``, or a leaf breaks the layout.
        ConfigError: ``dtype`` is none of floats.
    """
    q = to_axes(require_qtensor("dequantize", q).check("dequantize"), axes)
    dtype = float_dtype("dtype", dtype)
    layout = q.layout
    if layout.dense:
        return jnp.asarray(q.data[0]).astype(dtype)
    extents = q.shape[len(q.lead) :]
    value = jnp.asarray(code_values(jax.tree.map(jnp.asarray, q)))
    if layout.affine == "zero_point":
        value = value - expand(
            jnp.asarray(q.zeros[0]).astype(jnp.float32), layout.zeros[0], extents
        )
    for leaf, grid in zip(q.scales, layout.scales, strict=True):
        value = value * expand(jnp.asarray(leaf).astype(jnp.float32), grid, extents)
    if layout.affine == "offset":
        offset = 1.0
        for leaf, grid in zip(q.zeros, layout.zeros, strict=True):
            offset = offset * expand(jnp.asarray(leaf).astype(jnp.float32), grid, extents)
        value = value - offset
    if q.perm is not None:
        value = _unsort(value, jnp.asarray(q.perm), layout.index("in") - len(axes))
    return value.astype(dtype)


def _unsort(value: jax.Array, perm: jax.Array, axis: int) -> jax.Array:
    """Put act-order rows back: entry ``i`` along ``axis`` goes to position ``perm[i]``."""
    inverse = jnp.argsort(perm, axis=-1)
    shape = [1] * value.ndim
    shape[: value.ndim - 2] = inverse.shape[:-1]
    shape[axis] = inverse.shape[-1]
    return jnp.take_along_axis(value, inverse.reshape(shape), axis=axis)


def _blocks(w: jax.Array, block: Sequence[int]) -> tuple[jax.Array, tuple[int, int]]:
    """View ``[*lead, out, in]`` as ``[*lead, out cells, b_out, in cells, b_in]``, zero padded."""
    out, inn = w.shape[-2:]
    b_out, b_in = block[0] or out, block[1] or inn
    c_out, c_in = -(-out // b_out), -(-inn // b_in)
    pad = [(0, 0)] * (w.ndim - 2) + [(0, c_out * b_out - out), (0, c_in * b_in - inn)]
    return jnp.pad(w, pad).reshape(*w.shape[:-2], c_out, b_out, c_in, b_in), (out, inn)


def _unblock(blocks: jax.Array, extents: tuple[int, int]) -> jax.Array:
    *lead, c_out, b_out, c_in, b_in = blocks.shape
    return blocks.reshape(*lead, c_out * b_out, c_in * b_in)[..., : extents[0], : extents[1]]


def encode_values(values: jax.Array, code: Code) -> jax.Array:
    """Round numbers to the nearest code, saturating; returns stored patterns (ties to even)."""
    if code.kind == "float":
        return jnp.clip(values, code.min, code.max).astype(code.storage)
    if code.name == "e2m1":
        magnitude = jnp.abs(values)
        index = jnp.zeros(values.shape, jnp.uint8)
        for i, threshold in enumerate(E2M1_THRESHOLDS):
            # A tie goes to the even code: up from an odd one, down from an even one.
            above = magnitude >= threshold if i % 2 else magnitude > threshold
            index = index + above.astype(jnp.uint8)
        return index | (jnp.signbit(values).astype(jnp.uint8) << 3)
    rounded = jnp.clip(jnp.round(values), code.min, code.max) + code.bias
    return rounded.astype(code.storage)


def power_of_two_scale(amax: jax.Array, code: Code, rounded: bool = False) -> jax.Array:
    """OCP microscaling exponent of a block as an f32 power of two: 2**(floor(log2 amax) - emax).

    Args:
        amax: largest magnitude of each block.
        code: e2m1, e4m3 or e5m2.
        rounded: round magnitudes of 1.75 and more times a power of two up first.
    """
    emax = {"e2m1": 2, "e4m3": 8, "e5m2": 15}[code.name]
    # 2**-127 is subnormal in float32 and devices flush it to zero.
    mantissa, exponent = jnp.frexp(jnp.maximum(amax, 2.0**-126))
    if rounded:
        exponent = exponent + (mantissa >= 0.875)
    return jnp.ldexp(jnp.float32(1), jnp.clip(exponent - 1 - emax, -126, 127))


def quantize(w: Any, scheme: Scheme | str, axes: Sequence[str] = ("in", "out")) -> QTensor:
    """Round-to-nearest quantization of a dense weight.

    Args:
        w: ``[*lead, *axes]``, any float type.
        scheme: a :class:`Scheme` or its name.
        axes: names of the two trailing axes of ``w``.
    Returns:
        A QTensor with the same axes, whose activations are quantized as the scheme says.  Where
        ``w`` is not finite, no value of the cell that it shares a scale with is.
    Raises:
        ConfigError: the scheme cannot be written (unknown name, groups that do not divide ``in``).
        LayoutError: ``axes`` are not ``out`` and ``in``, or ``w`` is no such array of floats.
    """
    scheme = Scheme.parse(scheme)
    if sorted(axes) != ["in", "out"]:
        raise LayoutError("quantize", f"axes {tuple(axes)}", "'in' and 'out' in some order")
    w = _dense_array(w)
    if scheme.block is None:
        return dense(w.astype(scheme.weight.storage), tuple(axes))
    if tuple(axes) == ("in", "out"):
        w = jnp.swapaxes(w, -1, -2)
    inn = w.shape[-1]
    group = scheme.block[1]
    if scheme.block[0] <= 1 and group and inn % group:
        raise ConfigError(
            "scheme", f"{scheme} for {inn} inputs", f"groups of {group} must divide the inputs"
        )
    return to_axes(_quantize(w, scheme), tuple(axes))


def _dense_array(w: Any) -> jax.Array:
    """``w`` as an array ``[*lead, out, in]`` or ``[*lead, in, out]`` of floats, not empty."""
    try:
        array = jnp.asarray(w)
    except (TypeError, ValueError):
        raise LayoutError("quantize", type(w).__name__, "a dense array is needed") from None
    if not jnp.issubdtype(array.dtype, jnp.floating):
        action = "codes of a checkpoint come with their scales: see jaxquant.read_quantized"
        raise LayoutError("quantize", f"a weight of {array.dtype}", "any float type", action)
    if array.ndim < 2 or 0 in array.shape[-2:]:
        raise LayoutError("quantize", f"a weight of shape {array.shape}", "inputs and outputs")
    return array


def _quantize(w: jax.Array, scheme: Scheme) -> QTensor:
    code, block = scheme.weight, scheme.block
    assert block is not None
    blocks, extents = _blocks(w.astype(jnp.float32), block)
    amax = jnp.max(jnp.abs(blocks), axis=(-3, -1), keepdims=True)
    # Not isfinite(amax): a maximum over two axes drops NaN on a CPU.
    finite = jnp.all(jnp.isfinite(blocks), axis=(-3, -1), keepdims=True)
    amax = jnp.where(finite, amax, 0.0)
    zeros: tuple[Any, ...] = ()
    top: tuple[Any, ...] = ()
    # Group scales take 16 bits, as in checkpoints; per channel or block they cost nothing.
    scale_dtype = (
        jnp.bfloat16 if block[1] and code.kind != "float" and block[0] == 1 else jnp.float32
    )
    if scheme.scale_code == "e4m3":
        largest = jnp.max(amax, axis=(-4, -3, -2, -1), keepdims=True)
        tensor = largest / (code.max * 448.0)
        tensor = jnp.where(largest > 0, jnp.maximum(tensor, LEAST_TENSOR_SCALE), 1.0)
        local = jnp.clip(amax / code.max / tensor, 2.0**-9, 448.0).astype(jnp.float8_e4m3fn)
        scale, stored = local.astype(jnp.float32) * tensor, local
        top = (tensor[..., 0, :, 0],)
    elif scheme.scale_code == "e8m0":
        scale = power_of_two_scale(amax, code)
        stored = scale.astype(jnp.float8_e8m0fnu)
    elif not scheme.symmetric:
        low = jnp.minimum(jnp.min(blocks, axis=(-3, -1), keepdims=True), 0.0)
        high = jnp.maximum(jnp.max(blocks, axis=(-3, -1), keepdims=True), 0.0)
        step = jnp.maximum((high - low) / (code.max - code.min), LEAST_SCALE)
        stored = jnp.where(high > low, step, 1.0).astype(scale_dtype)
        scale = stored.astype(jnp.float32)
        zero = jnp.clip(jnp.round(code.min - low / scale), code.min, code.max)
        blocks = blocks + zero * scale
        zeros = (zero[..., 0, :, 0].astype(code.storage),)
    else:
        # Integer codes reach one further down than up: use it where the extreme is negative.
        low = -jnp.min(blocks, axis=(-3, -1), keepdims=True) / -code.min
        high = jnp.max(blocks, axis=(-3, -1), keepdims=True) / code.max
        widest = jnp.maximum(jnp.maximum(low, high), LEAST_SCALE)
        stored = jnp.where(amax > 0, widest, 1.0).astype(scale_dtype)
        scale = stored.astype(jnp.float32)
    # Few codes can say that they are no numbers: the scale of their cell does.
    stored = jnp.where(finite, stored, jnp.asarray(jnp.nan, stored.dtype))
    patterns = encode_values(_unblock(blocks / scale, extents), code)
    axes = ("out", "in")
    grids = packed_grids(code, axes, "in", extents[1])
    grid = (block[0], block[1])
    layout = Layout(
        axes,
        code,
        grids,
        (grid, *((WHOLE, WHOLE) for _ in top)),
        (grid,) * len(zeros),
        "zero_point" if zeros else "symmetric",
    )
    scales = (stored[..., 0, :, 0], *top)
    return QTensor(pack_codes(patterns, code, grids), scales, zeros, layout, act=scheme.act).check(
        "quantize"
    )


def requantize(q: QTensor, scheme: Scheme | str) -> QTensor:
    """Quantize the dense value of ``q`` again with another scheme; lossy, hence spelled out."""
    return quantize(dequantize(q, axes=require_qtensor("requantize", q).axes), scheme, q.axes)


def weight_only(q: QTensor) -> QTensor:
    """The same weight without activation quantization."""
    require_qtensor("weight_only", q)
    return dataclasses.replace(q, act=None, act_scale=None, act_zero=None)


def as_numpy(q: QTensor) -> QTensor:
    """Fetch every leaf to the host."""
    return jax.tree.map(np.asarray, q)


__all__ = [
    "CODES",
    "as_numpy",
    "code_values",
    "dequantize",
    "encode_values",
    "expand",
    "power_of_two_scale",
    "quantize",
    "requantize",
    "weight_only",
]
