"""Pieces that several kernel bodies share: shared memory types, register layouts, ring buffers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.problem import dtype_bits

# Register layouts of a vector that scales the rows or the columns of a wgmma accumulator.
ROW = plgpu.Layout.WGMMA.reduce(1)
COLUMN = plgpu.Layout.WGMMA.reduce(0)

# Every scratch buffer starts at a multiple of this; barriers and reductions need a little besides.
SMEM_ALIGNMENT = 1024
SMEM_RESERVE = 1024


def cdiv(a: int, b: int) -> int:
    """Return a / b rounded up."""
    return -(-a // b)


def round_up(a: int, b: int) -> int:
    """Return the least multiple of b that is at least a."""
    return cdiv(a, b) * b


def tiled_smem(shape: tuple[int, ...], dtype: Any) -> Any:
    """Return shared memory in the tiling and swizzle that wgmma and TMA take.

    The last two dimensions are cut in tiles of 8 rows by the widest swizzle (128, 64 or 32 bytes)
    that divides the last one.
    """
    bits = dtype_bits(dtype)
    swizzle = plgpu.find_swizzle(shape[-1] * bits)
    transforms = (
        plgpu.TilingTransform((8, swizzle * 8 // bits)),
        plgpu.SwizzleTransform(swizzle),
    )
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def accumulator(shape: Sequence[int], dtype: Any) -> Any:
    """Return the type of a wgmma accumulator, zero when its scope begins."""
    rows, columns = shape
    return plgpu.ACC((rows, columns), dtype)  # pyright: ignore[reportPrivateImportUsage]


def load(ref: Any, layout: Any) -> jax.Array:
    """Read a whole ref into registers in a given layout (the spelling all jax versions take)."""
    return plgpu.layout_cast(ref[...], layout)


def load_global(ref: Any, layout: Any) -> jax.Array:
    """Read global memory into registers in a given layout, without shared memory in between."""
    index = () if hasattr(plgpu, "InterpretGPUParams") else (...,)  # jax 0.10 wants one
    return plgpu.load(ref, *index, layout=layout, optimized=False)


def store_global(ref: Any, value: jax.Array) -> None:
    """Write registers to global memory, without shared memory in between.

    jax 0.12 refuses that of a plain assignment, and earlier ones know no other.
    """
    if hasattr(plgpu, "store"):
        getattr(plgpu, "store")(ref, value, optimized=False)  # noqa: B009
    else:
        ref[...] = value


def silu(x: jax.Array) -> jax.Array:
    """Return x / (1 + exp(-x)) by two approximations of the hardware; division takes ten times."""
    root = lax.rsqrt(1 + jnp.exp(-x))
    return x * root * root


def scale_rows(tile: jax.Array, scale: jax.Array) -> jax.Array:
    """Multiply row i of a tile by scale[i]; `scale` lies in the ROW layout."""
    return tile * lax.broadcast_in_dim(scale, tile.shape, [0])


def scale_columns(tile: jax.Array, scale: jax.Array) -> jax.Array:
    """Multiply column j of a tile by scale[j]; `scale` lies in the COLUMN layout."""
    return tile * lax.broadcast_in_dim(scale, tile.shape, [1])


def guarded(condition: bool | jax.Array, action: Callable[[], None]) -> None:
    """Run an action under a condition, which may be known while tracing."""
    if not isinstance(condition, bool):
        pl.when(condition)(action)
    elif condition:
        action()


def slot(step: Any, count: int) -> jax.Array:
    """Return the ring slot that a step, which is not negative, uses."""
    if count & (count - 1) == 0:
        return lax.bitwise_and(jnp.int32(step), jnp.int32(count - 1))
    return lax.rem(step, jnp.int32(count))


def copy_contiguous(source: Any, target: Any, barrier: Any, interpret: bool) -> None:
    """Start copying contiguous global memory, all of it within bounds, to shared memory.

    Where jax can promise that (0.11), the copy goes without a tensor map, whose first use waits for
    it to be fetched, and which takes more instructions to name.
    """
    promise = {}
    if not interpret and hasattr(plgpu, "OOBFillMode"):
        mode = getattr(plgpu, "OOBFillMode")  # noqa: B009 - absent in 0.10
        promise["oob_mode"] = mode.PROMISE_IN_BOUNDS
    plgpu.copy_gmem_to_smem(source, target, barrier, **promise)


def release(barrier: Any, interpret: bool) -> None:
    """Let a producer refill shared memory that this warpgroup has read into registers.

    On a GPU the arrival is enough, as every library relies on; the interpreter's race detector
    wants a proxy fence between the reads and the refill by TMA besides.
    """
    if interpret:
        plgpu.commit_smem()
    plgpu.barrier_arrive(barrier)


def drain(barriers: Any, steps: Any, count: int) -> None:
    """Wait for the release of every slot that was filled and not waited for.

    A producer does this before it leaves: in a cluster a peer may still signal its barriers, and
    the interpreter insists on it.
    """

    def wait(step, carry):
        plgpu.barrier_wait(barriers.at[slot(step, count)])
        return carry

    lax.fori_loop(lax.max(steps - count, 0), steps, wait, jnp.int32(0))


def stage_tile(
    tile: jax.Array | Sequence[jax.Array],
    staging: Any,
    *,
    transpose: bool = False,
    pending: int = 0,
) -> None:
    """Write a wgmma tile to shared memory, from where TMA may read it.

    Args:
        tile: [rows, columns] in the WGMMA layout, already of the output type; or equal pieces of
            its columns, each as wide as a tile of the staging buffer.
        staging: tiled shared memory, [rows, columns], or [columns, rows] when transposing.
        transpose: whether the output is the transpose of the tile.
        pending: earlier stores that may still read their own staging buffers.
    """
    plgpu.wait_smem_to_gmem(pending, wait_read_only=True)
    pieces = [tile] if isinstance(tile, jax.Array) else tile
    if len(pieces) > 1:
        for j, piece in enumerate(pieces):
            width = piece.shape[1]
            staging.at[:, pl.ds(j * width, width)][...] = piece
    elif transpose:
        staging.T[...] = plgpu.layout_cast(pieces[0], plgpu.Layout.WGMMA_TRANSPOSED)
    else:
        staging[...] = pieces[0]
    plgpu.commit_smem()


def store_tile(
    tile: jax.Array | Sequence[jax.Array],
    staging: Any,
    destination: Any,
    *,
    transpose: bool = False,
    pending: int = 0,
) -> None:
    """Write a wgmma tile to global memory through a staging buffer.

    Args:
        tile: as for `stage_tile`, like the other arguments.
        staging: tiled shared memory.
        destination: global memory of the staging buffer's shape; TMA drops what is out of bounds.
        transpose: whether the output is the transpose of the tile.
        pending: earlier stores that may still read their own staging buffers.
    """
    stage_tile(tile, staging, transpose=transpose, pending=pending)
    plgpu.copy_smem_to_gmem(staging, destination)


def pad_rows(x: jax.Array, multiple: int) -> jax.Array:
    """Pad axis 0 with zeros to a multiple (TMA cuts tiled operands in groups of 8 rows)."""
    missing = -x.shape[0] % multiple
    return jnp.pad(x, ((0, missing),) + ((0, 0),) * (x.ndim - 1)) if missing else x


def pad_tokens(x: jax.Array) -> jax.Array:
    """Pad rows to a multiple of 8; 8 rows or fewer are a tile as they are."""
    return pad_rows(x, 8) if x.shape[0] > 8 else x


def pad_columns(x: jax.Array, multiple: int) -> jax.Array:
    """Pad the last axis with zeros to a multiple (TMA wants row pitches of 16 bytes)."""
    missing = -x.shape[-1] % multiple
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, missing),)) if missing else x
