"""Codes packed into 32-bit words along one axis, to and from canonical data leaves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxquant.arrays.codes import Code
from jaxquant.arrays.layout import packed_grids
from jaxquant.errors import FormatError
from jaxquant.formats.base import AXES
from jaxquant.transforms.repack import (
    elements_to_words,
    pack_codes,
    unpack_codes,
    words_to_elements,
)


def rows_to_data(words: np.ndarray, code: Code, count: int) -> tuple[np.ndarray, ...]:
    """Data planes ``[out, in / step]`` of words ``[out, W]`` whose bit stream runs along ``in``.

    Widths that divide 32 are already in our order, LSB first: words are only looked at as bytes.

    Args:
        words: int32 ``[out, W]``, rows of dense bit streams.
        code: alphabet of the elements.
        count: number of inputs.
    """
    grids = packed_grids(code, AXES, "in", count)
    if code.bits in (2, 4, 8) and grids[0][1] == 8 // code.bits:
        octets = np.ascontiguousarray(words).view(np.uint8)
        return (octets[:, : count * code.bits // 8],)
    return pack_codes(words_to_elements(words, code.bits, count), code, grids)


def data_to_rows(data: tuple[Any, ...], code: Code, count: int) -> np.ndarray:
    """Inverse of :func:`rows_to_data`, padded with zero bits to whole words."""
    return elements_to_words(patterns_of(data, code, count), code.bits)


def patterns_of(data: tuple[Any, ...], code: Code, count: int) -> np.ndarray:
    """Unsigned bit patterns ``[out, in]`` uint8 of canonical data planes."""
    planes = [np.asarray(plane).view(np.uint8) for plane in data]
    return unpack_codes(planes, code, packed_grids(code, AXES, "in", count))


def data_of(patterns: np.ndarray, code: Code) -> tuple[np.ndarray, ...]:
    """Inverse of :func:`patterns_of`."""
    return pack_codes(patterns, code, packed_grids(code, AXES, "in", patterns.shape[-1]))


def take_inputs(
    data: tuple[np.ndarray, ...], code: Code, count: int, index: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Data planes with their inputs in another order: entry ``i`` becomes input ``index[i]``."""
    grids = packed_grids(code, AXES, "in", count)
    return tuple(
        _take_plane(plane.view(np.uint8), grid[1], index)
        for plane, grid in zip(data, grids, strict=True)
    )


def _take_plane(plane: np.ndarray, per_byte: int, index: np.ndarray) -> np.ndarray:
    """:func:`take_inputs` of one plane, by strips of rows that stay in the cache.

    Elements are never interleaved: the first of every byte stand together, then the second, and
    the index is bent accordingly.
    """
    if per_byte == 1:
        return np.take(plane, index, axis=1)
    width, columns = 8 // per_byte, plane.shape[1]
    place = index % per_byte * columns + index // per_byte
    shifts = [np.uint8(width * i) for i in range(per_byte)]
    mask = np.uint8((1 << width) - 1)
    out = np.empty_like(plane, order="C")
    for start in range(0, plane.shape[0], 32):
        strip = plane[start : start + 32]
        parts = np.concatenate([(strip >> shift) & mask for shift in shifts], axis=1)
        packed = np.take(parts, place[::per_byte], axis=1)
        for i in range(1, per_byte):
            packed |= np.take(parts, place[i::per_byte], axis=1) << shifts[i]
        out[start : start + 32] = packed
    return out


def integer(config: Mapping[str, Any], key: str, *others: str) -> int:
    """An integer of a config, under the first of several keys that is present.

    Raises:
        FormatError: absent, or no integer (booleans and strings are not).
    """
    for name in (key, *others):
        if name in config:
            value = config[name]
            if isinstance(value, float) and value.is_integer():
                value = int(value)
            if type(value) is not int or abs(value) > 1 << 31:
                raise FormatError(f"quantization_config: {name}", repr(value)[:80], "an integer")
            return value
    raise FormatError(f"quantization_config: {key}", "absent", "the checkpoint's config gives it")
