"""FP8 checkpoints: ``quant_method`` fp8, fbgemm_fp8, w8a8_fp8, w4afp8, mxfp8.

========================  ===========================================================
``weight``                F8_E4M3 (or E5M2, FNUZ) [out, in]
``weight_scale_inv``      the multiplier despite its name: [ceil(out/bo), ceil(in/bi)],
``weight_scale``          [out, 1], [1] or []; F32, BF16, F16, or e8m0 exponents
``scale``                 (DeepSeek-V4), ``qscale_weight`` (Mistral)
``input_scale``           static activations: [] or [1]; also ``activation_scale``,
                          ``act_scale``, ``qscale_act``
========================  ===========================================================
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from jaxquant.arrays.codes import CODES
from jaxquant.arrays.layout import Grid, cells
from jaxquant.arrays.scheme import ActSpec
from jaxquant.errors import FormatError
from jaxquant.formats.arranged import (
    arranged_decode,
    arranged_encode,
    arranged_shape,
    arranged_slots,
)
from jaxquant.formats.base import (
    CHANNEL,
    EXPONENT_DTYPES,
    FP8_DTYPES,
    TENSOR,
    Coverage,
    Format,
    FormatWarning,
    RawModule,
    RawTensor,
    method_of,
)
from jaxquant.formats.fp4 import Fp4Spec, fp4_spec
from jaxquant.formats.names import by_component, by_regex_or_suffix, search_prefix, string_list
from jaxquant.formats.scaled import (
    ScaledSpec,
    first_of,
    fused_parts,
    scale_grid,
    scaled_spec,
    weight_shape,
)

METHODS = ("fp8", "fbgemm-fp8", "w8a8-fp8", "w4afp8", "mxfp8", "deepseek-v4-fp8")
WEIGHT_SCALES = ("weight_scale_inv", "weight_scale", "scale", "qscale_weight")
ACT_SCALES = ("input_scale", "activation_scale", "act_scale", "qscale_act")
FORMAT_DTYPES = {"e4m3": ("F8_E4M3", "F8_E4M3FNUZ"), "e5m2": ("F8_E5M2", "F8_E5M2FNUZ")}


def _coverage(config: Mapping[str, Any]) -> Coverage:
    ignored = string_list(config, "ignored_layers", "modules_to_not_convert", "ignore")
    only = string_list(config, "modules_to_convert")

    def matches(entry: str, path: str) -> bool:
        return by_component(entry, path) or by_regex_or_suffix(entry, path)

    def targeted(path: str) -> bool:
        return not only or any(search_prefix(entry, path) is not None for entry in only)

    return Coverage(ignored, matches, targeted)


def block_of(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """The declared ``weight_block_size``, None where it is absent or null.

    Raises:
        FormatError: not two positive integers.
    """
    block = config.get("weight_block_size")
    if block is None:
        return None
    if (
        not isinstance(block, list | tuple)
        or len(block) != 2
        or any(type(n) is not int or not 0 < n < 1 << 31 for n in block)
    ):
        raise FormatError(
            "quantization_config: weight_block_size", repr(block)[:80], "two positive integers"
        )
    return block[0], block[1]


def _grid(
    config: Mapping[str, Any], method: str, scale: RawTensor, shape: tuple[int, int]
) -> tuple[str, Grid]:
    """What the scale covers; where the config leaves it open, the tensor decides."""
    block = block_of(config)
    if method == "mxfp8":
        block = (1, 32)
    elif method in ("fbgemm-fp8", "w8a8-fp8"):
        return "channel", scale_grid(scale, shape, None, ("channel",))
    if block is None and len(scale.shape) == 2 and scale.shape not in ((1, 1), (shape[0], 1)):
        # transformers reads an absent block size as 128x128, vLLM as per tensor.
        block = (128, 128)
        if scale.shape == (cells(shape[0], 128), cells(shape[1], 128)):
            warnings.warn(
                f"{scale.file}: {scale.name}: the config has no weight_block_size, the scale's "
                f"shape {list(scale.shape)} says 128x128",
                FormatWarning,
                stacklevel=2,
            )
    if block is not None:
        return "block", scale_grid(scale, shape, block, ("block",))
    grid = scale_grid(scale, shape, None, ("tensor", "channel"))
    return ("tensor" if grid == TENSOR else "channel"), grid


def _activations(
    config: Mapping[str, Any], method: str, kind: str, grid: Grid, static: bool
) -> ActSpec:
    e4m3 = CODES["e4m3"]
    if method == "fbgemm-fp8":
        bound = config.get("activation_scale_ub", 1200.0)
        if isinstance(bound, bool) or not isinstance(bound, int | float) or not bound > 0:
            raise FormatError(
                "quantization_config: activation_scale_ub", repr(bound)[:80], "a positive number"
            )
        return ActSpec(e4m3, upper_bound=float(bound))
    if method == "mxfp8":
        return ActSpec(e4m3, "group", group_size=32, scale_code="mx")
    if static:
        return ActSpec(e4m3, "tensor", dynamic=False)
    if kind == "block":
        scale_code = "e8m0" if config.get("scale_fmt") == "ue8m0" else "f32"
        return ActSpec(e4m3, "group", group_size=grid[1], scale_code=scale_code)
    return ActSpec(e4m3)


def _check_dtype(config: Mapping[str, Any], weight: RawTensor) -> None:
    if weight.dtype not in FP8_DTYPES:
        raise weight.error(
            f"dtype {weight.dtype} beside a weight scale",
            f"a quantized weight is one of {', '.join(FP8_DTYPES)}",
            "an already dequantized weight must not have a scale",
        )
    declared = str(config.get("fmt") or "").lower().removeprefix("float8_")
    if declared[:4] in FORMAT_DTYPES and weight.dtype not in FORMAT_DTYPES[declared[:4]]:
        raise weight.error(f"dtype {weight.dtype}", f"the config says fmt {config['fmt']!r}")


def _four_bit(config: Mapping[str, Any], method: str, module: RawModule) -> ScaledSpec | Fp4Spec:
    """The experts of W4AFP8 (int4) and of DeepSeek-V4 (MXFP4) beside FP8 linears."""
    if method == "w4afp8":
        rows, columns = weight_shape(module)
        grid = scale_grid(
            module.need("weight_scale_inv"), (rows, 2 * columns), (1, 128), ("block",)
        )
        module.need("input_scale")
        return scaled_spec(
            "int4",
            module,
            "weight_scale_inv",
            grid,
            act=ActSpec(CODES["e4m3"], "tensor", dynamic=False),
            act_name="input_scale",
            nibbles=True,
        )
    if config.get("expert_dtype") == "fp4":
        return fp4_spec(module, block="scale")
    weight = module.need("weight")
    raise weight.error(f"dtype {weight.dtype}", f"one of {', '.join(FP8_DTYPES)} in this family")


def _spec(config: Mapping[str, Any], module: RawModule) -> ScaledSpec | Fp4Spec:
    method = method_of(config)
    weight = module.need("weight")
    if weight.dtype in ("I8", "U8"):
        return _four_bit(config, method, module)
    name, scale = first_of(module, WEIGHT_SCALES, "weight scale")
    _check_dtype(config, weight)
    shape = weight_shape(module)
    parts = fused_parts(module, scale, shape[0])
    if parts:
        kind, grid = "tensor", CHANNEL
    else:
        kind, grid = _grid(config, method, scale, shape)
    acts = [act for act in ACT_SCALES if module.get(act) is not None]
    scheme = config.get("activation_scheme") or "dynamic"
    if scheme not in ("dynamic", "static"):
        raise FormatError(
            "quantization_config: activation_scheme", repr(scheme)[:80], "dynamic or static"
        )
    static = scheme == "static"
    if static and not acts:
        raise module.error(
            "no activation scale",
            f"activation_scheme static stores one of {', '.join(ACT_SCALES)}",
            "the checkpoint is incomplete",
        )
    if static and kind == "block":
        raise module.error("static activations with blocks", "blocks have dynamic activations")
    # Mistral's files have no activation_scheme: the tensor says it.
    static = static or "qscale_act" in acts
    spec = scaled_spec(
        kind,
        module,
        name,
        grid,
        act=_activations(config, method, kind, grid, static),
        act_name=acts[0] if acts and static else None,
        parts=parts,
    )
    if method == "mxfp8" and scale.dtype not in EXPONENT_DTYPES:
        raise scale.error(f"dtype {scale.dtype}", "mxfp8 scales are e8m0 exponents (U8)")
    return spec


FP8 = Format(
    "fp8",
    lambda config: method_of(config) in METHODS,
    ("weight_scale_inv", "weight_scale", "qscale_weight"),
    ("weight", *WEIGHT_SCALES, *ACT_SCALES, "input_scale_ub"),
    _coverage,
    _spec,
    arranged_shape,
    arranged_slots,
    arranged_decode,
    arranged_encode,
    (*ACT_SCALES, "input_scale_ub"),
)
