"""Tiles of a grouped matmul, found and stored by each thread block on its own.

Rows are sorted by expert and only the device knows how many each expert has.  A launch has
`Groups.tiles` tiles, a bound that needs no group sizes; every block finds from the sizes which rows
and whose weights its tile has, in half a microsecond and without a kernel before it.  A tile starts
at its first row, aligned or not: shared memory that wgmma reads in tiles of 8 rows has a second
view in tiles of 1 row, the same bytes, which TMA fills or empties from any row on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.problem import dtype_bits
from pallas_kernels.tiles import cdiv, tiled_smem

_LANES = 32


class Tile(NamedTuple):
    """One tile.

    Attributes:
        expert: whose weights, a position in the stacked weight.
        row: its first row.
        rows: how many it has; 0 for a tile of the launch that the group sizes leave idle.
    """

    expert: jax.Array
    row: jax.Array
    rows: jax.Array


@dataclasses.dataclass(frozen=True)
class Groups:
    """Static facts of the groups of rows.

    Attributes:
        rows: all rows of the operand.
        total: experts that have a group size.
        first: position of the weight's first expert among them.
        experts: experts of the weight.
    """

    rows: int
    total: int
    first: int
    experts: int

    def tiles(self, height: int) -> int:
        """Return the largest number of tiles of `height` rows that the weight's experts can fill.

        ceil(x / height) is at most (x + height - 1) / height.
        """
        filled = min(self.rows, self.experts)
        return (self.rows + filled * (height - 1)) // height

    def finder(self, height: int, interpret: bool) -> Callable[[Any, jax.Array], Tile]:
        """Return the function of the ref of the sizes and the number of a tile that finds it."""
        return _host_finder(self, height) if interpret else _device_finder(self, height)


def _host_finder(groups: Groups, height: int) -> Callable[[Any, jax.Array], Tile]:
    def find(sizes_ref: Any, index: jax.Array) -> Tile:
        sizes = sizes_ref[...]
        position = lax.broadcasted_iota(jnp.int32, sizes.shape, 0) - groups.first
        mine = (position >= 0) & (position < groups.experts)
        tiles = jnp.where(mine, (sizes + height - 1) // height, 0)
        row = jnp.cumsum(sizes) - sizes
        within = index - (jnp.cumsum(tiles) - tiles)
        hit = (within >= 0) & (within < tiles)

        def pick(values: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(hit, values, 0), dtype=jnp.int32)

        left = sizes - within * height
        return Tile(pick(position), pick(row + within * height), pick(lax.min(left, height)))

    return find


def _shuffle(kind: str, x: Any, lane: Any) -> Any:
    """Read another lane's word: `lane` lanes below ("up", its own if none) or lane `lane`."""
    clamp = 0 if kind == "up" else _LANES - 1
    asm = f"shfl.sync.{kind}.b32 $0, $1, $2, {clamp}, 0xffffffff;"
    return llvm.inline_asm(x.type, [x, lane], asm, "=r,r,r", has_side_effects=True)


