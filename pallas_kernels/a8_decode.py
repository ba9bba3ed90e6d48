"""8-bit x 8-bit matmul for few tokens: output channels are the rows of the wgmma, K is split.

Reading the weights once is all the work, so every SM must pull its share from the first moment.
K is split over warpgroups of a block, which add through shared memory, and over the blocks of a
cluster, which add through distributed shared memory; then a narrow layer also fills the chip.  A
block makes one output tile; in a grouped problem, where experts make tiles enough, it makes several
and has no cluster.  Several blocks share an SM when their shared memory allows it, so this kernel
leaves the register split to the compiler.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.a8_decode_configs import (
    CHANNELS,
    DecodeConfig,
    decode_candidates,
    decode_default,
    decode_refuses,
)
from pallas_kernels.a8_decode_sums import Feed, add_shares, add_steps, share_scratch
from pallas_kernels.a8_problem import (
    GROUP,
    epilogue_of,
    operand_names,
    step_k,
    w_block,
)
from pallas_kernels.group_tiles import Groups, Tile, store_rows, two_views, views
from pallas_kernels.launch import CLUSTER, GRID, WARPGROUP, launch
from pallas_kernels.problem import Kernel, Problem
from pallas_kernels.tile_relay import Relay, relay_scratch
from pallas_kernels.tiles import (
    cdiv,
    drain,
    release,
    round_up,
    slot,
    stage_tile,
    store_tile,
    tiled_smem,
)


def matmul(
    problem: Problem,
    config: DecodeConfig,
    interpret: bool,
    *operands: jax.Array,
    groups: Groups | None = None,
    into: jax.Array | None = None,
) -> jax.Array:
    """Run the decode kernel; operands come in the order of `operand_names`.

    With `groups`, which a grouped problem needs, the result may take over the buffer of `into`.
    """
    if interpret:  # which has no distributed shared memory
        config = dataclasses.replace(config, cluster=1)
    m, n, k, c = groups.rows if groups else problem.m, problem.n, problem.k, config
    bn, bk, block = CHANNELS * c.channels, step_k(problem) * c.atoms, w_block(problem)
    grouped = problem.x_scale == "1x128"
    steps = k // bk // c.cluster
    # A slot always belongs to the same share of K, so that releases come in order.
    stages = c.stages // c.split * c.split
    if not groups:
        stages = min(stages, round_up(steps, c.split))
    row_tiles = groups.tiles(c.bm) if groups else cdiv(m, c.bm)
    tiles, workers = row_tiles * (n // bn), c.channels * c.split
    grid = min(tiles, problem.device.sms * c.occupancy) if groups else tiles
    block_n, block_k = block or (n, k)
    width = c.bm // c.parts
    epilogue = epilogue_of(problem, transposed=True)
    names = operand_names(problem)

    def body(
        *refs,
        x_sm,
        w_sm,
        o_sm,
        full,
        empty,
        tile_full: Any = None,
        tile_empty: Any = None,
        groups_sm: Any = None,
        **more,
    ):
        gmem, o_gm = dict(zip(names, refs, strict=False)), refs[-1]
        warpgroup, rank = lax.axis_index(WARPGROUP), lax.axis_index(CLUSTER)
        first_step = rank * steps
        o_rows = o_sm
        if groups:
            o_sm, o_rows = views(o_sm, interpret)

        relay = Relay(more, interpret)

        def each_tile(use, searches: bool) -> Any:
            """Call `use` for this block's tiles and return their number.

            It gets the tile, its first row and channel, and how many tiles the block made before.
            In a grouped problem one warpgroup searches and tells the others.
            """
            if not groups:
                tile = lax.axis_index(GRID)
                m0 = lax.rem(tile, jnp.int32(row_tiles)) * c.bm
                use(Tile(0, m0, c.bm), m0, lax.div(tile, jnp.int32(row_tiles)) * bn, 0)
                return jnp.int32(1)
            sizes, columns, align = gmem["group_sizes"], n // bn, groups.align
            find = groups.finder(c.bm, interpret)
            # To count the tiles costs a second search, which pays where most may be idle: after the
            # last one with rows.
            counted = tiles > 2 * grid
            rows = groups.counter(c.bm, interpret)(sizes) if counted else row_tiles

            zeros = jnp.int32(0), jnp.int32(0)

            @plgpu.nd_loop((rows * columns,), collective_axes=GRID, init_carry=zeros)
            def count(info, carry):
                (tile,), told = info.index, info.local_index
                if searches:
                    at = find(sizes, lax.div(tile, jnp.int32(columns)))
                    relay.tell(at, told)
                else:
                    at = relay.hear(told)
                n0 = lax.rem(tile, jnp.int32(columns)) * bn
                if counted:
                    use(at, at.start(align), n0, told)
                    return told + 1, told + 1
                pl.when(at.rows > 0)(lambda: use(at, at.start(align), n0, told))
                return carry[0] + (at.rows > 0).astype(jnp.int32), told + 1

            made, told = count
            if searches:
                relay.close(told)
            return made

        @pl.when(warpgroup == workers)
        def produce():
            def produce_tile(at, m0, n0, before):
                def step(i, carry):
                    s = slot(before * steps + i, stages)

                    @pl.when(before * steps + i >= stages)
                    def _():
                        plgpu.barrier_wait(empty.at[s])

                    at_k = pl.ds((first_step + i) * bk, bk)
                    plgpu.copy_gmem_to_smem(
                        gmem["w"].at[pl.ds(at.expert * n + n0, bn), at_k], w_sm.at[s], full.at[s]
                    )
                    plgpu.copy_gmem_to_smem(
                        gmem["x_q"].at[pl.ds(m0, c.bm), at_k], x_sm.at[s], full.at[s]
                    )
                    if grouped:
                        group = (first_step + i) * bk // GROUP
                        plgpu.copy_gmem_to_smem(
                            gmem["x_groups"].at[group, pl.ds(m0, c.bm)],
                            groups_sm.at[s, pl.ds(0, c.bm)],
                            full.at[s],
                        )
                    return carry

                def fetch():
                    epilogue.fetch(
                        gmem,
                        more,
                        0,
                        tile_full,
                        {"m": m0, "n": at.expert * n + n0},
                        {"m": c.bm, "n": bn},
                    )

                lax.fori_loop(0, steps, step, jnp.int32(0))
                # Last, so that one buffer is enough: the previous tile is long finished by now.
                if epilogue.vectors:
                    if groups:

                        @pl.when(before > 0)
                        def _():
                            plgpu.barrier_wait(tile_empty)

                    fetch()

            made = each_tile(produce_tile, searches=True)
            drain(empty, made * steps, stages)
            if epilogue.vectors and groups:

                @pl.when(made > 0)
                def _():
                    plgpu.barrier_wait(tile_empty)

        def consume_tile(at, m0, n0, before):
            column = lax.rem(warpgroup, jnp.int32(c.channels))
            share = lax.div(warpgroup, jnp.int32(c.channels))
            my_rows = pl.ds(column * CHANNELS, CHANNELS)
            my_steps = lax.div(steps - share + c.split - 1, jnp.int32(c.split))

            def my_slot(i):
                return slot(before * steps + i * c.split + share, stages)

            def w_scale(i):
                channel = n0 + column * CHANNELS
                at_k = (first_step + i * c.split + share) * bk
                row = at.expert * cdiv(n, block_n) + channel // block_n
                return gmem["w_blocks"][row, at_k // block_k]

            feed = Feed(
                my_steps,
                my_slot,
                weights=lambda s: w_sm.at[s, my_rows],
                x=lambda s: x_sm.at[s],
                x_scale=(lambda s: groups_sm.at[s, pl.ds(0, c.bm)]) if grouped else None,
                w_scale=w_scale if block else None,
                full=full,
                empty=empty,
            )
            total = add_steps(problem, c, interpret, feed)

            def store(total, part):
                """Finish and write the tokens of a part of the tile."""
                first = part * width
                if epilogue.vectors:
                    plgpu.barrier_wait(tile_full)
                my_column = column * CHANNELS
                tile = epilogue.apply(
                    total, gmem, more, 0, {"m": first, "n": my_column, "expert": at.expert}
                )
                if epilogue.vectors and groups:
                    release(tile_empty, interpret)
                my_channel = n0 + my_column
                staging = o_sm.at[column]
                if groups:
                    stage_tile(tile, staging, transpose=True)
                    place = (at.row, my_channel, at.rows, at.row - m0)
                    return store_rows(o_rows.at[column], o_gm, *place)
                target = o_gm.at[pl.ds(m0 + first, width), pl.ds(my_channel, CHANNELS)]
                store_tile(tile, staging, target, transpose=True)

            def idle():
                if epilogue.vectors and (groups or interpret):
                    plgpu.barrier_wait(tile_full)  # the interpreter wants all threads to see it
                    if groups:
                        plgpu.barrier_arrive(tile_empty)

            add_shares(
                c,
                total,
                store,
                more,
                column=column,
                share=share,
                rank=rank,
                interpret=interpret,
                idle=idle,
            )

        @pl.when(warpgroup < workers)
        def consume():
            each_tile(consume_tile, searches=False)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    staging = (c.channels, width, CHANNELS)
    scratch = {
        "x_sm": tiled_smem((stages, c.bm, bk), problem.x_dtype),
        "w_sm": tiled_smem((stages, bn, bk), problem.w_dtype),
        "o_sm": two_views(staging, problem.out_dtype, interpret)
        if groups
        else tiled_smem(staging, problem.out_dtype),
        "full": plgpu.Barrier(num_arrivals=2 + grouped, num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=c.channels, num_barriers=stages),
        **epilogue.scratch(1, c.bm, bn),
        **share_scratch(problem, c),
    }
    if epilogue.vectors:
        scratch["tile_full"] = plgpu.Barrier(num_arrivals=len(epilogue.vectors))
        if groups:
            scratch["tile_empty"] = plgpu.Barrier(num_arrivals=workers)
    if groups:
        scratch |= relay_scratch(workers)
    if grouped:
        scratch["groups_sm"] = plgpu.SMEM((stages, round_up(c.bm, 32)), jnp.float32)
    return launch(
        body,
        *operands,
        out=jax.ShapeDtypeStruct((m, n), problem.out_dtype),
        scratch=scratch,
        grid=grid,
        cluster=c.cluster,
        warpgroups=workers + 1,
        name=f"{problem.op}_decode",
        interpret=interpret,
        into=into,
    )


DECODE = Kernel(
    name="a8_decode",
    op="matmul_a8",
    config_type=DecodeConfig,
    fn=matmul,
    accepts=decode_refuses,
    default_config=decode_default,
    candidates=decode_candidates,
)
