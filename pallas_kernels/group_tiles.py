"""Tiles of a grouped matmul, found and stored by each thread block on its own.

Rows are sorted by expert and only the device knows how many each expert has.  A launch is sized by
`Groups.tiles`, a bound that needs no group sizes; every block finds from the sizes which rows and
whose weights a tile has, in a quarter of a microsecond and without a kernel before it.

A tile may begin at any row: shared memory that wgmma reads in tiles of 8 rows has a second view in
tiles of 1 row, the same bytes, which TMA fills or empties from any row on.  Where a float32 vector
along the rows is copied too, tiles begin at a multiple of 8 rows instead, and rows of a neighbour
in them are computed but not stored: the address at which a TMA copy starts, its coordinates
included, must be a multiple of 16 bytes (else: CUDA_ERROR_ILLEGAL_INSTRUCTION).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
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
        row: the first of its expert's rows.
        rows: how many it has of them; 0 for a tile of the launch that the group sizes leave idle.
    """

    expert: Any
    row: Any
    rows: Any

    def start(self, align: int) -> Any:
        """Return where the tile begins in memory if tiles begin at a multiple of `align` rows."""
        return pl.multiple_of(lax.div(self.row, jnp.int32(align)) * align, align)


@dataclasses.dataclass(frozen=True)
class Groups:
    """Static facts of the groups of rows.

    Attributes:
        rows: all rows of the operand.
        total: experts that have a group size.
        first: position of the weight's first expert among them.
        experts: experts of the weight.
        align: tiles begin in memory at the next multiple of it before their first row.
        stacked: whether the weight is a stack of such weights, one for each layer; the layer's
            number then follows the sizes.
    """

    rows: int
    total: int
    first: int
    experts: int
    align: int = 1
    stacked: bool = False

    def tiles(self, height: int) -> int:
        """Return the largest number of tiles of `height` rows that the weight's experts can fill.

        ceil(x / height) is at most 1 + (x - 1) / height, and x counts up to align - 1 rows more.
        Nor are there more than tiles of `align` rows, of which every expert but one shares its
        first with the expert before it.
        """
        filled = min(self.rows, self.experts)
        straddling = filled + (self.rows + (self.align - 2) * filled) // height
        return min(straddling, max(filled - 1, 0) + cdiv(self.rows, self.align))

    def finder(self, height: int, interpret: bool) -> Callable[[Any, jax.Array], Tile]:
        """Return the function of the ref of the sizes and the number of a tile that finds it.

        Its expert counts from the first of all layers.
        """
        return _host_finder(self, height) if interpret else _device_finder(self, height)

    def counter(self, height: int, interpret: bool) -> Callable[[Any], jax.Array]:
        """Return the function of the ref of the sizes that counts the tiles that have rows."""
        return _host_counter(self, height) if interpret else _device_counter(self, height)


def sizes_of_layer(group_sizes: jax.Array, layer: jax.Array | None) -> jax.Array:
    """Return the sizes as kernels read them, followed by the layer if there is one."""
    return group_sizes if layer is None else jnp.append(group_sizes, layer)


