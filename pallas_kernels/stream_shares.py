"""How shares of k become one sum: warpgroups add through shared memory, blocks of a cluster too.

A tile's tokens are cut into pieces; in a cluster each has one owner, which adds and stores it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.launch import CLUSTER
from pallas_kernels.record import CHANNELS
from pallas_kernels.stream_config import StreamConfig
from pallas_kernels.tiles import load, tiled_smem


def share_scratch(config: StreamConfig) -> dict[str, Any]:
    """Return the scratch memory of `add_shares`."""
    c, scratch = config, {}
    pieces = c.bm // c.stage
    owned = pieces // c.owners
    if c.kw > 1:
        sums = (c.kw - 1, c.nw, pieces, CHANNELS, c.stage)
        scratch["sums_sm"] = tiled_smem(sums, jnp.float32)
        scratch["summed"] = plgpu.Barrier(num_arrivals=c.kw - 1, num_barriers=c.nw)
    if c.cs > 1:
        peers = (c.cs - 1, c.nw, owned, CHANNELS, c.stage)
        scratch["peers_sm"] = plgpu.SMEM(peers, jnp.float32)
        scratch["peers_sent"] = plgpu.Barrier(num_arrivals=(c.cs - 1) * owned, num_barriers=c.nw)
    return scratch


def add_shares(
    config: StreamConfig,
    sums: list[jax.Array],
    store: Callable[[jax.Array, int], None],
    scratch: Mapping[str, Any],
    *,
    column: jax.Array,
    share: jax.Array,
    rank: jax.Array,
) -> None:
    """Add the sums over all shares of k, and have each piece stored once.

    Args:
        config: tiles.
        sums: [64, stage] f32 pieces of this warpgroup's sums.
        store: called with a finished piece and its number.
        scratch: what `share_scratch` asked for.
        column: position of the warpgroup over channels.
        share: its position over k.
        rank: position of the block in its cluster.
    """
    c = config
    if c.kw == 1:
        return _add_blocks(c, sums, store, scratch, column, rank)
    sums_sm, summed = scratch["sums_sm"], scratch["summed"]

    @pl.when(share > 0)
    def _():
        for p, piece in enumerate(sums):
            sums_sm[share - 1, column, p] = piece
        plgpu.barrier_arrive(summed.at[column])

    @pl.when(share == 0)
    def _():
        plgpu.barrier_wait(summed.at[column])
        added = list(sums)
        for other in range(c.kw - 1):
            for p in range(len(added)):
                added[p] += load(sums_sm.at[other, column, p], plgpu.Layout.WGMMA)
        _add_blocks(c, added, store, scratch, column, rank)


def _add_blocks(
    c: StreamConfig,
    sums: list[jax.Array],
    store: Callable[[jax.Array, int], None],
    scratch: Mapping[str, Any],
    column: jax.Array,
    rank: jax.Array,
) -> None:
    """Add the shares of the cluster's blocks and store."""
    if c.cs == 1:
        for p, piece in enumerate(sums):
            store(piece, p)
        return
    peers_sm, peers_sent = scratch["peers_sm"], scratch["peers_sent"]
    owned = len(sums) // c.owners
    for p, piece in enumerate(sums):
        owner = p // owned

        @pl.when(rank != owner)
        def _(p=p, piece=piece, owner=owner):
            sender = lax.rem(rank - owner + c.cs - 1, jnp.int32(c.cs))
            plgpu.async_store_smem(
                piece,
                peers_sm.at[sender, column, p % owned],
                peers_sent.at[column],
                cluster_idx=jnp.int32(owner),
                cluster_dim=CLUSTER,
            )

    for owner in range(c.owners):

        @pl.when(rank == owner)
        def _(owner=owner):
            plgpu.barrier_wait(peers_sent.at[column])
            for q in range(owned):
                result = sums[owner * owned + q]
                for peer in range(c.cs - 1):
                    result += load(peers_sm.at[peer, column, q], plgpu.Layout.WGMMA)
                store(result, owner * owned + q)
