"""NVIDIA ModelOpt checkpoints: one algorithm for all modules, or one a module.

==========================  ==================================================================
FP8                         ``weight`` F8 [out, in], ``weight_scale`` [], ``input_scale`` []
FP8_PER_CHANNEL_PER_TOKEN   ``weight_scale`` [out]; activations dynamic per token
FP8_PB_WO, FP8_PB_REAL      ``weight_scale`` [out/128, in/128], size-1 axes allowed
INT8_SQ, INT8_WO            ``weight`` I8, ``weight_scale`` [out] (SQ: ``input_scale``)
W4A16_AWQ, W4A8_AWQ         ``weight`` U8 [out/2, in]: two output rows to a byte, low nibble
                            first, two's complement; ``weight_scale`` [out, in/group]
NVFP4, W4A16_NVFP4,         ``weight`` U8 [out, in/2], ``weight_scale`` e4m3 [out, in/16],
NVFP4_AWQ, W4A8_NVFP4_FP8   ``weight_scale_2`` [], ``input_scale`` []
MXFP4, W4A8_MXFP4_FP8       ``weight_scale`` U8 [out, in/32]
MXFP8                       ``weight`` F8, ``weight_scale`` U8 [out, in/32]
==========================  ==================================================================

``pre_quant_scale`` [in] multiplies the activations first (AWQ, SmoothQuant).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxquant.arrays.codes import CODES
from jaxquant.arrays.qtensor import QTensor
from jaxquant.arrays.scheme import ActSpec
from jaxquant.errors import FormatError
from jaxquant.formats.arranged import (
    arranged_decode,
    arranged_encode,
    arranged_shape,
    arranged_slots,
)
from jaxquant.formats.base import (
    SCALE_DTYPES,
    Coverage,
    Format,
    Leaf,
    RawModule,
    Slot,
    Spec,
    method_of,
    numpy_dtype,
)
from jaxquant.formats.fp4 import Fp4Spec, fp4_activations, fp4_spec
from jaxquant.formats.names import by_glob, fused_aliases, roots, stack_names, string_list
from jaxquant.formats.scaled import (
    ScaledSpec,
    Side,
    scale_grid,
    scaled_spec,
    side,
    weight_shape,
)

METHODS = ("modelopt", *(f"modelopt-{kind}" for kind in ("fp8", "fp4", "mxfp8", "mixed")), "nvfp4")
_IN_EXPERTS = re.compile(r"(.*\.experts)\.\d+\.")
SUFFIXES = ("weight", "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale")
ALIASES = {
    "FP8_PC_PT": "FP8_PER_CHANNEL_PER_TOKEN",
    "INT4_AWQ": "W4A16_AWQ",
    "MIXED": "MIXED_PRECISION",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowPackedSpec(Spec):
    """Spec of an int4 weight with two output rows to a byte.

    Attributes:
        sides: every side tensor on disk.
    """

    sides: tuple[Side, ...]


def _coverage(config: Mapping[str, Any]) -> Coverage:
    layers = config.get("quantized_layers")

    def targeted(path: str) -> bool:
        return not isinstance(layers, Mapping) or not layers or _layer(layers, path) is not None

    return Coverage(string_list(config, "ignore", "exclude_modules"), by_glob, targeted)


def _layer(layers: Mapping[str, Any], path: str) -> Any:
    """The entry of ``quantized_layers`` for a module, None where there is none.

    The list may have another root than the tensors, and may name what a runtime joins:
    ``qkv_proj``, a stack of experts, or all ``experts`` of a layer.
    """
    for name in roots(path):
        experts = (name[: found.end(1)],) if (found := _IN_EXPERTS.match(name)) else ()
        for known in (name, *fused_aliases(name), *stack_names(name), *experts):
            if layers.get(known) is not None:
                return layers[known]
    return None


def _algorithm(config: Mapping[str, Any], path: str) -> str | None:
    """The algorithm of a module; None where a mixed config does not list it."""
    name = str(config.get("quant_algo") or "").upper()
    if method_of(config) == "nvfp4" and not name:
        name = "NVFP4"
    if ALIASES.get(name, name) == "MIXED_PRECISION":
        layers = config.get("quantized_layers")
        if not isinstance(layers, Mapping):
            raise FormatError(
                "quantization_config: quantized_layers", repr(layers)[:80], "module -> algorithm"
            )
        entry = _layer(layers, path)
        if entry is None:
            return None
        name = str(entry.get("quant_algo") if isinstance(entry, Mapping) else entry).upper()
    return ALIASES.get(name, name)


def _spec(config: Mapping[str, Any], module: RawModule) -> Spec | None:
    name = _algorithm(config, module.path)
    if name is None:
        return None
    if module.get("weight_global_scale") is not None:
        raise module.error("weight_global_scale", "ModelOpt stores weight_scale_2, its reciprocal")
    if name in ("W4A16_AWQ", "W4A8_AWQ"):
        return _row_packed(module, name)
    if name in _FP4:
        return _fp4(module, name)
    if name in _SCALED:
        return _scaled(module, name)
    raise FormatError(
        "quantization_config: quant_algo",
        repr(name),
        f"one of {', '.join((*_SCALED, *_FP4, 'W4A16_AWQ', 'W4A8_AWQ', 'MIXED_PRECISION'))}",
        "low-rank corrections and older algorithms are not read",
    )


_FP4 = ("NVFP4", "W4A16_NVFP4", "NVFP4_AWQ", "W4A8_NVFP4_FP8", "MXFP4", "W4A8_MXFP4_FP8")
_SCALED = (
    "FP8",
    "FP8_PER_CHANNEL_PER_TOKEN",
    "FP8_PB_WO",
    "FP8_PB_REAL",
    "INT8_SQ",
    "INT8_WO",
    "MXFP8",
)


def _fp4(module: RawModule, name: str) -> Fp4Spec:
    static = module.get("input_scale") is not None
    act: ActSpec | None = None
    if name in ("NVFP4", "NVFP4_AWQ", "MXFP4"):
        act = fp4_activations("mxfp4" if name == "MXFP4" else "nvfp4")
        if name != "MXFP4":
            module.need("input_scale")
    elif name.endswith("_FP8"):
        e4m3 = CODES["e4m3"]
        act = ActSpec(e4m3, "tensor", dynamic=False) if static else ActSpec(e4m3)
    return fp4_spec(
        module,
        tensor=None if "MXFP4" in name else "weight_scale_2",
        act=act,
        act_name="input_scale",
        pre_name="pre_quant_scale",
    )


def _scaled(module: RawModule, name: str) -> ScaledSpec:
    scale, shape = module.need("weight_scale"), weight_shape(module)
    kind, block, act = "tensor", None, None
    if name == "FP8_PER_CHANNEL_PER_TOKEN":
        kind, act = "channel", ActSpec(CODES["e4m3"])
    elif name.startswith("FP8_PB"):
        kind, block = "block", (128, 128)
    elif name.startswith("INT8"):
        kind = "channel"
    elif name == "MXFP8":
        kind, block = "block", (1, 32)
        act = ActSpec(CODES["e4m3"], "group", group_size=32, scale_code="mx")
    static = name in ("FP8", "INT8_SQ")
    if static:
        module.need("input_scale")
        code = CODES["e4m3" if name == "FP8" else "int8"]
        act = ActSpec(code, "tensor", dynamic=False)
    expected = "I8" if name.startswith("INT8") else "F8_E4M3"
    weight = module.need("weight")
    if weight.dtype != expected:
        raise weight.error(f"dtype {weight.dtype}", f"{expected} for {name}")
    return scaled_spec(
        kind,
        module,
        "weight_scale",
        scale_grid(scale, shape, block, (kind,)),
        act=act,
        act_name="input_scale" if static else None,
        pre_name="pre_quant_scale",
    )


def _row_packed(module: RawModule, name: str) -> RowPackedSpec:
    weight, scale, pre = (
        module.need("weight"),
        module.need("weight_scale"),
        module.get("pre_quant_scale"),
    )
    if weight.dtype not in ("U8", "I8") or len(weight.shape) != 2:
        raise weight.error(f"{weight.dtype} {list(weight.shape)}", "U8 [out/2, in]")
    out, inputs = weight.shape[0] * 2, weight.shape[1]
    if scale.dtype not in SCALE_DTYPES or len(scale.shape) != 2 or scale.shape[0] != out:
        raise scale.error(f"{scale.dtype} {list(scale.shape)}", f"[{out}, in/group], 16 or 32 bit")
    group, rest = divmod(inputs, scale.shape[1])
    if rest:
        raise scale.error(f"shape {list(scale.shape)}", f"whole groups of {inputs} inputs")
    names = ["weight", "weight_scale"]
    act = None
    if name == "W4A8_AWQ":
        act = ActSpec(CODES["e4m3"], "tensor", dynamic=False)
        names += ["weight_scale_2", "input_scale"]
    names += ["pre_quant_scale"] if pre is not None else []
    for suffix in names[2:]:
        tensor, size = module.need(suffix), inputs if suffix == "pre_quant_scale" else 1
        if tensor.dtype not in SCALE_DTYPES or math.prod(tensor.shape) != size:
            raise tensor.error(
                f"{tensor.dtype} {list(tensor.shape)}", f"{size} 16- or 32-bit floats"
            )
    sides = (side(module.need(suffix), suffix) for suffix in names)
    return RowPackedSpec(
        kind="row-packed",
        code=CODES["int4"],
        scales=(Leaf((1, group), numpy_dtype(scale.dtype).name),),
        act=act,
        act_scale=act is not None,
        pre_scale=None if pre is None else numpy_dtype(pre.dtype).name,
        sides=tuple(entry for entry in sides if entry),
    )


def _rows_decode(
    arrays: Mapping[str, np.ndarray], spec: RowPackedSpec, shape: tuple[int, int]
) -> QTensor:
    out, inputs = shape
    octets = np.ascontiguousarray(arrays["weight"]).view(np.uint8)
    first, second = octets[:, 0::2], octets[:, 1::2]
    data = np.empty((out, inputs // 2), np.uint8)
    data[0::2] = (first & np.uint8(0x0F)) | (second << np.uint8(4))
    data[1::2] = (first >> np.uint8(4)) | (second & np.uint8(0xF0))
    # Two's complement to excess form.
    data ^= np.uint8(0x88)
    act = arrays.get("input_scale")
    pre = arrays.get("pre_quant_scale")
    return QTensor(
        (data,),
        (arrays["weight_scale"],),
        (),
        spec.layout(shape),
        act_scale=None if act is None else act.astype(np.float32).reshape(1, 1),
        pre_scale=None if pre is None else pre.reshape(1, -1),
        act=spec.act,
    )


def _rows_encode(q: QTensor, spec: RowPackedSpec) -> dict[str, np.ndarray]:
    data = np.asarray(q.data[0]) ^ np.uint8(0x88)
    even, odd = data[0::2], data[1::2]
    octets = np.empty((data.shape[0] // 2, data.shape[1] * 2), np.uint8)
    octets[:, 0::2] = (even & np.uint8(0x0F)) | (odd << np.uint8(4))
    octets[:, 1::2] = (even >> np.uint8(4)) | (odd & np.uint8(0xF0))
    arrays = {"weight": octets, "weight_scale": np.asarray(q.scales[0])}
    if q.act_scale is not None:
        arrays["input_scale"] = np.asarray(q.act_scale)
        # How a kernel re-expresses code x scale in e4m3: the largest value over 448.
        codes = (data[..., None] >> np.array([0, 4], np.uint8)) & np.uint8(15)
        signed = (codes ^ np.uint8(8)).astype(np.int8) - np.int8(8)
        values = signed.reshape(q.shape) * np.repeat(
            arrays["weight_scale"].astype(np.float32), q.layout.scales[0][1], axis=1
        )
        arrays["weight_scale_2"] = np.abs(values).max() / np.float32(448)
    if q.pre_scale is not None:
        arrays["pre_quant_scale"] = np.asarray(q.pre_scale)
    return {
        entry.suffix: np.asarray(arrays[entry.suffix], numpy_dtype(entry.dtype)).reshape(
            entry.shape
        )
        for entry in spec.sides
    }


def _shape(spec: Any, module: RawModule) -> tuple[int, int]:
    if isinstance(spec, RowPackedSpec):
        rows, columns = spec.sides[0].shape
        return rows * 2, columns
    return arranged_shape(spec, module)


def _slots(spec: Any, shape: tuple[int, int]) -> tuple[Slot, ...]:
    if isinstance(spec, RowPackedSpec):
        return tuple(Slot(s.suffix, (s.dtype,), (s.shape,)) for s in spec.sides)
    return arranged_slots(spec, shape)


def _decode(arrays: Mapping[str, np.ndarray], spec: Any, shape: tuple[int, int]) -> QTensor:
    if isinstance(spec, RowPackedSpec):
        return _rows_decode(arrays, spec, shape)
    return arranged_decode(arrays, spec, shape)


def _encode(q: QTensor, spec: Any) -> dict[str, np.ndarray]:
    if isinstance(spec, RowPackedSpec):
        return _rows_encode(q, spec)
    return arranged_encode(q, spec)


MODELOPT = Format(
    "modelopt",
    lambda config: method_of(config) in METHODS,
    ("weight_scale", "weight_scale_2"),
    (*SUFFIXES, "weight_global_scale"),
    _coverage,
    _spec,
    _shape,
    _slots,
    _decode,
    _encode,
    ("input_scale",),
)
