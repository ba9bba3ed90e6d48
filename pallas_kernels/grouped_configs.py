"""The tiles of the grouped stream kernels for 16-bit activations: defaults and candidates."""

from __future__ import annotations

import math
from collections.abc import Iterator

from pallas_kernels.a16_configs import most_tokens
from pallas_kernels.problem import Problem
from pallas_kernels.tiles import cdiv, round_up

# Most rows of a tile; an expert with more has several of one height.
_HIGHEST = 160


def _typical_tile(problem: Problem) -> int:
    """Return the height that holds the rows of most experts when rows spread at random."""
    mean = problem.m / problem.experts
    rows = math.ceil(mean + 1.4 * math.sqrt(mean))
    return max(8, round_up(rows, 8 if rows <= 64 else 16))


def decode_shapes(problem: Problem) -> Iterator[dict[str, int]]:
    """Yield tiles for few rows an expert, the likeliest first; the last ones run anything."""
    bm = min(most_tokens(problem), _typical_tile(problem))
    blocks = min(problem.m, problem.experts) * (problem.n // 64)
    sms, long = problem.device.sms, problem.k >= 4096
    if problem.k <= 1024:
        yield dict(bm=bm, slots=3, records=2)
    # Few blocks leave multiprocessors idle: two then share out k, the more so the longer it is.
    if blocks < (3 if long else 2) * sms:
        yield dict(bm=bm, cs=2, records=2)
        yield dict(bm=bm, kw=2)
    # Two warpgroups over k keep more bytes under way where blocks have far to go.
    elif long and problem.m > 64:
        yield dict(bm=bm, kw=2, records=2)
        yield dict(bm=bm, kw=2)
    yield dict(bm=bm, records=2)
    yield dict(bm=bm)


def prefill_shapes(problem: Problem) -> Iterator[dict[str, int]]:
    """Yield tiles for many rows an expert, the likeliest first; the last ones run anything."""
    rows = _typical_tile(problem)
    bm = round_up(cdiv(rows, cdiv(rows, _HIGHEST)), 8 if rows <= 64 else 16)
    if bm > 96:
        yield dict(bm=bm, nw=4, ring=4, lag=1)
    yield dict(bm=bm, nw=2, ring=4, lag=1)
    yield dict(bm=bm, nw=2, ring=2, lag=0)
    yield dict(bm=bm, ring=2, lag=0)


def decode_trials(problem: Problem) -> list[dict[str, int]]:
    """Return the tiles for few rows an expert that are worth measuring."""
    tile = _typical_tile(problem)
    heights = sorted({min(most_tokens(problem), max(8, h)) for h in (tile - 8, tile)})
    shapes = [
        dict(bm=bm, kw=kw, cs=cs, slots=slots, records=records)
        for bm in heights
        for kw, cs, slots, records in (
            (1, 1, 2, 1),
            (1, 1, 2, 2),
            (1, 1, 3, 1),
            (1, 2, 2, 2),
            (2, 1, 2, 1),
            (2, 1, 2, 2),
            (2, 2, 2, 1),
            (4, 1, 2, 1),
            (4, 1, 2, 2),
        )
    ]
    shapes += [
        dict(bm=bm, nw=nw, records=records, ring=ring, lag=lag)
        for bm in heights
        for nw, records, ring, lag in ((2, 1, 4, 1), (2, 2, 3, 1), (4, 1, 4, 1), (4, 2, 3, 0))
    ]
    return shapes


def prefill_trials(problem: Problem) -> list[dict[str, int]]:
    """Return the tiles for many rows an expert that are worth measuring."""
    tile = round_up(_typical_tile(problem), 16)
    heights = {h for h in (tile - 16, tile, 64, 96, 128, 144) if 32 <= h <= 256 and h < 4 * tile}
    return [
        dict(bm=bm, nw=nw, ring=ring, lag=lag)
        for bm in sorted(heights)
        for nw, ring, lag in ((1, 2, 0), (2, 2, 0), (2, 4, 1), (4, 4, 1))
    ]
