"""GGUF weights: between the blocks of a file and QTensors, bit for bit.

=====================  =======================================  ===============================
type                   data                                     scales and offsets (inputs each)
=====================  =======================================  ===============================
Q4_0  Q5_0  Q8_0       int4, int5 (4 + 1 bits), int8            f16 per 32
Q4_1  Q5_1             uint4, uint5                             f16 per 32, offset f16 per 32
Q2_K                   uint2                                    u4 per 16 x f16 per 256, both twice
Q4_K  Q5_K             uint4, uint5                             u6 per 32 x f16 per 256, both twice
Q3_K  Q6_K             int3 (2 + 1 bits), int6 (4 + 2 bits)     int8 per 16 x f16 per 256
IQ4_NL  IQ4_XS         iq4 table                                f16 per 32; int8 / 32 x f16 / 256
MXFP4  NVFP4           e2m1                                     e8m0 per 32; e4m3 per 16 (x one f32)
TQ1_0  TQ2_0           ternary, two bits                        f16 per 256
F32  F16  BF16         dense                                    none
IQ1  IQ2  IQ3          decoded to f32 when read
=====================  =======================================  ===============================

Everything but the last row keeps its width and can be written back without loss.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import jax
import ml_dtypes
import numpy as np

from jaxquant.arrays.codes import CODES, Code
from jaxquant.arrays.layout import WHOLE, Grid, Layout, dense_layout, packed_grids
from jaxquant.arrays.qtensor import QTensor, dense
from jaxquant.errors import FormatError
from jaxquant.formats.gguf_blocks import BlockFormat, Parts
from jaxquant.formats.gguf_codebook import CODEBOOK_TYPES, codebook_scales, dequantize_codebook
from jaxquant.formats.gguf_kquants import K_QUANTS
from jaxquant.formats.gguf_legacy import LEGACY
from jaxquant.formats.gguf_tables import TABLE_TYPES
from jaxquant.formats.gguf_types import GgmlType
from jaxquant.transforms.repack import pack_codes

AXES = ("out", "in")
BLOCK_FORMATS: dict[str, BlockFormat] = {
    fmt.type.name: fmt for fmt in (*LEGACY, *K_QUANTS, *TABLE_TYPES)
}
PLAIN_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I8": np.dtype("i1"),
    "I16": np.dtype("<i2"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}
DENSE_CODES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_CHUNK = 1 << 20
"""Elements decoded at a time: bounds the temporaries, and they stay in the cache."""


def layout_of(kind: GgmlType, inputs: int, tensor_scale: bool = False) -> Layout:
    """The layout that a weight of this type gets, known before a byte is read.

    Args:
        kind: type in the file.
        inputs: extent of ``in``.
        tensor_scale: whether a float32 factor of the whole tensor comes with it (NVFP4).
    Raises:
        FormatError: the type holds integers that are no weights.
    """
    if kind.name in BLOCK_FORMATS:
        fmt = BLOCK_FORMATS[kind.name]
        scales: list[Grid] = [(1, step) for step in fmt.scale_steps]
        if tensor_scale:
            scales.append((WHOLE, WHOLE))
        return Layout(
            AXES,
            fmt.code,
            packed_grids(fmt.code, AXES, "in", inputs),
            tuple(scales),
            tuple((1, step) for step in fmt.zero_steps),
            "offset" if fmt.zero_steps else "symmetric",
        )
    if kind.name.startswith("I") and kind.name in PLAIN_DTYPES:
        raise FormatError(kind.name, "an integer tensor", "it is no weight", "read it as an array")
    return dense_layout(CODES[DENSE_CODES.get(kind.name, "f32")], AXES)


def _row_chunks(rows: int, inputs: int) -> Iterator[slice]:
    step = max(1, _CHUNK // inputs)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _blocks(raw: np.ndarray, kind: GgmlType, rows: slice, inputs: int) -> np.ndarray:
    """The blocks of some rows, ``[n, bytes]``, as a view of the file."""
    row_bytes = inputs // kind.elements * kind.bytes
    return raw[rows.start * row_bytes : rows.stop * row_bytes].reshape(-1, kind.bytes)


def check_finite(parts: Parts, where: str) -> None:
    """Raise where a scale or offset is infinite or no number."""
    for leaf in (*parts.scales, *parts.zeros):
        if leaf.dtype.itemsize > 1 or leaf.dtype == ml_dtypes.float8_e8m0fnu:
            bad = ~np.isfinite(leaf.astype(np.float32))
            if bad.any():
                raise FormatError(
                    where, f"{int(bad.sum())} scales that are not finite", "scales are numbers"
                )


def _whole(tensor_scale: np.ndarray, lead: Sequence[int], where: str) -> np.ndarray:
    """A tensor scale as the leaf ``[*lead, 1, 1]`` of a whole-axis grid."""
    scale = np.asarray(tensor_scale, np.float32).reshape(-1)
    count = int(np.prod(lead, dtype=np.int64))
    if scale.size not in (1, count) or not np.isfinite(scale).all():
        rule = f"one finite number, or {count}"
        raise FormatError(where, f"tensor scale {scale[:4].tolist()}", rule)
    return np.broadcast_to(scale, count).reshape(*lead, 1, 1).copy()


def decode(
    raw: np.ndarray,
    kind: GgmlType,
    shape: Sequence[int],
    where: str = "tensor",
    tensor_scale: np.ndarray | None = None,
) -> QTensor:
    """Turn a tensor's bytes into a QTensor without rounding anything.

    Args:
        raw: uint8, all bytes of the tensor.
        kind: its type.
        shape: ``[*lead, out, in]``; leading axes are stacked experts.
        where: file and tensor, for errors.
        tensor_scale: float32 factor of the whole tensor, or one for each leading index (NVFP4); it
            becomes a further scale leaf.
    Raises:
        FormatError: scales are not finite, the type is no weight, or a codebook is missing.
    """
    *lead, out, inputs = shape
    rows = int(np.prod(lead, dtype=np.int64)) * out
    layout = layout_of(kind, inputs, tensor_scale is not None)
    if kind.name in DENSE_CODES:
        return dense(raw.view(PLAIN_DTYPES[kind.name]).reshape(tuple(shape)), AXES)
    if layout.dense:
        return dense(dequantize(raw, kind, shape, where), AXES)
    fmt = BLOCK_FORMATS[kind.name]
    leaves: list[np.ndarray] = []
    for chunk in _row_chunks(rows, inputs):
        parts = fmt.split(_blocks(raw, kind, chunk, inputs))
        check_finite(parts, where)
        patterns = parts.patterns.reshape(-1, inputs)
        planes = pack_codes(patterns, fmt.code, layout.data)
        count = chunk.stop - chunk.start
        pieces = [leaf.reshape(count, -1) for leaf in (*planes, *parts.scales, *parts.zeros)]
        if not leaves:
            leaves = [np.empty((rows, piece.shape[1]), piece.dtype) for piece in pieces]
        for leaf, piece in zip(leaves, pieces, strict=True):
            leaf[chunk] = piece
    shaped = [leaf.reshape(*lead, out, leaf.shape[1]) for leaf in leaves]
    planes, rest = shaped[: len(layout.data)], shaped[len(layout.data) :]
    scales, zeros = rest[: len(fmt.scale_steps)], rest[len(fmt.scale_steps) :]
    if tensor_scale is not None:
        scales.append(_whole(tensor_scale, lead, where))
    return QTensor(tuple(planes), tuple(scales), tuple(zeros), layout).check(where)


@functools.lru_cache(maxsize=1024)
def abstract(kind: GgmlType, shape: tuple[int, ...], tensor_scale: bool = False) -> QTensor:
    """What :func:`decode` will return, with ``jax.ShapeDtypeStruct`` leaves, before a byte is read.

    Args:
        kind: type in the file.
        shape: ``[*lead, out, in]``.
        tensor_scale: whether a factor of the whole tensor comes with it.
    Raises:
        FormatError: the type is no weight, or its codebook is missing.
    """
    *lead, out, inputs = shape
    row = np.zeros(inputs // kind.elements * kind.bytes, np.uint8)
    one = np.ones(1, np.float32) if tensor_scale else None
    q = decode(row, kind, (1, inputs), kind.name, one)

    def grow(leaf: np.ndarray, grid: Grid) -> jax.ShapeDtypeStruct:
        rows = 1 if grid[0] == WHOLE else out
        return jax.ShapeDtypeStruct((*lead, rows, leaf.shape[-1]), leaf.dtype)

    return q.map(grow)


def _values(patterns: np.ndarray, code: Code) -> np.ndarray:
    if code.kind == "table":
        return np.asarray(code.table, np.float32)[patterns]
    return patterns.astype(np.float32) - np.float32(code.bias)


def _product(factors: Sequence[np.ndarray], start: np.ndarray) -> np.ndarray:
    """Multiply ``start [n, elements]`` by leaves that each cover equal runs of a block."""
    count, elements = start.shape
    for leaf in factors:
        run = leaf.shape[1]
        wide = start.reshape(count, run, elements // run) * leaf.astype(np.float32)[..., None]
        start = wide.reshape(count, elements)
    return start


def dequantize(
    raw: np.ndarray, kind: GgmlType, shape: Sequence[int], where: str = "tensor"
) -> np.ndarray:
    """Decode a tensor's bytes to numbers, as llama.cpp's reference decoders do, bit for bit.

    Args:
        raw: uint8, all bytes of the tensor.
        kind: its type.
        shape: logical shape; blocks run along the last axis.
        where: file and tensor, for errors.
    Returns:
        float32 of that shape; plain integers keep their own dtype.
    Raises:
        FormatError: scales are not finite, or a codebook is missing.
    """
    if kind.name in PLAIN_DTYPES:
        plain = raw.view(PLAIN_DTYPES[kind.name]).reshape(tuple(shape))
        return plain if kind.name.startswith("I") else plain.astype(np.float32)
    inputs = shape[-1]
    rows = int(np.prod(shape[:-1], dtype=np.int64))
    result = np.empty((rows, inputs), np.float32)
    for chunk in _row_chunks(rows, inputs):
        blocks = _blocks(raw, kind, chunk, inputs)
        if kind.name in CODEBOOK_TYPES:
            result[chunk] = dequantize_codebook(blocks, kind, where).reshape(-1, inputs)
            continue
        fmt = BLOCK_FORMATS[kind.name]
        parts = fmt.split(blocks)
        check_finite(parts, where)
        value = _product(parts.scales, _values(parts.patterns, fmt.code))
        if fmt.zero_steps:
            value -= _product(parts.zeros, np.ones_like(value))
        result[chunk] = value.reshape(-1, inputs)
    return result.reshape(tuple(shape))


def scales_of(
    raw: np.ndarray, kind: GgmlType, shape: Sequence[int], where: str = "tensor"
) -> np.ndarray | None:
    """The scales of a tensor, sub-scales multiplied by super-scales, or None for plain numbers.

    Args:
        raw: uint8, all bytes of the tensor.
        kind: its type.
        shape: logical shape.
        where: file and tensor, for errors.
    Returns:
        float32 ``[blocks, scales of a block]``.
    Raises:
        FormatError: scales are not finite.
    """
    if kind.name not in (*BLOCK_FORMATS, *CODEBOOK_TYPES):
        return None
    inputs, rows = shape[-1], int(np.prod(shape[:-1], dtype=np.int64))
    found = []
    for chunk in _row_chunks(rows, inputs):
        blocks = _blocks(raw, kind, chunk, inputs)
        if kind.name in CODEBOOK_TYPES:
            found.append(codebook_scales(blocks, kind))
            if not np.isfinite(found[-1]).all():
                raise FormatError(where, "scales that are not finite", "scales are numbers")
            continue
        parts = BLOCK_FORMATS[kind.name].split(blocks)
        check_finite(parts, where)
        fine = parts.scales[0].astype(np.float32)
        found.append(_product(parts.scales[1:], fine))
    return np.concatenate(found)
