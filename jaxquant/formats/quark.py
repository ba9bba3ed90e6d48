"""AMD Quark checkpoints: FP8, INT8 and MXFP4 weights; int4 and fp6 are refused.

==========  ============================================================
fp8_e4m3    ``weight`` F8, ``weight_scale`` [] or [out], ``input_scale``
int8        ``weight`` I8, ``weight_scale`` [out], ``weight_zero_point``
fp4         ``weight`` U8 [out, in/2], ``weight_scale`` U8 [out, in/32]
==========  ============================================================
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any

from jaxquant.arrays.codes import CODES
from jaxquant.arrays.scheme import ActSpec
from jaxquant.errors import FormatError
from jaxquant.formats.arranged import (
    Arranged,
    arranged_decode,
    arranged_encode,
    arranged_shape,
    arranged_slots,
)
from jaxquant.formats.base import TENSOR, Coverage, Format, RawModule, method_of
from jaxquant.formats.fp4 import fp4_activations, fp4_spec
from jaxquant.formats.names import by_name_or_regex, string_list
from jaxquant.formats.scaled import scale_grid, scaled_spec, weight_shape

SUFFIXES = ("weight", "weight_scale", "weight_zero_point", "input_scale", "input_zero_point")


def _coverage(config: Mapping[str, Any]) -> Coverage:
    return Coverage(string_list(config, "exclude"), by_name_or_regex)


def _settings(config: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """The entry of ``layer_quant_config`` for a module, else the global one."""
    layers = config.get("layer_quant_config") or {}
    for pattern, settings in layers.items() if isinstance(layers, Mapping) else ():
        # Without a glob the rule is reversed: the module's name occurs in the key.
        if fnmatch.fnmatchcase(path, pattern) if "*" in pattern else path in pattern:
            return settings
    settings = config.get("global_quant_config")
    if not isinstance(settings, Mapping):
        raise FormatError(
            "quantization_config: global_quant_config", repr(settings)[:80], "an object"
        )
    return settings


def _spec(config: Mapping[str, Any], module: RawModule) -> Arranged:
    settings = _settings(config, module.path)
    weight, inputs = settings.get("weight"), settings.get("input_tensors")
    if not isinstance(weight, Mapping):
        raise FormatError(
            "quantization_config: weight",
            repr(weight)[:80],
            "one spec; two-level weights are not read",
        )
    kind = str(weight.get("dtype"))
    if kind == "fp4":
        act = fp4_activations("mxfp4") if inputs else None
        return fp4_spec(module, act=act)
    if kind not in ("fp8_e4m3", "int8"):
        raise FormatError(
            "quantization_config: weight.dtype",
            repr(kind),
            "fp8_e4m3, int8 or fp4",
            "export the checkpoint with one of these",
        )
    shape = weight_shape(module)
    grid = scale_grid(module.need("weight_scale"), shape, None, ("tensor", "channel"))
    static = isinstance(inputs, Mapping) and not inputs.get("is_dynamic", False)
    act = None
    if isinstance(inputs, Mapping):
        code = CODES["e4m3" if kind == "fp8_e4m3" else "int8"]
        symmetric = inputs.get("symmetric") is not False or kind == "fp8_e4m3"
        act = ActSpec(code, "tensor", False, symmetric) if static else ActSpec(code)
        if static:
            module.need("input_scale")
    zero = module.get("weight_zero_point")
    return scaled_spec(
        "tensor" if grid == TENSOR else "channel",
        module,
        "weight_scale",
        grid,
        act=act,
        act_name="input_scale" if static else None,
        zero_name="weight_zero_point" if zero is not None and bool(zero.read().any()) else None,
        act_zero_name="input_zero_point" if act is not None and not act.symmetric else None,
    )


QUARK = Format(
    "quark",
    lambda config: method_of(config) == "quark",
    ("weight_scale", "weight_zero_point"),
    SUFFIXES,
    _coverage,
    _spec,
    arranged_shape,
    arranged_slots,
    arranged_decode,
    arranged_encode,
    ("input_scale", "weight_zero_point", "input_zero_point"),
)