def _host_layout(groups: Groups, height: int, sizes: jax.Array) -> tuple[jax.Array, ...]:
    """Return of each expert its position, first row, tiles, and rows before it in its tile."""
    position = lax.broadcasted_iota(jnp.int32, sizes.shape, 0) - groups.first
    mine = (position >= 0) & (position < groups.experts) & (sizes > 0)
    begin = jnp.cumsum(sizes) - sizes
    skipped = begin % groups.align
    tiles = jnp.where(mine, (skipped + sizes + height - 1) // height, 0)
    return position, begin, tiles, skipped


def _host_finder(groups: Groups, height: int) -> Callable[[Any, jax.Array], Tile]:
    def find(sizes_ref: Any, index: jax.Array) -> Tile:
        sizes, before = sizes_ref[...][: groups.total], 0
        if groups.stacked:
            before = sizes_ref[...][groups.total] * groups.experts
        position, begin, tiles, skipped = _host_layout(groups, height, sizes)
        within = index - (jnp.cumsum(tiles) - tiles)
        hit = (within >= 0) & (within < tiles)
        start = jnp.maximum(within * height - skipped, 0)
        stop = jnp.minimum((within + 1) * height - skipped, sizes)

        def pick(values: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(hit, values, 0), dtype=jnp.int32)

        return Tile(pick(position) + before, pick(begin + start), pick(stop - start))

    return find


def _host_counter(groups: Groups, height: int) -> Callable[[Any], jax.Array]:
    def count(sizes_ref: Any) -> jax.Array:
        sizes = sizes_ref[...][: groups.total]
        return jnp.sum(_host_layout(groups, height, sizes)[2], dtype=jnp.int32)

    return count


def _shuffle(kind: str, x: Any, lane: Any) -> Any:
    """Read another lane's word: `lane` lanes below ("up", its own if none) or lane `lane`."""
    clamp = 0 if kind == "up" else _LANES - 1
    asm = f"shfl.sync.{kind}.b32 $0, $1, $2, {clamp}, 0xffffffff;"
    return llvm.inline_asm(x.type, [x, lane], asm, "=r,r,r", has_side_effects=True)


class _Lanes:
    """The experts of each lane of a warp, inside a kernel: `cdiv(total, 32)` in turn.

    Attributes:
        row, tile: rows and tiles of all lower lanes.
        tiles: tiles of all lanes.
    """

    def __init__(self, groups: Groups, height: int, sizes_ref: Any):
        self.groups, self.height = groups, height
        self.i32 = ir.IntegerType.get_signless(32)
        const = self.const
        self.lane = arith.remui(mgpu.thread_idx(), const(_LANES))
        self.first = arith.muli(self.lane, const(cdiv(groups.total, _LANES)))
        self.base = mgpu.memref_ptr(sizes_ref)
        self.sizes = []
        for j in range(cdiv(groups.total, _LANES)):
            expert = arith.addi(self.first, const(j))
            inside = self.less(expert, const(groups.total))
            size = self.read(arith.select(inside, expert, const(0)))
            self.sizes.append(arith.select(inside, size, const(0)))
        self.row, _ = self._before(self.sizes)
        self.tile, self.tiles = self._before([tiles for _, _, tiles, _ in self.experts()])

    def experts(self) -> Iterator[tuple[Any, Any, Any, Any]]:
        """Yield of each expert its position, first row, tiles, and rows before it in its tile."""
        const, less = self.const, self.less
        # Hidden from the compiler, which would keep the values of one call for the next, and spill.
        row: Any = llvm.inline_asm(
            self.i32, [self.row], "mov.b32 $0, $1;", "=r,r", has_side_effects=True
        )
        for j, size in enumerate(self.sizes):
            expert = arith.addi(self.first, const(j - self.groups.first))
            skipped = arith.remui(row, const(self.groups.align))
            tiles = arith.addi(arith.addi(size, skipped), const(self.height - 1))
            tiles = arith.divui(tiles, const(self.height))
            mine = arith.andi(less(const(-1), expert), less(expert, const(self.groups.experts)))
            mine = arith.andi(mine, less(const(0), size))
            yield expert, row, arith.select(mine, tiles, const(0)), skipped
            row = arith.addi(row, size)

    def const(self, value: int) -> Any:
        return arith.constant(self.i32, ir.IntegerAttr.get(self.i32, value))

    def read(self, index: Any) -> Any:
        """Read a number from where the sizes lie."""
        return llvm.load(self.i32, mgpu.getelementptr(self.base, [index], self.i32))

    def less(self, a: Any, b: Any) -> Any:
        return arith.cmpi(arith.CmpIPredicate.slt, a, b)

    def _before(self, values: list[Any]) -> tuple[Any, Any]:
        """Return the sum of the values of all lower lanes, and of all lanes."""
        own = functools.reduce(arith.addi, values)
        running = own
        for step in (1, 2, 4, 8, 16):
            below = _shuffle("up", running, self.const(step))
            below = arith.select(self.less(self.lane, self.const(step)), self.const(0), below)
            running = arith.addi(running, below)
        return arith.subi(running, own), _shuffle("idx", running, self.const(_LANES - 1))


_SCALAR = plgpu.Layout.WG_SPLAT
_INT = plgpu.ShapeDtypeStruct((), jnp.int32, layout=_SCALAR)


def _splat(value: Any) -> Any:
    return fa.FragmentedArray.splat(value, (), is_signed=True)


def _device_counter(groups: Groups, height: int) -> Callable[[Any], jax.Array]:
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=_INT)
    def count(ctx: Any, sizes_ref: Any) -> Any:
        return _splat(_Lanes(groups, height, sizes_ref).tiles)

    counted: Any = count  # inside a kernel the context is passed by the primitive
    return counted


def _device_finder(groups: Groups, height: int) -> Callable[[Any, jax.Array], Tile]:
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _SCALAR), return_type=(_INT,) * 3)
    def find(ctx: Any, sizes_ref: Any, index_array: Any) -> tuple[Any, ...]:
        lanes = _Lanes(groups, height, sizes_ref)
        layer = lanes.read(lanes.const(groups.total)) if groups.stacked else lanes.const(0)
        less, zero, tall = lanes.less, lanes.const(0), lanes.const(height)
        index = index_array.registers.flat[0]
        tile = lanes.tile
        found = [zero, zero, zero]
        for size, (expert, row, tiles, skipped) in zip(lanes.sizes, lanes.experts(), strict=True):
            within = arith.subi(index, tile)
            hit = arith.andi(less(lanes.const(-1), within), less(within, tiles))
            start = arith.subi(arith.muli(within, tall), skipped)
            stop = arith.minsi(arith.addi(start, tall), size)
            start = arith.maxsi(start, zero)
            values = expert, arith.addi(row, start), arith.subi(stop, start)
            found = [arith.select(hit, *pair) for pair in zip(values, found, strict=True)]
            tile = arith.addi(tile, tiles)
        # The lane that found it tells the others; lane 0, whose count is then 0, if none did.
        some = arith.extui(lanes.i32, less(zero, found[2]))
        asm = "{ .reg .pred p; setp.ne.u32 p, $1, 0; vote.sync.ballot.b32 $0, p, 0xffffffff; }"
        votes: Any = llvm.inline_asm(lanes.i32, [some], asm, "=r,r", has_side_effects=True)
        winner: Any = llvm.inline_asm(lanes.i32, [votes], "bfind.u32 $0, $1;", "=r,r")
        winner = arith.select(less(winner, zero), zero, winner)
        expert, *rows = (_shuffle("idx", value, winner) for value in found)
        expert = arith.addi(expert, arith.muli(layer, lanes.const(groups.experts)))
        return tuple(map(_splat, (expert, *rows)))

    found: Any = find  # as in `_device_counter`
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


def store_rows(source: Any, out: Any, row: Any, column: Any, count: Any, skipped: Any = 0) -> None:
    """Store `count` rows, which may be none, and leave the others as they are.

    Args:
        source: [rows, columns] in shared memory, in tiles of 1 row.
        out: [all rows, all columns] in global memory.
        row: where the first of them goes in `out`.
        column: its first channel there.
        count: rows to store.
        skipped: rows of `source` before them.
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
            part = source.at[pl.ds(skipped + done, power)]
            plgpu.copy_smem_to_gmem(part, out.at[pl.ds(row + done, power), across])
