"""The sums of the 8-bit prefill kernel: a warpgroup's part of a tile over all steps of K."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.a8_prefill_configs import PrefillConfig
from pallas_kernels.a8_problem import accumulator_dtype, promotes, step_k, w_block
from pallas_kernels.problem import Problem
from pallas_kernels.promote import Ring, start_product, sum_steps
from pallas_kernels.tiles import ROW, accumulator, cdiv, load, scale_rows, slot


@dataclasses.dataclass(frozen=True)
class Feed:
    """What a warpgroup multiplies for one tile.

    Attributes:
        steps: steps of K.
        first: number of the first of them since the block began.
        ring: their slots.
        x: returns the [rows, step] activations in a slot, in shared memory.
        weights: returns the [bn, step] weights in a slot.
        x_scale: returns the [rows] scales in a slot, for activations that have them along K.
        w_blocks: [block rows, block columns] scales of the weights, for those that have blocks.
        expert: whose weights, a position in the stacked weight.
        channel: the tile's first.
    """

    steps: int
    first: Any
    ring: Ring
    x: Callable[[Any], Any]
    weights: Callable[[Any], Any]
    x_scale: Callable[[Any], Any] | None
    w_blocks: Any
    expert: Any
    channel: Any


def piece_columns(problem: Problem, config: PrefillConfig) -> int:
    """Return the columns of the pieces in which a tile is summed.

    The columns of a promoted piece share a weight scale wherever the tile begins.
    """
    return math.gcd(_grain(problem, config), config.stage) if promotes(problem) else config.bn


def _grain(problem: Problem, config: PrefillConfig) -> int:
    """Return at whose multiples in a block of weights a tile begins."""
    block = w_block(problem)
    return math.gcd(config.bn, block[0]) if block else config.bn


def add_steps(problem: Problem, config: PrefillConfig, feed: Feed) -> list[jax.Array]:
    """Return the sums over all steps, in pieces of [rows, `piece_columns`]."""
    shape = (config.bm // config.warpgroups, config.bn)
    if promotes(problem):
        return _promoted(problem, config, feed, shape)
    first, ring = feed.first, feed.ring

    def accumulate(acc):
        def step(i, carry):
            s = slot(first + i, ring.slots)
            plgpu.barrier_wait(ring.full.at[s])
            plgpu.wgmma(acc, feed.x(s), feed.weights(s).T)
            plgpu.wgmma_wait(1)

            @pl.when(i > 0)
            def _():
                plgpu.barrier_arrive(ring.empty.at[slot(first + i - 1, ring.slots)])

            return carry

        lax.fori_loop(0, feed.steps, step, jnp.int32(0))
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(ring.empty.at[slot(first + feed.steps - 1, ring.slots)])
        return acc[...]

    return [pl.run_scoped(accumulate, accumulator(shape, accumulator_dtype(problem)))]


def _promoted(
    problem: Problem, config: PrefillConfig, feed: Feed, shape: tuple[int, int]
) -> list[jax.Array]:
    """Return the sums where scales vary along K."""
    bk, bn, blocked = step_k(problem), config.bn, w_block(problem) is not None
    block_n, block_k = w_block(problem) or (bn, bk)
    # Blocks of weights that a tile touches at most.
    touched = cdiv(bn + block_n - _grain(problem, config), block_n) if blocked else 0
    block_rows, piece = cdiv(problem.n, block_n), piece_columns(problem, config)

    def start(i, s):
        """Start the product of step i; return it and the scales of its rows and blocks.

        The scales are read while the tensor cores work.
        """
        kind = accumulator(shape, accumulator_dtype(problem))
        product = start_product(kind, feed.x(s), feed.weights(s).T)
        block = lax.div(feed.channel, jnp.int32(block_n))
        blocks = [lax.min(block + b, block_rows - 1) for b in range(touched)]
        w_scales = [
            feed.w_blocks[feed.expert * block_rows + row, i * bk // block_k] for row in blocks
        ]
        x_scale = load(feed.x_scale(s), ROW) if feed.x_scale else None
        return product, (x_scale, w_scales)

    def block_scale(column, w_scales):
        """Choose the scale of the weight block that holds a column of the tile."""
        if bn % block_n == 0:
            return w_scales[column // block_n]
        column = lax.rem(feed.channel, jnp.int32(block_n)) + column
        scale = w_scales[-1]
        for b in reversed(range(touched - 1)):
            scale = lax.select(column < (b + 1) * block_n, w_scales[b], scale)
        return scale

    def add(totals, product, scales):
        x_scale, w_scales = scales
        added = []
        for j, total in enumerate(totals):
            part = product[:, j * piece : (j + 1) * piece]
            scale = block_scale(j * piece, w_scales) if blocked else 1.0
            part = part * scale if x_scale is None else scale_rows(part, x_scale * scale)
            added.append(total + part)
        return added

    zeros = plgpu.layout_cast(jnp.zeros((shape[0], piece), jnp.float32), plgpu.Layout.WGMMA)
    return sum_steps(
        start,
        add,
        [zeros] * (bn // piece),
        steps=feed.steps,
        unroll=config.unroll,
        first_slot=slot(feed.first, feed.ring.slots),
        ring=feed.ring,
    )


def skip_steps(feed: Feed) -> None:
    """Give back every slot unread, for a warpgroup whose rows are all outside its tile's expert."""

    def step(i, carry):
        s = slot(feed.first + i, feed.ring.slots)
        plgpu.barrier_wait(feed.ring.full.at[s])
        plgpu.barrier_arrive(feed.ring.empty.at[s])
        return carry

    lax.fori_loop(0, feed.steps, step, jnp.int32(0))
