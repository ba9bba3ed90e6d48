"""The search for the tiles of a grouped matmul, against enumeration of rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grouped_cases import patterns

from pallas_kernels.group_tiles import Groups

EXPERTS = 8


def fault(groups: Groups, height: int, sizes: np.ndarray, found: list, count: int) -> str | None:
    """Return what is wrong with the tiles, or None: each row in one tile of its own expert."""
    owner = np.full(groups.rows, -1)
    for expert, row, rows in zip(*found, strict=True):
        skipped = row % groups.align
        if not 0 <= rows <= height - skipped:
            return "a tile higher than its height"
        if rows and (row < 0 or row + rows > groups.rows or (owner[row : row + rows] != -1).any()):
            return "a row in two tiles, or outside"
        owner[row : row + rows] = expert + groups.first
    if count != sum(rows > 0 for rows in found[2]):
        return "another count than tiles"
    if (np.diff(np.sign(found[2])) > 0).any():
        return "an idle tile before one with rows"
    want = np.full(groups.rows, -1)
    want[: sizes.sum()] = np.repeat(np.arange(EXPERTS), sizes)
    want[(want < groups.first) | (want >= groups.first + groups.experts)] = -1
    return None if (owner == want).all() else "a row without its expert, or another's"


def search(groups: Groups, height: int, all_sizes: np.ndarray) -> tuple[list, np.ndarray]:
    """Return the tiles of many group sizes, and how many the counter counts."""
    find = groups.finder(height, interpret=True)
    count = groups.counter(height, interpret=True)
    index = jnp.arange(groups.tiles(height))

    def both(sizes):
        return jax.vmap(lambda i: find(sizes, i))(index), count(sizes)

    found, counts = jax.jit(jax.vmap(both))(jnp.asarray(all_sizes, jnp.int32))
    return [np.asarray(x) for x in found], np.asarray(counts)


@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("height", [8, 24, 96])
def test_tiles_cover_every_pattern_of_empty_experts(height, align):
    all_sizes = patterns(EXPERTS, (1, 2, 7, 8, 9, 130))
    groups = Groups(int(all_sizes.sum(1).max()), EXPERTS, 2, 5, align)
    found, counts = search(groups, height, all_sizes)
    for i, sizes in enumerate(all_sizes):
        assert fault(groups, height, sizes, [x[i] for x in found], counts[i]) is None


def test_wrong_tiles_are_noticed():
    """Negative control: a row less, a row later, another expert, a tile more."""
    sizes = np.array([[3, 0, 20, 1, 0, 0, 0, 0]])
    groups = Groups(24, EXPERTS, 0, EXPERTS, 8)
    found, counts = search(groups, 8, sizes)
    tiles = [x[0] for x in found]
    assert fault(groups, 8, sizes[0], tiles, counts[0]) is None
    assert fault(groups, 8, sizes[0], tiles, counts[0] + 1) is not None
    for field, change in ((0, 1), (1, 1), (2, -1)):
        wrong = [x.copy() for x in tiles]
        wrong[field][1] += change
        assert fault(groups, 8, sizes[0], wrong, counts[0]) is not None


def test_the_bound_is_reached():
    """Aligned, every second expert's rows straddle two tiles: no smaller launch would do."""
    sizes = np.array([[7, 2, 6, 2, 6, 2, 6, 2]])
    assert search(Groups(33, 8, 0, 8, 8), 8, sizes)[1] == 12 == Groups(33, 8, 0, 8, 8).tiles(8)
    assert Groups(33, 8, 0, 8).tiles(8) == 11
    assert Groups(3, 128, 0, 128, 8).tiles(128) == 3
    # Rows that share one stretch of 8 share no tile, and none straddles two.
    assert Groups(8, 128, 0, 128, 8).tiles(8) == Groups(8, 128, 0, 128, 8).tiles(16) == 8
