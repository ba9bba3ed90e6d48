"""The tile schedule of grouped matmuls, against enumeration of rows."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped import most_tiles, tile_schedule

EXPERTS = 8


def fault(table: np.ndarray, sizes: np.ndarray, height: int, start: int) -> str | None:
    """Return what is wrong with a schedule, or None: every row in one tile of its own expert."""
    tiles, live = table[:-1], int(table[-1, 0])
    if not 0 <= live <= len(tiles):
        return "more live tiles than lines"
    owner = np.full(start + sizes.sum(), -1)
    for expert, first, begin, end in tiles[:live]:
        if first % 8 or end - begin != sizes[expert]:
            return "misaligned, or not the expert's rows"
        mine = slice(max(first, begin), min(first + height, end))
        if mine.stop <= mine.start or (owner[mine] != -1).any():
            return "an empty tile, or a row in two tiles"
        owner[mine] = expert
    expected = np.repeat(np.arange(len(sizes)), sizes)
    return None if (owner[start:] == expected).all() else "a row without its expert"


@functools.partial(jax.jit, static_argnums=(1, 2))
def schedules(sizes, rows: int, height: int, start):
    """Return the schedules of many group sizes."""
    return jax.vmap(lambda s, t: tile_schedule(s, rows, height, t))(sizes, start)


@pytest.mark.parametrize("height", [8, 24, 128])
def test_every_pattern_of_empty_experts(height):
    rng = np.random.default_rng(height)
    filled = np.array(list(itertools.product([0, 1], repeat=EXPERTS)))
    # Small groups, single rows and a few that fill several tiles.
    sizes = filled * rng.choice([1, 2, 7, 8, 9, 130], filled.shape)
    start = rng.integers(0, 20, len(sizes))
    tables = np.asarray(schedules(sizes, int((start + sizes.sum(1)).max()), height, start))
    for table, size, first in zip(tables, sizes, start, strict=True):
        assert fault(table, size, height, first) is None


def test_a_wrong_schedule_is_noticed():
    """Negative control: a row less, a tile less, another expert, another row."""
    sizes = np.array([3, 0, 20, 1])
    table = np.asarray(tile_schedule(jnp.asarray(sizes), 24, 8))
    assert fault(table, sizes, 8, 0) is None
    for line, field, change in ((-1, 0, -1), (0, 0, 1), (1, 1, 8), (1, 1, 1), (2, 3, -1)):
        wrong = table.copy()
        wrong[line, field] += change
        assert fault(wrong, sizes, 8, 0) is not None


def test_the_bound_is_reached():
    """Each expert's rows straddle two tiles: no smaller launch would do."""
    sizes = jnp.array([7, 2, 6, 2, 6, 2, 6, 2])
    assert tile_schedule(sizes, 33, 8)[-1, 0] == 12
    assert most_tiles(33, 8, 8) >= 12
    assert most_tiles(3, 128, 128) == 3
