"""Unquantized linears: one 16- or 32-bit ``weight`` [out, in]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxquant.arrays.codes import CODES
from jaxquant.arrays.qtensor import QTensor, dense
from jaxquant.formats.base import DENSE_DTYPES, Coverage, Format, RawModule, Slot, Spec


def _spec(config: Mapping[str, Any], module: RawModule) -> Spec:
    weight = module.need("weight")
    if weight.dtype not in DENSE_DTYPES:
        raise weight.error(f"dtype {weight.dtype}", f"an unquantized weight is {_NAMES}")
    return Spec(kind="dense", code=CODES[DENSE_DTYPES[weight.dtype]])


_NAMES = ", ".join(DENSE_DTYPES)
_DISK = {code: dtype for dtype, code in DENSE_DTYPES.items()}


def _shape(spec: Spec, module: RawModule) -> tuple[int, int]:
    weight = module.need("weight")
    if len(weight.shape) != 2:
        raise weight.error(f"shape {list(weight.shape)}", "[out, in]")
    return weight.shape[0], weight.shape[1]


def _slots(spec: Spec, shape: tuple[int, int]) -> tuple[Slot, ...]:
    return (Slot("weight", (_DISK[spec.code.name],), (shape,)),)


def _decode(arrays: Mapping[str, np.ndarray], spec: Spec, shape: tuple[int, int]) -> QTensor:
    return dense(arrays["weight"])


def _encode(q: QTensor, spec: Spec) -> dict[str, np.ndarray]:
    return {"weight": np.asarray(q.data[0])}


DENSE = Format(
    "dense",
    lambda config: False,
    (),
    ("weight",),
    lambda config: Coverage((), lambda entry, path: False),
    _spec,
    _shape,
    _slots,
    _decode,
    _encode,
)
