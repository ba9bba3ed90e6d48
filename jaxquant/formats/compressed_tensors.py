"""compressed-tensors (llm-compressor): four arrangements under one config.

``pack-quantized`` words, ``int-quantized`` and ``float-quantized`` 8-bit arrays
(``naive-quantized`` is either), ``mxfp8-quantized``, and the 4-bit floats ``nvfp4-pack-quantized``
and ``mxfp4-pack-quantized``.  The tensors that a module has decide which; the config must agree.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxquant.arrays.codes import CODES
from jaxquant.arrays.qtensor import QTensor
from jaxquant.errors import FormatError
from jaxquant.formats.arranged import (
    arranged_decode,
    arranged_encode,
    arranged_shape,
    arranged_slots,
)
from jaxquant.formats.base import (
    CHANNEL,
    DENSE_DTYPES,
    TENSOR,
    Coverage,
    Format,
    FormatWarning,
    RawModule,
    Slot,
    Spec,
    by_auto_round,
    method_of,
)
from jaxquant.formats.ct_config import (
    Arguments,
    Group,
    activation_spec,
    group_of,
    parse_groups,
    written_by,
)
from jaxquant.formats.ct_packed import (
    PackedSpec,
    packed_decode,
    packed_encode,
    packed_shape,
    packed_slots,
    packed_spec,
)
from jaxquant.formats.fp4 import Fp4Spec, fp4_spec
from jaxquant.formats.names import by_name_or_regex, string_list
from jaxquant.formats.scaled import (
    ScaledSpec,
    scale_grid,
    scaled_decode,
    scaled_encode,
    scaled_spec,
    weight_shape,
)
from jaxquant.formats.words import data_of, patterns_of

SUFFIXES = (
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_shape",
    "weight_g_idx",
    "weight_global_scale",
    "weight_scale_2",
    "input_scale",
    "input_zero_point",
    "input_global_scale",
)
MARKERS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_global_scale")
_GROUP_KEYS = ("config_groups", "format", "sparsity_config", "transform_config")
REFUSED = ("marlin-24", "sparse-bitmask", "sparse-24-bitmask", "mxfp6-pack-quantized")


def _groups(config: Mapping[str, Any]) -> tuple[Group, ...]:
    return _parsed(json.dumps({key: config.get(key) for key in _GROUP_KEYS}, sort_keys=True))


@functools.lru_cache(8)
def _parsed(text: str) -> tuple[Group, ...]:
    """One parse for all modules of a checkpoint."""
    return parse_groups(json.loads(text))


def _coverage(config: Mapping[str, Any]) -> Coverage:
    groups = _groups(config)

    def targeted(path: str) -> bool:
        group = group_of(groups, path)
        return group is not None and group.weights is not None

    return Coverage(string_list(config, "ignore"), by_name_or_regex, targeted)


def _spec(config: Mapping[str, Any], module: RawModule) -> Spec | None:
    group = group_of(_groups(config), module.path)
    if group is None or group.weights is None:
        return None
    if group.format in REFUSED:
        raise module.error(f"format {group.format!r}", "this arrangement is not read")
    status = config.get("quantization_status", "compressed")
    weight, packed = module.get("weight"), module.get("weight_packed")
    if weight is not None and weight.dtype in DENSE_DTYPES:
        if status == "compressed":
            raise weight.error(
                f"dtype {weight.dtype} beside {sorted(set(module.tensors) - {'weight'})}",
                "a compressed weight is not 16-bit",
                "an already dequantized weight must not have a scale",
            )
        warnings.warn(
            f"{weight.file}: {weight.name}: quantization_status is {status!r}; the weight is read "
            "as the 16-bit tensor that it is",
            FormatWarning,
            stacklevel=2,
        )
        return Spec(kind="dense", code=CODES[DENSE_DTYPES[weight.dtype]])
    if packed is None and weight is None:
        raise module.error(
            f"neither weight nor weight_packed beside {sorted(module.tensors)}",
            "a quantized module has one of them",
            "the checkpoint is incomplete: download or export it again",
        )
    if packed is not None and packed.dtype in ("U8", "I8"):
        return _fp4(module, group, written_by(config))
    if packed is not None:
        spec = packed_spec(module, group.weights, group.activations, written_by(config))
    else:
        spec = _scaled(module, group, group.weights)
    return dataclasses.replace(spec, signed_scales=by_auto_round(config))


def _fp4(module: RawModule, group: Group, version: tuple[int, int]) -> Fp4Spec:
    acts, weights = group.activations, group.weights
    scale = module.need("weight_scale")
    nvfp4 = scale.dtype == "F8_E4M3"
    size = 16 if nvfp4 else 32
    if weights and (weights.kind, weights.bits, weights.group) != ("float", 4, size):
        raise scale.error(
            f"dtype {scale.dtype}, of 4-bit floats in groups of {size}",
            f"the config says {weights.kind}{weights.bits} in groups of {weights.group}",
        )
    if not nvfp4 and (0, 0) < version < (0, 14):
        file, (major, minor) = module.need("weight_packed").file, version
        warnings.warn(
            f"{file}: written by compressed-tensors {major}.{minor}, which "
            "chose MXFP4 exponents by another rule than 0.14 and later; they are read as they are, "
            "and codes may be saturated",
            FormatWarning,
            stacklevel=2,
        )
    if module.get("weight_scale_2") is not None:
        raise module.error(
            "both weight_scale_2 and weight_global_scale" if nvfp4 else "weight_scale_2",
            "compressed-tensors stores weight_global_scale, the reciprocal",
        )
    if nvfp4:
        top = module.need("weight_global_scale")
        value = np.asarray(top.read()).astype(np.float32).reshape(-1)
        if value.size != 1 or not np.isfinite(value).all() or value[0] < 1:
            raise top.error(
                f"{value[:3].tolist()}",
                "weight_global_scale is 448 * 6 / amax, far above 1",
                "a value below 1 looks like ModelOpt's weight_scale_2 under this name",
            )
    if nvfp4 and acts is not None and acts.dynamic == "local":
        module.need("input_global_scale")
    return fp4_spec(
        module,
        data="weight_packed",
        tensor="weight_global_scale" if nvfp4 else None,
        act=activation_spec(acts),
        act_name="input_global_scale",
        reciprocal=True,
    )


def _scaled(module: RawModule, group: Group, weights: Arguments) -> ScaledSpec:
    """int-quantized, float-quantized, mxfp8-quantized."""
    weight, scale = module.need("weight"), module.need("weight_scale")
    acts = group.activations
    expected = ("I8",) if weights.kind == "int" else ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ")
    if weight.dtype not in expected or not 2 <= weights.bits <= 8:
        raise weight.error(
            f"dtype {weight.dtype}", f"{weights.kind}{weights.bits} is {' or '.join(expected)}"
        )
    shape = weight_shape(module)
    block = weights.block
    if weights.strategy == "group":
        assert weights.group is not None
        block = (1, weights.group)
    kind = weights.strategy if weights.strategy in ("tensor", "channel") else "block"
    grid = scale_grid(scale, shape, block, (kind,))
    static = acts is not None and acts.dynamic is False
    if static:
        module.need("input_scale")
    asymmetric_act = static and acts is not None and not acts.symmetric
    if asymmetric_act:
        module.need("input_zero_point")
    zero = module.get("weight_zero_point")
    if weights.kind == "int" and not weights.symmetric and zero is None:
        raise module.error("no weight_zero_point", "an asymmetric weight has zero points")
    # Older versions wrote zeros beside symmetric weights, and beside floats to this day.
    keep = zero is not None and weights.kind == "int" and bool(zero.read().any())
    keep = keep or (zero is not None and not weights.symmetric and weights.kind == "int")
    spec = scaled_spec(
        kind,
        module,
        "weight_scale",
        grid if grid in (TENSOR, CHANNEL) or block is None else block,
        act=activation_spec(acts),
        act_name="input_scale" if static else None,
        zero_name="weight_zero_point" if keep else None,
        act_zero_name="input_zero_point" if asymmetric_act else None,
    )
    if weights.kind == "int" and weights.bits < 8:
        code = CODES[f"{'uint' if spec.zeros else 'int'}{weights.bits}"]
        return dataclasses.replace(spec, code=code)
    return spec


def _shape(spec: Any, module: RawModule) -> tuple[int, int]:
    if isinstance(spec, PackedSpec):
        return packed_shape(spec, module)
    return arranged_shape(spec, module)


def _slots(spec: Any, shape: tuple[int, int]) -> tuple[Slot, ...]:
    if isinstance(spec, PackedSpec):
        return packed_slots(spec, shape)
    return arranged_slots(spec, shape)


def _decode(arrays: Mapping[str, np.ndarray], spec: Any, shape: tuple[int, int]) -> QTensor:
    if isinstance(spec, PackedSpec):
        return packed_decode(arrays, spec, shape)
    if isinstance(spec, Fp4Spec) or not spec.code.packed:
        return arranged_decode(arrays, spec, shape)
    # Narrow integers, a byte each: packed here, so that kernels see what pack-quantized gives.
    wide = dataclasses.replace(spec, code=CODES["uint8" if spec.zeros else "int8"])
    q = scaled_decode(arrays, wide, shape)
    code = spec.code
    middle = 1 << (code.bits - 1)
    values = arrays["weight"]
    if values.min(initial=0) < -middle or values.max(initial=0) >= middle:
        raise FormatError(
            "weight", f"codes {values.min()} to {values.max()}", f"{code.bits}-bit integers"
        )
    patterns = values.view(np.uint8) + np.uint8(middle)
    shift = np.uint8(0x80 - middle)
    zeros = tuple(zero - shift for zero in q.zeros)
    return dataclasses.replace(
        q, data=data_of(patterns, code), zeros=zeros, layout=spec.layout(shape)
    )


def _encode(q: QTensor, spec: Any) -> dict[str, np.ndarray]:
    if isinstance(spec, PackedSpec):
        return packed_encode(q, spec)
    if isinstance(spec, Fp4Spec) or not spec.code.packed:
        return arranged_encode(q, spec)
    code = spec.code
    middle = np.uint8(1 << (code.bits - 1))
    shift = np.uint8(0x80) - middle
    signed = (patterns_of(q.data, code, q.shape[1]) - middle).view(np.int8)
    wide = dataclasses.replace(spec, code=CODES["uint8" if spec.zeros else "int8"])
    data = signed.view(np.uint8) ^ np.uint8(0x80) if spec.zeros else signed
    zeros = tuple(np.asarray(zero) + shift for zero in q.zeros)
    return scaled_encode(dataclasses.replace(q, data=(data,), zeros=zeros), wide)


COMPRESSED_TENSORS = Format(
    "compressed-tensors",
    lambda config: method_of(config) == "compressed-tensors",
    MARKERS,
    SUFFIXES,
    _coverage,
    _spec,
    _shape,
    _slots,
    _decode,
    _encode,
    ("input_scale", "input_global_scale", "weight_zero_point", "input_zero_point"),
)
