"""A float64 NumPy oracle of quantized matmul, written from the formulas, not from the package.

It reads the arrays of a QTensor by their documented meaning and never calls jaxquant code that
packs, scales or multiplies.
"""

import ml_dtypes
import numpy as np


def bits_of(planes, widths, steps):
    """Unsigned patterns [out, in] of planes packed along the last axis, low plane first."""
    total, low = 0, 0
    for plane, width, step in zip(planes, widths, steps, strict=True):
        plane = np.asarray(plane)
        if step == 1:
            part = plane.astype(np.int64)
        else:
            shifts = np.arange(step) * width
            part = (plane[..., None].astype(np.int64) >> shifts) & ((1 << width) - 1)
            part = part.reshape(*plane.shape[:-1], -1)
        total, low = total + (part << low), low + width
    return total


def cell(leaf, steps, shape):
    """Value of every element's scale or zero cell, by index arithmetic."""
    leaf = np.asarray(leaf).astype(np.float64)
    index = [
        np.zeros(n, int) if s == 0 else np.arange(n) // s for n, s in zip(shape, steps, strict=True)
    ]
    return leaf[np.ix_(*index)]


def weight(q) -> np.ndarray:
    """The dense weight [out, in] in float64, act-order undone."""
    layout, code, shape = q.layout, q.layout.code, q.shape
    assert layout.axes == ("out", "in")
    if code.kind == "float":
        value = np.asarray(q.data[0]).astype(np.float64)
    else:
        packed = code.bits < 8 and any(s > 1 for grid in layout.data for s in grid)
        widths = code.planes if packed else (code.bits,)
        steps = [grid[1] for grid in layout.data]
        value = (
            bits_of(q.data, widths, steps).astype(np.float64)
            if packed
            else np.asarray(q.data[0], np.float64)
        )
        if code.kind == "table":
            value = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])[
                value.astype(int)
            ]
        elif code.kind == "int" and code.bits < 8:
            value = value - 2 ** (code.bits - 1)
    if layout.affine == "zero_point":
        value = value - cell(q.zeros[0], layout.zeros[0], shape)
    for leaf, grid in zip(q.scales, layout.scales, strict=True):
        value = value * cell(leaf, grid, shape)
    if layout.affine == "offset":
        offset = 1.0
        for leaf, grid in zip(q.zeros, layout.zeros, strict=True):
            offset = offset * cell(leaf, grid, shape)
        value = value - offset
    if q.perm is not None:
        unsorted = np.empty_like(value)
        unsorted[:, np.asarray(q.perm)] = value
        value = unsorted
    return value


def round_e4m3(x):
    return np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)


def token_int8(x, levels=127.0):
    scale = np.abs(x).max(-1, keepdims=True) / levels
    scale = np.where(scale > 0, scale, 1)
    return np.clip(np.round(x / scale), -128, 127) * scale


def token_e4m3(x):
    scale = np.abs(x).max(-1, keepdims=True) / 448
    scale = np.where(scale > 0, scale, 1)
    return round_e4m3(x / scale) * scale


def group_e4m3(x, group=128):
    pad = -x.shape[-1] % group
    blocks = np.pad(x, [(0, 0), (0, pad)]).reshape(len(x), -1, group)
    return token_e4m3(blocks).reshape(len(x), -1)[:, : x.shape[-1]]


def group_int8(x, group=128):
    pad = -x.shape[-1] % group
    blocks = np.pad(x, [(0, 0), (0, pad)]).reshape(len(x), -1, group)
    return token_int8(blocks).reshape(len(x), -1)[:, : x.shape[-1]]


def token_int8_asymmetric(x):
    low, high = np.minimum(x.min(-1, keepdims=True), 0), np.maximum(x.max(-1, keepdims=True), 0)
    scale = (high - low) / 255
    scale = np.where(scale > 0, scale, 1)
    zero = np.clip(np.round(-128 - low / scale), -128, 127)
    return (np.clip(np.round(x / scale + zero), -128, 127) - zero) * scale


def relative(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
