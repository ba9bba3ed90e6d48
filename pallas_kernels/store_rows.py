"""Storing the rows of a tile that belong to one expert, and no others."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.grouped import Tile
from pallas_kernels.tiles import cdiv, tiled_smem

# Columns of a staging buffer: 128 bytes of a 16-bit type, one swizzle atom.
COLUMNS = 64
_CHUNKS = 8  # pieces of 16 bytes in a row, one for each of 8 neighbouring threads
_SCALAR = plgpu.Layout.WG_SPLAT


def _device_store(rows: int, dtype: Any) -> Any:
    """Return a function that copies rows of a staging buffer to global memory.

    TMA has no mask and cannot cut its swizzled tiles of 8 rows, so threads store: 16 bytes each,
    eight of them a whole line of 128 bytes.
    """
    transforms = tiled_smem((rows, COLUMNS), dtype).transforms

    @plgpu.inline_mgpu(
        arg_types=(
            plgpu.RefType(transforms),
            plgpu.RefType(),
            *[_SCALAR] * 4,
        )
    )
    def store(ctx: Any, staging: ir.Value, out: ir.Value, *scalars: Any) -> None:
        del ctx
        row, column, begin, end = (scalar.registers.item() for scalar in scalars)
        i8, i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (8, 32, 64))
        words = ir.VectorType.get((4,), i32)

        def const(value: int, kind: ir.Type = i32) -> ir.Value:
            return arith.constant(kind, ir.IntegerAttr.get(kind, value))

        pitch = ir.MemRefType(out.type).shape[1] * 2
        source, target = mgpu.memref_ptr(staging), mgpu.memref_ptr(out)
        thread = arith.remui(mgpu.thread_idx(), const(128))
        for i in range(cdiv(rows * _CHUNKS, 128)):
            piece = arith.addi(thread, const(i * 128))
            local = arith.shrui(piece, const(3))
            chunk = arith.andi(piece, const(7))
            at_row = arith.addi(row, local)
            mine = arith.andi(
                arith.cmpi(arith.CmpIPredicate.sge, at_row, begin),
                arith.cmpi(arith.CmpIPredicate.slt, at_row, end),
            )
            if (i + 1) * 128 > rows * _CHUNKS:  # threads of the last turn beyond the tile
                inside = arith.cmpi(arith.CmpIPredicate.ult, local, const(rows))
                mine = arith.andi(mine, inside)
            with mgpu.when(mine):
                swizzled = arith.xori(chunk, arith.andi(local, const(7)))
                offset = arith.addi(arith.shli(local, const(7)), arith.shli(swizzled, const(4)))
                value = llvm.load(words, mgpu.getelementptr(source, [offset], i8), alignment=16)
                across = arith.addi(arith.shli(column, const(1)), arith.shli(chunk, const(4)))
                place = arith.addi(
                    arith.muli(arith.extui(i64, at_row), const(pitch, i64)),
                    arith.extui(i64, across),
                )
                llvm.store(value, mgpu.getelementptr(target, [place], i8), alignment=16)

    return store


def _host_store(staging: Any, out: Any, row: Any, column: Any, begin: Any, end: Any) -> None:
    """The same under the interpreter."""

    def one(i, carry):
        @pl.when((row + i >= begin) & (row + i < end))
        def _():
            out[row + i, pl.ds(column, COLUMNS)] = staging[i]

        return carry

    lax.fori_loop(0, staging.shape[0], one, jnp.int32(0))


def store_rows(
    tile: jax.Array,
    staging: Any,
    out: Any,
    row: Any,
    column: Any,
    at: Tile,
    interpret: bool,
    *,
    transpose: bool = False,
) -> None:
    """Write the rows of a wgmma tile that lie in [at.begin, at.end) to global memory.

    Args:
        tile: [rows, 64] in the WGMMA layout, of a 16-bit type; [64, rows] when transposing.
        staging: tiled shared memory, [rows, 64].
        out: global memory [all rows, all columns].
        row: row of `out` where the tile lies.
        column: column of `out`; a tile beyond the last one is dropped.
        at: whose rows they are.
        interpret: whether the interpreter runs this.
        transpose: whether the output is the transpose of the tile.
    """
    rows = staging.shape[0]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    if transpose:
        staging.T[...] = plgpu.layout_cast(tile, plgpu.Layout.WGMMA_TRANSPOSED)
    else:
        staging[...] = tile
    plgpu.commit_smem()
    whole = (row >= at.begin) & (row + rows <= at.end)

    @pl.when(whole)
    def _():
        plgpu.copy_smem_to_gmem(staging, out.at[pl.ds(row, rows), pl.ds(column, COLUMNS)])

    @pl.when(jnp.logical_not(whole) & (column < out.shape[1]))
    def _():
        store = _host_store if interpret else _device_store(rows, out.dtype)
        store(staging, out, row, column, at.begin, at.end)
