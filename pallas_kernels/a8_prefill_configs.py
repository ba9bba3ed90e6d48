"""Tile sizes of the 8-bit prefill kernel: what fits, sane defaults, what is worth measuring."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from pallas_kernels.a8_problem import common_refusal, epilogue_of, promotes, step_bytes
from pallas_kernels.problem import Config, Problem
from pallas_kernels.tiles import SMEM_ALIGNMENT, SMEM_RESERVE, cdiv, round_up

# Columns of one staging buffer of the epilogue: 128 bytes of a 16-bit type, one swizzle atom.
STAGE = 64


@dataclasses.dataclass(frozen=True)
class PrefillConfig(Config):
    """Tiles of the prefill kernel.

    Attributes:
        bm, bn: tokens and output channels of a block's tile.
        stages: K steps in flight.
        warpgroups: multiplying warpgroups; each takes bm / warpgroups tokens.
        cluster: blocks that share one weight tile by multicast.
        group: width in tiles of the snake that output tiles follow, for L2 reuse.
        minor: the dimension along which the snake moves first, 0 tokens or 1 channels.
        staging: staging buffers per warpgroup in the epilogue.
        unroll: K steps in a row in which two promoted products are under way (`promote.sum_steps`);
            1 adds each before the next starts.  Without effect where scales do not vary along K.
    """

    bm: int = 128
    bn: int = 256
    stages: int = 4
    warpgroups: int = 2
    cluster: int = 1
    group: int = 16
    minor: int = 0
    staging: int = 1
    unroll: int = 1

    @property
    def stage(self) -> int:
        """Columns of a staging buffer, at most a swizzle atom."""
        return next(width for width in (STAGE, 48, 32, 16) if self.bn % width == 0)

    def smem_bytes(self, problem: Problem) -> int:
        """Return the shared memory of a block, in bytes."""
        ring = self.stages * (self.bm + self.bn) * step_bytes(problem)
        if problem.x_scale == "1x128":
            ring += round_up(self.stages * self.bm * 4, SMEM_ALIGNMENT)
        staging = self.warpgroups * self.staging * 64 * self.stage * 2
        vectors = epilogue_of(problem, transposed=False).smem_bytes(1, self.bm, self.bn)
        tiles = SMEM_ALIGNMENT if problem.experts else 0  # of `tile_relay`
        return ring + staging + vectors + tiles + SMEM_RESERVE

    def refuses(self, problem: Problem) -> str | None:
        """Return why this config cannot run `problem`, or None."""
        rows = self.bm // self.warpgroups
        if self.bm % self.warpgroups or rows not in (64, 128):
            return "a warpgroup takes 64 or 128 tokens"
        if self.bn % (STAGE if problem.experts else 16) or not 16 <= self.bn <= 256:
            return "bn must be a multiple of 16, or of 64 with experts, up to 256"
        # float32 registers of a thread for accumulators; a promoted tile has a total besides.
        registers = rows * self.bn // 128
        if promotes(problem):
            registers *= 1 + min(self.unroll, 2)
        if registers > (192 if self.warpgroups <= 2 else 128):
            return f"needs {registers} accumulator registers a thread"
        # With N = 64 and a tile of 128, the half outside overwrote the other on an H200: a store
        # beyond a dimension of a single swizzle tile does not seem to be dropped.
        if self.bn > problem.n or (self.bm > max(problem.m, 64) and not problem.experts):
            return f"a tile of {self.bm} x {self.bn} is larger than the output"
        # Registers spill, those of products under way too, before they hold anything.
        if problem.experts and promotes(problem) and self.unroll > 2:
            return "with experts two steps in a row at most: four were wrong on an H100"
        if problem.experts and self.cluster > 1:
            return "row tiles of a grouped problem share no weights"
        if self.stages < 2:
            return "needs two stages: one is released when the next is in use"
        if cdiv(problem.m, self.bm) % self.cluster:
            return f"{cdiv(problem.m, self.bm)} row tiles do not divide by cluster {self.cluster}"
        if self.smem_bytes(problem) > problem.device.smem:
            return (
                f"needs {self.smem_bytes(problem)} of {problem.device.smem} bytes of shared memory"
            )
        return None


def prefill_refuses(problem: Problem) -> str | None:
    """Return why the prefill kernel does not take a dense problem, or None."""
    if reason := common_refusal(problem):
        return reason
    return "takes more than 32 tokens" if problem.m <= 32 else None


def prefill_default(problem: Problem) -> PrefillConfig:
    """Return the widest tile that still gives every SM one."""
    unroll = 4 if promotes(problem) else 1
    if problem.m <= 64:
        (bn,) = _even_widths(problem, 64, 1)
        return _most_stages(problem, 64, bn, 1, unroll=unroll)
    widths = ((128, 6),) if promotes(problem) else ((256, 4), (192, 5), (128, 6))
    for bn, stages in widths:
        if bn > problem.n or problem.m < 128:
            continue
        if cdiv(problem.m, 128) * cdiv(problem.n, bn) >= 0.9 * problem.device.sms:
            return PrefillConfig(bn=bn, stages=stages, unroll=unroll)
    return PrefillConfig(bm=64, bn=64, stages=8, warpgroups=1, unroll=unroll)


def _most_stages(problem: Problem, bm: int, bn: int, warpgroups: int, **rest) -> PrefillConfig:
    """Return a config with as many stages as fit, at most 12."""
    for stages in range(12, 2, -1):
        config = PrefillConfig(bm, bn, stages, warpgroups, **rest)
        if config.refuses(problem) is None:
            return config
    return PrefillConfig(bm, bn, 2, warpgroups, **rest)


def _even_widths(problem: Problem, bm: int, count: int, widest: int = 128) -> list[int]:
    """Return the widths of tiles that leave least of the last wave of blocks idle."""

    def busy(bn: int) -> float:
        tiles = cdiv(problem.m, bm) * cdiv(problem.n, bn)
        return problem.n / (cdiv(tiles, problem.device.sms) * bn)

    widths = range(32, min(problem.n, widest) + 1, 16)
    return sorted(widths, key=busy, reverse=True)[:count]


def prefill_candidates(problem: Problem) -> Iterator[PrefillConfig]:
    """Yield the configs worth measuring: wide tiles for many tokens, narrow ones for few."""
    if problem.m <= 512:
        for bm, count in ((64, 3), (128, 2)) if problem.m <= 128 else ((128, 3),):
            for bn in _even_widths(problem, bm, count, 128 if problem.m <= 64 else 256):
                unroll = 4 if promotes(problem) and bn <= 128 else 1
                for cluster, staging in ((1, 1), (2, 1), (1, 2)):
                    rest = dict(unroll=unroll, cluster=cluster, group=8, staging=staging)
                    config = _most_stages(problem, bm, bn, bm // 64, **rest)
                    if config.refuses(problem) is None:
                        yield config
    if promotes(problem):
        tiles = [(128, 128, 6, 2, 4), (192, 128, 4, 3, 1), (128, 192, 4, 2, 1)]
        if problem.m <= 512:
            tiles += [(128, 64, 8, 2, 4)]
    elif problem.m > 512:
        tiles = [(128, 256, 4, 2, 1)]
    else:
        tiles = [(128, 256, 4, 2, 1), (128, 192, 5, 2, 1), (128, 128, 6, 2, 1), (128, 64, 8, 2, 1)]
    for bm, bn, stages, warpgroups, unroll in tiles:
        for cluster in (1, 2):
            for group in (8, 16) if problem.m > 512 else (8,):
                for staging in (1, 2):
                    config = PrefillConfig(
                        bm, bn, stages, warpgroups, cluster, group, 0, staging, unroll
                    )
                    if config.refuses(problem) is None:
                        yield config


def grouped_prefill_refuses(problem: Problem) -> str | None:
    """Return why the prefill kernel does not take a grouped problem, or None."""
    if reason := common_refusal(problem):
        return reason
    return "takes at least a row an expert" if problem.m < problem.experts else None


def grouped_prefill_default(problem: Problem) -> PrefillConfig:
    """Return the widest tile."""
    unroll = 2 if promotes(problem) else 1
    widths = ((128, 6),) if promotes(problem) else ((256, 4), (192, 5), (128, 6))
    for bn, stages in widths:
        if bn <= problem.n:
            return PrefillConfig(bn=bn, stages=stages, unroll=unroll)
    return PrefillConfig(bn=64, stages=6, unroll=unroll)


def grouped_prefill_candidates(problem: Problem) -> Iterator[PrefillConfig]:
    """Yield the configs worth measuring."""
    if promotes(problem):
        tiles = [(128, 128, 6, 2, 2), (128, 128, 6, 2, 1), (192, 128, 4, 3, 1), (128, 192, 4, 2, 1)]
    else:
        shapes = ((128, 256, 4), (128, 192, 5), (128, 128, 6), (256, 128, 4))
        tiles = [(*shape, 2, 1) for shape in shapes]
    for bm, bn, stages, warpgroups, unroll in tiles:
        for group, minor in ((8, 0), (2, 0), (16, 1)):
            config = PrefillConfig(bm, bn, stages, warpgroups, 1, group, minor, unroll=unroll)
            if config.refuses(problem) is None:
                yield config
