"""GGUF types of one float16 scale to 32 inputs: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 (and Q8_1, Q8_K).

``_0`` types are symmetric; ``_1`` types add a minimum, kept here as the offset ``-minimum`` (a sign
flip, hence exact).
"""

from __future__ import annotations

import numpy as np

from jaxquant.arrays.codes import CODES
from jaxquant.formats.gguf_blocks import BlockFormat, Parts
from jaxquant.formats.gguf_types import TYPES, as_bytes, half_at, pack_strips, unpack_strips


def _high_bits(blocks: np.ndarray, offset: int) -> np.ndarray:
    """The fifth bits, one to an element in element order, moved to bit 4: ``[n, 32]``."""
    bits = np.unpackbits(blocks[:, offset : offset + 4], axis=-1, bitorder="little")
    return bits << np.uint8(4)


def _pack_high_bits(patterns: np.ndarray) -> np.ndarray:
    return np.packbits(patterns >> np.uint8(4), axis=-1, bitorder="little")


def _split_q4_0(blocks: np.ndarray) -> Parts:
    return Parts(unpack_strips(blocks[:, 2:], 4, 16), (half_at(blocks, 0),))


def _join_q4_0(parts: Parts) -> np.ndarray:
    return np.concatenate([as_bytes(parts.scales[0]), pack_strips(parts.patterns, 4, 16)], axis=-1)


def _split_q4_1(blocks: np.ndarray) -> Parts:
    patterns = unpack_strips(blocks[:, 4:], 4, 16)
    return Parts(patterns, (half_at(blocks, 0),), (-half_at(blocks, 2),))


def _join_q4_1(parts: Parts) -> np.ndarray:
    head = [as_bytes(parts.scales[0]), as_bytes(-parts.zeros[0])]
    return np.concatenate([*head, pack_strips(parts.patterns, 4, 16)], axis=-1)


def _split_q5_0(blocks: np.ndarray) -> Parts:
    patterns = unpack_strips(blocks[:, 6:], 4, 16) | _high_bits(blocks, 2)
    return Parts(patterns, (half_at(blocks, 0),))


def _join_q5_0(parts: Parts) -> np.ndarray:
    low = pack_strips(parts.patterns & np.uint8(15), 4, 16)
    return np.concatenate(
        [as_bytes(parts.scales[0]), _pack_high_bits(parts.patterns), low], axis=-1
    )


def _split_q5_1(blocks: np.ndarray) -> Parts:
    patterns = unpack_strips(blocks[:, 8:], 4, 16) | _high_bits(blocks, 4)
    return Parts(patterns, (half_at(blocks, 0),), (-half_at(blocks, 2),))


def _join_q5_1(parts: Parts) -> np.ndarray:
    low = pack_strips(parts.patterns & np.uint8(15), 4, 16)
    head = [as_bytes(parts.scales[0]), as_bytes(-parts.zeros[0])]
    return np.concatenate([*head, _pack_high_bits(parts.patterns), low], axis=-1)


def _split_q8_0(blocks: np.ndarray) -> Parts:
    return Parts(blocks[:, 2:].view(np.int8), (half_at(blocks, 0),))


def _join_q8_0(parts: Parts) -> np.ndarray:
    return np.concatenate([as_bytes(parts.scales[0]), as_bytes(parts.patterns)], axis=-1)


def _split_q8_1(blocks: np.ndarray) -> Parts:
    # Bytes 2 and 3 are the scaled sum of the codes, a by-product that carries no information.
    return Parts(blocks[:, 4:].view(np.int8), (half_at(blocks, 0),))


def _split_q8_k(blocks: np.ndarray) -> Parts:
    # The 16 sums at the end of the block are derived from the codes.
    return Parts(blocks[:, 4:260].view(np.int8), (as_bytes(blocks[:, :4]).view("<f4"),))


LEGACY = (
    BlockFormat(TYPES["Q4_0"], CODES["int4"], (32,), (), _split_q4_0, _join_q4_0),
    BlockFormat(TYPES["Q4_1"], CODES["uint4"], (32,), (32,), _split_q4_1, _join_q4_1),
    BlockFormat(TYPES["Q5_0"], CODES["int5"], (32,), (), _split_q5_0, _join_q5_0),
    BlockFormat(TYPES["Q5_1"], CODES["uint5"], (32,), (32,), _split_q5_1, _join_q5_1),
    BlockFormat(TYPES["Q8_0"], CODES["int8"], (32,), (), _split_q8_0, _join_q8_0),
    BlockFormat(TYPES["Q8_1"], CODES["int8"], (32,), (), _split_q8_1, None),
    BlockFormat(TYPES["Q8_K"], CODES["int8"], (256,), (), _split_q8_k, None),
)


def quantize_q8_0(values: np.ndarray) -> np.ndarray:
    """Quantize float32 ``[n, 32]`` to Q8_0 blocks, bit for bit as llama.cpp does.

    Codes are found with the float32 scale; only the stored scale is rounded to float16.  Halves
    round away from zero.
    """
    scale = np.abs(values).max(axis=-1, keepdims=True) / np.float32(127)
    codes = values * _inverse(scale)
    whole = np.trunc(codes)
    rounded = whole + np.trunc(2 * (codes - whole))
    return _join_q8_0(Parts(rounded.astype(np.int8), (_stored(scale),)))


def quantize_q4_0(values: np.ndarray) -> np.ndarray:
    """Quantize float32 ``[n, 32]`` to Q4_0 blocks, bit for bit as llama.cpp does.

    The element of largest magnitude becomes code -8, so the scale takes its opposite sign.
    """
    at = np.abs(values).argmax(axis=-1, keepdims=True)
    scale = np.take_along_axis(values, at, axis=-1) / np.float32(-8)
    codes = np.trunc(values * _inverse(scale) + np.float32(8.5)).astype(np.uint8)
    return _join_q4_0(Parts(np.minimum(codes, 15), (_stored(scale),)))


def _inverse(scale: np.ndarray) -> np.ndarray:
    """``1 / scale``, and 0 for blocks of zeros (or so small that the inverse overflows)."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scale
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _stored(scale: np.ndarray) -> np.ndarray:
    """Round a scale to float16, to infinity where it does not fit; the caller checks."""
    with np.errstate(over="ignore"):
        return scale.astype("<f2")
