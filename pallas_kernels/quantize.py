"""Quantization of activations to e4m3 or int8, on its own or fused with what precedes it.

One warpgroup holds a row in registers, so the row is read once, its statistics need no second pass,
and RMSNorm or silu(gate) * up cost no extra memory traffic.  Rows arrive by TMA one ahead.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.launch import GRID, launch
from pallas_kernels.problem import (
    Config,
    Kernel,
    KernelError,
    Problem,
    current_device,
    require_hopper,
    select,
)
from pallas_kernels.tiles import SMEM_RESERVE, load, round_up, scale_rows, slot, store_scattered

GROUP = 128
# Largest code of each type, and the least amplitude taken for a row, so that zeros divide well.
LARGEST = {"float8_e4m3fn": 448.0, "int8": 127.0}
TINY = 1e-30

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


@dataclasses.dataclass(frozen=True)
class QuantizeConfig(Config):
    """Attributes: occupancy: blocks of one warpgroup on an SM; slots: rows held in advance."""

    occupancy: int = 8
    slots: int = 2

    def smem_bytes(self, problem: Problem) -> int:
        """Return the shared memory of a block, in bytes."""
        itemsize = jnp.dtype(problem.x_dtype).itemsize
        row = problem.k * itemsize * (2 if problem.fused == "gated" else 1)
        weight = problem.k * 4 if problem.fused == "rms" else 0
        return self.slots * row + round_up(problem.k, 1024) + weight + SMEM_RESERVE

    def refuses(self, problem: Problem) -> str | None:
        """Return why this config cannot run `problem`, or None."""
        if self.slots < 2:
            return "needs two slots: one fills while the other is in use"
        if self.smem_bytes(problem) * self.occupancy > problem.device.smem:
            return f"needs {self.smem_bytes(problem)} bytes of shared memory x {self.occupancy}"
        return None


def _refuses(problem: Problem) -> str | None:
    if reason := require_hopper(problem):
        return reason
    if problem.k % (4 * GROUP):
        return f"K must be a multiple of {4 * GROUP}, not {problem.k}"
    if problem.k > 20480:
        return f"a row must fit in the registers of a warpgroup: K={problem.k} is above 20480"
    return None


def _candidates(problem: Problem) -> Iterator[QuantizeConfig]:
    """Yield the configs worth measuring."""
    for occupancy in (16, 12, 8, 6, 4, 3, 2, 1):
        for slots in (2, 3):
            config = QuantizeConfig(occupancy, slots)
            if config.refuses(problem) is None:
                yield config


def _default(problem: Problem) -> QuantizeConfig:
    """Return the highest occupancy that fits."""
    return next(_candidates(problem), QuantizeConfig(1, 2))


def _row_layout(groups: int, widest: int) -> Any:
    """Return a layout of [groups, 128] in which no group spans two warps.

    A thread reads 16 bytes at most, so `widest`, the bytes of the widest operand, limits its share.
    """
    if groups % 8 == 0 and widest <= 2:  # two groups a warp, eight values a thread
        tiling, warps, lanes = ((8, GROUP), (2, GROUP), (8,)), (-5,), (-3, -2)
    else:  # one group a warp, four values a thread
        tiling, warps, lanes = ((4, GROUP), (4,)), (-3,), (-2,)
    return plgpu.Layout.TILED(fa.Tiling(tiling), warp_dims=warps, lane_dims=lanes, vector_dim=-1)


def _scale_and_zero(rows: jax.Array, problem: Problem) -> tuple[jax.Array, jax.Array | None]:
    """Return scale and zero of a [groups, 128] row: one number each, or one a group."""
    largest = LARGEST[problem.out_dtype]
    if problem.zero:
        low = lax.min(jnp.min(jnp.min(rows, axis=1)), 0.0)
        high = lax.max(jnp.max(jnp.max(rows, axis=1)), 0.0)
        scale = lax.max(high - low, TINY) * (1 / (2 * largest + 1))
        return scale, jnp.round(-largest - 1 - low / scale)
    amplitude = jnp.max(jnp.maximum(rows, -rows), axis=1)
    if problem.x_scale == "token":
        amplitude = jnp.max(amplitude)
    return jnp.maximum(amplitude, TINY) * (1 / largest), None


def _encode(
    rows: jax.Array, scale: jax.Array, zero: jax.Array | None, problem: Problem
) -> jax.Array:
    """Return the codes of a [groups, 128] row."""
    rows = scale_rows(rows, 1 / scale) if problem.x_scale == "1x128" else rows * (1 / scale)
    largest = LARGEST[problem.out_dtype]
    if problem.out_dtype == "int8":
        rows = jnp.round(rows)
        if zero is not None:
            rows = rows + zero
    lowest = -largest - 1 if zero is not None else -largest
    return jnp.minimum(jnp.maximum(rows, lowest), largest).astype(problem.out_dtype)


def _quantize_rows(
    problem: Problem,
    config: QuantizeConfig,
    interpret: bool,
    epsilon: float,
    x: jax.Array,
    *extra: jax.Array,
) -> tuple[jax.Array, ...]:
    """Run the kernel; `extra` holds the RMSNorm weight, then the static scale and zero point."""
    m, k, c = problem.m, problem.k, config
    groups, gated, rms = k // GROUP, problem.fused == "gated", problem.fused == "rms"
    static = problem.x_scale == "tensor"
    blocks = min(m, problem.device.sms * c.occupancy)
    widest = max(a.dtype.itemsize for a in (x, *extra[:rms]))
    layout = _row_layout(groups, widest)
    inputs = 1 + gated

    def body(*refs, x_sm, codes_sm, full, weight_sm: Any = None, weight_full: Any = None):
        x_gm, extra_gm, outputs = refs[0], refs[1 : 1 + len(extra)], refs[1 + len(extra) :]
        block = lax.axis_index(GRID)
        count = lax.div(m - block + blocks - 1, jnp.int32(blocks))

        def fetch(i):
            s = slot(i, c.slots)
            plgpu.copy_gmem_to_smem(x_gm.at[block + i * blocks], x_sm.at[s], full.at[s])

        if rms:
            plgpu.copy_gmem_to_smem(extra_gm[0], weight_sm, weight_full)
        for i in range(c.slots - 1):
            pl.when(i < count)(functools.partial(fetch, jnp.int32(i)))
        if rms:
            plgpu.barrier_wait(weight_full)

        def one_row(i, carry):
            row = block + i * blocks
            s = slot(i, c.slots)
            # The slot was read a step ago, and storing that step's codes synchronised the threads.
            pl.when(i + c.slots - 1 < count)(lambda: fetch(i + c.slots - 1))
            plgpu.barrier_wait(full.at[s])
            rows = load(x_sm.at[s, pl.ds(0, groups)], layout).astype(jnp.float32)
            if gated:
                up = load(x_sm.at[s, pl.ds(groups, groups)], layout).astype(jnp.float32)
                rows = rows / (1 + jnp.exp(-rows)) * up
            if rms:
                mean_square = jnp.sum(jnp.sum(rows * rows, axis=1)) * (1 / k)
                weight = load(weight_sm, layout).astype(jnp.float32)
                rows = rows * lax.rsqrt(mean_square + epsilon) * weight
            if static:
                scale = extra_gm[rms][0]
                zero = extra_gm[rms + 1][0].astype(jnp.float32) if problem.zero else None
            else:
                scale, zero = _scale_and_zero(rows, problem)
            codes = _encode(rows, scale, zero, problem)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            codes_sm[...] = codes
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(codes_sm, outputs[0].at[row])
            if problem.x_scale == "1x128":
                store_scattered(outputs[1].at[:, row], scale)
            elif not static:
                outputs[1][row] = scale
                if zero is not None:
                    outputs[2][row] = zero.astype(jnp.int32)
            return carry

        lax.fori_loop(0, count, one_row, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    out = [jax.ShapeDtypeStruct((m, groups, GROUP), problem.out_dtype)]
    if problem.x_scale == "1x128":
        out.append(jax.ShapeDtypeStruct((groups, round_up(m, 4)), jnp.float32))
    elif not static:
        out.append(jax.ShapeDtypeStruct((m,), jnp.float32))
        if problem.zero:
            out.append(jax.ShapeDtypeStruct((m,), jnp.int32))
    scratch = {
        "x_sm": plgpu.SMEM((c.slots, inputs * groups, GROUP), problem.x_dtype),
        "codes_sm": plgpu.SMEM((groups, GROUP), problem.out_dtype),
        "full": plgpu.Barrier(num_barriers=c.slots),
    }
    if rms:
        scratch["weight_sm"] = plgpu.SMEM((groups, GROUP), extra[0].dtype)
        scratch["weight_full"] = plgpu.Barrier()
        extra = (extra[0].reshape(groups, GROUP), *extra[1:])
    results = launch(
        body,
        x.reshape(m, inputs * groups, GROUP),
        *extra,
        out=tuple(out),
        scratch=scratch,
        grid=blocks,
        warpgroups=1,
        name=f"quantize_{problem.fused or 'row'}",
        interpret=interpret,
    )
    return (results[0].reshape(m, k), *results[1:])


QUANTIZE_KERNELS = (
    Kernel(
        name="quantize_rows",
        op="quantize",
        config_type=QuantizeConfig,
        fn=_quantize_rows,
        accepts=_refuses,
        default_config=_default,
        candidates=_candidates,
    ),
)


def quantize_problem(
    x: jax.Array | jax.ShapeDtypeStruct,
    *,
    dtype: jax.typing.DTypeLike,
    layout: ScaleLayout,
    scale: jax.Array | jax.ShapeDtypeStruct | None = None,
    zero: jax.Array | jax.ShapeDtypeStruct | None = None,
    symmetric: bool = True,
    rms_weight: jax.Array | jax.ShapeDtypeStruct | None = None,
    gated: bool = False,
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
    m, k = x.shape[0], x.shape[1] // (2 if gated else 1)
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
    )
    kernel, config = select(QUANTIZE_KERNELS, problem, config)
    extra = [rms_weight, *(a.reshape(1) for a in (scale, zero) if a is not None)]
    codes, *made = kernel.fn(
        problem, config, interpret, rms_epsilon, x, *(a for a in extra if a is not None)
    )
    if layout == "tensor":
        assert scale is not None
        return Quantized(codes, scale, zero)
    if layout == "1x128":
        return Quantized(codes, made[0], None)
    return Quantized(codes, made[0][:, None], made[1][:, None] if problem.zero else None)
