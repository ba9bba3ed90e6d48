"""The K-quants of GGUF, Q2_K to Q6_K: super-blocks of 256 inputs with quantized sub-scales.

A sub-scale of a few bits covers 16 or 32 inputs, and a float16 super-scale covers the super-block;
their product is the scale.  Q2_K, Q4_K and Q5_K have minima of the same build, which are offsets.
Sub-scales stay integers (``uint8`` or ``int8``), so nothing is rounded.
"""

from __future__ import annotations

import numpy as np

from jaxquant.arrays.codes import CODES
from jaxquant.formats.gguf_blocks import BlockFormat, Parts
from jaxquant.formats.gguf_types import TYPES, as_bytes, half_at, pack_strips, unpack_strips


def _split_q2_k(blocks: np.ndarray) -> Parts:
    packed = blocks[:, :16]
    return Parts(
        unpack_strips(blocks[:, 16:80], 2, 32),
        (packed & np.uint8(15), half_at(blocks, 80)),
        (packed >> np.uint8(4), half_at(blocks, 82)),
    )


def _join_q2_k(parts: Parts) -> np.ndarray:
    (scales, d), (minima, dmin) = parts.scales, parts.zeros
    packed = scales | minima << np.uint8(4)
    codes = pack_strips(parts.patterns, 2, 32)
    return np.concatenate([packed, codes, as_bytes(d), as_bytes(dmin)], axis=-1)


def _split_q3_k(blocks: np.ndarray) -> Parts:
    # A cleared high bit subtracts 4: the excess form of a signed 3-bit code.
    high = unpack_strips(blocks[:, :32], 1, 32)
    low = unpack_strips(blocks[:, 32:96], 2, 32)
    scales = unpack_strips(blocks[:, 96:104], 4, 8)
    scales |= unpack_strips(blocks[:, 104:108], 2, 4) << np.uint8(4)
    return Parts(
        low | high << np.uint8(2), (scales.view(np.int8) - np.int8(32), half_at(blocks, 108))
    )


def _join_q3_k(parts: Parts) -> np.ndarray:
    scales, d = parts.scales
    excess = (scales + np.int8(32)).view(np.uint8)
    return np.concatenate(
        [
            pack_strips(parts.patterns >> np.uint8(2), 1, 32),
            pack_strips(parts.patterns & np.uint8(3), 2, 32),
            pack_strips(excess & np.uint8(15), 4, 8),
            pack_strips(excess >> np.uint8(4), 2, 4),
            as_bytes(d),
        ],
        axis=-1,
    )


def _six_bit_pairs(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight 6-bit scales and eight 6-bit minima from 12 bytes: two uint8 ``[n, 8]``.

    The first four of each lie in the low bits of bytes 0-3 and 4-7; the last four share bytes 8-11
    as nibbles and keep their upper two bits on top of the first four.
    """
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    low, six = np.uint8(15), np.uint8(63)
    scales = [first & six, (third & low) | (first >> np.uint8(6)) << np.uint8(4)]
    minima = [second & six, (third >> np.uint8(4)) | (second >> np.uint8(6)) << np.uint8(4)]
    return np.concatenate(scales, axis=-1), np.concatenate(minima, axis=-1)


def _pack_six_bit_pairs(scales: np.ndarray, minima: np.ndarray) -> np.ndarray:
    """Inverse of :func:`_six_bit_pairs`."""
    four, low = np.uint8(4), np.uint8(15)
    first = scales[:, :4] | (scales[:, 4:] >> four) << np.uint8(6)
    second = minima[:, :4] | (minima[:, 4:] >> four) << np.uint8(6)
    third = (scales[:, 4:] & low) | (minima[:, 4:] & low) << four
    return np.concatenate([first, second, third], axis=-1)


def _split_q4_k(blocks: np.ndarray) -> Parts:
    scales, minima = _six_bit_pairs(blocks[:, 4:16])
    return Parts(
        unpack_strips(blocks[:, 16:], 4, 32),
        (scales, half_at(blocks, 0)),
        (minima, half_at(blocks, 2)),
    )


def _head_with_minima(parts: Parts) -> list[np.ndarray]:
    (scales, d), (minima, dmin) = parts.scales, parts.zeros
    return [as_bytes(d), as_bytes(dmin), _pack_six_bit_pairs(scales, minima)]


def _join_q4_k(parts: Parts) -> np.ndarray:
    codes = pack_strips(parts.patterns, 4, 32)
    return np.concatenate([*_head_with_minima(parts), codes], axis=-1)


def _split_q5_k(blocks: np.ndarray) -> Parts:
    scales, minima = _six_bit_pairs(blocks[:, 4:16])
    high = unpack_strips(blocks[:, 16:48], 1, 32)
    return Parts(
        unpack_strips(blocks[:, 48:], 4, 32) | high << np.uint8(4),
        (scales, half_at(blocks, 0)),
        (minima, half_at(blocks, 2)),
    )


def _join_q5_k(parts: Parts) -> np.ndarray:
    high = pack_strips(parts.patterns >> np.uint8(4), 1, 32)
    low = pack_strips(parts.patterns & np.uint8(15), 4, 32)
    return np.concatenate([*_head_with_minima(parts), high, low], axis=-1)


def _split_q6_k(blocks: np.ndarray) -> Parts:
    low = unpack_strips(blocks[:, :128], 4, 64)
    high = unpack_strips(blocks[:, 128:192], 2, 32)
    scales = blocks[:, 192:208].view(np.int8)
    return Parts(low | high << np.uint8(4), (scales, half_at(blocks, 208)))


def _join_q6_k(parts: Parts) -> np.ndarray:
    scales, d = parts.scales
    low = pack_strips(parts.patterns & np.uint8(15), 4, 64)
    high = pack_strips(parts.patterns >> np.uint8(4), 2, 32)
    return np.concatenate([low, high, as_bytes(scales), as_bytes(d)], axis=-1)


K_QUANTS = (
    BlockFormat(TYPES["Q2_K"], CODES["uint2"], (16, 256), (16, 256), _split_q2_k, _join_q2_k),
    BlockFormat(TYPES["Q3_K"], CODES["int3"], (16, 256), (), _split_q3_k, _join_q3_k),
    BlockFormat(TYPES["Q4_K"], CODES["uint4"], (32, 256), (32, 256), _split_q4_k, _join_q4_k),
    BlockFormat(TYPES["Q5_K"], CODES["uint5"], (32, 256), (32, 256), _split_q5_k, _join_q5_k),
    BlockFormat(TYPES["Q6_K"], CODES["int6"], (16, 256), (), _split_q6_k, _join_q6_k),
)
