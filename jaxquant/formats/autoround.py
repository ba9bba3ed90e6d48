"""AutoRound checkpoints: GPTQ or AWQ tensors under AutoRound's own config.

``packing_format`` says which: ``auto_gptq`` stores zero points less one, ``gptqmodel``,
``exllamav2`` and plain ``auto_round`` store them as they are, ``auto_awq`` has AWQ's gemm words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxquant.arrays.qtensor import QTensor
from jaxquant.errors import FormatError
from jaxquant.formats.awq import (
    AWQSpec,
    awq_decode,
    awq_encode,
    awq_shape,
    awq_slots,
    awq_spec,
)
from jaxquant.formats.base import Coverage, Format, RawModule, Slot, method_of
from jaxquant.formats.gptq import (
    GPTQSpec,
    gptq_decode,
    gptq_encode,
    gptq_shape,
    gptq_slots,
    gptq_spec,
)
from jaxquant.formats.names import search_prefix, string_list
from jaxquant.formats.patterns import MAX_PATTERN
from jaxquant.formats.words import integer

V1 = ("auto_gptq",)
V2 = ("", "auto_round", "gptqmodel", "exllamav2", "gptq_exllamav2", "tritonv2")


def _override(config: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """The entry of ``extra_config`` for a module: by name, then by a pattern of the whole name."""
    extra = config.get("extra_config") or {}
    if not isinstance(extra, Mapping):
        raise FormatError("quantization_config: extra_config", repr(extra)[:80], "an object")
    if isinstance(extra.get(path), Mapping):
        return extra[path]
    for pattern, settings in extra.items():
        if len(pattern) <= MAX_PATTERN and search_prefix(f"(?:{pattern})$", path) is not None:
            return settings if isinstance(settings, Mapping) else {}
    return {}


def _bits(name: str, settings: Mapping[str, Any]) -> float:
    """Bits of an entry of ``extra_config``, 0 where it leaves them as they are."""
    bits = settings.get("bits")
    if isinstance(bits, bool) or not isinstance(bits, int | float | None):
        where = f"quantization_config: extra_config: {name[:80]}: bits"
        raise FormatError(where, repr(bits)[:80], "a number")
    return bits or 0


def _coverage(config: Mapping[str, Any]) -> Coverage:
    blocks = string_list(config, "block_name_to_quantize", "to_quant_block_names")
    names = tuple(name.strip() for block in blocks for name in block.split(",") if name.strip())
    extra = config.get("extra_config") or {}
    ignored = tuple(
        re.escape(name) if name.replace(".", "").replace("_", "").isalnum() else name
        for name, settings in (extra.items() if isinstance(extra, Mapping) else ())
        if isinstance(settings, Mapping) and _bits(name, settings) >= 16
    )

    def targeted(path: str) -> bool:
        if path.rpartition(".")[2] == "lm_head":
            return config.get("quant_lm_head") is True
        return not names or path.startswith(names)

    def matches(entry: str, path: str) -> bool:
        return search_prefix(f"(?:{entry})$", path) is not None

    return Coverage(ignored, matches, targeted)


def _spec(config: Mapping[str, Any], module: RawModule) -> GPTQSpec | AWQSpec:
    override = _override(config, module.path)
    settings = {**config, **{key: value for key, value in override.items() if value is not None}}
    packing = str(settings.get("packing_format") or "").lower().removeprefix("auto_round:")
    if str(settings.get("data_type") or "int") not in ("int", "int_sym", "int_asym"):
        raise FormatError(
            "quantization_config: data_type",
            repr(settings["data_type"]),
            "integer weights are read",
        )
    bits, group = integer(settings, "bits"), integer(settings, "group_size")
    symmetric = settings.get("sym", True) is not False
    if packing == "auto_awq":
        if bits != 4:
            raise FormatError("quantization_config: bits", str(bits), "AWQ words have 4-bit codes")
        words = {"version": "gemm", "zero_point": not symmetric}
        return awq_spec(words, module, group, signed=True)
    if packing not in (*V1, *V2):
        raise FormatError(
            "quantization_config: packing_format",
            repr(settings.get("packing_format")),
            f"auto_round:* with one of {', '.join(filter(None, (*V1, *V2)))}, auto_awq",
            "export with format auto_gptq, auto_awq or llm_compressor",
        )
    return gptq_spec(
        module,
        bits,
        group,
        one_bits=bits,
        symmetric=symmetric,
        version=1 if packing in V1 else 2,
        act_order=False,
        signed=True,
    )


def _shape(spec: Any, module: RawModule) -> tuple[int, int]:
    return awq_shape(spec, module) if isinstance(spec, AWQSpec) else gptq_shape(spec, module)


def _slots(spec: Any, shape: tuple[int, int]) -> tuple[Slot, ...]:
    return awq_slots(spec, shape) if isinstance(spec, AWQSpec) else gptq_slots(spec, shape)


def _decode(arrays: Mapping[str, np.ndarray], spec: Any, shape: tuple[int, int]) -> QTensor:
    if isinstance(spec, AWQSpec):
        return awq_decode(arrays, spec, shape)
    return gptq_decode(arrays, spec, shape)


def _encode(q: QTensor, spec: Any) -> dict[str, np.ndarray]:
    return awq_encode(q, spec) if isinstance(spec, AWQSpec) else gptq_encode(q, spec)


AUTO_ROUND = Format(
    "auto-round",
    lambda config: method_of(config) == "auto-round",
    ("qweight", "qzeros"),
    ("qweight", "qzeros", "scales", "g_idx"),
    _coverage,
    _spec,
    _shape,
    _slots,
    _decode,
    _encode,
)
