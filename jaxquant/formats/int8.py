"""INT8 checkpoints of sglang: ``blockwise_int8`` and ``w8a8_int8``.

===================  ==============================================================
``weight``           I8 [out, in]
``weight_scale_inv`` blockwise: F32 [ceil(out/bo), ceil(in/bi)], the multiplier
``weight_scale``     w8a8: F32 [out, 1]
===================  ==============================================================

Activations are quantized at run time, amax / 127 per token or per ``bi`` inputs of a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxquant.arrays.codes import CODES
from jaxquant.arrays.scheme import ActSpec
from jaxquant.errors import FormatError
from jaxquant.formats.base import Coverage, Format, RawModule, method_of
from jaxquant.formats.fp8 import block_of
from jaxquant.formats.names import by_component, string_list
from jaxquant.formats.scaled import (
    ScaledSpec,
    first_of,
    scale_grid,
    scaled_decode,
    scaled_encode,
    scaled_shape,
    scaled_slots,
    scaled_spec,
    weight_shape,
)

METHODS = ("blockwise-int8", "w8a8-int8")
WEIGHT_SCALES = ("weight_scale_inv", "weight_scale")


def _coverage(config: Mapping[str, Any]) -> Coverage:
    return Coverage(string_list(config, "ignored_layers", "ignore"), by_component)


def _spec(config: Mapping[str, Any], module: RawModule) -> ScaledSpec:
    weight = module.need("weight")
    name, scale = first_of(module, WEIGHT_SCALES, "weight scale")
    if weight.dtype != "I8":
        raise weight.error(
            f"dtype {weight.dtype} beside {name}",
            "an int8 weight is I8",
            "an already dequantized weight must not have a scale",
        )
    shape = weight_shape(module)
    if method_of(config) == "w8a8-int8":
        grid = scale_grid(scale, shape, None, ("channel",))
        return scaled_spec("channel", module, name, grid, act=ActSpec(CODES["int8"]))
    block = block_of(config)
    if block is None:
        raise FormatError(
            "quantization_config: weight_block_size", "absent", "blockwise_int8 has blocks"
        )
    if config.get("activation_scheme", "dynamic") != "dynamic":
        raise FormatError(
            "quantization_config: activation_scheme",
            repr(config["activation_scheme"]),
            "blockwise_int8 quantizes activations dynamically",
        )
    act = ActSpec(CODES["int8"], "group", group_size=block[1])
    grid = scale_grid(scale, shape, block, ("block",))
    return scaled_spec("block", module, name, grid, act=act)


INT8 = Format(
    "int8",
    lambda config: method_of(config) in METHODS,
    WEIGHT_SCALES,
    ("weight", *WEIGHT_SCALES),
    _coverage,
    _spec,
    scaled_shape,
    scaled_slots,
    scaled_decode,
    scaled_encode,
)
