"""Tiles that the warpgroup which copies has found, told to those that multiply.

A search takes as long as several products.  The warpgroup that copies is a tile ahead anyway; one
that multiplies would leave the tensor cores idle meanwhile, and the registers would be its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.group_tiles import Tile
from pallas_kernels.tiles import drain, release, slot

# Tiles that are told and not yet heard.
_SLOTS = 2


def relay_scratch(readers: int) -> dict[str, Any]:
    """Return the scratch memory of a `Relay` from one warpgroup to `readers` others."""
    return {
        "tiles_sm": plgpu.SMEM((_SLOTS, 4), jnp.int32),
        "tiles_full": plgpu.Barrier(num_arrivals=1, num_barriers=_SLOTS),
        "tiles_empty": plgpu.Barrier(num_arrivals=readers, num_barriers=_SLOTS),
    }


@dataclasses.dataclass(frozen=True)
class Relay:
    """A queue of tiles in shared memory; every reader hears each of them.

    Attributes:
        scratch: what `relay_scratch` asked for, among others.
        interpret: whether the interpreter runs this.
    """

    scratch: Mapping[str, Any]
    interpret: bool

    def tell(self, tile: Tile, count: Any) -> None:
        """Put in a tile, before which there were `count` others."""
        s = slot(count, _SLOTS)

        @pl.when(count >= _SLOTS)
        def _():
            plgpu.barrier_wait(self.scratch["tiles_empty"].at[s])

        for i, number in enumerate(tile):
            self.scratch["tiles_sm"][s, i] = number
        plgpu.barrier_arrive(self.scratch["tiles_full"].at[s])

    def hear(self, count: Any) -> Tile:
        """Return the tile before which there were `count` others."""
        s = slot(count, _SLOTS)
        plgpu.barrier_wait(self.scratch["tiles_full"].at[s])
        tile = Tile(*(self.scratch["tiles_sm"][s, i] for i in range(3)))
        release(self.scratch["tiles_empty"].at[s], self.interpret)
        return tile

    def close(self, count: Any) -> None:
        """Wait until all `count` tiles have been heard."""
        drain(self.scratch["tiles_empty"], count, _SLOTS)
