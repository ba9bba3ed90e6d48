"""What the ops must compute, in float64 NumPy and independent of the package."""

import ml_dtypes
import numpy as np


def _float64(x) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def _spread(scale, steps, shape) -> np.ndarray:
    scale = np.repeat(np.repeat(_float64(scale), steps[0], 0), steps[1], 1)
    return scale[: shape[0], : shape[1]]


def dequantize(codes, scale, block, zero=None) -> np.ndarray:
    """Return (codes - zero) * scale; each scale covers a block of (rows, columns)."""
    values = _float64(codes)
    if zero is not None:
        values = values - _float64(zero)
    return values * _spread(scale, block, values.shape)


def matmul_a8(x_q, x_scale, w, w_scale, w_block=None, bias=None, x_zero=None, w_sum=None):
    """Return x @ w.T + bias for the operands of `pallas_kernels.matmul_a8`; w_sum is ignored."""
    (m, k), n = x_q.shape, w.shape[0]
    x_scale, w_scale = _float64(x_scale), _float64(w_scale)
    if x_scale.shape in ((m, 1), (1, 1)):
        x = dequantize(x_q, np.broadcast_to(x_scale, (m, 1)), (1, k), x_zero)
    else:
        x = dequantize(x_q, x_scale.T[:m], (1, 128))
    if w_block is None:
        w = dequantize(w, np.broadcast_to(w_scale, (n, 1)), (1, k))
    else:
        w = dequantize(w, w_scale, w_block)
    y = x @ w.T
    return y if bias is None else y + _float64(bias)


def relative_error(got, want) -> float:
    """Return ||got - want|| / ||want||; infinite if anything is not finite."""
    got, want = _float64(got), _float64(want)
    if got.shape != want.shape or not np.isfinite(got).all():
        return float("inf")
    return float(np.linalg.norm(got - want) / (np.linalg.norm(want) + 1e-300))


def rounding(dtype) -> float:
    """Return the relative error (RMS) that rounding random numbers to a dtype makes."""
    bits = {"bfloat16": 8, "float16": 11}[np.dtype(dtype).name]
    return 2.0**-bits / np.sqrt(3) * 0.75


def float8(x, dtype="float8_e4m3fn") -> np.ndarray:
    """Round to a float8 type on the host."""
    return np.asarray(x).astype(getattr(ml_dtypes, dtype))


def fused(x, rms_weight=None, rms_epsilon=1e-6, gated=False) -> np.ndarray:
    """Return what `pallas_kernels.quantize` quantizes: x, RMSNorm(x) or silu(gate) * up."""
    x = _float64(x)
    if gated:
        gate, up = np.split(x, 2, axis=1)
        return gate / (1 + np.exp(-gate)) * up
    if rms_weight is not None:
        mean_square = np.mean(x**2, axis=1, keepdims=True)
        return x / np.sqrt(mean_square + rms_epsilon) * _float64(rms_weight)
    return x


def largest_step(values, scale, dtype) -> np.ndarray:
    """Return the largest error that rounding to codes of a type may make, for each value."""
    if np.dtype(dtype).name == "int8":
        return np.broadcast_to(scale / 2, values.shape)
    spacing = 2.0 ** np.maximum(np.floor(np.log2(np.abs(values / scale) + 1e-300)) - 3, -9)
    return scale * spacing / 2
