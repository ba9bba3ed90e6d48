"""The element types of GGUF files, and the bit strips that their blocks are built from.

A GGUF row is a sequence of *blocks*, each a fixed number of bytes for a fixed number of consecutive
inputs.  Inside a block, codes narrower than a byte lie in *strips*: a run of bytes holds as many
consecutive runs of elements as fit, the lowest bits being the first run.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxquant.errors import FormatError


class GgmlType(NamedTuple):
    """One element type.

    Attributes:
        id: number in the file.
        name: the usual name, e.g. ``"Q4_K"``.
        elements: elements in one block.
        bytes: bytes of one block.
    """

    id: int
    name: str
    elements: int
    bytes: int


TYPES: dict[str, GgmlType] = {
    name: GgmlType(id, name, elements, size)
    for id, name, elements, size in (
        (0, "F32", 1, 4),
        (1, "F16", 1, 2),
        (2, "Q4_0", 32, 18),
        (3, "Q4_1", 32, 20),
        (6, "Q5_0", 32, 22),
        (7, "Q5_1", 32, 24),
        (8, "Q8_0", 32, 34),
        (9, "Q8_1", 32, 36),
        (10, "Q2_K", 256, 84),
        (11, "Q3_K", 256, 110),
        (12, "Q4_K", 256, 144),
        (13, "Q5_K", 256, 176),
        (14, "Q6_K", 256, 210),
        (15, "Q8_K", 256, 292),
        (16, "IQ2_XXS", 256, 66),
        (17, "IQ2_XS", 256, 74),
        (18, "IQ3_XXS", 256, 98),
        (19, "IQ1_S", 256, 50),
        (20, "IQ4_NL", 32, 18),
        (21, "IQ3_S", 256, 110),
        (22, "IQ2_S", 256, 82),
        (23, "IQ4_XS", 256, 136),
        (24, "I8", 1, 1),
        (25, "I16", 1, 2),
        (26, "I32", 1, 4),
        (27, "I64", 1, 8),
        (28, "F64", 1, 8),
        (29, "IQ1_M", 256, 56),
        (30, "BF16", 1, 2),
        (34, "TQ1_0", 256, 54),
        (35, "TQ2_0", 256, 66),
        (39, "MXFP4", 32, 17),
        (40, "NVFP4", 64, 36),
    )
}
BY_ID = {kind.id: kind for kind in TYPES.values()}
REFUSED = {
    **dict.fromkeys((4, 5), "Q4_2 and Q4_3 were removed from the format"),
    **dict.fromkeys((31, 32, 33), "the interleaved Q4_0 variants were removed from the format"),
    **dict.fromkeys((36, 37, 38), "the interleaved IQ4_NL variants were removed from the format"),
    41: "the block layout of Q1_0 is not documented well enough to read it",
}


def type_of_id(number: int, where: str) -> GgmlType:
    """Return the type with this number.

    Raises:
        FormatError: the number is unknown, or its type was removed; the message says which.
    """
    if number in BY_ID:
        return BY_ID[number]
    reason = REFUSED.get(number, "no such type is known")
    raise FormatError(where, f"element type {number}", reason, "quantize the model again")


def unpack_strips(data: np.ndarray, width: int, strip: int) -> np.ndarray:
    """Read codes that lie in strips.

    Args:
        data: uint8 ``[blocks, B]``, ``B`` a multiple of ``strip``.
        width: bits of a code; 1, 2 or 4.
        strip: bytes in one strip; ``strip * 8 // width`` consecutive elements share it.
    Returns:
        uint8 ``[blocks, B * 8 // width]`` in element order.
    """
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    strips = data.reshape(data.shape[0], -1, 1, strip)
    return ((strips >> shifts) & np.uint8((1 << width) - 1)).reshape(data.shape[0], -1)


def pack_strips(codes: np.ndarray, width: int, strip: int) -> np.ndarray:
    """Inverse of :func:`unpack_strips`."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    runs = codes.astype(np.uint8).reshape(codes.shape[0], -1, 8 // width, strip)
    return np.bitwise_or.reduce(runs << shifts, axis=2).reshape(codes.shape[0], -1)


def half_at(blocks: np.ndarray, offset: int) -> np.ndarray:
    """Read the float16 at byte ``offset`` of every block: ``[blocks, 1]``."""
    return np.ascontiguousarray(blocks[:, offset : offset + 2]).view("<f2")


def as_bytes(array: np.ndarray) -> np.ndarray:
    """View the last axis of a contiguous array as bytes: uint8 ``[blocks, n * itemsize]``."""
    return np.ascontiguousarray(array).view(np.uint8)
