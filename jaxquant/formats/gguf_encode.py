"""Writing GGUF blocks: QTensors back without loss, and numbers quantized as llama.cpp does."""

from __future__ import annotations

import numpy as np

from jaxquant.arrays.layout import WHOLE
from jaxquant.arrays.qtensor import QTensor
from jaxquant.errors import FormatError
from jaxquant.formats.gguf import (
    AXES,
    BLOCK_FORMATS,
    DENSE_CODES,
    PLAIN_DTYPES,
    check_finite,
    layout_of,
)
from jaxquant.formats.gguf_blocks import BlockFormat, Parts
from jaxquant.formats.gguf_legacy import quantize_q4_0, quantize_q8_0
from jaxquant.formats.gguf_types import TYPES, GgmlType
from jaxquant.transforms.repack import unpack_codes
from jaxquant.transforms.structure import refine, to_axes


def type_of(q: QTensor) -> GgmlType | None:
    """The GGUF type that holds ``q`` exactly as it is laid out, or None.

    A layout does not say in which dtype its scales are; :func:`encode` checks that they fit.
    """
    layout = to_axes(q, AXES).layout
    if layout.dense:
        return TYPES[{code: name for name, code in DENSE_CODES.items()}[layout.code.name]]
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
    check_finite(BLOCK_FORMATS[kind.name].split(blocks), where)
    return blocks.reshape(-1)
