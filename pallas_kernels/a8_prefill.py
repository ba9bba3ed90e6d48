"""8-bit x 8-bit matmul for many tokens: a persistent, warp-specialised wgmma kernel.

One warpgroup issues TMA copies, the others multiply; tokens are the rows of the wgmma.  The step
counter runs on across output tiles, so the copies for the next tile proceed during the epilogue.
A grouped problem differs in where its row tiles lie and whose weights they meet.  Rows of a
neighbour in a tile are not stored, and a warpgroup that has no others multiplies nothing.

With scales along K (1x128 activations, blocked weights) products are promoted step by step.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.a8_prefill_configs import (
    PrefillConfig,
    prefill_candidates,
    prefill_default,
    prefill_refuses,
)
from pallas_kernels.a8_prefill_sums import Feed, add_steps, piece_columns, skip_steps
from pallas_kernels.a8_problem import GROUP, epilogue_of, operand_names, step_k, w_block
from pallas_kernels.group_tiles import Groups, Tile, store_rows, two_views, views
from pallas_kernels.launch import CLUSTER, GRID, WARPGROUP, launch
from pallas_kernels.problem import Kernel, Problem
from pallas_kernels.promote import Ring
from pallas_kernels.tile_relay import Relay, relay_scratch
from pallas_kernels.tiles import (
    cdiv,
    drain,
    release,
    slot,
    stage_tile,
    store_tile,
    tiled_smem,
)


def matmul(
    problem: Problem,
    config: PrefillConfig,
    interpret: bool,
    *operands: jax.Array,
    groups: Groups | None = None,
    into: jax.Array | None = None,
) -> jax.Array:
    """Run the prefill kernel; operands come in the order of `operand_names`.

    With `groups`, which a grouped problem needs, the result may take over the buffer of `into`.
    """
    m, n, k, c = groups.rows if groups else problem.m, problem.n, problem.k, config
    bk, blocked, grouped = step_k(problem), bool(w_block(problem)), problem.x_scale == "1x128"
    row_tiles = groups.tiles(c.bm) if groups else cdiv(m, c.bm)
    column_tiles, steps = cdiv(n, c.bn), cdiv(k, bk)
    row_clusters = row_tiles // c.cluster
    tiles = row_clusters * column_tiles
    grid = min(tiles, max(1, problem.device.sms // c.cluster))
    stages, producer = min(c.stages, steps), c.warpgroups
    rows = c.bm // c.warpgroups
    piece = piece_columns(problem, c)
    epilogue = epilogue_of(problem, transposed=False)
    names = operand_names(problem)

    def body(
        *refs,
        x_sm,
        w_sm,
        o_sm,
        full,
        empty,
        groups_sm: Any = None,
        tile_full: Any = None,
        tile_empty: Any = None,
        **more,
    ):
        gmem, o_gm = dict(zip(names, refs, strict=False)), refs[-1]
        warpgroup, block_in_cluster = lax.axis_index(WARPGROUP), lax.axis_index(CLUSTER)
        clusters, o_rows = row_clusters, o_sm
        relay = Relay(more, interpret)
        if groups:
            clusters = groups.counter(c.bm, interpret)(gmem["group_sizes"])
            o_sm, o_rows = views(o_sm, interpret)

        def origin(info, searches):
            """Return this block's part of a tile of the grid, and its first row and channel.

            In a grouped problem one warpgroup searches and tells the others.
            """
            (linear,) = info.index
            row, column = plgpu.planar_snake(linear, (clusters, column_tiles), c.minor, c.group)
            if groups:
                if searches:
                    at = groups.finder(c.bm, interpret)(gmem["group_sizes"], row)
                    relay.tell(at, info.local_index)
                else:
                    at = relay.hear(info.local_index)
                return at, at.start(groups.align), column * c.bn
            at = Tile(0, (row * c.cluster + block_in_cluster) * c.bm, c.bm)
            return at, at.row, column * c.bn

        @pl.when(warpgroup == producer)
        def produce():
            plgpu.set_max_registers(32 if c.warpgroups > 2 else 40, action="decrease")

            @plgpu.nd_loop(
                (clusters * column_tiles,), collective_axes=GRID, init_carry=jnp.int32(0)
            )
            def steps_done(info, carry):
                at, m0, n0 = origin(info, searches=True)

                def step(i, count):
                    s = slot(count, stages)

                    @pl.when(count >= stages)
                    def _():
                        plgpu.barrier_wait(empty.at[s])

                    at_k = pl.ds(i * bk, bk)
                    plgpu.copy_gmem_to_smem(
                        gmem["x_q"].at[pl.ds(m0, c.bm), at_k], x_sm.at[s], full.at[s]
                    )
                    plgpu.copy_gmem_to_smem(
                        gmem["w"].at[pl.ds(at.expert * n + n0, c.bn), at_k],
                        w_sm.at[s],
                        full.at[s],
                        collective_axes=CLUSTER if c.cluster > 1 else None,
                    )
                    if grouped:
                        plgpu.copy_gmem_to_smem(
                            gmem["x_groups"].at[i * bk // GROUP, pl.ds(m0, c.bm)],
                            groups_sm.at[s],
                            full.at[s],
                        )
                    return count + 1

                count = lax.fori_loop(0, steps, step, carry)
                # Last, so that one buffer is enough: the previous tile is long finished by now.
                if epilogue.vectors:

                    @pl.when(info.local_index > 0)
                    def _():
                        plgpu.barrier_wait(tile_empty)

                    epilogue.fetch(
                        gmem,
                        more,
                        0,
                        tile_full,
                        {"m": m0, "n": at.expert * n + n0},
                        {"m": c.bm, "n": c.bn},
                    )
                return count

            total: Any = steps_done
            drain(empty, total, stages)
            if groups:
                relay.close(lax.div(total, jnp.int32(steps)))
            if epilogue.vectors:

                @pl.when(total > 0)
                def _():
                    plgpu.barrier_wait(tile_empty)

        @pl.when(warpgroup < producer)
        def consume():
            plgpu.set_max_registers(232 if c.warpgroups <= 2 else 160, action="increase")
            my_row = warpgroup * rows
            my_rows = pl.ds(my_row, rows)

            def finish(at, m0, n0, tile):
                """Finish and store this warpgroup's rows of a tile."""
                if epilogue.vectors:
                    plgpu.barrier_wait(tile_full)
                tile = [
                    epilogue.apply(
                        part,
                        gmem,
                        more,
                        0,
                        {"m": my_row, "n": j * piece, "expert": at.expert},
                    )
                    for j, part in enumerate(tile)
                ]
                if epilogue.vectors:
                    release(tile_empty, interpret)
                for count, (r, j) in enumerate(np.ndindex(rows // 64, c.bn // c.stage)):
                    part, column = divmod(j * c.stage, piece)
                    width = min(piece, c.stage)
                    in_rows, in_columns = slice(r * 64, (r + 1) * 64), slice(column, column + width)
                    blocks = [tile[part + p][in_rows, in_columns] for p in range(c.stage // width)]
                    first_row, first_column = m0 + my_row + r * 64, n0 + j * c.stage
                    # The first finds all stores of the tile before done, as no later one does.
                    buffer, pending = (warpgroup, count % c.staging), min(count, c.staging - 1)
                    if groups:

                        def within(row, first_row=first_row):
                            return lax.min(lax.max(row - first_row, 0), 64)

                        skipped = within(at.row)
                        live = within(at.row + at.rows) - skipped
                        place = (first_row + skipped, first_column, live, skipped)

                        @pl.when(live > 0)
                        def _(blocks=blocks, buffer=buffer, pending=pending, place=place):
                            stage_tile(blocks, o_sm.at[buffer], pending=pending)
                            store_rows(o_rows.at[buffer], o_gm, *place)

                        continue
                    store_tile(
                        blocks,
                        o_sm.at[buffer],
                        o_gm.at[pl.ds(first_row, 64), pl.ds(first_column, c.stage)],
                        pending=pending,
                    )

            @plgpu.nd_loop((clusters * column_tiles,), collective_axes=GRID)
            def _(info):
                at, m0, n0 = origin(info, searches=False)
                feed = Feed(
                    steps,
                    info.local_index * steps,
                    Ring(full, empty, stages, interpret),
                    x=lambda s: x_sm.at[s, my_rows],
                    weights=lambda s: w_sm.at[s],
                    x_scale=(lambda s: groups_sm.at[s, my_rows]) if grouped else None,
                    w_blocks=gmem["w_blocks"] if blocked else None,
                    expert=at.expert,
                    channel=n0,
                )

                def multiply():
                    finish(at, m0, n0, add_steps(problem, c, feed))

                def skip():
                    skip_steps(feed)
                    if epilogue.vectors:
                        plgpu.barrier_wait(tile_full)
                        plgpu.barrier_arrive(tile_empty)

                if not groups:
                    return multiply()
                # A tile begins with its expert's rows: what lacks them is its end.
                has_rows = m0 + my_row < at.row + at.rows
                pl.when(has_rows)(multiply)
                pl.when(~has_rows)(skip)

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    staging = (c.warpgroups, c.staging, 64, c.stage)
    scratch = {
        "x_sm": tiled_smem((stages, c.bm, bk), problem.x_dtype),
        "w_sm": tiled_smem((stages, c.bn, bk), problem.w_dtype),
        "o_sm": two_views(staging, problem.out_dtype, interpret)
        if groups
        else tiled_smem(staging, problem.out_dtype),
        "full": plgpu.Barrier(num_arrivals=2 + grouped, num_barriers=stages),
        "empty": plgpu.ClusterBarrier(
            collective_axes=(CLUSTER,), num_arrivals=c.warpgroups, num_barriers=stages
        )
        if c.cluster > 1
        else plgpu.Barrier(num_arrivals=c.warpgroups, num_barriers=stages),
        **epilogue.scratch(1, c.bm, c.bn),
    }
    if grouped:
        scratch["groups_sm"] = plgpu.SMEM((stages, c.bm), jnp.float32)
    if groups:
        scratch |= relay_scratch(c.warpgroups)
    if epilogue.vectors:
        scratch["tile_full"] = plgpu.Barrier(num_arrivals=len(epilogue.vectors))
        scratch["tile_empty"] = plgpu.Barrier(num_arrivals=c.warpgroups)
    return launch(
        body,
        *operands,
        out=jax.ShapeDtypeStruct((m, n), problem.out_dtype),
        scratch=scratch,
        grid=grid,
        cluster=c.cluster,
        warpgroups=c.warpgroups + 1,
        name=f"{problem.op}_prefill",
        interpret=interpret,
        into=into,
    )


PREFILL = Kernel(
    name="a8_prefill",
    op="matmul_a8",
    config_type=PrefillConfig,
    fn=matmul,
    accepts=prefill_refuses,
    default_config=prefill_default,
    candidates=prefill_candidates,
)
