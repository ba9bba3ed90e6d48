"""Choose between the two plain arrangements, scaled bytes and packed 4-bit floats, by the spec."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jaxquant.arrays.qtensor import QTensor
from jaxquant.formats.base import RawModule, Slot
from jaxquant.formats.fp4 import Fp4Spec, fp4_decode, fp4_encode, fp4_shape, fp4_slots
from jaxquant.formats.scaled import (
    ScaledSpec,
    scaled_decode,
    scaled_encode,
    scaled_shape,
    scaled_slots,
)

Arranged = ScaledSpec | Fp4Spec


def arranged_shape(spec: Arranged, module: RawModule) -> tuple[int, int]:
    """(out, in)."""
    return fp4_shape(spec, module) if isinstance(spec, Fp4Spec) else scaled_shape(spec, module)


def arranged_slots(spec: Arranged, shape: tuple[int, int]) -> tuple[Slot, ...]:
    """The tensors of one weight."""
    return fp4_slots(spec, shape) if isinstance(spec, Fp4Spec) else scaled_slots(spec, shape)


def arranged_decode(
    arrays: Mapping[str, np.ndarray], spec: Arranged, shape: tuple[int, int]
) -> QTensor:
    """Decode."""
    if isinstance(spec, Fp4Spec):
        return fp4_decode(arrays, spec, shape)
    return scaled_decode(arrays, spec, shape)


def arranged_encode(q: QTensor, spec: Arranged) -> dict[str, np.ndarray]:
    """The tensors as they were on disk."""
    return fp4_encode(q, spec) if isinstance(spec, Fp4Spec) else scaled_encode(q, spec)
