"""Tile sizes of the 8-bit decode kernel: what fits, sane defaults, what is worth measuring."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from pallas_kernels.a8_problem import common_refusal, epilogue_of, promotes, step_bytes, step_k
from pallas_kernels.problem import Config, Problem
from pallas_kernels.tiles import SMEM_ALIGNMENT, SMEM_RESERVE, cdiv, round_up

# Channels of a warpgroup: the rows of one wgmma.
CHANNELS = 64


@dataclasses.dataclass(frozen=True)
class DecodeConfig(Config):
    """Tiles of the decode kernel.

    Attributes:
        bm: tokens of a tile, a multiple of 8.
        stages: K steps in flight in a block.
        atoms: 128-byte K atoms of a step; 2 halves the barrier traffic of a thin tile.
        channels: warpgroups side by side over output channels, 64 each; they share activations.
        split: warpgroups of a block that share out the K steps of the same channels.
        cluster: blocks that share out K.
        occupancy: blocks meant to be resident on one SM.
    """

    bm: int = 16
    stages: int = 12
    atoms: int = 1
    channels: int = 1
    split: int = 2
    cluster: int = 1
    occupancy: int = 1

    def adapted(self, problem: Problem) -> DecodeConfig:
        """Return this config with tiles of the least height that reads the weights once."""
        height = grouped_height(problem) if problem.experts else _tile_tokens(problem.m)
        for stages in range(self.stages, 1, -1):
            config = dataclasses.replace(self, bm=height, stages=stages)
            if stages % self.split == 0 and config.refuses(problem) is None:
                return config
        return self

    @property
    def parts(self) -> int:
        """Parts of a tile's tokens, each summed and stored by another block of the cluster."""
        return self.cluster if self.bm >= 8 * self.cluster else 1

    def smem_bytes(self, problem: Problem) -> int:
        """Return the shared memory of a block, in bytes."""
        bn = CHANNELS * self.channels
        ring = self.stages * (self.bm + bn) * step_bytes(problem) * self.atoms
        if problem.x_scale == "1x128":
            ring += round_up(self.stages * round_up(self.bm * 4, 128), SMEM_ALIGNMENT)
        width = self.bm // self.parts
        sums = ((self.split - 1) * self.bm + (self.cluster - 1) * width) * bn * 4
        vectors = epilogue_of(problem, transposed=True).smem_bytes(1, self.bm, bn)
        tiles = SMEM_ALIGNMENT if problem.experts else 0  # of `tile_relay`
        return ring + sums + bn * width * 2 + vectors + tiles + SMEM_RESERVE

    def refuses(self, problem: Problem) -> str | None:
        """Return why this config cannot run `problem`, or None."""
        step = step_k(problem) * self.atoms
        if self.bm % (8 * self.parts) or not 8 <= self.bm <= 128:
            return "bm, and its part for each block of a cluster, must be multiples of 8 up to 128"
        if problem.x_dtype == "int8" and self.bm > 32 and self.bm % 16:
            return "an int8 wgmma of more than 32 columns has a multiple of 16 of them"
        if problem.m <= 8 < self.bm:  # for the same reason as in PrefillConfig
            return "8 tokens or fewer take tiles of 8"
        if promotes(problem) and self.atoms > 1:
            return "scales along K need steps of one atom"
        if problem.experts and self.cluster > 1:
            return "a grouped problem has tiles enough not to split K over blocks"
        if problem.n % (CHANNELS * self.channels):
            return f"N={problem.n} is no multiple of {CHANNELS * self.channels} channels"
        if problem.k % (step * self.cluster) or problem.k // step // self.cluster < self.split:
            return f"K={problem.k} does not split into {self.cluster} x {self.split} runs of {step}"
        if problem.experts and problem.k // step % self.split:
            return f"{problem.k // step} steps of K do not divide by a split of {self.split}"
        if self.stages < 2 * self.split:
            return "needs two stages for each share of K: one is released when the next is in use"
        if self.channels * self.split > 7:
            return "a block has at most 7 multiplying warpgroups"
        if self.smem_bytes(problem) * self.occupancy > problem.device.smem:
            return f"needs {self.smem_bytes(problem)} bytes of shared memory x {self.occupancy}"
        return None


def _tile_tokens(m: int) -> int:
    """Return the height of the least tile that holds all tokens, if there is one."""
    return min(128, max(8, 1 << (m - 1).bit_length()))


def decode_refuses(problem: Problem) -> str | None:
    """Return why the decode kernel does not take a dense problem, or None."""
    if reason := common_refusal(problem):
        return reason
    return None if problem.m <= 256 else "takes at most 256 tokens"


