"""torchao safetensors checkpoints: ``_weight_qdata`` with ``_weight_scale``.

Float8Tensor (F8 with a scalar or one scale a row) and Int8Tensor (I8 with one scale a row) are
read.  Int4Tensor keeps its nibbles in an order that only an external kernel package defines, and
tile-packed tensors are opaque: both are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxquant.arrays.codes import CODES
from jaxquant.arrays.scheme import ActSpec
from jaxquant.formats.base import FP8_DTYPES, TENSOR, Coverage, Format, RawModule, method_of
from jaxquant.formats.names import by_regex_or_suffix, string_list
from jaxquant.formats.scaled import (
    ScaledSpec,
    scale_grid,
    scaled_decode,
    scaled_encode,
    scaled_shape,
    scaled_slots,
    scaled_spec,
    weight_shape,
)

DATA, SCALE, ZERO = "_weight_qdata", "_weight_scale", "_weight_zero_point"


def _coverage(config: Mapping[str, Any]) -> Coverage:
    return Coverage(string_list(config, "modules_to_not_convert"), by_regex_or_suffix)


def _type(config: Mapping[str, Any]) -> str:
    """The torchao config's class name, or the old short name."""
    kind = config.get("quant_type")
    if isinstance(kind, Mapping):
        kind = kind.get("default", kind)
        kind = kind.get("_type", "") if isinstance(kind, Mapping) else kind
    return str(kind or "")


def _spec(config: Mapping[str, Any], module: RawModule) -> ScaledSpec:
    data, scale = module.need(DATA), module.need(SCALE)
    if module.get(ZERO) is not None or data.dtype not in ("I8", *FP8_DTYPES):
        raise module.error(
            f"{data.dtype} codes of {_type(config) or 'torchao'}",
            "Float8Tensor and Int8Tensor are read; the nibble order of Int4Tensor is undocumented",
            "export to compressed-tensors or GPTQ",
        )
    shape = weight_shape(module, DATA)
    grid = scale_grid(scale, shape, None, ("channel", "tensor"))
    code = CODES["int8" if data.dtype == "I8" else "e4m3"]
    dynamic = "dynamicactivation" in _type(config).lower().replace("_", "")
    return scaled_spec(
        "tensor" if grid == TENSOR else "channel",
        module,
        SCALE,
        grid,
        act=ActSpec(code) if dynamic else None,
        weight_name=DATA,
    )


TORCHAO = Format(
    "torchao",
    lambda config: method_of(config) == "torchao",
    (DATA, SCALE),
    (DATA, SCALE, ZERO),
    _coverage,
    _spec,
    scaled_shape,
    scaled_slots,
    scaled_decode,
    scaled_encode,
)
