"""The nibble orders of AWQ: eight outputs to a word (gemm), interleaved rows (gemv_fast)."""

from __future__ import annotations

import numpy as np

from jaxquant.transforms.repack import pack_bits, transpose_copy, unpack_bits

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Nibble ``i`` of a gemm word holds output ``AWQ_ORDER[i]`` of its eight."""

_SWAPS = ((4, 0x0000FFFF), (2, 0x00FF00FF), (1, 0x0F0F0F0F))
"""(rows apart, mask) of the three stages that transpose an 8x8 matrix of nibbles."""


def _transpose_nibbles(rows: list[np.ndarray]) -> list[np.ndarray]:
    """Transpose eight uint32 arrays seen as 8x8 nibbles: nibble j of row i goes to i of row j."""
    rows = list(rows)
    for apart, mask in _SWAPS:
        shift, low = np.uint32(4 * apart), np.uint32(mask)
        for i in range(8):
            if i & apart:
                continue
            a, b = rows[i], rows[i + apart]
            crossed = ((a >> shift) ^ b) & low
            rows[i], rows[i + apart] = a ^ (crossed << shift), b ^ crossed
    return rows


def gemm_to_data(words: np.ndarray) -> np.ndarray:
    """Codes packed along ``in``, uint8 ``[out, in/2]``, of gemm words int32 ``[in, out/8]``.

    Works on whole words: eight inputs by eight outputs are transposed inside registers, then words
    are transposed in strips that stay in the cache.
    """
    inputs, columns = words.shape
    if inputs % 8:
        patterns = words_to_patterns(words)
        return patterns if inputs % 2 else pack_bits(patterns, 4, -1)
    blocks = words.view(np.uint32).reshape(inputs // 8, 8, columns)
    data = np.empty((columns, 8, inputs // 8), np.uint32)
    strip = max(16, (1 << 15) // max(1, columns))
    for start in range(0, inputs // 8, strip):
        part = blocks[start : start + strip]
        rows = _transpose_nibbles([part[:, i] for i in range(8)])
        for nibble, output in enumerate(AWQ_ORDER):
            data[:, output, start : start + strip] = transpose_copy(rows[nibble])
    return data.reshape(columns * 8, inputs // 8).view(np.uint8)


def words_to_patterns(words: np.ndarray) -> np.ndarray:
    """Codes uint8 ``[out, in]`` of gemm words int32 ``[in, out/8]``, for any ``in``."""
    inputs, columns = words.shape
    nibbles = unpack_bits(np.ascontiguousarray(words).view(np.uint8), 4, -1)
    ordered = nibbles.reshape(inputs, columns, 8)[:, :, np.argsort(AWQ_ORDER)]
    return np.ascontiguousarray(ordered.reshape(inputs, columns * 8).T)


def patterns_to_gemm(patterns: np.ndarray) -> np.ndarray:
    """Gemm words int32 ``[in, out/8]`` of codes uint8 ``[out, in]``."""
    out, inputs = patterns.shape
    nibbles = patterns.T.reshape(inputs, out // 8, 8)[:, :, list(AWQ_ORDER)]
    packed = pack_bits(np.ascontiguousarray(nibbles.reshape(inputs, out)), 4, -1)
    return np.ascontiguousarray(packed).view(np.int32)


def _fast_position(inputs: int) -> tuple[np.ndarray, np.ndarray]:
    """(word column, nibble) ``[4, in]`` of output ``n % 4`` and input ``k`` in gemv_fast order."""
    k = np.arange(inputs)
    k32 = k % 32
    position = 8 * ((k32 % 8) // 2) + 2 * (k32 // 8) + k32 % 2
    within = 8 * (position // 8) + 4 * (position % 2) + (position % 8) // 2
    moved = 32 * (k // 32) + within
    flat = np.arange(4)[:, None] * 64 + moved % 64
    return moved // 64 * 64 + flat // 4, flat % 4


def fast_to_patterns(words: np.ndarray) -> np.ndarray:
    """Codes uint8 ``[out, in]`` of gemv_fast words int16 ``[out/4, in]``."""
    rows, inputs = words.shape
    column, nibble = _fast_position(inputs)
    elements = unpack_bits(np.ascontiguousarray(words).view(np.uint8), 4, -1)
    index = (4 * column + nibble).reshape(-1)
    return elements[:, index].reshape(4 * rows, inputs)


def patterns_to_fast(patterns: np.ndarray) -> np.ndarray:
    """Inverse of :func:`fast_to_patterns`."""
    out, inputs = patterns.shape
    column, nibble = _fast_position(inputs)
    elements = np.empty((out // 4, 4 * inputs), np.uint8)
    elements[:, (4 * column + nibble).reshape(-1)] = patterns.reshape(out // 4, 4 * inputs)
    return np.ascontiguousarray(pack_bits(elements, 4, -1)).view(np.int16)