def _fitted(
    problem: Problem, bm: int, atoms: int, *shape: int, most: int = 16
) -> DecodeConfig | None:
    """Return the config of a shape with as many stages as fit, of `most` atoms, or None."""
    for stages in range(most // atoms, 2, -1):
        config = DecodeConfig(bm, stages, atoms, *shape)
        if stages % config.split == 0 and config.refuses(problem) is None:
            return config
    return None


def decode_default(problem: Problem) -> DecodeConfig:
    """Split K until every SM has a block, as far as K and the cluster allow."""
    bm = _tile_tokens(problem.m)
    best = None
    for shape in ((2, 1, 1), (1, 2, 1), (1, 2, 2), (1, 1, 2), (2, 1, 4), (1, 1, 4), (1, 1, 1)):
        config = _fitted(problem, bm, 1, *shape)
        if config:
            best = config
            blocks = cdiv(problem.m, bm) * problem.n // (CHANNELS * shape[0]) * shape[2]
            if blocks >= problem.device.sms * 0.9:
                return config
    return best or DecodeConfig(8, 4, 1, 1, 1, 1)


def decode_candidates(problem: Problem) -> Iterator[DecodeConfig]:
    """Yield the configs worth measuring."""
    bm = _tile_tokens(problem.m)
    if problem.m <= 32:
        shapes = (
            (1, 1, 1, 1),
            (1, 2, 1, 1),
            (1, 2, 2, 1),
            (1, 2, 1, 2),
            (1, 2, 2, 2),
            (2, 1, 1, 2),
            (4, 1, 1, 1),
            (1, 1, 1, 4),
        )
    else:
        shapes = (
            (1, 2, 1, 1),
            (1, 2, 2, 1),
            (1, 2, 1, 2),
            (1, 1, 2, 1),
            (1, 1, 2, 2),
            (2, 1, 1, 1),
            (2, 1, 2, 1),
        )
        shapes += (
            (2, 1, 4, 1),
            (2, 2, 2, 1),
            (1, 2, 4, 1),
            (3, 1, 1, 1),
            (4, 1, 2, 1),
            (4, 1, 4, 1),
        )
    for channels, split, cluster, occupancy in shapes:
        for atoms in (1,) if promotes(problem) else (1, 2) if problem.m > 32 else (1, 2, 4):
            config = _fitted(problem, bm, atoms, channels, split, cluster, occupancy)
            if config:
                yield config


def grouped_height(problem: Problem) -> int:
    """Return the height of the tile that holds nearly every expert's rows, at most 128.

    Rows that choose their experts at random scatter by the square root of their number, and a tile
    starts up to 7 rows before its expert's.
    """
    if problem.m <= 8:
        return 8
    mean = problem.m / min(problem.m, problem.experts)
    height = min(128, round_up(math.ceil(mean + 7 + 2 * mean**0.5), 8))
    return round_up(height, 16) if problem.x_dtype == "int8" and height > 32 else height


def grouped_decode_refuses(problem: Problem) -> str | None:
    """Return why the decode kernel does not take a grouped problem, or None."""
    if reason := common_refusal(problem):
        return reason
    if problem.m > 128 * problem.experts:
        return "takes at most 128 rows an expert"
    return None


def grouped_decode_default(problem: Problem) -> DecodeConfig:
    """Return 128 channels a block, or for a token or so 64 and blocks enough to share evenly."""
    shapes: tuple[tuple[int, int, int], ...] = ((2, 1, 16), (1, 1, 16))
    if problem.m <= 8:
        shapes = ((1, 3, 16), *shapes)
    # Two blocks on each multiprocessor are a tile each: more stages only delay the first product.
    if problem.m * (problem.n // CHANNELS) <= 2 * problem.device.sms:
        shapes = ((1, 2, 8), *shapes)
    for channels, occupancy, most in shapes:
        height = grouped_height(problem)
        if config := _fitted(problem, height, 1, channels, 1, 1, occupancy, most=most):
            return config
    return DecodeConfig(8, 4, 1, 1, 1, 1)


def grouped_decode_candidates(problem: Problem) -> Iterator[DecodeConfig]:
    """Yield the configs worth measuring."""
    height = grouped_height(problem)
    heights = {height, max(8, height // 16 * 8), min(128, height + 16)}
    if problem.x_dtype == "int8":
        heights = {h if h <= 32 else round_up(h, 16) for h in heights}
    for bm in sorted({8} if problem.m <= 8 else heights - {8}):
        shapes = [(1, 1, 2), (1, 1, 3), (2, 1, 1), (2, 1, 2), (3, 1, 1), (4, 1, 1)]
        if problem.m <= 8:
            shapes += [(1, 2, 2), (1, 2, 3), (2, 2, 1), (2, 2, 2)]
        for channels, split, occupancy in shapes:
            for atoms in (1,) if promotes(problem) or bm > 64 else (1, 2):
                if config := _fitted(problem, bm, atoms, channels, split, 1, occupancy):
                    yield config
