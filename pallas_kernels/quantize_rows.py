"""The body behind `quantize`: a row of activations in registers, from the first load to its codes.

Values go from global memory to registers and come back as codes, so statistics need no second pass,
and RMSNorm or silu(gate) * up no memory traffic besides their operands.  What hides the latency of
memory is the number of rows on a multiprocessor: shared memory holds nothing but a few numbers, and
registers set the limit.  (Rows by TMA, a ring of them ahead, took 3 to 20 % longer.)
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.a8_problem import GROUP
from pallas_kernels.launch import GRID, WARPGROUP, launch
from pallas_kernels.problem import Config, Kernel, Problem, require_hopper
from pallas_kernels.tiles import load, load_global, round_up, scale_rows, silu, store_global

# Largest code of each type, and the least scale, the smallest normal float32: zeros divide well.
LARGEST = {"float8_e4m3fn": 448.0, "int8": 127.0}
LEAST_SCALE = 2.0**-126
# Values of a row that a thread may hold: of 255 registers, those that addresses and operands leave.
MOST_VALUES = 160


@dataclasses.dataclass(frozen=True)
class QuantizeConfig(Config):
    """How a row is spread over threads.

    Attributes:
        parts: warpgroups that share a row: of one block where a number concerns the whole row, else
            blocks of their own.
    """

    parts: int = 1

    def warpgroups(self, problem: Problem) -> int:
        """Return the warpgroups of a block."""
        return self.parts if _joint(problem) else 1

    def values(self, problem: Problem) -> int:
        """Return how many values of a row a thread holds."""
        return problem.k // (128 * self.parts)

    def refuses(self, problem: Problem) -> str | None:
        """Return why this config cannot run `problem`, or None."""
        if self.parts < 1 or problem.k % (4 * GROUP * self.parts):
            return f"K={problem.k} is no multiple of {4 * GROUP} x {self.parts} parts"
        if self.warpgroups(problem) > 8:
            return "a block holds eight warpgroups at most"
        if self.values(problem) > MOST_VALUES:
            return f"{self.values(problem)} values a thread are above {MOST_VALUES}"
        return None


def _joint(problem: Problem) -> int:
    """Return how many numbers need a whole row: mean square, amplitude or ends of the range."""
    ends = {"token": 2 if problem.zero else 1}.get(problem.x_scale, 0)
    return (problem.fused == "rms") + ends


def _refuses(problem: Problem) -> str | None:
    if reason := require_hopper(problem):
        return reason
    if problem.k % (4 * GROUP):
        return f"K must be a multiple of {4 * GROUP}, not {problem.k}"
    if next(_candidates(problem), None) is None:
        return f"a row must fit in the registers of a block: K={problem.k} does not"
    return None


def _candidates(problem: Problem) -> Iterator[QuantizeConfig]:
    """Yield the configs worth measuring."""
    for parts in range(1, problem.k // (4 * GROUP) + 1):
        config = QuantizeConfig(parts)
        if config.refuses(problem) is None:
            yield config


def _default(problem: Problem) -> QuantizeConfig:
    """Return the fewest parts that leave registers for several rows on a multiprocessor.

    Few rows whose parts need not meet are spread over as many blocks as read 16 bytes a thread.
    """
    choices = list(_candidates(problem))
    many = problem.m >= 4 * problem.device.sms
    if not (many or _joint(problem)):
        return [c for c in choices if c.values(problem) >= 8 or c.parts == choices[0].parts][-1]
    most = 16 if problem.fused == "gated" else 63
    config = next((c for c in choices if c.values(problem) <= most), choices[-1])
    # The norm's weight takes as many registers again: two warpgroups with more than some 40 values
    # a thread leave room for one row, a single one with twice as many for two rows.
    whole = choices[0]
    crowded = problem.fused == "rms" and config.parts == 2 and config.values(problem) > 40
    return whole if many and crowded and whole.values(problem) <= 112 else config


def _layout(groups: int, widest: int) -> Any:
    """Return a layout of [groups, 128] in which no group spans two warps.

    A thread reads 16 bytes at most, so `widest`, the bytes of the widest operand, limits its share.
    """
    if groups % 8 == 0 and widest <= 2:  # two groups a warp, eight values a thread
        tiling, warps, lanes = ((8, GROUP), (2, GROUP), (8,)), (-5,), (-3, -2)
    else:  # one group a warp, four values a thread
        tiling, warps, lanes = ((4, GROUP), (4,)), (-3,), (-2,)
    return plgpu.Layout.TILED(fa.Tiling(tiling), warp_dims=warps, lane_dims=lanes, vector_dim=-1)


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


def _everywhere(count: int) -> Any:
    """Return a layout of [count] numbers that gives every warp all of them."""
    lanes = math.gcd(count, 32)
    return plgpu.Layout.TILED(
        fa.Tiling(((lanes,), (1,))),
        warp_dims=(fa.Replicated(4),),
        lane_dims=(-2, fa.Replicated(32 // lanes)),
        vector_dim=-1,
    )


def _quantize_rows(
    problem: Problem,
    config: QuantizeConfig,
    interpret: bool,
    epsilon: float,
    x: jax.Array,
    *extra: jax.Array,
    source: jax.Array | None = None,
    keep: bool = False,
) -> tuple[jax.Array, ...]:
    """Run the kernel; `extra` holds the RMSNorm weight, then the static scale and zero point.

    With `source`, row i is made of row `source[i]` of x, or not at all if that is negative.  With
    `keep` the last result is the rows before they were quantized, in the type of x.
    """
    m, k, parts = problem.m, problem.k, config.parts
    groups, gated, rms = k // GROUP, problem.fused == "gated", problem.fused == "rms"
    share, warpgroups = groups // parts, config.warpgroups(problem)
    static, blocked = problem.x_scale == "tensor", problem.x_scale == "1x128"
    asymmetric = bool(problem.zero) and not static
    largest = LARGEST[problem.out_dtype]
    widest = max(a.dtype.itemsize for a in (x, *extra[:rms]))
    layout = _layout(share, widest)

    def body(*refs, **scratch):
        warpgroup = lax.axis_index(WARPGROUP)
        if warpgroups > 1:
            row, mine = lax.axis_index(GRID), warpgroup
        else:
            row = lax.div(lax.axis_index(GRID), jnp.int32(parts))
            mine = lax.rem(lax.axis_index(GRID), jnp.int32(parts))
        make = functools.partial(make_row, refs, warpgroup, row, mine, **scratch)
        if source is None:
            return make(row)
        at = refs[1 + len(extra)][row]
        pl.when(at >= 0)(lambda: make(at))

    def make_row(refs, warpgroup, row, mine, at, numbers: Any = None, arrived: Any = None):
        """Make this warpgroup's part of a row from row `at` of x."""
        x_gm, extra_gm, outputs = refs[0], refs[1 : 1 + len(extra)], refs[-len(out) :]

        def over_row(values: list[tuple[jax.Array, Any]]) -> list[jax.Array]:
            """Reduce [share] numbers over the row, each list by its own function."""
            # Mosaic reduces across warps in shared memory that all warpgroups have in common, so
            # only a lone one may let it; several write their numbers, meet, and read all of them.
            if warpgroups > 1:
                for i, (value, _) in enumerate(values):
                    numbers[i, pl.ds(mine * share, share)] = value
                plgpu.barrier_arrive(arrived)
                plgpu.barrier_wait(arrived)
                read = functools.partial(load, layout=_everywhere(groups))
                values = [(read(numbers.at[i]), join) for i, (_, join) in enumerate(values)]
            return [join(value) for value, join in values]

        raw = [
            load_global(x_gm.at[at, pl.ds((i * parts + mine) * share, share)], layout)
            for i in range(1 + gated)
        ]
        weight = load_global(extra_gm[0].at[mine], layout) if rms else None
        values = raw[0].astype(jnp.float32)
        if gated:
            values = silu(values) * raw[1].astype(jnp.float32)
        if keep:
            store_global(outputs[-1].at[row, mine], values.astype(x.dtype) if gated else raw[0])
        reductions: list[tuple[jax.Array, Any]] = []
        if weight is not None:
            # The norm is one factor of the row: scales take it over and codes do not see it.
            reductions.append((jnp.sum(values * values, axis=1), jnp.sum))
            values = values * weight.astype(jnp.float32)
        amplitude: Any = None
        if asymmetric:
            reductions.append((jnp.minimum(jnp.min(values, axis=1), 0.0), jnp.min))
            reductions.append((jnp.maximum(jnp.max(values, axis=1), 0.0), jnp.max))
        elif not static:
            amplitude = jnp.max(jnp.maximum(values, -values), axis=1)
            if not blocked:
                reductions.append((amplitude, jnp.max))
        reduced = over_row(reductions) if reductions else []
        norm = lax.rsqrt(reduced.pop(0) * (1 / k) + epsilon) if rms else None
        zero = None
        if static:
            scale = extra_gm[rms][0]
            zero = extra_gm[rms + 1][0].astype(jnp.float32) if problem.zero else None
            values = values if norm is None else values * norm
        elif asymmetric:
            low, high = reduced
            scale = lax.max((high - low) * (1 / (2 * largest + 1)), LEAST_SCALE)
            zero = jnp.round(-largest - 1 - low / scale)
        else:
            amplitude = amplitude if blocked else reduced[0]
            scale = jnp.maximum(amplitude * (1 / largest), LEAST_SCALE)
        store_global(outputs[0].at[row, mine], _encode(values, scale, zero, problem))
        if static:
            return
        made = scale if norm is None else scale * norm
        if blocked:
            store_global(outputs[1].at[mine, :, row], made)
            return

        @pl.when(warpgroup == 0)
        def _():
            outputs[1][row] = made
            if zero is not None:
                outputs[2][row] = zero.astype(jnp.int32)

    out = [jax.ShapeDtypeStruct((m, parts, share, GROUP), problem.out_dtype)]
    if blocked:
        out.append(jax.ShapeDtypeStruct((parts, share, round_up(m, 4)), jnp.float32))
    elif not static:
        out.append(jax.ShapeDtypeStruct((m,), jnp.float32))
        if problem.zero:
            out.append(jax.ShapeDtypeStruct((m,), jnp.int32))
    if keep:
        out.append(jax.ShapeDtypeStruct((m, parts, share, GROUP), x.dtype))
    scratch = {}
    if warpgroups > 1:
        scratch["numbers"] = plgpu.SMEM((_joint(problem), groups), jnp.float32)
        scratch["arrived"] = plgpu.Barrier(num_arrivals=warpgroups)
    if rms:
        extra = (extra[0].reshape(parts, share, GROUP), *extra[1:])
    results = launch(
        body,
        x.reshape(-1, (1 + gated) * groups, GROUP),
        *extra,
        *(() if source is None else (source,)),
        out=tuple(out),
        scratch=scratch,
        grid=m * parts // warpgroups,
        warpgroups=warpgroups,
        name=f"quantize_{problem.fused or 'row'}",
        interpret=interpret,
    )
    codes, *made = results
    if blocked:
        made[0] = made[0].reshape(groups, -1)
    if keep:
        made[-1] = made[-1].reshape(m, k)
    return codes.reshape(m, k), *made


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
