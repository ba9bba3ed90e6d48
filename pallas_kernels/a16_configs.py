"""The tiles of the stream kernels: what they refuse, defaults, what is worth measuring."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from pallas_kernels.problem import Problem
from pallas_kernels.stream_config import StreamConfig, record_of
from pallas_kernels.tiles import cdiv

_ConfigType = TypeVar("_ConfigType", bound=StreamConfig)
# Of a problem: fields of configs.
Shapes = Callable[[Problem], Iterable[dict[str, int]]]


def most_tokens(problem: Problem) -> int:
    """Return the widest tile of tokens whose sums per group fit the registers of a thread."""
    record = record_of(problem)
    return 32 if record.group < 64 and not record.rounded else 64


@dataclasses.dataclass(frozen=True)
class ExactConfig(StreamConfig):
    """Tiles of a kernel that scales the sums of every group in f32."""

    def refuses(self, problem: Problem) -> str | None:
        """Return why this config cannot run `problem`, or None."""
        most = most_tokens(problem)
        if self.bm > most:
            return f"bm must be at most {most} with {problem.w_scale}"
        return super().refuses(problem)


@dataclasses.dataclass(frozen=True)
class RoundedConfig(StreamConfig):
    """Tiles of a kernel that applies scales to the operand, and adds over all of k at once."""

    def refuses(self, problem: Problem) -> str | None:
        """Return why this config cannot run `problem`, or None."""
        return "needs a ring of 2 steps" if self.ring == 1 else super().refuses(problem)


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
    config_type: type[_ConfigType], shapes: Shapes, problem: Problem
) -> Iterator[_ConfigType]:
    """Yield the configs of the shapes of a problem that can run it."""
    for shape in shapes(problem):
        config = config_type(**shape)
        if config.refuses(problem) is None:
            yield config


def first_fitting(config_type: type[_ConfigType], shapes: Shapes, problem: Problem) -> _ConfigType:
    """Return the first of `fitting`."""
    return next(fitting(config_type, shapes, problem))


def decode_trials(problem: Problem) -> Iterator[dict[str, int]]:
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


def prefill_trials(problem: Problem) -> Iterator[dict[str, int]]:
    """Yield the tiles for many tokens that are worth measuring."""
    m = problem.m
    if m <= 32:  # groups of 32
        return decode_trials(problem)
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
