"""AWQ checkpoints: 4-bit codes with zero points, in three arrangements.

=========  ======================================================================
gemm       ``qweight`` I32 [in, out/8], eight outputs to a word in the order
           0 2 4 6 1 3 5 7; ``qzeros`` I32 [groups, out/8] likewise;
           ``scales`` [groups, out]
gemv       ``qweight`` I32 [out, in/8] in plain order; ``qzeros`` I32 [out, zw];
           ``scales`` [out, 8 * zw], columns beyond the groups are padding
gemv_fast  ``qweight`` I16 [out/4, in] interleaved; ``scales`` and ``qzeros``
           F16 [8 * zw, out], and value = code x scale + qzeros
=========  ======================================================================
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxquant.arrays.codes import CODES
from jaxquant.arrays.layout import WHOLE, cells
from jaxquant.arrays.qtensor import QTensor
from jaxquant.errors import FormatError
from jaxquant.formats.base import (
    SCALE_DTYPES,
    Coverage,
    Format,
    FormatWarning,
    Leaf,
    RawModule,
    Slot,
    Spec,
    by_auto_round,
    method_of,
    numpy_dtype,
)
from jaxquant.formats.names import by_substring, string_list
from jaxquant.formats.nibbles import (
    AWQ_ORDER,
    fast_to_patterns,
    gemm_to_data,
    patterns_to_fast,
    patterns_to_gemm,
)
from jaxquant.formats.words import data_of, data_to_rows, integer, patterns_of, rows_to_data
from jaxquant.transforms.repack import elements_to_words, words_to_elements

METHODS = ("awq", "awq-marlin")
VERSIONS = ("gemm", "gemv", "gemv_fast")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AWQSpec(Spec):
    """Spec of an AWQ weight; ``kind`` is the arrangement.

    Attributes:
        group: inputs to a scale, -1 for all.
        scale_dtype: safetensors dtype of ``scales``.
        width: columns (gemv) or rows (gemv_fast) of ``scales`` with padding.
        qzeros: whether the file has zero points.
    """

    group: int
    scale_dtype: str
    width: int
    qzeros: bool = True


def _coverage(config: Mapping[str, Any]) -> Coverage:
    def targeted(path: str) -> bool:
        return path.rpartition(".")[2] != "lm_head" or config.get("lm_head") is True

    return Coverage(string_list(config, "modules_to_not_convert"), by_substring, targeted)


def _kind(config: Mapping[str, Any], module: RawModule) -> str:
    """The arrangement that the shapes show; a contradicting config is warned about."""
    declared = str(config.get("version") or "gemm").lower()
    if declared not in VERSIONS:
        raise FormatError(
            "quantization_config: version",
            repr(declared),
            f"one of {', '.join(VERSIONS)}",
            "save the checkpoint as gemm with the tool that made it",
        )
    qweight, scales = module.need("qweight"), module.need("scales")
    for tensor in (qweight, scales):
        if len(tensor.shape) != 2:
            raise tensor.error(f"shape {list(tensor.shape)}", "rank 2")
    qzeros = module.get("qzeros")
    if qweight.dtype == "I16" or (qzeros is not None and qzeros.dtype == "F16"):
        kind = "gemv_fast"
    elif qweight.shape[1] * 8 == scales.shape[1] and qweight.dtype in ("I32", "U32"):
        kind = "gemm"
    elif qweight.shape[0] == scales.shape[0] and qweight.dtype in ("I32", "U32"):
        kind = "gemv"
    else:
        raise qweight.error(
            f"{qweight.dtype} {list(qweight.shape)} with scales {list(scales.shape)}",
            "I32 [in, out/8] with [groups, out] (gemm), I32 [out, in/8] with [out, n] (gemv) or "
            "I16 [out/4, in] (gemv_fast)",
        )
    if kind != declared:
        warnings.warn(
            f"{qweight.file}: {qweight.name}: the config says {declared}, the shapes are those of "
            f"{kind}; the shapes are trusted",
            FormatWarning,
            stacklevel=2,
        )
    return kind


def _spec(config: Mapping[str, Any], module: RawModule) -> AWQSpec:
    bits = integer(config, "bits", "w_bit", "weight_bits")
    if bits != 4:
        raise FormatError("quantization_config: bits", str(bits), "AWQ has 4-bit codes")
    group = integer(config, "group_size", "q_group_size")
    return awq_spec(config, module, group, signed=by_auto_round(config))


def awq_spec(
    config: Mapping[str, Any], module: RawModule, group: int, signed: bool = False
) -> AWQSpec:
    """Spec from the group size and the module's headers; ``signed`` allows negative scales.

    Raises:
        FormatError: shapes or dtypes fit no arrangement.
    """
    if group != -1 and group < 1:
        raise FormatError("quantization_config: group_size", str(group), "-1 or positive")
    kind = _kind(config, module)
    qweight, scales, qzeros = module.need("qweight"), module.need("scales"), module.get("qzeros")
    if scales.dtype not in SCALE_DTYPES:
        raise scales.error(f"dtype {scales.dtype}", f"one of {', '.join(SCALE_DTYPES)}")
    inputs = _shape_of(kind, qweight.shape)[1]
    groups = 1 if group == -1 else cells(inputs, group)
    width = scales.shape[0 if kind == "gemv_fast" else 1]
    if kind == "gemm":
        width = groups
    if width < groups or (kind == "gemm" and scales.shape[0] != groups):
        raise scales.error(
            f"shape {list(scales.shape)}", f"{groups} groups of {group} for {inputs} inputs"
        )
    zero_point = config.get("zero_point")
    if zero_point is None:
        # GPTQModel's files say it the other way round.
        zero_point = config.get("sym") is not True
    if qzeros is None and (zero_point or kind == "gemv_fast"):
        raise module.error("no qzeros", "an AWQ weight with zero_point has zero points")
    centred = qzeros is None
    if qzeros is not None and kind != "gemv_fast" and qzeros.dtype not in ("I32", "U32"):
        raise qzeros.error(f"dtype {qzeros.dtype}", "I32 words of zero points")
    if qzeros is not None and not zero_point and kind != "gemv_fast":
        stored = np.unique(qzeros.read().view(np.uint32))
        centred = stored.tolist() in ([0], [0x88888888])
        if centred and not stored.any():
            # Exporters of symmetric weights left this tensor unset; the codes are centred on 8.
            warnings.warn(
                f"{qzeros.file}: {qzeros.name}: the config says symmetric and all stored zero "
                "points are 0; 8 is used",
                FormatWarning,
                stacklevel=2,
            )
    grid = (1, WHOLE if group == -1 else group)
    dtype = numpy_dtype(scales.dtype).name
    offset = kind == "gemv_fast"
    zeros = (Leaf(grid, dtype if offset else "uint8"),) if not centred else ()
    return AWQSpec(
        kind=kind,
        code=CODES["uint4" if zeros else "int4"],
        scales=(Leaf(grid, dtype),),
        zeros=zeros,
        affine=("offset" if offset else "zero_point") if zeros else "symmetric",
        group=group,
        scale_dtype=scales.dtype,
        width=width,
        qzeros=qzeros is not None,
        dead_scales=True,
        signed_scales=signed,
    )


def _shape_of(kind: str, words: tuple[int, ...]) -> tuple[int, int]:
    a, b = words
    return {"gemm": (b * 8, a), "gemv": (a, b * 8), "gemv_fast": (a * 4, b)}[kind]


def awq_shape(spec: AWQSpec, module: RawModule) -> tuple[int, int]:
    """(out, in)."""
    return _shape_of(spec.kind, module.need("qweight").shape)


def awq_slots(spec: AWQSpec, shape: tuple[int, int]) -> tuple[Slot, ...]:
    """The tensors of one weight."""
    out, inputs = shape
    words: tuple[str, ...] = ("I32", "U32")
    if spec.kind == "gemm":
        shapes = (inputs, out // 8), (spec.width, out), (spec.width, out // 8)
    elif spec.kind == "gemv":
        shapes = (out, inputs // 8), (out, spec.width), (out, spec.width // 8)
    else:
        shapes = (out // 4, inputs), (spec.width, out), (spec.width, out)
    fast = spec.kind == "gemv_fast"
    return (
        Slot("qweight", ("I16",) if fast else words, (shapes[0],)),
        Slot("scales", (spec.scale_dtype,), (shapes[1],)),
        Slot("qzeros", (spec.scale_dtype,) if fast else words, (shapes[2],), spec.qzeros),
    )


def awq_decode(arrays: Mapping[str, np.ndarray], spec: AWQSpec, shape: tuple[int, int]) -> QTensor:
    """Decode into 4-bit codes packed along ``in``."""
    out, inputs = shape
    groups = 1 if spec.group == -1 else cells(inputs, spec.group)
    qweight, scales, qzeros = arrays["qweight"], arrays["scales"], arrays.get("qzeros")
    zeros = None
    if spec.kind == "gemm":
        data = gemm_to_data(qweight)
        scales = scales.T
        if spec.zeros and qzeros is not None:
            stored = words_to_elements(qzeros, 4, out).reshape(groups, out // 8, 8)
            zeros = stored[:, :, np.argsort(AWQ_ORDER)].reshape(groups, out).T
    elif spec.kind == "gemv":
        (data,) = rows_to_data(qweight, spec.code, inputs)
        scales = scales[:, :groups]
        if spec.zeros and qzeros is not None:
            zeros = words_to_elements(qzeros, 4, groups)
    else:
        (data,) = data_of(fast_to_patterns(qweight), spec.code)
        scales = scales[:groups].T
        assert qzeros is not None
        zeros = -qzeros[:groups].T
    leaves = () if zeros is None else (np.ascontiguousarray(zeros),)
    return QTensor((data,), (np.ascontiguousarray(scales),), leaves, spec.layout(shape))


def awq_encode(q: QTensor, spec: AWQSpec) -> dict[str, np.ndarray]:
    """The tensors as AWQ tools write them."""
    inputs = q.shape[1]
    data = tuple(np.asarray(plane) for plane in q.data)
    scales = np.asarray(q.scales[0])
    zeros = np.asarray(q.zeros[0]) if q.zeros else np.full(scales.shape, 8, np.uint8)
    pad = ((0, 0), (0, spec.width - scales.shape[1]))
    if spec.kind == "gemm":
        arrays = {
            "qweight": patterns_to_gemm(patterns_of(data, spec.code, inputs)),
            "scales": np.ascontiguousarray(scales.T),
            "qzeros": patterns_to_gemm(zeros),
        }
    elif spec.kind == "gemv":
        arrays = {
            "qweight": data_to_rows(data, spec.code, inputs),
            "scales": np.pad(scales, pad),
            "qzeros": elements_to_words(np.pad(zeros, pad), 4),
        }
    else:
        arrays = {
            "qweight": patterns_to_fast(patterns_of(data, spec.code, inputs)),
            "scales": np.ascontiguousarray(np.pad(scales, pad).T),
            "qzeros": np.ascontiguousarray(np.pad(-zeros, pad).T),
        }
    if not spec.qzeros:
        del arrays["qzeros"]
    return arrays


AWQ = Format(
    "awq",
    lambda config: method_of(config) in METHODS,
    ("qweight", "qzeros"),
    ("qweight", "qzeros", "scales"),
    _coverage,
    _spec,
    awq_shape,
    awq_slots,
    awq_decode,
    awq_encode,
)
