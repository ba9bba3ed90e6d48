"""The body of the kernels that decode weight records in registers.

Output channels are the rows of the wgmma (its register operand), tokens its columns.  A block has
`nw` warpgroups side by side over channels, 64 each, times `kw` over k, which add through shared
memory; the blocks of a cluster share out k once more and add through distributed shared memory.
There is no producer: each warpgroup owns a ring of record slots and refills a slot as soon as its
four warps have the codes in registers.  A block makes one output tile, and several small blocks
share an SM, so that the start and the end of one hide behind the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.epilogue import Along, Epilogue
from pallas_kernels.group_tiles import Groups, store_rows, two_views, views
from pallas_kernels.launch import CLUSTER, GRID, WARPGROUP, launch
from pallas_kernels.problem import Problem
from pallas_kernels.record import CHANNELS, DEPTH, WORDS, Record
from pallas_kernels.stream_config import StreamConfig
from pallas_kernels.stream_shares import add_shares, share_scratch
from pallas_kernels.stream_sums import Feed, add_steps, product_depth
from pallas_kernels.tiles import (
    cdiv,
    copy_contiguous,
    guarded,
    slot,
    stage_tile,
    store_tile,
    tiled_smem,
)


@plgpu.inline_mgpu()
def _warpgroup_barrier(ctx: Any) -> None:
    mgpu.warpgroup_barrier()


# Inside a kernel the context is passed by the primitive.
_sync_warps: Callable[[], None] = _warpgroup_barrier  # pyright: ignore[reportAssignmentType]


def _x_smem(slots: int, bm: int, extent: int, depth: int, dtype: Any) -> Any:
    """Return shared memory for activations that can be cut in pieces of `depth` along k."""
    transforms = tiled_smem((8, depth), dtype).transforms
    return plgpu.SMEM((slots, bm, extent), dtype, transforms=transforms)


def stream_matmul(
    problem: Problem,
    config: StreamConfig,
    interpret: bool,
    record: Record,
    epilogue: Epilogue,
    x: jax.Array,
    records: jax.Array,
    *vectors: jax.Array,
    rounded: bool,
    name: str,
    groups: Groups | None = None,
    into: jax.Array | None = None,
) -> jax.Array:
    """Multiply x [m, k] by a prepacked weight, or groups of its rows by a stack of them.

    Args:
        problem: sizes and types; without groups m, all rows, is at most 8 or a multiple of 8.
        config: tiles.
        interpret: run under the interpreter, with jax.numpy in place of decoding and wgmma.
        record: format of the records.
        epilogue: what happens to the sums.
        x: [m, k] bf16 or f16, or int8 or e4m3 for records with 8-bit operands.
        records: [n/64 * ceil(k/128), rows, 32] int32; with groups, those of all experts in turn.
        *vectors: operands of the epilogue; with groups, before them the int32 [total] sizes, and
            vectors along channels have those of all experts in turn.
        rounded: whether scales are applied to the operand, if there are any.
        name: kernel name.
        groups: which rows belong to which expert; None for one weight.
        into: with groups, an array whose buffer the result takes over; rows of other experts
            keep their values there, and have no defined ones without it.

    Returns:
        [m, n] in `problem.out_dtype`.
    """
    # The interpreter has no distributed shared memory.
    c = dataclasses.replace(config, cs=1) if interpret else config
    m, n = problem.m if groups is None else groups.rows, problem.n
    total = cdiv(problem.k, DEPTH)
    extent = c.records * DEPTH  # k of a step
    run, longer = divmod(total // c.records, c.cs * c.kw)  # steps of a share of k
    most = run + (longer > 0)
    slots, ring = min(c.slots, most), min(c.ring, most)
    lag = max(min(c.lag, ring - 1 - rounded), 0)
    row_tiles, column_tiles = cdiv(m, c.bm), n // (CHANNELS * c.nw)
    snake, find_tile = c.snake, None
    if groups is not None:
        # All channels of a tile first: its expert's weights and its rows are read once from DRAM.
        row_tiles, snake = groups.tiles(c.bm), column_tiles
        find_tile = groups.finder(c.bm, interpret)
    depth = product_depth(record, x.dtype, rounded)
    width = c.stage
    names = [term.name for term in epilogue.terms]

    def body(
        x_gm,
        w_gm,
        *refs,
        x_sm,
        w_sm,
        o_sm,
        full,
        x_full: Any = None,
        x_empty: Any = None,
        fetched: Any = None,
        **more,
    ):
        o_gm, vector_gm = refs[-1], dict(zip(names, refs[groups is not None :], strict=False))
        zero = jnp.int32(0)
        warpgroup = lax.axis_index(WARPGROUP) if c.workers > 1 else zero
        column = lax.rem(warpgroup, jnp.int32(c.nw)) if c.kw > 1 else warpgroup
        share = lax.div(warpgroup, jnp.int32(c.nw)) if c.kw > 1 else zero
        rank = lax.axis_index(CLUSTER)
        row, block = (
            plgpu.planar_snake(lax.axis_index(GRID), (row_tiles, column_tiles), 1, snake)
            if row_tiles > 1
            else (zero, lax.axis_index(GRID))
        )
        expert, m0, channel_block = zero, row * c.bm, block * c.nw + column
        x_rows, o_rows, count = x_sm, o_sm, jnp.int32(c.bm)
        if find_tile is not None:
            expert, m0, count = find_tile(refs[0], row)
            (x_sm, x_rows), (o_sm, o_rows) = views(x_sm, interpret), views(o_sm, interpret)
        part = rank * c.kw + share
        steps = run + (part < longer).astype(jnp.int32) if longer else run
        first = part * run + (lax.min(part, jnp.int32(longer)) if longer else 0)

        def record_slot(i):
            return warpgroup * slots + slot(i, slots)

        def x_slot(i):
            return share * ring + slot(i, ring) if ring else record_slot(i)

        def fetch_x(i, barrier):
            if groups is not None:
                for p in range(extent // depth):
                    at_k = pl.ds((first + i) * extent + p * depth, depth)
                    x_piece = x_gm.at[pl.ds(m0, c.bm), at_k]
                    plgpu.copy_gmem_to_smem(x_piece, x_rows.at[x_slot(i), p], barrier)
                return
            at_k = pl.ds((first + i) * extent, extent)
            plgpu.copy_gmem_to_smem(x_gm.at[pl.ds(m0, c.bm), at_k], x_sm.at[x_slot(i)], barrier)

        def fetch_records(i):
            s = record_slot(i)
            record_block = expert * (n // CHANNELS) + channel_block
            at = pl.ds(record_block * total + (first + i) * c.records, c.records)
            copy_contiguous(w_gm.at[at], w_sm.at[s], full.at[s], interpret)
            if not ring:
                fetch_x(i, full.at[s])

        def fill_ring():
            for i in range(ring):
                guarded(i < steps, lambda i=i: fetch_x(i, x_full.at[x_slot(i)]))

        def fetch_vectors():
            start: dict[Along, Any] = {"m": m0, "n": expert * n + block * c.nw * CHANNELS}
            size: dict[Along, int] = {"m": c.bm, "n": c.nw * CHANNELS}
            epilogue.fetch(vector_gm, more, 0, fetched, start, size)

        def refill_records(i):
            """Refill the slot of step i, whose codes all four warps hold in registers."""
            if interpret:
                plgpu.commit_smem()
            else:
                _sync_warps()

            @pl.when(i + slots < steps)
            def _():
                fetch_records(i + slots)

        def release_x(i):
            """Give back the activations of step i, and refill those of step i - lag."""
            if ring in (0, most):  # not shared, or there from start to end
                return

            @pl.when(i + ring < steps)
            def _():
                plgpu.barrier_arrive(x_empty.at[x_slot(i)])

            @pl.when((column == 0) & (i >= lag) & (i - lag + ring < steps))
            def _():
                plgpu.barrier_wait(x_empty.at[x_slot(i - lag)])
                fetch_x(i - lag + ring, x_full.at[x_slot(i - lag)])

        def x_tile(i, j, k):
            if groups is None:
                return x_sm.at[x_slot(i), :, pl.ds(j * DEPTH + k, depth)]
            return x_sm.at[x_slot(i), j * (DEPTH // depth) + k // depth]

        feed = Feed(
            steps,
            await_records=lambda i: plgpu.barrier_wait(full.at[record_slot(i)]),
            await_x=lambda i: plgpu.barrier_wait(x_full.at[x_slot(i)]),
            records=lambda i, j: w_sm.at[record_slot(i), j],
            x=x_tile,
            release_records=refill_records,
            release_x=release_x,
        )

        def store(sums: jax.Array, piece):
            first_token = piece * width
            start: dict[Along, Any] = {"m": first_token, "n": column * CHANNELS, "expert": expert}
            token, channel = m0 + first_token, channel_block * CHANNELS

            def finished():
                return epilogue.apply(sums, vector_gm, more, 0, start)

            if groups is None:
                target = o_gm.at[pl.ds(token, width), pl.ds(channel, CHANNELS)]
                store_tile(finished(), o_sm.at[column], target, transpose=True)
                return

            @pl.when(count > first_token)
            def _():
                stage_tile(finished(), o_sm.at[column], transpose=True)
                store_rows(o_rows.at[column], o_gm, token, channel, count - first_token)

        def run_tile():
            for i in range(slots):  # first, as they come from farther away
                guarded(i < steps, lambda i=i: fetch_records(i))
            if ring:
                guarded(column == 0 if c.nw > 1 else True, fill_ring)
            if epilogue.vectors:
                guarded(warpgroup == 0 if c.workers > 1 else True, fetch_vectors)
            sums = add_steps(c, record, x.dtype, rounded, interpret, feed)
            if epilogue.vectors:
                plgpu.barrier_wait(fetched)
            add_shares(c, sums, store, more, column=column, share=share, rank=rank)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        pl.when(count > 0)(run_tile) if groups is not None else run_tile()

    x_slots = c.kw * ring if ring else c.workers * slots
    copies = 1 if groups is None else extent // depth
    scratch: dict[str, Any] = {
        "x_sm": _x_smem(x_slots, c.bm, extent, depth, x.dtype),
        "w_sm": plgpu.SMEM((c.workers * slots, c.records, record.rows, WORDS), jnp.int32),
        "o_sm": tiled_smem((c.nw, width, CHANNELS), problem.out_dtype),
        "full": plgpu.Barrier(
            num_arrivals=1 if ring else 1 + copies, num_barriers=c.workers * slots
        ),
        **epilogue.scratch(1, c.bm, c.nw * CHANNELS),
        **share_scratch(c),
    }
    if groups is not None:
        scratch["x_sm"] = two_views((x_slots, copies, c.bm, depth), x.dtype, interpret)
        scratch["o_sm"] = two_views((c.nw, width, CHANNELS), problem.out_dtype, interpret)
    if ring:
        scratch["x_full"] = plgpu.Barrier(num_arrivals=copies, num_barriers=x_slots)
        scratch["x_empty"] = plgpu.Barrier(num_arrivals=c.nw, num_barriers=x_slots)
    if epilogue.vectors:
        scratch["fetched"] = plgpu.Barrier(num_arrivals=len(epilogue.vectors))
    return launch(
        body,
        x,
        records,
        *vectors,
        out=jax.ShapeDtypeStruct((m, n), problem.out_dtype),
        scratch=scratch,
        grid=row_tiles * column_tiles,
        cluster=c.cs,
        warpgroups=c.workers,
        name=name,
        interpret=interpret,
        into=into,
    )