def _device_finder(groups: Groups, height: int) -> Callable[[Any, jax.Array], Tile]:
    each = cdiv(groups.total, _LANES)  # experts of a lane
    scalar = plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT), return_type=(scalar, scalar, scalar)
    )
    def find(ctx: Any, sizes_ref: Any, index_array: Any) -> tuple[Any, ...]:
        i32 = ir.IntegerType.get_signless(32)

        def const(value: int) -> Any:
            return arith.constant(i32, ir.IntegerAttr.get(i32, value))

        def less(a: Any, b: Any) -> Any:
            return arith.cmpi(arith.CmpIPredicate.slt, a, b)

        def select(condition: Any, yes: Any, no: Any) -> Any:
            return arith.select(condition, yes, no)

        zero, tall = const(0), const(height)
        index = index_array.registers.flat[0]
        lane = arith.remui(mgpu.thread_idx(), const(_LANES))
        base = mgpu.memref_ptr(sizes_ref)
        sizes, tiles, experts = [], [], []
        for j in range(each):
            expert = arith.addi(arith.muli(lane, const(each)), const(j))
            inside = less(expert, const(groups.total))
            source = mgpu.getelementptr(base, [select(inside, expert, zero)], i32)
            size = select(inside, llvm.load(i32, source), zero)
            after = arith.addi(size, const(height - 1))
            count = arith.divui(after, tall)
            mine = arith.andi(
                less(const(groups.first - 1), expert),
                less(expert, const(groups.first + groups.experts)),
            )
            sizes.append(size)
            tiles.append(select(mine, count, zero))
            experts.append(arith.subi(expert, const(groups.first)))

        def before(values: list[Any]) -> Any:
            """Return the sum over all lower lanes."""
            own = values[0]
            for value in values[1:]:
                own = arith.addi(own, value)
            running = own
            for step in (1, 2, 4, 8, 16):
                below = _shuffle("up", running, const(step))
                below = select(less(lane, const(step)), zero, below)
                running = arith.addi(running, below)
            return arith.subi(running, own)

        row, tile = before(sizes), before(tiles)
        found = [zero, zero, zero]
        for expert, size, count in zip(experts, sizes, tiles, strict=True):
            within = arith.subi(index, tile)
            hit = arith.andi(less(const(-1), within), less(within, count))
            done = arith.muli(within, tall)
            left = arith.subi(size, done)
            values = expert, arith.addi(row, done), select(less(left, tall), left, tall)
            found = [select(hit, value, old) for value, old in zip(values, found, strict=True)]
            row, tile = arith.addi(row, size), arith.addi(tile, count)
        # The lane that found it tells the others; lane 0, whose count is then 0, if none did.
        some = less(zero, found[2])
        asm = "{ .reg .pred p; setp.ne.u32 p, $1, 0; vote.sync.ballot.b32 $0, p, 0xffffffff; }"
        votes: Any = llvm.inline_asm(
            i32, [arith.extui(i32, some)], asm, "=r,r", has_side_effects=True
        )
        winner = llvm.inline_asm(i32, [votes], "bfind.u32 $0, $1;", "=r,r")
        winner = select(less(winner, zero), zero, winner)
        told = (_shuffle("idx", value, winner) for value in found)
        return tuple(fa.FragmentedArray.splat(value, (), is_signed=True) for value in told)

    # Inside a kernel the context is passed by the primitive.
    found: Any = find
    return lambda sizes_ref, index: Tile(*found(sizes_ref, index))


def two_views(shape: tuple[int, ...], dtype: Any, interpret: bool) -> Any:
    """Return shared memory [..., rows, columns] for wgmma, with a second view for TMA.

    The last dimension is one swizzle wide.  As tiles of 8 rows and as tiles of 1 row the bytes lie
    alike: rows follow each other, and the swizzle depends on the address alone.
    """
    wgmma = tiled_smem(shape, dtype)
    if interpret:  # which knows no unions, and ignores tiles
        return wgmma
    bits = dtype_bits(dtype)
    transforms = (
        plgpu.TilingTransform((1, shape[-1])),
        plgpu.SwizzleTransform(shape[-1] * bits // 8),
    )
    return plgpu.RefUnion(wgmma, plgpu.SMEM(shape, dtype, transforms=transforms))


def views(scratch: Any, interpret: bool) -> tuple[Any, Any]:
    """Return the view for wgmma and the one for TMA of `two_views` memory inside a kernel."""
    return (scratch, scratch) if interpret else scratch


def store_rows(source: Any, out: Any, row: Any, column: Any, count: Any) -> None:
    """Store the first `count` rows, which may be none, and leave the others as they are.

    Args:
        source: [rows, columns] in shared memory, in tiles of 1 row.
        out: [all rows, all columns] in global memory.
        row: where the tile starts in `out`.
        column: its first channel there.
        count: rows to store.
    """
    rows, columns = source.shape
    across = pl.ds(column, columns)

    @pl.when(count >= rows)
    def _():
        plgpu.copy_smem_to_gmem(source, out.at[pl.ds(row, rows), across])

    # A copy has a static size: the rest goes in powers of two.
    for bit in reversed(range((rows - 1).bit_length())):
        power = 1 << bit

        @pl.when((count < rows) & (count & power != 0))
        def _(power=power):
            done = count & -(2 * power)
            part = source.at[pl.ds(done, power)]
            plgpu.copy_smem_to_gmem(part, out.at[pl.ds(row + done, power), across])
