"""GGUF types whose codes are looked up in a small table: IQ4, MXFP4, NVFP4 and the ternary TQ."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from jaxquant.arrays.codes import CODES
from jaxquant.errors import FormatError
from jaxquant.formats.gguf_blocks import BlockFormat, Parts
from jaxquant.formats.gguf_types import TYPES, as_bytes, half_at, pack_strips, unpack_strips

_NEGATIVE_ZERO = np.uint8(8)


def _split_iq4_nl(blocks: np.ndarray) -> Parts:
    return Parts(unpack_strips(blocks[:, 2:], 4, 16), (half_at(blocks, 0),))


def _join_iq4_nl(parts: Parts) -> np.ndarray:
    return np.concatenate([as_bytes(parts.scales[0]), pack_strips(parts.patterns, 4, 16)], axis=-1)


def _split_iq4_xs(blocks: np.ndarray) -> Parts:
    scales = unpack_strips(blocks[:, 4:8], 4, 1)
    scales |= unpack_strips(blocks[:, 2:4], 2, 1) << np.uint8(4)
    return Parts(
        unpack_strips(blocks[:, 8:], 4, 16),
        (scales.view(np.int8) - np.int8(32), half_at(blocks, 0)),
    )


def _join_iq4_xs(parts: Parts) -> np.ndarray:
    scales, d = parts.scales
    excess = (scales + np.int8(32)).view(np.uint8)
    high = pack_strips(excess >> np.uint8(4), 2, 1)
    low = pack_strips(excess & np.uint8(15), 4, 1)
    return np.concatenate([as_bytes(d), high, low, pack_strips(parts.patterns, 4, 16)], axis=-1)


def _unsigned_zeros(patterns: np.ndarray) -> np.ndarray:
    """Replace -0 by +0: GGUF tables have one zero, the e2m1 code has two."""
    return np.where(patterns == _NEGATIVE_ZERO, np.uint8(0), patterns)


def _split_mxfp4(blocks: np.ndarray) -> Parts:
    patterns = _unsigned_zeros(unpack_strips(blocks[:, 1:], 4, 16))
    return Parts(patterns, (np.ascontiguousarray(blocks[:, :1]).view(ml_dtypes.float8_e8m0fnu),))


def _join_mxfp4(parts: Parts) -> np.ndarray:
    return np.concatenate([as_bytes(parts.scales[0]), pack_strips(parts.patterns, 4, 16)], axis=-1)


def _split_nvfp4(blocks: np.ndarray) -> Parts:
    # The scale byte is unsigned: its top bit does not count, and 0x7F means zero, not NaN.
    scales = blocks[:, :4] & np.uint8(0x7F)
    if (blocks[:, :4] == 0xFF).any():
        raise FormatError("NVFP4 scale", "the byte 0xFF", "an unsigned e4m3 of at most 0x7F")
    scales = np.where(scales == 0x7F, np.uint8(0), scales)
    patterns = _unsigned_zeros(unpack_strips(blocks[:, 4:], 4, 8))
    return Parts(patterns, (scales.view(ml_dtypes.float8_e4m3fn),))


def _join_nvfp4(parts: Parts) -> np.ndarray:
    return np.concatenate([as_bytes(parts.scales[0]), pack_strips(parts.patterns, 4, 8)], axis=-1)


def _split_tq2_0(blocks: np.ndarray) -> Parts:
    return Parts(unpack_strips(blocks[:, :64], 2, 32), (half_at(blocks, 64),))


def _join_tq2_0(parts: Parts) -> np.ndarray:
    return np.concatenate([pack_strips(parts.patterns, 2, 32), as_bytes(parts.scales[0])], axis=-1)


_TQ1_RUNS = ((0, 32, 5), (32, 48, 5), (48, 52, 4))
"""First and last byte of each run of TQ1_0, and how many ternary digits its bytes hold."""


def _split_tq1_0(blocks: np.ndarray) -> Parts:
    digits = []
    for start, stop, count in _TQ1_RUNS:
        # A byte is a fraction of 256 in base 3: multiplying by 3 moves a digit out at the top.
        powers = (3 ** np.arange(count)).astype(np.uint8)[:, None]
        rest = blocks[:, None, start:stop] * powers
        digits.append(((rest.astype(np.uint16) * 3) >> 8).astype(np.uint8).reshape(len(blocks), -1))
    return Parts(np.concatenate(digits, axis=-1), (half_at(blocks, 52),))


def _join_tq1_0(parts: Parts) -> np.ndarray:
    if parts.patterns.max(initial=0) > 2:
        raise FormatError("TQ1_0", "a code of value 2", "ternary codes are -1, 0 and 1")
    pieces, at = [], 0
    for start, stop, count in _TQ1_RUNS:
        width = stop - start
        digits = parts.patterns[:, at : at + width * count].reshape(-1, count, width)
        powers = (3 ** np.arange(4, 4 - count, -1)).astype(np.uint16)[:, None]
        number = (digits * powers).sum(axis=1, dtype=np.uint32)
        # Rounded up, so that flooring on the way back finds every digit again.
        pieces.append(((number * 256 + 242) // 243).astype(np.uint8))
        at += width * count
    return np.concatenate([*pieces, as_bytes(parts.scales[0])], axis=-1)


TABLE_TYPES = (
    BlockFormat(TYPES["IQ4_NL"], CODES["iq4"], (32,), (), _split_iq4_nl, _join_iq4_nl),
    BlockFormat(TYPES["IQ4_XS"], CODES["iq4"], (32, 256), (), _split_iq4_xs, _join_iq4_xs),
    BlockFormat(TYPES["MXFP4"], CODES["e2m1"], (32,), (), _split_mxfp4, _join_mxfp4),
    BlockFormat(TYPES["NVFP4"], CODES["e2m1"], (16,), (), _split_nvfp4, _join_nvfp4),
    BlockFormat(TYPES["TQ1_0"], CODES["ternary"], (256,), (), _split_tq1_0, _join_tq1_0),
    BlockFormat(TYPES["TQ2_0"], CODES["ternary"], (256,), (), _split_tq2_0, _join_tq2_0),
)
