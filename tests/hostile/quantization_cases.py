"""Lies in a ``quantization_config``, and in the scales and codes that it describes."""

from __future__ import annotations

import copy
import json
from typing import Any

import ml_dtypes
import numpy as np

from jaxquant.convert import read_quantized
from tests.convert.writer import assemble, header_of
from tests.formats.cases import CASES as MODULES
from tests.hostile.harness import Case

FILE, WEIGHTS = "config.json", "model.safetensors"
read = read_quantized
E4M3, E8M0 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu


def checkpoint(name: str, changes: dict[str, Any], file: str, subject: str = "", **arrays) -> Case:
    """A module's checkpoint with other values in its config or arrays.

    Args:
        name: the module in ``tests.formats.cases``.
        changes: dotted place in the config -> value.
        file: the file at fault.
        subject: what the error names.
        arrays: suffix -> array.
    """
    case = MODULES[name]
    config = copy.deepcopy(case.config)
    for place, value in changes.items():
        *path, last = place.split("/")
        inner = config
        for key in path:
            inner = inner[key]
        inner[last] = value
    tensors = {f"{case.path}.{suffix}": a for suffix, a in (case.arrays | arrays).items()}
    model = case.model | {"quantization_config": config}
    files = {
        FILE: json.dumps(model).encode(),
        WEIGHTS: assemble(*header_of(tensors)),
    }
    return Case(files, file, "", subject)


GOOD = checkpoint("gptq-4b-v1-asym", {}, FILE)
CASES: dict[str, Case] = {}


def each(name: str, place: str, *values: object) -> None:
    key = place.rpartition("/")[2]
    for value in values:
        shown = str(value)[:24] + (f" ({len(str(value))})" if len(str(value)) > 24 else "")
        label = f"{MODULES[name].format}: {key} = {shown}"
        assert label not in CASES, label
        subject = "weights" if key in ("num_bits", "type") else key
        CASES[label] = checkpoint(name, {place: value}, FILE, subject)


GROUP = "config_groups/group_0/"
each("fp8-block-partial", "quant_method", 3, ["fp8"], {"a": 1}, "megabyte", True)
each("fp8-block-partial", "weight_block_size", 128, [128], [0, 128], [-1, 128], ["128", 128])
each("fp8-block-partial", "weight_block_size", [1 << 70, 128], [1.5, 128], "128x128", {"a": 1})
each("fp8-block-partial", "activation_scheme", 3, ["dynamic"], "sometimes")
each("fp8-block-partial", "fmt", 3, ["e4m3"], {"a": 1})
each("fp8-block-partial", "ignored_layers", 3, {"a": 1}, [1], [["a"]], [None])
each("gptq-4b-v1-asym", "bits", "4", 4.5, [4], True, 5, -4, 0, 1 << 70, {"a": 1})
each("gptq-4b-v1-asym", "group_size", "64", 64.5, [64], True, 0, -2, 1 << 70)
each("gptq-4b-v1-asym", "desc_act", "false", 0, [1], {"a": 1})
each("gptq-4b-v1-asym", "sym", "true", 1, [1])
each("gptq-4b-v1-asym", "lm_head", "true", 1, [1])
each("gptq-4b-v1-asym", "checkpoint_format", 3, ["gptq"], "planar")
each("gptq-4b-v1-asym", "dynamic", "all", 3, [1])
each("awq-gemm", "zero_point", "true", 1, [1])
each("awq-gemm", "modules_to_not_convert", 3, {"a": 1}, [1])
each("ct-packed-4b", "config_groups", 3, "W9A9", [1], {})
each("ct-packed-4b", GROUP + "targets", 3, [1], {"a": 1})
each("ct-packed-4b", GROUP + "weights", 3, "int4", [1])
each("ct-packed-4b", GROUP + "weights/num_bits", "4", 4.5, 0, 17, -1, 1 << 70, [4])
each("ct-packed-4b", GROUP + "weights/strategy", 3, "row", ["group"])
each("ct-packed-4b", GROUP + "weights/symmetric", "true", 1, [1])
each("ct-packed-4b", GROUP + "weights/type", 3, "complex", ["int"])
each("ct-packed-4b", GROUP + "weights/dynamic", "yes", 1, [1])
each("ct-packed-4b", "ignore", 3, {"a": 1}, [1])
each("ct-packed-4b", "format", 3, ["pack-quantized"])

