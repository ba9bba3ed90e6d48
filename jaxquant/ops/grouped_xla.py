"""The XLA path of ``grouped_matmul``: one tile of one expert's rows at a time.

``lax.ragged_dot`` multiplies every row with every expert on devices without a grouped kernel.  Here
a loop visits only the tiles that hold rows, so the work is that of the rows plus at most one
partial tile per expert, and one expert's dense weight is alive at a time.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.arrays.bank import ExpertBank, StackedBank
from jaxquant.ops.matmul_xla import matmul_xla
from jaxquant.transforms.structure import index_lead

MAX_TILE = 128


def _tile_rows(rows: int, experts: int) -> int:
    """Rows of a tile: about the mean group, a power of two from 8 to ``MAX_TILE``."""
    mean = max(1, rows // max(1, experts))
    return min(MAX_TILE, max(8, 1 << (mean - 1).bit_length()))


def grouped_matmul_xla(
    x: jax.Array, bank: ExpertBank | StackedBank, group_sizes: jax.Array
) -> jax.Array:
    """``[rows, in] x bank -> [rows, out]``; contract of ``jaxquant.grouped_matmul``."""
    layer: tuple[jax.Array, ...] = ()
    if isinstance(bank, StackedBank):
        layer, bank = (bank.layer,), bank.stack
    rows = x.shape[0]
    out = bank.parts[0].extent("out")
    tile = _tile_rows(rows, bank.experts)
    ends = jnp.cumsum(group_sizes)
    starts = ends - group_sizes
    # Tiles may read and write past the last row; the margin takes those accesses.
    padded = jnp.pad(x, ((0, tile), (0, 0)))
    result = jnp.zeros((rows + tile, out), x.dtype)
    for part, run in zip(bank.parts, bank.runs, strict=True):
        sizes = lax.slice_in_dim(group_sizes, run.start, run.stop)
        first = lax.slice_in_dim(starts, run.start, run.stop)
        tiles = -(-sizes // tile)
        last_tile = jnp.cumsum(tiles)

        def body(i, acc, part=part, sizes=sizes, first=first, tiles=tiles, last_tile=last_tile):
            expert = jnp.searchsorted(last_tile, i, side="right")
            within = i - (last_tile[expert] - tiles[expert])
            row = first[expert] + within * tile
            # Layer and expert in one slice: an inner loop over a layer's slice would copy its bank.
            weight = index_lead(part, (*layer, expert))
            y = matmul_xla(lax.dynamic_slice_in_dim(padded, row, tile), weight)
            mine = jnp.arange(tile) < sizes[expert] - within * tile
            old = lax.dynamic_slice_in_dim(acc, row, tile)
            return lax.dynamic_update_slice_in_dim(acc, jnp.where(mine[:, None], y, old), row, 0)

        result = lax.fori_loop(0, last_tile[-1], body, result)
    return result[:rows]
