"""The tiles of the stream kernels for 16-bit activations: refusals, defaults, candidates."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import TypeVar

from pallas_kernels.problem import Problem, require_hopper
from pallas_kernels.stream_config import StreamConfig, record_of
from pallas_kernels.tiles import cdiv

_ConfigType = TypeVar("_ConfigType", bound=StreamConfig)


def most_tokens(problem: Problem) -> int:
    """Return the widest tile of tokens whose sums per group fit the registers of a thread."""
    record = record_of(problem)
    return 32 if record.group < 64 and not record.rounded else 64


def exceeds_registers(config: StreamConfig, problem: Problem) -> str | None:
    """Return why a config that scales the sums of each group has too many of them, or None."""
    most = most_tokens(problem)
    return f"bm must be at most {most} with {problem.w_scale}" if config.bm > most else None


@dataclasses.dataclass(frozen=True)
class A16DecodeConfig(StreamConfig):
    """Tiles of the kernel for few tokens, which scales sums in f32."""

    def refuses(self, problem: Problem) -> str | None:
        """Return why this config cannot run `problem`, or None."""
        return exceeds_registers(self, problem) or super().refuses(problem)


@dataclasses.dataclass(frozen=True)
class A16PrefillConfig(StreamConfig):
    """Tiles of the kernel for many tokens, which rounds scales into the operand."""

    def refuses(self, problem: Problem) -> str | None:
        """Return why this config cannot run `problem`, or None."""
        return "needs a ring of 2 steps" if self.ring == 1 else super().refuses(problem)


def accepts_hopper(problem: Problem) -> str | None:
    if reason := require_hopper(problem):
        return reason
    if problem.n % 64 or problem.k % 64:
        return f"N and K must be multiples of 64, not N={problem.n}, K={problem.k}"
    return None


def _token_tile(m: int) -> int:
    return max(8, 1 << (m - 1).bit_length())


def decode_shapes(problem: Problem) -> Iterator[dict[str, int]]:
    """Yield tiles for few tokens, the likeliest first; the last ones run anything."""
    bm = min(most_tokens(problem), _token_tile(problem.m))
    tiles = problem.n // 64 * cdiv(problem.m, bm)
    wide = tiles >= 3 * problem.device.sms
    narrow = tiles <= problem.device.sms * 5 // 8
    if wide and bm <= 16:
        yield dict(bm=bm, cs=2, records=2)
        yield dict(bm=bm, cs=2)
    if wide:
        yield dict(bm=bm, nw=4, records=2, ring=3 if bm == 64 else 8, lag=0)
        yield dict(bm=bm, nw=4, ring=4, lag=1)
    yield dict(bm=bm, kw=4, cs=1 + narrow, records=2 if bm < 64 else 1)
    yield dict(bm=bm, kw=4, cs=1 + narrow)
    yield dict(bm=bm, kw=2, cs=2, records=2 if bm < 64 else 1)
    yield dict(bm=bm, kw=2)
    yield dict(bm=bm)


def prefill_shapes(problem: Problem) -> Iterator[dict[str, int]]:
    """Yield tiles for many tokens, the likeliest first; the last ones run anything."""
    if problem.m <= 32:  # groups of 32
        yield from decode_shapes(problem)
        return
    bm = 64 if problem.m <= 64 else 128
    tiles = cdiv(problem.m, bm) * (problem.n // 128)
    split = 2 if tiles <= problem.device.sms * 5 // 8 else 1
    snake = 4 if problem.m > 512 else 1
    if problem.m > 512:
        yield dict(bm=256, nw=2, ring=2, lag=0, snake=snake)
    if split > 1:
        yield dict(bm=bm, nw=2, cs=split, ring=4, lag=1, snake=snake)
    yield dict(bm=bm, nw=2, ring=2, lag=0, snake=snake)
    yield dict(bm=bm, ring=2, lag=0, snake=snake)


def fitting(
    config_type: type[_ConfigType], shapes: Iterable[dict[str, int]], problem: Problem
) -> Iterator[_ConfigType]:
    for shape in shapes:
        config = config_type(**shape)
        if config.refuses(problem) is None:
            yield config


def few_tokens(problem: Problem) -> Iterator[dict[str, int]]:
    """Yield the tiles for few tokens that are worth measuring."""
    bm = min(most_tokens(problem), _token_tile(problem.m))
    shapes = [
        dict(kw=kw, cs=cs, slots=slots, records=records)
        for kw, cs, slots, records in (
            (1, 1, 2, 1),
            (1, 2, 2, 2),
            (1, 2, 2, 1),
            (2, 1, 2, 1),
            (2, 1, 2, 2),
            (2, 2, 2, 1),
            (2, 2, 2, 2),
            (3, 1, 2, 2),
            (3, 2, 2, 2),
            (3, 2, 4, 1),
            (4, 1, 2, 1),
            (4, 1, 2, 2),
            (4, 1, 3, 2),
            (4, 2, 2, 1),
            (4, 2, 2, 2),
            (4, 2, 3, 2),
            (5, 1, 2, 1),
            (5, 1, 2, 2),
        )
    ]
    shapes += [
        dict(nw=nw, cs=cs, records=records, ring=ring, lag=lag)
        for nw, cs, records, ring, lag in (
            (4, 1, 1, 8, 1),
            (4, 1, 2, 3, 0),
            (4, 1, 2, 4, 1),
            (4, 1, 2, 8, 1),
            (7, 2, 1, 16, 0),
            (7, 2, 2, 8, 0),
        )
    ]
    return (dict(bm=bm, **shape) for shape in shapes)


def decode_candidates(problem: Problem) -> Iterator[A16DecodeConfig]:
    """Yield the decode configs worth measuring."""
    return fitting(A16DecodeConfig, few_tokens(problem), problem)


def many_tokens(problem: Problem) -> Iterator[dict[str, int]]:
    """Yield the tiles for many tokens that are worth measuring."""
    m = problem.m
    small = [dict(bm=64, nw=4, slots=slots, ring=ring, lag=1) for slots, ring in ((2, 8), (4, 4))]
    small += [
        dict(bm=64, nw=4, ring=4, lag=0),
        dict(bm=64, kw=2, records=2, lag=0),
        dict(bm=64, kw=2, cs=2, records=2, lag=0),
        dict(bm=64, kw=4, ring=2, lag=0),
        dict(bm=64, kw=2, cs=2, ring=4, lag=1),
        dict(bm=64, nw=2, kw=2, ring=2, lag=0),
        dict(bm=64, nw=2, cs=2, ring=4, lag=1),
        dict(bm=64, nw=3, cs=2, ring=2, lag=0),
    ]
    split = [dict(bm=128, nw=2, cs=2, ring=4, lag=1), dict(bm=128, kw=2, cs=2, ring=2, lag=0)]
    large = [
        dict(bm=128, nw=2, ring=2, lag=0),
        dict(bm=128, nw=2, ring=4, lag=1),
        dict(bm=128, nw=3, ring=4, lag=1),
        dict(bm=128, nw=4, ring=4, lag=0),
        dict(bm=128, nw=4, ring=4, lag=1),
    ]
    largest = [dict(bm=bm, nw=2, ring=2, lag=0) for bm in (192, 256)]
    if m <= 64:
        shapes = small
    elif m <= 128:
        shapes = small + split + large
    else:
        shapes = (split if m <= 512 else []) + large + largest
    snakes = (1,) if m <= 128 else (4,) if m <= 512 else (4, 8)
    return (dict(**shape, snake=snake) for shape in shapes for snake in snakes)


def prefill_candidates(problem: Problem) -> Iterator[A16PrefillConfig]:
    """Yield the prefill configs worth measuring."""
    shapes = few_tokens if problem.m <= 32 else many_tokens
    return fitting(A16PrefillConfig, shapes(problem), problem)
