"""Quantization of activations to e4m3 or int8, on its own or fused with what precedes it."""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.problem import Config, KernelError, Problem, Shaped, current_device, select
from pallas_kernels.quantize_rows import LARGEST, QUANTIZE_KERNELS

ScaleLayout = Literal["token", "1x128", "tensor"]


class Quantized(NamedTuple):
    """Codes with their scale and zero point: value = (codes - zero) * scale.

    Attributes:
        codes: [M, K] e4m3 or int8.
        scale: float32, [M, 1], [1, 1] or [K/128, M rounded up to 4] by layout.
        zero: int32 [M, 1] or [1, 1], or None for symmetric codes.
    """

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array | None


def quantize_problem(
    x: Shaped,
    *,
    dtype: jax.typing.DTypeLike,
    layout: ScaleLayout,
    scale: Shaped | None = None,
    zero: Shaped | None = None,
    symmetric: bool = True,
    rms_weight: Shaped | None = None,
    gated: bool = False,
    source: Shaped | None = None,
) -> Problem:
    """Return the problem that the operands of `quantize` form; only shapes and dtypes are read.

    Raises:
        KernelError: an operand or a combination of options breaks the contract of `quantize`.
    """
    name = jnp.dtype(dtype).name
    if name not in LARGEST:
        raise KernelError(f"dtype is {name}; it must be float8_e4m3fn or int8")
    if len(x.shape) != 2 or x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise KernelError(f"x is {x.dtype}{x.shape}; it must be a matrix of a float type")
    m, k = x.shape[0] if source is None else source.size, x.shape[1] // (2 if gated else 1)
    if source is not None and (len(source.shape) != 1 or source.dtype != jnp.int32):
        raise KernelError(f"source is {source.dtype}{source.shape}; it must be [rows] int32")
    if gated and (rms_weight is not None or x.shape[1] % 2):
        raise KernelError(f"gated needs [M, 2K] and no rms_weight; x is {x.shape}")
    if rms_weight is not None and rms_weight.shape != (k,):
        raise KernelError(f"rms_weight is {rms_weight.shape}; it must be ({k},)")
    if (layout == "tensor") != (scale is not None):
        raise KernelError("the layout 'tensor' takes a scale, and the others make theirs")
    for operand, operand_name, operand_dtype in (
        (scale, "scale", jnp.float32),
        (zero, "zero", jnp.int32),
    ):
        if operand is not None and (operand.shape, operand.dtype) != ((1, 1), operand_dtype):
            raise KernelError(
                f"{operand_name} is {operand.dtype}{operand.shape}; "
                f"it must be {jnp.dtype(operand_dtype).name}(1, 1)"
            )
    if zero is not None and (layout != "tensor" or name != "int8"):
        raise KernelError("zero goes with int8 codes and the layout 'tensor'")
    if not symmetric and (layout != "token" or name != "int8"):
        raise KernelError("symmetric=False goes with int8 codes and the layout 'token'")
    return Problem(
        op="quantize",
        m=m,
        n=1,
        k=k,
        x_dtype=x.dtype.name,
        w_dtype="none",
        out_dtype=name,
        x_scale=layout,
        zero=layout if zero is not None or not symmetric else "",
        fused="gated" if gated else "rms" if rms_weight is not None else "",
        device=current_device(),
    )


@functools.partial(
    jax.jit,
    static_argnames=(
        "dtype",
        "layout",
        "symmetric",
        "rms_epsilon",
        "gated",
        "config",
        "interpret",
    ),
)
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
    source: jax.Array | None = None,
    config: Config | None = None,
    interpret: bool = False,
) -> Quantized:
    """Quantize activations for `matmul_a8`, after RMSNorm or a gate where asked.

    Args:
        x: [M, K] bfloat16, float16 or float32; [M, 2K], gate then up, when `gated`.
        dtype: float8_e4m3fn or int8.
        layout: "token" (a scale for each row), "1x128" (for each 128 values of a row) or "tensor"
            (the given scale).
        scale: float32 [1, 1], for the layout "tensor".
        zero: int32 [1, 1] zero point in code steps, for int8 in the layout "tensor".
        symmetric: False to give each row of int8 codes a zero point.
        rms_weight: [K] any float type; quantize RMSNorm(x) with this weight.
        rms_epsilon: added to the mean square.
        gated: quantize silu(x[:, :K]) * x[:, K:].
        source: int32 [rows], the row of x that each row is made of; M is then their number, and
            rows of a negative source are left undefined.
        config: tile sizes, to override the tuned ones.
        interpret: run under the GPU interpreter on the host (jax 0.11 and later).

    Returns:
        Codes, scale and zero.  The largest code, 448 or 127, stands for the largest amplitude of a
        row or group; everything before rounding is done in float32.  Scales for "1x128" are
        [K/128, M rounded up to 4], as `matmul_a8` takes them; columns from M on are undefined.

    Raises:
        KernelError: an operand breaks the contract, or K is no multiple of 512 up to 20480.
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
        source=source,
    )
    kernel, config = select(QUANTIZE_KERNELS, problem, config)
    extra = [rms_weight, *(a.reshape(1) for a in (scale, zero) if a is not None)]
    extra = [a for a in extra if a is not None]
    codes, *made = kernel.fn(problem, config, interpret, rms_epsilon, x, *extra, source=source)
    if layout == "tensor":
        assert scale is not None
        return Quantized(codes, scale, zero)
    return _of_layout(problem, codes, *made)


def _of_layout(problem: Problem, codes: jax.Array, *made: jax.Array) -> Quantized:
    """Return what a kernel made, scales and zero points in the shapes of their layout."""
    if problem.x_scale == "1x128":
        return Quantized(codes, made[0], None)
    return Quantized(codes, made[0][:, None], made[1][:, None] if problem.zero else None)


@functools.partial(
    jax.jit, static_argnames=("dtype", "layout", "symmetric", "gated", "config", "interpret")
)
def quantize_and_keep(
    x: jax.Array,
    *,
    dtype: jax.typing.DTypeLike,
    layout: Literal["token", "1x128"],
    symmetric: bool = True,
    gated: bool = False,
    source: jax.Array | None = None,
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, Quantized]:
    """Return the gathered or gated rows themselves and quantized, by one kernel.

    A bank whose experts read activations of 16 and of 8 bits needs both.

    Args:
        x: [M, K] bfloat16, float16 or float32; [M, 2K], gate then up, when `gated`.
        dtype: float8_e4m3fn or int8.
        layout: "token" (a scale for each row) or "1x128" (for each 128 values of a row).
        symmetric: False to give each row of int8 codes a zero point.
        gated: the rows are silu(x[:, :K]) * x[:, K:].
        source: int32 [rows], the row of x that each row is made of; M is then their number, and
            rows of a negative source are left undefined.
        config: tile sizes, to override the tuned ones.
        interpret: run under the GPU interpreter on the host (jax 0.11 and later).

    Returns:
        [M, K] in the type of x, and the codes and scales of the rows before they were rounded to
        it.

    Raises:
        KernelError: an operand breaks the contract, or K is no multiple of 512 up to 20480.
    """
    problem = quantize_problem(
        x, dtype=dtype, layout=layout, symmetric=symmetric, gated=gated, source=source
    )
    kernel, config = select(QUANTIZE_KERNELS, problem, config)
    codes, *made, kept = kernel.fn(problem, config, interpret, 0.0, x, source=source, keep=True)
    return kept, _of_layout(problem, codes, *made)
