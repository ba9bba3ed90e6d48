"""The XLA path of ``grouped_matmul``: one tile of one expert's rows at a time.

``lax.ragged_dot`` multiplies every row with every expert on devices without a grouped kernel.  Here
a loop visits only the tiles that hold rows, so the work is that of the rows plus at most one
partial tile per expert, and one expert's dense weight is alive at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.arrays.bank import ExpertBank, Run, StackedBank
from jaxquant.arrays.qtensor import QTensor
from jaxquant.ops.activations import gate
from jaxquant.ops.matmul_xla import matmul_xla
from jaxquant.ops.prepared import Prepared, unprepare
from jaxquant.transforms.leading import index_lead, take_lead

MAX_TILE = 128


def _tile_rows(rows: int, experts: int) -> int:
    """Rows of a tile: about the mean group, a power of two from 8 to ``MAX_TILE``."""
    mean = max(1, rows // max(1, experts))
    return min(MAX_TILE, max(8, 1 << (mean - 1).bit_length()))


def _one(part: QTensor | Prepared, index: Any) -> QTensor:
    """One expert's weight out of a stack."""
    if isinstance(part, QTensor):
        return index_lead(part, index)
    return unprepare(jax.tree.map(lambda leaf: take_lead(leaf, index), part))


def _run_tiles(
    padded: jax.Array,
    part: QTensor | Prepared,
    run: Run,
    group_sizes: jax.Array,
    layer: tuple[jax.Array, ...],
    tile: int,
    result: jax.Array,
) -> jax.Array:
    """Write the rows of one run's experts; both arrays have a margin of a tile at their end.

    ``layer`` is the index of the layer where ``part`` is a stack of layers, else empty.
    """
    sizes = lax.slice_in_dim(group_sizes, run.start, run.stop)
    first = lax.slice_in_dim(jnp.cumsum(group_sizes) - group_sizes, run.start, run.stop)
    tiles = -(-sizes // tile)
    last_tile = jnp.cumsum(tiles)

    def body(i: jax.Array, acc: jax.Array) -> jax.Array:
        expert = jnp.searchsorted(last_tile, i, side="right")
        within = i - (last_tile[expert] - tiles[expert])
        row = first[expert] + within * tile
        # Layer and expert in one slice: an inner loop over a layer's slice would copy its bank.
        weight = _one(part, (*layer, expert))
        y = matmul_xla(lax.dynamic_slice_in_dim(padded, row, tile), weight)
        mine = jnp.arange(tile) < sizes[expert] - within * tile
        old = lax.dynamic_slice_in_dim(acc, row, tile)
        return lax.dynamic_update_slice_in_dim(acc, jnp.where(mine[:, None], y, old), row, 0)

    return lax.fori_loop(0, last_tile[-1], body, result)


def grouped_matmul_xla(
    x: jax.Array,
    bank: ExpertBank | StackedBank,
    group_sizes: jax.Array,
    source: jax.Array | None = None,
    *,
    gated: bool = False,
    runs: Sequence[int] | None = None,
) -> jax.Array:
    """``[rows, in] x bank -> [rows, out]``; contract of ``jaxquant.grouped_matmul``.

    Args:
        x: ``[rows, in]``.
        bank: experts in bank order.
        group_sizes: ``[experts]`` int32.
        source: ``[rows]`` int32, or None for the rows of ``x``.
        gated: whether rows are ``silu(gate) * up``.
        runs: which runs to compute, all by default; rows of others are zero.
    """
    x = gate(x) if gated else x
    x = x if source is None else x[source]
    layer: tuple[jax.Array, ...] = ()
    if isinstance(bank, StackedBank):
        layer, bank = (bank.layer,), bank.stack
    rows, tile = x.shape[0], _tile_rows(x.shape[0], bank.experts)
    # Tiles may read and write past the last row; the margin takes those accesses.
    padded = jnp.pad(x, ((0, tile), (0, 0)))
    result = jnp.zeros((rows + tile, bank.parts[0].extent("out")), x.dtype)
    for i in range(len(bank.runs)) if runs is None else runs:
        result = _run_tiles(padded, bank.parts[i], bank.runs[i], group_sizes, layer, tile, result)
    return result[:rows]
