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
