"""How a stream kernel cuts a problem: its config, what that needs, and why it may not fit."""

from __future__ import annotations

import dataclasses
from typing import Self

import jax.numpy as jnp

from pallas_kernels.problem import Config, Problem
from pallas_kernels.record import CHANNELS, DEPTH, WORDS, Record
from pallas_kernels.tiles import SMEM_RESERVE, cdiv

# Most tokens of one output staging buffer.
STAGE = 64
# Barriers in one array: one phase bit each in a 32 bit register.
MAX_BARRIERS = 32
# Elements along one dimension of a TMA copy.
MAX_COPY = 256
# Tokens up to which the height of a tile follows their number.
FEW = 32


def scale_name(record: Record, factor: str = "") -> str:
    """Return the scale layout of a weight in the words of `Problem.w_scale`.

    Args:
        record: format of its records.
        factor: "one" or "n" for a float32 factor of the result, "" for none.
    """
    parts = [f"g{record.group}"]
    parts += [record.scale_dtype or "none"] if record.scale_bits != 16 else []
    parts += ["super"] if record.product else []
    parts += [f"factor {factor}"] if factor else []
    return " ".join(parts)


def zero_name(record: Record) -> str:
    """Return the zero points of a record in the words of `Problem.zero`."""
    return "group" if record.zero else "offset" if record.offset else ""


def record_of(problem: Problem) -> Record:
    """Return the format of a problem's records, up to which 16-bit type the scales have."""
    group, *rest = problem.w_scale[1:].split()
    scale = rest[0] if rest and rest[0] not in ("super", "factor") else "bfloat16"
    scale = "" if scale == "none" else scale
    operand = 8 * jnp.dtype(problem.x_dtype).itemsize
    zero, offset = problem.zero == "group", problem.zero == "offset"
    return Record(problem.w_dtype, operand, int(group), scale, zero, offset, "super" in rest)


def factor_of(problem: Problem) -> str:
    """Return how the factor of a problem's result runs: "", "one" or "n"."""
    *_, last = problem.w_scale.split()
    return last if "factor" in problem.w_scale else ""


@dataclasses.dataclass(frozen=True)
class StreamConfig(Config):
    """Tiles of a stream kernel.

    Attributes:
        bm: tokens of a tile, a multiple of 8.
        nw: warpgroups over output channels, 64 each.
        kw: warpgroups over k.
        cs: blocks of a cluster over k.
        slots: record slots of a warpgroup.
        records: records in a slot.
        ring: steps of activations that the `nw` warpgroups share; 0 if each warpgroup brings its
            own with its records.
        lag: steps by which the refill of the shared ring trails the release of a slot.  Without a
            ring, with one record in a slot and scales rounded into the operand: whether a slot is
            refilled in the next step (1), or after waiting for the last wgmma of its own (0).
        snake: width in tiles of the snake in which output tiles are visited, for L2 reuse.
    """

    bm: int
    nw: int = 1
    kw: int = 1
    cs: int = 1
    slots: int = 2
    records: int = 1
    ring: int = 0
    lag: int = 1
    snake: int = 1

    def adapted(self, problem: Problem) -> Self:
        """Return this config with one tile of all tokens, up to 64: weights are then read once."""
        if problem.experts or problem.m > STAGE:
            return self
        height = 8 * cdiv(problem.m, 8) if problem.m <= FEW else STAGE
        return dataclasses.replace(self, bm=height)

    @property
    def workers(self) -> int:
        """Warpgroups of a block."""
        return self.nw * self.kw

    def smem_bytes(self, problem: Problem) -> int:
        """Return the shared memory of a block, in bytes."""
        rows = record_of(problem).rows
        x_bytes = self.bm * DEPTH * jnp.dtype(problem.x_dtype).itemsize
        activations = self.kw * self.ring if self.ring else self.workers * self.slots
        stage = self.nw * self.stage * CHANNELS * 2
        sums = (self.kw - 1) * self.nw * CHANNELS * self.bm * 4
        peers = (self.cs - 1) * self.nw * CHANNELS * self.bm // self.owners * 4
        vectors = 12 * (self.bm + self.nw * CHANNELS)
        stream = self.workers * self.slots * self.records * rows * WORDS * 4
        return (
            stream + activations * self.records * x_bytes + stage + sums + peers + vectors
        ) + SMEM_RESERVE

    @property
    def stage(self) -> int:
        """Tokens staged for the output at a time: the largest part of a tile that fits."""
        return next(s for s in range(min(self.bm, STAGE), 0, -8) if self.bm % s == 0)

    @property
    def owners(self) -> int:
        """Blocks of a cluster that store parts of the output tile."""
        return min(self.cs, self.bm // self.stage)

    def refuses(self, problem: Problem) -> str | None:
        """Return why this config cannot run `problem`, or None."""
        total = cdiv(problem.k, DEPTH)
        if self.bm % 8 or not 8 <= self.bm <= 256 or (self.bm > STAGE and self.bm % 16):
            return "bm must be a multiple of 8 up to 64, or of 16 up to 256"
        if problem.n % (CHANNELS * self.nw):
            return f"N={problem.n} is no multiple of {CHANNELS * self.nw} channels"
        if total % self.records or total // self.records < self.cs * self.kw:
            return f"{total} records do not split into {self.cs} x {self.kw} runs of {self.records}"
        if self.bm // self.stage % self.owners:
            return f"{self.cs} blocks cannot share out {self.bm} tokens"
        if self.ring and not 0 <= self.lag < self.ring:
            return "lag must be below ring"
        if self.nw > 1 and not self.ring and self.kw > 1:
            return "warpgroups side by side and over k need a shared ring"
        vectors = problem.bias or factor_of(problem) == "n"
        if vectors and self.nw * CHANNELS > MAX_COPY:
            return f"one copy brings the vectors of at most {MAX_COPY} channels"
        if self.workers > 8:
            return "a block has at most 8 warpgroups"
        if max(self.workers * self.slots, self.kw * self.ring) > MAX_BARRIERS:
            return f"more than {MAX_BARRIERS} barriers"
        if self.smem_bytes(problem) > problem.device.smem:
            return f"needs {self.smem_bytes(problem)} bytes of shared memory"
        return None
