"""What happens to an accumulator after the last K step: zero points, scales, bias, rounding.

Every operand of the epilogue is a vector along tokens, a vector along output channels, one number
or one number for each expert.  Vectors travel through shared memory by TMA, which needs no bounds
checks; single numbers are read where they are used, so that a per-tensor scale costs no launch to
broadcast it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.tiles import COLUMN, ROW, SMEM_ALIGNMENT, load, round_up

Along = Literal["m", "n", "one", "expert"]


@dataclasses.dataclass(frozen=True)
class Term:
    """One operand of the epilogue: its name, what it runs along, its dtype."""

    name: str
    along: Along
    dtype: Any

    def smem(self, slots: int, extent: int) -> Any:
        """Return `slots` buffers for `extent` values, each 128-byte aligned as TMA demands."""
        values = round_up(extent, 128 // jnp.dtype(self.dtype).itemsize)
        return plgpu.SMEM((slots, values), self.dtype)


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """The terms of one problem, in operand order, and how they act on a tile.

    Attributes:
        terms: the operands present.
        transposed: whether tile rows are output channels (and columns tokens).
        out_dtype: type of the result.
    """

    terms: tuple[Term, ...]
    transposed: bool
    out_dtype: Any

    @property
    def vectors(self) -> tuple[Term, ...]:
        """The terms that pass through shared memory."""
        return tuple(term for term in self.terms if term.along in ("m", "n"))

    def scratch(self, slots: int, bm: int, bn: int) -> dict[str, Any]:
        """Return the shared memory of the vectors for tiles of bm tokens x bn channels."""
        extent = {"m": bm, "n": bn}
        return {f"{v.name}_sm": v.smem(slots, extent[v.along]) for v in self.vectors}

    def smem_bytes(self, slots: int, bm: int, bn: int) -> int:
        """Return the bytes that `scratch` takes."""
        extent = {"m": bm, "n": bn}
        sizes = (
            slots * round_up(extent[v.along] * jnp.dtype(v.dtype).itemsize, 128)
            for v in self.vectors
        )
        return sum(round_up(size, SMEM_ALIGNMENT) for size in sizes)

    def fetch(
        self,
        refs: Mapping[str, Any],
        scratch: Mapping[str, Any],
        slot: Any,
        barrier: Any,
        start: Mapping[Along, Any],
        size: Mapping[Along, int],
    ) -> None:
        """Start the copies of one tile's vectors; each arrives once on `barrier`."""
        for v in self.vectors:
            source = refs[v.name].at[pl.ds(start[v.along], size[v.along])]
            target = scratch[f"{v.name}_sm"].at[slot, pl.ds(0, size[v.along])]
            plgpu.copy_gmem_to_smem(source, target, barrier)

    def apply(
        self,
        tile: jax.Array,
        refs: Mapping[str, Any],
        scratch: Mapping[str, Any],
        slot: Any,
        first: Mapping[Along, Any],
    ) -> jax.Array:
        """Return the finished tile, in `out_dtype`.

        Args:
            tile: accumulator, float32 or int32, in the WGMMA layout.
            refs: term name -> global memory.
            scratch: shared memory that `fetch` filled.
            slot: which buffer of each vector.
            first: offset of this tile within the buffers, and its expert.
        """
        present = {term.name: term for term in self.terms}

        def spread(name: str) -> jax.Array:
            term = present[name]
            if term.along not in ("m", "n"):
                return refs[name][first["expert"] if term.along == "expert" else 0]
            axis = int((term.along == "m") == self.transposed)
            part = pl.ds(first[term.along], tile.shape[axis])
            vector = load(scratch[f"{name}_sm"].at[slot, part], COLUMN if axis else ROW)
            return lax.broadcast_in_dim(vector, tile.shape, [axis])

        if "x_zero" in present:
            tile = tile - spread("x_zero") * spread("w_sum")
        tile = tile.astype(jnp.float32)
        for name in ("x_scale", "w_scale"):
            if name in present:
                tile = tile * spread(name)
        if "x_sum" in present:
            tile = tile - spread("x_sum") * spread("w_offset")
        if "bias" in present:
            tile = tile + spread("bias").astype(jnp.float32)
        return tile.astype(self.out_dtype)
