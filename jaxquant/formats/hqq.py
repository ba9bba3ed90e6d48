"""HQQ checkpoints as transformers saves them: float zero points, groups along the inputs.

``W_q`` holds the weight reshaped to [groups, group] and packed along its rows: with 4 bits, byte =
row r << 4 | row r + rows/2, with 2 bits quarters, with 1 bit eighths, with 3 bits ten parts in an
I32.  ``scale`` and ``zero`` [groups, 1]; ``shape`` [2].  value = (code - zero) x scale.  Groups
along the outputs (axis 0) repeat in strides that no kernel follows and are refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxquant.arrays.codes import CODES
from jaxquant.arrays.qtensor import QTensor
from jaxquant.errors import FormatError
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
from jaxquant.formats.names import by_component, string_list
from jaxquant.formats.scaled import Side, side
from jaxquant.formats.words import data_of, integer, patterns_of

META = (
    "shape",
    "nbits",
    "group_size",
    "axis",
    "packing",
    "compute_dtype",
    "view_as_float",
    "channel_wise",
    "encoded_state_dict",
    "stores_quant_config",
    "unpack_view_dtype",
    "offload_meta",
    "round_zero",
    "optimize",
    "quant_scale",
    "quant_zero",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HQQSpec(Spec):
    """Spec of an HQQ weight.

    Attributes:
        logical: (out, in).
        packed: dtype and shape of ``W_q``.
        sides: ``scale``, ``zero`` and ``shape`` on disk.
    """

    logical: tuple[int, int]
    packed: Side
    sides: tuple[Side, ...]


def _coverage(config: Mapping[str, Any]) -> Coverage:
    skipped = string_list({"skip_modules": ["lm_head"], **config}, "skip_modules")
    return Coverage(skipped, by_component)


def _settings(config: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """``weight_quant_params`` of a module: one for all, or one a kind of layer."""
    settings = config.get("quant_config")
    if isinstance(settings, Mapping) and "weight_quant_params" not in settings:
        settings = next((value for name, value in settings.items() if path.endswith(name)), None)
    params = settings.get("weight_quant_params") if isinstance(settings, Mapping) else None
    if not isinstance(params, Mapping):
        raise FormatError(
            "quantization_config: quant_config", f"nothing for {path}", "weight_quant_params"
        )
    return params


def _spec(config: Mapping[str, Any], module: RawModule) -> HQQSpec:
    params = _settings(config, module.path)
    bits = integer(params, "nbits")
    if bits not in (1, 2, 3, 4, 8):
        raise FormatError("quantization_config: nbits", str(bits), "1, 2, 3, 4 or 8")
    if integer(params, "axis") != 1:
        raise FormatError(
            "quantization_config: axis", "0", "groups along the inputs (axis 1) are read"
        )
    packed, stored = module.need("W_q"), module.need("shape")
    if stored.shape != (2,) or stored.dtype not in ("I64", "I32"):
        raise stored.error(f"{stored.dtype} {list(stored.shape)}", "I64 [2]")
    out, inputs = (int(n) for n in stored.read())
    whole = params.get("group_size", 0) is None
    group = inputs if whole else integer(params, "group_size")
    if packed.dtype != ("I32" if bits == 3 else "U8"):
        raise packed.error(
            f"dtype {packed.dtype}", "U8 (I32 for 3 bits); view_as_float is not read"
        )
    if out < 1 or inputs < 1 or group < 1 or inputs % group:
        raise stored.error(f"{[out, inputs]}", f"whole groups of {group}")
    rows = out * inputs // group
    expected = (-(-rows // _parts(bits)), group)
    if packed.shape != expected:
        raise packed.error(f"shape {list(packed.shape)}", f"{list(expected)}")
    leaves = []
    for name in ("scale", "zero"):
        tensor = module.need(name)
        if tensor.dtype not in SCALE_DTYPES or tensor.shape != (rows, 1):
            raise tensor.error(f"{tensor.dtype} {list(tensor.shape)}", f"[{rows}, 1], 16 or 32 bit")
        leaves.append(Leaf((1, group), numpy_dtype(tensor.dtype).name))
    sides = (side(module.need(name), name) for name in ("scale", "zero", "shape"))
    return HQQSpec(
        kind="hqq",
        code=CODES[f"uint{bits}"],
        scales=(leaves[0],),
        zeros=(leaves[1],),
        affine="zero_point",
        logical=(out, inputs),
        packed=Side("W_q", packed.dtype, packed.shape),
        sides=tuple(entry for entry in sides if entry),
    )


def _parts(bits: int) -> int:
    """Codes to a stored element."""
    return 10 if bits == 3 else 8 // bits


def _shifts(bits: int) -> list[int]:
    """Where the parts stand in an element, the first part on top."""
    return [bits * i for i in reversed(range(_parts(bits)))]


def _shape(spec: HQQSpec, module: RawModule) -> tuple[int, int]:
    return spec.logical


def _slots(spec: HQQSpec, shape: tuple[int, int]) -> tuple[Slot, ...]:
    return tuple(Slot(s.suffix, (s.dtype,), (s.shape,)) for s in (spec.packed, *spec.sides))


def _decode(arrays: Mapping[str, np.ndarray], spec: HQQSpec, shape: tuple[int, int]) -> QTensor:
    bits, group = spec.code.bits, spec.scales[0].grid[1]
    packed = np.ascontiguousarray(arrays["W_q"])
    packed = packed.view(np.uint32) if bits == 3 else packed
    mask = (1 << bits) - 1
    parts = [(packed >> packed.dtype.type(s)) & packed.dtype.type(mask) for s in _shifts(bits)]
    rows = shape[0] * shape[1] // group
    patterns = np.concatenate(parts)[:rows].astype(np.uint8).reshape(shape)
    cells = (shape[0], shape[1] // group)
    scales, zeros = arrays["scale"].reshape(cells), arrays["zero"].reshape(cells)
    return QTensor(data_of(patterns, spec.code), (scales,), (zeros,), spec.layout(shape))


def _encode(q: QTensor, spec: HQQSpec) -> dict[str, np.ndarray]:
    bits, group = spec.code.bits, spec.scales[0].grid[1]
    patterns = patterns_of(q.data, spec.code, q.shape[1]).reshape(-1, group)
    dtype = np.uint32 if bits == 3 else np.uint8
    pad = -patterns.shape[0] % _parts(bits)
    parts = np.split(np.pad(patterns, ((0, pad), (0, 0))).astype(dtype), _parts(bits))
    packed = np.zeros_like(parts[0])
    for part, shift in zip(parts, _shifts(bits), strict=True):
        packed |= part << dtype(shift)
    return {
        "W_q": packed.view(numpy_dtype(spec.packed.dtype)),
        "scale": np.asarray(q.scales[0]).reshape(-1, 1),
        "zero": np.asarray(q.zeros[0]).reshape(-1, 1),
        "shape": np.array(q.shape, numpy_dtype(spec.sides[2].dtype)),
    }


HQQ = Format(
    "hqq",
    lambda config: method_of(config) == "hqq",
    ("W_q",),
    ("W_q", "scale", "zero", *META),
    _coverage,
    _spec,
    _shape,
    _slots,
    _decode,
    _encode,
    META,
)
