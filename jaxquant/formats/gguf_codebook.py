"""GGUF types that index large codebooks of vectors: IQ1, IQ2 and IQ3.

A code stands for a whole vector of inputs, so it has no place in the law of steps: these weights
are decoded to float32 when they are read.  The codebooks are tables of up to 2048 vectors, found by
search rather than by a rule; they are taken from the ``gguf`` package, an optional dependency.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from jaxquant.errors import FormatError
from jaxquant.formats.gguf_types import GgmlType

CODEBOOK_TYPES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")


def _package(where: str, kind: GgmlType) -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise FormatError(
            where,
            f"a weight of type {kind.name}",
            "its codebook comes with the 'gguf' package, which is not installed",
            "pip install gguf, or quantize the model to another type",
        ) from None


def dequantize_codebook(blocks: np.ndarray, kind: GgmlType, where: str) -> np.ndarray:
    """Decode blocks of a codebook type.

    Args:
        blocks: uint8 ``[n, kind.bytes]``.
        kind: one of :data:`CODEBOOK_TYPES`.
        where: file and tensor, for errors.
    Returns:
        float32 ``[n, kind.elements]``.
    Raises:
        FormatError: the ``gguf`` package is missing.
    """
    package = _package(where, kind)
    return package.quants.dequantize(blocks, package.GGMLQuantizationType(kind.id))


def _half(blocks: np.ndarray) -> np.ndarray:
    """The float16 super-scale ``[n, 1]`` at the start of blocks, as float32."""
    return np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)


def _nibbles(octets: np.ndarray) -> np.ndarray:
    return np.stack([octets & 15, octets >> 4], axis=-1).reshape(len(octets), -1)


def _top_bits(blocks: np.ndarray, start: int, dtype: str, shift: int) -> np.ndarray:
    """What the words from byte ``start`` to the end hold above their codes and signs."""
    return np.ascontiguousarray(blocks[:, start:]).view(dtype) >> shift


def codebook_scales(blocks: np.ndarray, kind: GgmlType) -> np.ndarray:
    """What multiplies the entries of the codebook, sub-scales times super-scales.

    Source: llama.cpp, ``dequantize_row_iq*`` in ``ggml-quants.c``.

    Args:
        blocks: uint8 ``[n, kind.bytes]``.
        kind: one of :data:`CODEBOOK_TYPES`.
    Returns:
        float32 ``[n, 8 or 16]``.
    """
    if kind.name == "IQ1_M":
        words = _top_bits(blocks, 48, "<u2", 0)
        tops = words >> np.array([12, 8, 4, 0], np.uint16) & np.array([15, 240, 3840, 61440], "<u2")
        scale = tops.sum(-1, dtype=np.uint16).view(np.float16).astype(np.float32)[:, None]
        fine = (words[..., None] >> np.array([0, 3, 6, 9], np.uint16) & 7).reshape(len(blocks), -1)
        return scale * (2 * fine + 1)
    scale = _half(blocks)
    if kind.name == "IQ1_S":
        return scale * (2 * (_top_bits(blocks, 34, "<u2", 12) & 7) + 1)
    if kind.name == "IQ2_XXS":  # words of codes and of signs take turns
        return scale * (_top_bits(blocks, 2, "<u4", 28)[:, 1::2] + np.float32(0.5)) / 4
    if kind.name == "IQ3_XXS":
        return scale * (_top_bits(blocks, 66, "<u4", 28) + np.float32(0.5)) / 2
    if kind.name == "IQ3_S":
        return scale * (2 * _nibbles(blocks[:, 106:]).astype(np.float32) + 1)
    return scale * (_nibbles(blocks[:, -8:]) + np.float32(0.5)) / 4
