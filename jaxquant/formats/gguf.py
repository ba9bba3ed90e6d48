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
from jaxquant.formats.gguf_codebook import CODEBOOK_TYPES, dequantize_codebook
from jaxquant.formats.gguf_kquants import K_QUANTS
from jaxquant.formats.gguf_legacy import LEGACY, quantize_q4_0, quantize_q8_0
from jaxquant.formats.gguf_tables import TABLE_TYPES
from jaxquant.formats.gguf_types import TYPES, GgmlType
from jaxquant.transforms.repack import pack_codes, unpack_codes
from jaxquant.transforms.structure import refine, to_axes

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
_DENSE = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
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
    return dense_layout(CODES[_DENSE.get(kind.name, "f32")], AXES)


def _row_chunks(rows: int, inputs: int) -> Iterator[slice]:
    step = max(1, _CHUNK // inputs)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _blocks(raw: np.ndarray, kind: GgmlType, rows: slice, inputs: int) -> np.ndarray:
    """The blocks of some rows, ``[n, bytes]``, as a view of the file."""
    row_bytes = inputs // kind.elements * kind.bytes
    return raw[rows.start * row_bytes : rows.stop * row_bytes].reshape(-1, kind.bytes)


def _check_finite(parts: Parts, where: str) -> None:
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
    if kind.name in _DENSE:
        return dense(raw.view(PLAIN_DTYPES[kind.name]).reshape(tuple(shape)), AXES)
    if layout.dense:
        return dense(dequantize(raw, kind, shape, where), AXES)
    fmt = BLOCK_FORMATS[kind.name]
    leaves: list[np.ndarray] = []
    for chunk in _row_chunks(rows, inputs):
        parts = fmt.split(_blocks(raw, kind, chunk, inputs))
        _check_finite(parts, where)
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
        _check_finite(parts, where)
        value = _product(parts.scales, _values(parts.patterns, fmt.code))
        if fmt.zero_steps:
            value -= _product(parts.zeros, np.ones_like(value))
        result[chunk] = value.reshape(-1, inputs)
    return result.reshape(tuple(shape))


def type_of(q: QTensor) -> GgmlType | None:
    """The GGUF type that holds ``q`` exactly as it is laid out, or None.

    A layout does not say in which dtype its scales are; :func:`encode` checks that they fit.
    """
    layout = to_axes(q, AXES).layout
    if layout.dense:
        return TYPES[{code: name for name, code in _DENSE.items()}[layout.code.name]]
    inputs = q.extent("in")
    for fmt in reversed(BLOCK_FORMATS.values()):
        if fmt.join is None or inputs % fmt.type.elements:
            continue
        scaled = fmt.type.name == "NVFP4" and len(layout.scales) == 2
        if layout == layout_of(fmt.type, inputs, scaled):
            return fmt.type
    return None


def _fitted(q: QTensor, fmt: BlockFormat, where: str) -> QTensor:
    """``q`` in the layout of ``fmt``, with finer scale cells where its groups are larger."""
    if q.perm is not None or q.pre_scale is not None:
        raise FormatError(where, "an act-order or pre-scaled weight", "GGUF has no place for it")
    q = to_axes(q, AXES)
    inputs = q.extent("in")
    if inputs % fmt.type.elements == 0:
        layout = layout_of(fmt.type, inputs, fmt.type.name == "NVFP4" and len(q.scales) == 2)
        if q.layout == layout:
            return q
        same = (q.layout.code, q.layout.affine) == (layout.code, layout.affine)
        if same and len(q.scales) == len(layout.scales) == 1:
            step = q.layout.scales[0][1]
            if step == WHOLE or step % fmt.scale_steps[0] == 0:
                q = refine(refine(q, "out", 1), "in", fmt.scale_steps[0])
                if q.layout == layout:
                    return q
    rule = f"{fmt.type.name} blocks of {fmt.type.elements} inputs"
    raise FormatError(where, f"{q.layout} of {inputs} inputs", rule, "quantize() to this type")


def encode(q: QTensor, kind: GgmlType, where: str = "tensor") -> np.ndarray:
    """Write a QTensor as GGUF blocks without rounding anything.

    The float32 factor of an NVFP4 tensor is no part of its blocks; it is ``q.scales[1]``.

    Args:
        q: ``[*lead, out, in]`` in the layout of ``kind``, or with larger groups of it.
        kind: the type to write.
        where: tensor name, for errors.
    Returns:
        uint8, all bytes of the tensor.
    Raises:
        FormatError: the layout is another, or a scale does not fit its dtype in the file.
    """
    if kind.name in PLAIN_DTYPES:
        q = to_axes(q, AXES)
        array = np.ascontiguousarray(q.data[0])
        if not q.layout.dense or array.dtype != PLAIN_DTYPES[kind.name]:
            raise FormatError(where, str(q.layout), f"a dense {kind.name} array")
        return array.reshape(-1).view(np.uint8)
    fmt = BLOCK_FORMATS.get(kind.name)
    if fmt is None or fmt.join is None:
        raise FormatError(where, f"type {kind.name}", "it can be read but not written")
    q = _fitted(q, fmt, where)
    like = fmt.split(np.zeros((1, kind.bytes), np.uint8))
    elements = kind.elements

    def leaf(array: np.ndarray, like: np.ndarray, cells: int) -> np.ndarray:
        array = np.asarray(array)
        with np.errstate(over="ignore"):
            cast = array.astype(like.dtype)
        if not np.array_equal(cast.astype(np.float32), array.astype(np.float32)):
            raise FormatError(
                where, f"scales that {like.dtype} cannot hold", f"{kind.name} keeps {like.dtype}"
            )
        return cast.reshape(-1, cells)

    counts = [elements // step for step in (*fmt.scale_steps, *fmt.zero_steps)]
    leaves = [
        leaf(array, example, count)
        for array, example, count in zip(
            (*q.scales[: len(fmt.scale_steps)], *q.zeros),
            (*like.scales, *like.zeros),
            counts,
            strict=True,
        )
    ]
    planes = tuple(np.asarray(plane) for plane in q.data)
    patterns = unpack_codes(planes, fmt.code, q.layout.data).reshape(-1, elements)
    split = len(fmt.scale_steps)
    joined = fmt.join(Parts(patterns, tuple(leaves[:split]), tuple(leaves[split:])))
    return joined.reshape(-1)


def quantize(values: np.ndarray, kind: GgmlType, where: str = "tensor") -> np.ndarray:
    """Quantize numbers to GGUF blocks: Q8_0 and Q4_0 bit for bit as llama.cpp, or plain floats.

    Args:
        values: float32, any shape whose last axis is a multiple of the block.
        kind: the type to write.
        where: tensor name, for errors.
    Returns:
        uint8, all bytes of the tensor.
    Raises:
        FormatError: no quantizer for this type, a ragged last axis, or values out of range.
    """
    if not np.isfinite(values).all():
        raise FormatError(where, "values that are not finite", "weights are numbers")
    if kind.name in ("F32", "F16", "BF16"):
        return np.ascontiguousarray(values).astype(PLAIN_DTYPES[kind.name]).reshape(-1).view("u1")
    quantizer = {"Q8_0": quantize_q8_0, "Q4_0": quantize_q4_0}.get(kind.name)
    if quantizer is None:
        raise FormatError(where, f"type {kind.name}", "weights are quantized to Q8_0 or Q4_0")
    if values.shape[-1] % kind.elements:
        raise FormatError(where, f"{values.shape[-1]} inputs", f"a multiple of {kind.elements}")
    blocks = quantizer(np.ascontiguousarray(values, np.float32).reshape(-1, kind.elements))
    _check_finite(BLOCK_FORMATS[kind.name].split(blocks), where)
    return blocks.reshape(-1)
