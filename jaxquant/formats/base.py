"""Format: a record of pure functions that turns a checkpoint's raw tensors into a QTensor and back.

Adding a format is one file with one ``Format`` in it and one line in ``jaxquant.formats.FORMATS``.
Decoding is NumPy only, so it runs in threads, without devices, and is tested bit for bit.

Canonical results, so that kernels cannot tell where a weight came from:

* axes are ``("out", "in")``, codes of fewer than 8 bits are packed along ``in``;
* weights without zero points use a signed code (``int4``: excess form), those with zero points the
  unsigned code and the ``zero_point`` formula, whatever domain the file keeps them in;
* scales keep the dtype they have on disk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxquant.arrays.layout import Layout
from jaxquant.arrays.qtensor import QTensor


@dataclasses.dataclass(frozen=True)
class RawTensor:
    """A tensor in a checkpoint file, not read yet.

    Attributes:
        name: full name in the checkpoint.
        dtype: safetensors dtype string, e.g. ``"F8_E4M3"``, ``"I32"``.
        shape: shape on disk.
        file: file it lies in, for error messages.
        read: returns the array (a read-only view of the file where that is possible).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    read: Callable[[], np.ndarray] = dataclasses.field(repr=False, compare=False)


class Slot(NamedTuple):
    """One tensor that a quantized linear consists of on disk.

    Attributes:
        suffix: what follows the module path, e.g. ``"qweight"``.
        dtypes: accepted safetensors dtypes.
        required: whether its absence is an error.
    """

    suffix: str
    dtypes: tuple[str, ...]
    required: bool = True


class Format(NamedTuple):
    """One checkpoint format.

    Attributes:
        name: short name, e.g. ``"gptq"``.
        claims: ``claims(config) -> bool``, given a ``quantization_config`` dict.
        spec: ``spec(config, path, raw) -> Spec | None``: how the module at ``path`` is quantized, read
            from the config and from small side tensors of ``raw`` (suffix -> RawTensor), never from
            the weight's bytes; None where the module is not quantized.
        slots: ``slots(spec) -> tuple[Slot, ...]``.
        shape: ``shape(spec, raw) -> (out, in)`` of the logical weight, from headers and side tensors.
        layout: ``layout(spec, shape) -> Layout`` of the decoded QTensor.
        decode: ``decode(arrays, spec, shape) -> QTensor`` (suffix -> array).
        encode: ``encode(q, spec) -> arrays``, the inverse, as the format's own tools write it.
    """

    name: str
    claims: Callable[[Mapping[str, Any]], bool]
    spec: Callable[[Mapping[str, Any], str, Mapping[str, RawTensor]], Any]
    slots: Callable[[Any], tuple[Slot, ...]]
    shape: Callable[[Any, Mapping[str, RawTensor]], tuple[int, int]]
    layout: Callable[[Any, tuple[int, int]], Layout]
    decode: Callable[[Mapping[str, np.ndarray], Any, tuple[int, int]], QTensor]
    encode: Callable[[QTensor, Any], dict[str, np.ndarray]]
