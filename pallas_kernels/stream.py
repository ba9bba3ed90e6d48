"""The body of the kernels that decode weight records in registers.

Output channels are the rows of the wgmma (its register operand), tokens its columns.  A block has
`nw` warpgroups side by side over channels, 64 each, times `kw` over k, which add through shared
memory; the blocks of a cluster share out k once more and add through distributed shared memory.
There is no producer: each warpgroup owns a ring of record slots and refills a slot as soon as its
four warps have the codes in registers.  A block makes one output tile, and several small blocks
share an SM, so that the start and the end of one hide behind the others.

Scales are applied in one of two ways:

  * exact: every group has a fresh accumulator, which is scaled in f32 and added to the total;
  * rounded: the operand is multiplied by its scale, rounding it to the operand type, and one
    accumulator lives in the tensor cores over all of k, with a wgmma always in flight.  Codes
    that an integer scale makes int8 operands are not rounded, nor those without scales here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.accumulate import HostDots, TensorCores
from pallas_kernels.decode import device_decoder, reference_decoder
from pallas_kernels.epilogue import Along, Epilogue
from pallas_kernels.group_tiles import Groups, store_rows, two_views, views
from pallas_kernels.launch import CLUSTER, GRID, WARPGROUP, launch
from pallas_kernels.problem import Problem
from pallas_kernels.record import CHANNELS, DEPTH, WORDS, Record
from pallas_kernels.stream_config import StreamConfig
from pallas_kernels.tiles import (
    cdiv,
    copy_contiguous,
    load,
    scale_rows,
    slot,
    stage_tile,
    store_tile,
    tiled_smem,
)

# Values of k decoded at a time: one fragment is filled while the tensor cores work on the other.
HALF = 64


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
    # Whether the last wgmma of a record runs on into the next: then the loop runs over records, as
    # ptxas would give each of an unrolled step's fragments registers of its own.
    across = rounded and bool(ring or c.lag)
    # The wgmma takes no 32 byte swizzle with int8 in registers: groups of 32 are cut out of 64.
    depth = HALF if rounded or x.dtype == jnp.int8 else min(record.group, HALF)
    make_decoder = reference_decoder if interpret else device_decoder
    decode = make_decoder(record, x.dtype, depth, HALF, rounded)
    acc_dtype = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    adder = (HostDots if interpret else TensorCores)((CHANNELS, c.bm), acc_dtype)
    # Halves of a record that add to one set of accumulators: both if they share a scale.
    scopes = ((0, 1),) if record.group == DEPTH else ((0,), (1,))
    width = c.stage
    pieces = c.bm // width
    owned = pieces // c.owners
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
        sums_sm: Any = None,
        summed: Any = None,
        peers_sm: Any = None,
        peers_sent: Any = None,
        **vector_sm,
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

        def x_slot(i):
            return share * ring + slot(i, ring) if ring else warpgroup * slots + slot(i, slots)

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
            s = warpgroup * slots + slot(i, slots)
            record_block = expert * (n // CHANNELS) + channel_block
            at = pl.ds(record_block * total + (first + i) * c.records, c.records)
            copy_contiguous(w_gm.at[at], w_sm.at[s], full.at[s], interpret)
            if not ring:
                fetch_x(i, full.at[s])

        def guarded(condition, action):
            """Run an action; the condition may be known while tracing."""
            if isinstance(condition, bool):
                return action() if condition else None
            return pl.when(condition)(action)

        def fill_ring():
            for i in range(ring):
                guarded(i < steps, lambda i=i: fetch_x(i, x_full.at[x_slot(i)]))

        def fetch_vectors():
            start: dict[Along, Any] = {"m": m0, "n": expert * n + block * c.nw * CHANNELS}
            size: dict[Along, int] = {"m": c.bm, "n": c.nw * CHANNELS}
            epilogue.fetch(vector_gm, vector_sm, 0, fetched, start, size)

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

        def tiles(i, j, halves):
            """Decode halves of record j of step i; yield group, tile and activations.

            The code between two halves overlaps the wgmma of the first.
            """
            record_ref = w_sm.at[warpgroup * slots + slot(i, slots), j]
            for half in halves:
                for q, tile in enumerate(decode(record_ref, half)):
                    if ring and half + q == 0:
                        guarded(j == 0, lambda: plgpu.barrier_wait(x_full.at[x_slot(i)]))
                    k = half * HALF + q * record.group // depth * depth
                    x_ref = (
                        x_sm.at[x_slot(i), :, pl.ds(j * DEPTH + k, depth)]
                        if groups is None
                        else x_sm.at[x_slot(i), j * (DEPTH // depth) + k // depth]
                    )
                    yield (half * HALF) // record.group + q, tile, x_ref

        def exact_step(i, sums):
            plgpu.barrier_wait(full.at[warpgroup * slots + slot(i, slots)])
            for j, halves in np.ndindex(c.records, len(scopes)):
                last = (j, halves) == (c.records - 1, len(scopes) - 1)

                def products(accs, j=j, halves=scopes[halves], last=last):
                    scales = []
                    for group, tile, x_ref in tiles(i, j, halves):
                        adder.add(accs, group % len(accs), tile.operand, x_ref)
                        scales.append(tile.scale)
                    if last and ring:
                        refill_records(i)
                    adder.wait(0)
                    return [(adder.read(acc, 0, c.bm), scales[g]) for g, acc in enumerate(accs)]

                for product, scale in adder.scoped(max(1, HALF // record.group), products):
                    sums = sums + scale_rows(product.astype(jnp.float32), scale)
            if not ring:  # the slot holds activations too, which the wgmma reads to its end
                refill_records(i)
            release_x(i)
            return sums

        def release(i):
            """Refill what only the wgmma of step i still read."""
            if ring:
                release_x(i)
            else:
                refill_records(i)

        def rounded_step(i, accs):
            """Add a step, every wgmma of which has ended when it returns."""
            plgpu.barrier_wait(full.at[warpgroup * slots + slot(i, slots)])
            for j in range(c.records):
                for _, tile, x_ref in tiles(i, j, range(DEPTH // HALF)):
                    adder.add(accs, 0, tile.operand, x_ref)
                    adder.wait(1)
            adder.wait(0)
            release_x(i)
            refill_records(i)

        def rounded_record(r, accs):
            """Add a record; its last wgmma goes on when this returns."""
            i, j = (
                (r, 0) if c.records == 1 else (lax.div(r, jnp.int32(c.records)), slot(r, c.records))
            )
            s = warpgroup * slots + slot(i, slots)
            guarded(j == 0, lambda: plgpu.barrier_wait(full.at[s]))
            for half, (_, tile, x_ref) in enumerate(tiles(i, j, range(DEPTH // HALF))):
                adder.add(accs, 0, tile.operand, x_ref)
                adder.wait(1)
                if half == 0:  # the step before has no wgmma under way any more
                    pl.when((j == 0) & (i > 0))(lambda: release(i - 1))
            if ring:  # else the slot has activations too, which the wgmma still reads
                guarded(j == c.records - 1, lambda: refill_records(i))

        def accumulate() -> list[jax.Array]:
            """Return the sums over this share of k in pieces [64, width]."""
            if not rounded:
                blank = jnp.zeros((CHANNELS, c.bm), jnp.float32)
                if not interpret:
                    blank = plgpu.layout_cast(blank, plgpu.Layout.WGMMA)
                return [lax.fori_loop(0, steps, exact_step, blank)]

            def run_steps(accs):
                (acc,) = (
                    adder.loop(steps * c.records, rounded_record, accs)
                    if across
                    else adder.loop(steps, rounded_step, accs)
                )
                adder.wait(0)
                read = [adder.read(acc, p * width, (p + 1) * width) for p in range(pieces)]
                read = [piece.astype(jnp.float32) for piece in read]
                return read if record.unit == 1 else [piece * record.unit for piece in read]

            return adder.scoped(1, run_steps)

        def store(sums: jax.Array, piece):
            first_token = piece * width
            start: dict[Along, Any] = {"m": first_token, "n": column * CHANNELS, "expert": expert}
            token, channel = m0 + first_token, channel_block * CHANNELS

            def finished():
                return epilogue.apply(sums, vector_gm, vector_sm, 0, start)

            if groups is None:
                target = o_gm.at[pl.ds(token, width), pl.ds(channel, CHANNELS)]
                store_tile(finished(), o_sm.at[column], target, transpose=True)
                return

            @pl.when(count > first_token)
            def _():
                stage_tile(finished(), o_sm.at[column], transpose=True)
                store_rows(o_rows.at[column], o_gm, token, channel, count - first_token)

        def finish(sums: list[jax.Array]):
            """Add the shares of the cluster's blocks and store; each piece has one owner."""
            if c.cs == 1:
                for p, piece in enumerate(sums):
                    store(piece, p)
                return
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

        def run_tile():
            for i in range(slots):  # first, as they come from farther away
                guarded(i < steps, lambda i=i: fetch_records(i))
            if ring:
                guarded(column == 0 if c.nw > 1 else True, fill_ring)
            if epilogue.vectors:
                guarded(warpgroup == 0 if c.workers > 1 else True, fetch_vectors)
            sums = accumulate()
            if epilogue.vectors:
                plgpu.barrier_wait(fetched)
            if c.kw == 1:
                finish(sums)
            else:

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
                        for p in range(pieces):
                            added[p] += load(sums_sm.at[other, column, p], plgpu.Layout.WGMMA)
                    finish(added)

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
    }
    if groups is not None:
        scratch["x_sm"] = two_views((x_slots, copies, c.bm, depth), x.dtype, interpret)
        scratch["o_sm"] = two_views((c.nw, width, CHANNELS), problem.out_dtype, interpret)
    if ring:
        scratch["x_full"] = plgpu.Barrier(num_arrivals=copies, num_barriers=x_slots)
        scratch["x_empty"] = plgpu.Barrier(num_arrivals=c.nw, num_barriers=x_slots)
    if epilogue.vectors:
        scratch["fetched"] = plgpu.Barrier(num_arrivals=len(epilogue.vectors))
    if c.kw > 1:
        sums = (c.kw - 1, c.nw, pieces, CHANNELS, width)
        scratch["sums_sm"] = tiled_smem(sums, jnp.float32)
        scratch["summed"] = plgpu.Barrier(num_arrivals=c.kw - 1, num_barriers=c.nw)
    if c.cs > 1:
        peers = (c.cs - 1, c.nw, owned, CHANNELS, width)
        scratch["peers_sm"] = plgpu.SMEM(peers, jnp.float32)
        scratch["peers_sent"] = plgpu.Barrier(num_arrivals=(c.cs - 1) * owned, num_barriers=c.nw)
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
