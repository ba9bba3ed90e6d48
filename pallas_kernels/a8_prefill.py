"""8-bit x 8-bit matmul for many tokens: a persistent, warp-specialised wgmma kernel.

One warpgroup issues TMA copies, the others multiply; tokens are the rows of the wgmma.  The step
counter runs on across output tiles, so the copies for the next tile proceed during the epilogue.

With scales along K (1x128 activations, blocked weights) each K step has a fresh accumulator that is
promoted to float32 registers, which also makes the result immune to the reduced precision in which
the tensor cores add fp8 products.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.a8_problem import Block, epilogue_of, operands_by_name, promotes, w_block
from pallas_kernels.launch import CLUSTER, GRID, WARPGROUP, launch
from pallas_kernels.problem import Config, Kernel, Problem, require_hopper
from pallas_kernels.tiles import (
    ROW,
    SMEM_RESERVE,
    cdiv,
    drain,
    load,
    pad_rows,
    scale_rows,
    slot,
    store_tile,
    tiled_smem,
)

# Columns of one staging buffer of the epilogue: 128 bytes of a 16-bit type, one swizzle atom.
STAGE_COLUMNS = 64


@dataclasses.dataclass(frozen=True)
class PrefillConfig(Config):
    """Tiles of the prefill kernel.

    Attributes:
        bm, bn: tokens and output channels of a block's tile.
        stages: K steps in flight.
        warpgroups: multiplying warpgroups; each takes bm / warpgroups tokens.
        cluster: blocks that share one weight tile by multicast.
        group: width in tiles of the snake that output tiles follow, for L2 reuse.
        minor: which dimension the snake runs along first (0 tokens, 1 channels).
        staging: staging buffers per warpgroup in the epilogue.
    """

    bm: int = 128
    bn: int = 256
    stages: int = 4
    warpgroups: int = 2
    cluster: int = 1
    group: int = 16
    minor: int = 0
    staging: int = 1

    def bk(self, problem: Problem) -> int:
        """K extent of a step: one weight block when promoting, else one swizzle atom."""
        block = w_block(problem)
        return min(128, block.k, problem.k & -problem.k) if block else 128

    def smem_bytes(self, problem: Problem) -> int:
        """Shared memory of a block, in bytes."""
        bk = _step(problem)
        ring = self.stages * (self.bm + self.bn) * bk
        if problem.x_scale == "1x128":
            ring += self.stages * max(self.bm * 4, 128)
        staging = self.warpgroups * self.staging * 64 * STAGE_COLUMNS * 2
        vectors = epilogue_of(problem, transposed=False).smem_bytes(2, self.bm, self.bn)
        return ring + staging + vectors + SMEM_RESERVE
