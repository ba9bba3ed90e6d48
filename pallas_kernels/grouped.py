"""Tiles of a grouped matmul: which expert and which rows each tile of the grid has.

Rows are sorted by expert, and only the device knows how many each expert has.  A launch is sized
by `most_tiles`, which needs no group sizes; the kernel reads the live tiles from a table.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

# TMA cuts activations in tiles of 8 rows, so that copies start at a multiple of 8.
ROW_ALIGNMENT = 8


class Tile(NamedTuple):
    """One tile of rows.

    Attributes:
        expert: whose weights the rows meet.
        first: first row, a multiple of 8; the tile has `height` rows from here on.
        begin, end: the expert's rows are [begin, end); those of the tile outside are another's.
    """

    expert: Any
    first: Any
    begin: Any
    end: Any


def most_tiles(rows: int, experts: int, height: int) -> int:
    """Return the largest number of tiles that `rows` rows of `experts` experts can make."""
    filled = min(rows, experts)
    # ceil(x / height) is at most 1 + (x - 1) / height, and x counts up to 7 rows of a neighbour.
    return filled + (rows + (ROW_ALIGNMENT - 2) * filled) // height


def tile_schedule(
    group_sizes: jax.Array, rows: int, height: int, start: jax.typing.ArrayLike = 0
) -> jax.Array:
    """List the live tiles in the order of their rows.

    An expert's first tile starts at its first row rounded down to a multiple of 8; experts without
    rows have no tile.

    Args:
        group_sizes: int32 [experts], rows of each expert.
        rows: static number of rows of the whole operand.
        height: rows of a tile, a multiple of 8.
        start: row at which the first expert's rows begin.

    Returns:
        int32 [most_tiles + 1, 4]: the fields of `Tile` for each tile, live ones first; the last
        line holds the number of live tiles.
    """
    experts = group_sizes.shape[0]
    index = jnp.arange(experts, dtype=jnp.int32)

    def running(x: jax.Array) -> jax.Array:
        # A sum under a mask compiles to one small kernel, a scan to several.
        return jnp.sum(jnp.where(index[None] <= index[:, None], x[None], 0), 1, dtype=jnp.int32)

    sizes = group_sizes.astype(jnp.int32)
    ends = running(sizes) + start
    begins = ends - sizes
    firsts = begins // ROW_ALIGNMENT * ROW_ALIGNMENT
    counts = jnp.where(sizes > 0, -((firsts - ends) // height), 0)
    tile_ends = running(counts)
    tile = jnp.arange(most_tiles(rows, experts, height), dtype=jnp.int32)
    passed = jnp.sum(tile_ends[None] <= tile[:, None], 1, dtype=jnp.int32)
    expert = jnp.minimum(passed, experts - 1)
    first = firsts[expert] + (tile - (tile_ends - counts)[expert]) * height
    table = jnp.stack([expert, first, begins[expert], ends[expert]], axis=1)
    return jnp.concatenate([table, jnp.broadcast_to(tile_ends[-1], (1, 4))])


def read_tile(table: Any, index: Any) -> Tile:
    """Read a line of the table inside a kernel."""
    expert, first, begin, end = (table[index, field] for field in range(4))
    return Tile(expert, pl.multiple_of(first, ROW_ALIGNMENT), begin, end)


def live_tiles(table: Any) -> Any:
    """Read the number of live tiles inside a kernel."""
    return table[table.shape[0] - 1, 0]
