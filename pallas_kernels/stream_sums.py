"""The sums of a stream kernel: a warpgroup's records, decoded and multiplied step by step.

Scales are applied in one of two ways:

  * exact: every group has a fresh accumulator, which is scaled in f32 and added to the total;
  * rounded: the operand is multiplied by its scale, rounding it to the operand type, and one
    accumulator lives in the tensor cores over all of k, with a wgmma always in flight.  Codes
    that an integer scale makes int8 operands are not rounded, nor those without scales here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.accumulate import HostDots, TensorCores
from pallas_kernels.decode import device_decoder, reference_decoder
from pallas_kernels.record import CHANNELS, DEPTH, Record
from pallas_kernels.stream_config import StreamConfig
from pallas_kernels.tiles import guarded, scale_rows, slot

# Values of k decoded at a time: one fragment is filled while the tensor cores work on the other.
# Two of them in turn are what lets a product run on into the next round of a loop: ptxas keeps
# registers that a wgmma still reads apart from others within straight code only, and with one
# fragment a round the next would overwrite them.
HALF = 64


@dataclasses.dataclass(frozen=True)
class Feed:
    """A warpgroup's share of the records and activations, in steps.

    Attributes:
        steps: how many there are.
        await_records: waits for the records of a step.
        await_x: waits for the activations of a step, if they do not come with its records.
        records: returns record j of step i in shared memory.
        x: returns the activations from k of record j of step i on, `product_depth` of them.
        release_records: refills the slot of a step's records, which all warps hold in registers.
        release_x: gives back the activations of a step.
    """

    steps: Any
    await_records: Callable[[Any], None]
    await_x: Callable[[Any], None]
    records: Callable[[Any, Any], Any]
    x: Callable[[Any, Any, int], Any]
    release_records: Callable[[Any], None]
    release_x: Callable[[Any], None]


def product_depth(record: Record, x_dtype: jax.typing.DTypeLike, rounded: bool) -> int:
    """Return how much of k one product takes."""
    # The wgmma takes no 32 byte swizzle with int8 in registers: groups of 32 are cut out of 64.
    return HALF if rounded or x_dtype == jnp.int8 else min(record.group, HALF)


def add_steps(
    config: StreamConfig,
    record: Record,
    x_dtype: jax.typing.DTypeLike,
    rounded: bool,
    interpret: bool,
    feed: Feed,
) -> list[jax.Array]:
    """Return the f32 sums over a warpgroup's steps: [64, bm], or cut into pieces of `config.stage`.

    Args:
        config: tiles.
        record: format of the records.
        x_dtype: type of the activations.
        rounded: whether scales are applied to the operand, if there are any.
        interpret: decode and multiply with jax.numpy.
        feed: where records and activations come from.
    """
    c, shared, width = config, config.ring > 0, config.stage
    depth, unit = product_depth(record, x_dtype, rounded), record.unit(x_dtype)
    make_decoder = reference_decoder if interpret else device_decoder
    decode = make_decoder(record, x_dtype, depth, HALF, rounded)
    acc_dtype = jnp.int32 if x_dtype == jnp.int8 else jnp.float32
    adder = (HostDots if interpret else TensorCores)((CHANNELS, c.bm), acc_dtype)
    # Whether the last wgmma of a record runs on into the next: then the loop runs over records, as
    # ptxas would give each of an unrolled step's fragments registers of its own.
    across = rounded and (shared or bool(c.lag))
    # Halves of a record that add to one set of accumulators: both if they share a scale.
    scopes = ((0, 1),) if record.group == DEPTH else ((0,), (1,))

    def tiles(i, j, halves) -> Iterator[tuple[int, Any, Any]]:
        """Decode halves of record j of step i; yield group, tile and activations.

        The code between two halves overlaps the wgmma of the first.
        """
        record_ref = feed.records(i, j)
        for half in halves:
            for q, tile in enumerate(decode(record_ref, half)):
                if shared and half + q == 0:
                    guarded(j == 0, lambda: feed.await_x(i))
                k = half * HALF + q * record.group // depth * depth
                yield (half * HALF) // record.group + q, tile, feed.x(i, j, k)

    def exact_step(i, sums):
        feed.await_records(i)
        for j, halves in np.ndindex(c.records, len(scopes)):
            last = (j, halves) == (c.records - 1, len(scopes) - 1)

            def products(accs, j=j, halves=scopes[halves], last=last):
                scales = []
                for group, tile, x in tiles(i, j, halves):
                    adder.add(accs, group % len(accs), tile.operand, x)
                    scales.append(tile.scale)
                if last and shared:
                    feed.release_records(i)
                adder.wait(0)
                return [(adder.read(acc, 0, c.bm), scales[g]) for g, acc in enumerate(accs)]

            for product, scale in adder.scoped(max(1, HALF // record.group), products):
                sums = sums + scale_rows(product.astype(jnp.float32), scale)
        if not shared:  # the slot holds activations too, which the wgmma reads to its end
            feed.release_records(i)
        feed.release_x(i)
        return sums

    def rounded_step(i, accs):
        """Add a step, every wgmma of which has ended when it returns."""
        feed.await_records(i)
        for j in range(c.records):
            for _, tile, x in tiles(i, j, range(DEPTH // HALF)):
                adder.add(accs, 0, tile.operand, x)
                adder.wait(1)
        adder.wait(0)
        feed.release_x(i)
        feed.release_records(i)

    def rounded_record(r, accs):
        """Add a record; its last wgmma goes on when this returns."""
        i, j = (r, 0) if c.records == 1 else (lax.div(r, jnp.int32(c.records)), slot(r, c.records))
        guarded(j == 0, lambda: feed.await_records(i))
        # What only the wgmma of the step before still read.
        release = feed.release_x if shared else feed.release_records
        for half, (_, tile, x) in enumerate(tiles(i, j, range(DEPTH // HALF))):
            adder.add(accs, 0, tile.operand, x)
            adder.wait(1)
            if half == 0:  # the step before has no wgmma under way any more
                pl.when((j == 0) & (i > 0))(lambda: release(i - 1))
        if shared:  # else the slot has activations too, which the wgmma still reads
            guarded(j == c.records - 1, lambda: feed.release_records(i))

    def run_rounded(accs):
        (acc,) = (
            adder.loop(feed.steps * c.records, rounded_record, accs)
            if across
            else adder.loop(feed.steps, rounded_step, accs)
        )
        adder.wait(0)
        read = [adder.read(acc, at, at + width) for at in range(0, c.bm, width)]
        read = [piece.astype(jnp.float32) for piece in read]
        return read if unit == 1 else [piece * unit for piece in read]

    if rounded:
        return adder.scoped(1, run_rounded)
    blank = jnp.zeros((CHANNELS, c.bm), jnp.float32)
    if not interpret:
        blank = plgpu.layout_cast(blank, plgpu.Layout.WGMMA)
    sums = lax.fori_loop(0, feed.steps, exact_step, blank)
    return [sums if unit == 1 else sums * unit]