# Patterns that take time without end, and those that are none, wherever a config may have one.
SLOW = {
    "nested repeats": "(a+)+$",
    "nested stars": "(.*)*x",
    "repeated alternatives": "(m|mo|mod)*$",
    "bounded repeats": "(m?){40}m{40}",
    "repeats of repeats": "((m{0,9}){0,9}){0,9}x",
    "many stars": ".*" * 12 + "x",
    "stars in a lookahead": "(?=" + ".*" * 12 + "x)",
    "back reference": r"(m.*)(.*)\1\2.*.*.*.*.*x",
    "long": "x?" * 3000,
    "deep": "(" * 600 + ")" * 600,
    "huge repeat": "a{1000000000}{1000000000}",
    "unclosed": "(a",
    "bad range": "[z-a]",
    "with spaces": "(?x)( a + ) +",
}
for label, pattern in SLOW.items():
    for name, place, value in (
        ("fp8-block-partial", "modules_to_not_convert", [pattern]),
        ("ct-packed-4b", "ignore", ["re:" + pattern]),
        ("ct-packed-4b", GROUP + "targets", ["re:" + pattern]),
        ("gptq-4b-v1-asym", "dynamic", {pattern: {"bits": 4}}),
    ):
        where = place.rpartition("/")[2]
        CASES[f"pattern in {where}: {label}"] = checkpoint(name, {place: value}, FILE, "pattern")


def edited(name: str, suffix: str, value: float) -> np.ndarray:
    array = MODULES[name].arrays[suffix].copy()
    array.reshape(-1)[-1] = value
    return array


def octet(name: str, suffix: str, value: int) -> np.ndarray:
    array = MODULES[name].arrays[suffix].copy()
    array.reshape(-1).view(np.uint8)[-1] = value
    return array


SCALES = (
    ("fp8-block-partial", "weight_scale_inv"),
    ("gptq-4b-v1-asym", "scales"),
    ("awq-gemm", "scales"),
    ("ct-packed-4b", "weight_scale"),
    ("ct-nvfp4", "weight_global_scale"),
    ("modelopt-nvfp4", "weight_scale_2"),
    ("qserve-group", "s1_scales"),
)
for name, suffix in SCALES:
    for value in (np.nan, np.inf, -1.0):
        path = f"{MODULES[name].path}"
        CASES[f"{name}: {suffix} {value}"] = checkpoint(
            name, {}, WEIGHTS, path, **{suffix: edited(name, suffix, value)}
        )
OCTETS = {
    "fp8-block-partial: NaN code": ("fp8-block-partial", "weight", 0x7F),
    "fp8-block-partial: negative NaN code": ("fp8-block-partial", "weight", 0xFF),
    "fp8-tensor: NaN code": ("fp8-tensor", "weight", 0x7F),
    "ct-nvfp4: NaN scale": ("ct-nvfp4", "weight_scale", 0x7F),
    "ct-mxfp4: NaN exponent": ("ct-mxfp4", "weight_scale", 0xFF),
    "gpt-oss: NaN exponent": ("gpt-oss", "scales", 0xFF),
    "fp8-block-ue8m0: NaN exponent": ("fp8-block-ue8m0", "weight_scale_inv", 0xFF),
}
for label, (name, suffix, value) in OCTETS.items():
    CASES[label] = checkpoint(
        name, {}, WEIGHTS, MODULES[name].path, **{suffix: octet(name, suffix, value)}
    )
