"""The sums of the 8-bit decode kernel: of a warpgroup's steps, then over all shares of K."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.a8_decode_configs import CHANNELS, DecodeConfig
from pallas_kernels.a8_problem import accumulator_dtype, promotes
from pallas_kernels.launch import CLUSTER
from pallas_kernels.problem import Problem
from pallas_kernels.tiles import COLUMN, accumulator, load, release, scale_columns, tiled_smem


@dataclasses.dataclass(frozen=True)
class Feed:
    """A warpgroup's share of the K steps of a tile.

    Attributes:
        steps: how many there are.
        slot: returns the slot of a step.
        weights: returns the [64, step] weights in a slot, in shared memory.
        x: returns the [bm, step] activations in a slot.
        x_scale: returns the [bm] scales in a slot, for activations that have them along K.
        w_scale: returns the scale of a step's weights, for those that have them along K.
        full, empty: barriers of the slots.
    """

    steps: Any
    slot: Callable[[Any], Any]
    weights: Callable[[Any], Any]
    x: Callable[[Any], Any]
    x_scale: Callable[[Any], Any] | None
    w_scale: Callable[[Any], Any] | None
    full: Any
    empty: Any


def sum_dtype(problem: Problem) -> Any:
    """Return the type of sums over a share of K."""
    return jnp.float32 if promotes(problem) else accumulator_dtype(problem)


def add_steps(problem: Problem, config: DecodeConfig, interpret: bool, feed: Feed) -> jax.Array:
    """Return the [64, bm] sums over a warpgroup's steps."""
    shape = (CHANNELS, config.bm)
    acc_type = accumulator(shape, accumulator_dtype(problem))

    def accumulate(acc):
        def step(i, carry):
            s = feed.slot(i)
            plgpu.barrier_wait(feed.full.at[s])
            plgpu.wgmma(acc, feed.weights(s), feed.x(s).T)
            plgpu.wgmma_wait(1)

            @pl.when(i > 0)
            def _():
                plgpu.barrier_arrive(feed.empty.at[feed.slot(i - 1)])

            return carry

        lax.fori_loop(0, feed.steps, step, jnp.int32(0))
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(feed.empty.at[feed.slot(feed.steps - 1)])
        return acc[...]

    def promote(i, total):
        s = feed.slot(i)
        # From global memory, which takes as long as the copies that follow.
        w_scale: Any = feed.w_scale(i) if feed.w_scale else 1.0
        plgpu.barrier_wait(feed.full.at[s])

        def one_step(acc):
            plgpu.wgmma(acc, feed.weights(s), feed.x(s).T)
            # The scales are read while the tensor cores work.
            scale = load(feed.x_scale(s), COLUMN) if feed.x_scale else 1.0
            scale = scale * w_scale
            plgpu.wgmma_wait(0)
            return acc[...], scale

        part, scale = pl.run_scoped(one_step, acc_type)
        release(feed.empty.at[s], interpret)
        part = part.astype(jnp.float32)
        return total + (scale_columns(part, scale) if feed.x_scale else part * scale)

    if not promotes(problem):
        return pl.run_scoped(accumulate, acc_type)
    zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
    return lax.fori_loop(0, feed.steps, promote, zeros)


def share_scratch(problem: Problem, config: DecodeConfig) -> dict[str, Any]:
    """Return the scratch memory of `add_shares`."""
    c, dtype, scratch = config, sum_dtype(problem), {}
    if c.split > 1:
        scratch["sums_sm"] = tiled_smem((c.split - 1, c.channels, CHANNELS, c.bm), dtype)
        scratch["summed"] = plgpu.Barrier(num_arrivals=c.split - 1, num_barriers=c.channels)
        if problem.experts:
            scratch["taken"] = plgpu.Barrier(num_arrivals=1, num_barriers=c.channels)
    if c.cluster > 1:
        peers = (c.cluster - 1, c.channels, CHANNELS, c.bm // c.parts)
        scratch["peers_sm"] = plgpu.SMEM(peers, dtype)
        scratch["peers_sent"] = plgpu.Barrier(num_arrivals=c.cluster - 1, num_barriers=c.channels)
    return scratch


def add_shares(
    config: DecodeConfig,
    total: jax.Array,
    store: Callable[[jax.Array, int], None],
    scratch: Mapping[str, Any],
    *,
    column: jax.Array,
    share: jax.Array,
    rank: jax.Array,
    interpret: bool,
    idle: Callable[[], None],
) -> None:
    """Add the sums over all shares of K, and have each part of the tile's tokens stored once.

    Args:
        config: tiles.
        total: [64, bm] sums of this warpgroup.
        store: called with the finished sums of a part, and its number.
        scratch: what `share_scratch` asked for.
        column: position of the warpgroup over channels.
        share: its position over K.
        rank: position of the block in its cluster.
        interpret: whether the interpreter runs this.
        idle: called by warpgroups that have given away their sums.
    """
    c, width = config, config.bm // config.parts

    def send(total, part):
        plgpu.async_store_smem(
            total[:, part * width : (part + 1) * width],
            scratch["peers_sm"].at[lax.select(rank > part, rank - 1, rank), column],
            scratch["peers_sent"].at[column],
            cluster_idx=jnp.int32(part),
            cluster_dim=CLUSTER,
        )

    def receive(total, part):
        plgpu.barrier_wait(scratch["peers_sent"].at[column])
        total = total[:, part * width : (part + 1) * width]
        for peer in range(c.cluster - 1):
            total += load(scratch["peers_sm"].at[peer, column], plgpu.Layout.WGMMA)
        store(total, part)

    def add_blocks(total):
        """Add the shares of the cluster's blocks: block i adds and stores part i."""
        if c.cluster == 1:
            return store(total, 0)
        for part in range(c.parts):
            pl.when(rank != part)(functools.partial(send, total, part))
        for part in range(c.parts):
            pl.when(rank == part)(functools.partial(receive, total, part))

    if c.split == 1:
        return add_blocks(total)
    sums_sm, summed = scratch["sums_sm"], scratch["summed"]

    @pl.when(share > 0)
    def _():
        sums_sm[share - 1, column] = total
        plgpu.barrier_arrive(summed.at[column])
        if "taken" in scratch:  # another tile follows
            plgpu.barrier_wait(scratch["taken"].at[column])
        idle()

    @pl.when(share == 0)
    def _():
        plgpu.barrier_wait(summed.at[column])
        result = total
        for other in range(c.split - 1):
            result += load(sums_sm.at[other, column], plgpu.Layout.WGMMA)
        if "taken" in scratch:
            release(scratch["taken"].at[column], interpret)
        add_blocks(result)
