"""GPTQ checkpoints: codes packed along ``in``, zero points along ``out``.

===========  ==========================================================
``qweight``  I32 [in * bits / 32, out], dense little-endian bit streams
``qzeros``   I32 [groups, out * bits / 32]; v1 files store zero - 1
``scales``   F16 (BF16, F32) [groups, out]
``g_idx``    I32 [in], the group of every input; absent means k // group
===========  ==========================================================

value = (code - zero) x scale.  Symmetric files have the constant zero 2**(bits-1): they become
signed codes without zero points.  With act-order the inputs are sorted by group and ``perm`` is
kept.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxquant.arrays.codes import CODES
from jaxquant.arrays.layout import WHOLE, Grid, cells
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
    by_auto_round,
    method_of,
    numpy_dtype,
)
from jaxquant.formats.checks import check_group_index
from jaxquant.formats.gptq_zeros import BITS, read_zeros, write_zeros, zero_points
from jaxquant.formats.names import search_prefix
from jaxquant.formats.words import data_to_rows, integer, rows_to_data, take_inputs
from jaxquant.transforms.repack import transpose_copy

METHODS = ("gptq", "gptq-marlin")
VERSIONS = {"": 1, "gptq": 1, "gptq_v2": 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTQSpec(Spec):
    """Spec of a GPTQ weight.

    Attributes:
        group: inputs to a scale, -1 for all.
        version: 1 where the file stores zero points less one, else 2.
        one_bits: the width of the ones that v1 files subtract from words of zero points.  GPTQModel
            takes the checkpoint's width, also for modules that a ``dynamic`` rule gives another.
        scale_dtype: safetensors dtype of ``scales``.
        qzeros: whether the file has zero points.
        g_idx: safetensors dtype of ``g_idx``, None where the file has none.
        ragged: groups of unequal size, whose scales are repeated for every input.
    """

    group: int
    version: int
    one_bits: int
    scale_dtype: str
    qzeros: bool
    g_idx: str | None
    ragged: bool = False


def _dynamic(config: Mapping[str, Any], path: str) -> tuple[bool, Mapping[str, Any]]:
    """Whether a ``-:`` rule excludes ``path``, and the overrides of the first rule that matches."""
    rules = config.get("dynamic") or {}
    if not isinstance(rules, Mapping):
        raise FormatError("quantization_config: dynamic", repr(rules)[:80], "an object of rules")
    for pattern, override in rules.items():
        if search_prefix(re.sub(r"^[+-]:", "", pattern), path) is not None:
            if pattern.startswith("-:"):
                return True, {}
            return False, override if isinstance(override, Mapping) else {}
    return False, {}


def _coverage(config: Mapping[str, Any]) -> Coverage:
    rules = config.get("dynamic") or {}
    if not isinstance(rules, Mapping):
        raise FormatError("quantization_config: dynamic", repr(rules)[:80], "an object of rules")
    if not isinstance(config.get("lm_head", False), bool | None):
        raise FormatError("quantization_config: lm_head", repr(config["lm_head"])[:80], "a flag")
    excluded = tuple(pattern for pattern in rules if pattern.startswith("-:"))
    blocks = config.get("modules_in_block_to_quantize") or []
    names = tuple(str(n) for part in blocks for n in (part if isinstance(part, list) else [part]))

    def matches(entry: str, path: str) -> bool:
        # Only the first matching rule counts, so a "+:" rule in front protects a module.
        return _dynamic(config, path)[0] and search_prefix(entry[2:], path) is not None

    def targeted(path: str) -> bool:
        if path.rpartition(".")[2] == "lm_head":
            return config.get("lm_head") is True
        return not names or path.endswith(names)

    return Coverage(excluded, matches, targeted)


def _spec(config: Mapping[str, Any], module: RawModule) -> GPTQSpec:
    override = _dynamic(config, module.path)[1]
    settings = {**config, **override}
    declared = str(settings.get("checkpoint_format") or settings.get("format") or "").lower()
    if declared not in VERSIONS:
        raise FormatError(
            "quantization_config: checkpoint_format",
            repr(declared),
            f"one of {', '.join(filter(None, VERSIONS))}",
            "convert the checkpoint to gptq with the tool that made it",
        )
    if str(settings.get("pack_dtype") or "int32") != "int32":
        raise FormatError(
            "quantization_config: pack_dtype", repr(settings["pack_dtype"]), "'int32' is read"
        )
    bits = integer(settings, "bits", "weight_bits")
    return gptq_spec(
        module,
        bits,
        integer(settings, "group_size"),
        one_bits=integer(config, "bits", "weight_bits") if "bits" in override else bits,
        symmetric=settings.get("sym", True) is not False,
        version=VERSIONS[declared],
        act_order=settings.get("desc_act", False) is True,
        signed=by_auto_round(config),
    )


def gptq_spec(
    module: RawModule,
    bits: int,
    group: int,
    *,
    one_bits: int,
    symmetric: bool,
    version: int,
    act_order: bool,
    signed: bool = False,
) -> GPTQSpec:
    """Spec from the family's settings and the module's zero points and group index.

    Raises:
        FormatError: shapes contradict the settings, or the group index is unusable.
    """
    if bits not in BITS or one_bits not in BITS:
        raise FormatError("quantization_config: bits", f"{bits}, {one_bits}", f"one of {BITS}")
    if group != -1 and group < 1:
        raise FormatError("quantization_config: group_size", str(group), "-1 or positive")
    qweight, scales = module.need("qweight"), module.need("scales")
    for tensor, dtypes in ((qweight, ("I32", "U32")), (scales, SCALE_DTYPES)):
        if tensor.dtype not in dtypes or len(tensor.shape) != 2:
            raise tensor.error(
                f"{tensor.dtype} {list(tensor.shape)}", f"{' or '.join(dtypes)} of rank 2"
            )
    rows, out = qweight.shape
    g_idx, qzeros = module.get("g_idx"), module.get("qzeros")
    inputs = rows * 32 // bits
    if g_idx is not None and len(g_idx.shape) == 1:
        _check_bits(module, bits, rows, g_idx.shape[0])
    groups = 1 if group == -1 else cells(inputs, group)
    if scales.shape != (groups, out):
        raise scales.error(
            f"shape {list(scales.shape)}",
            f"[groups, out] = {[groups, out]} for {inputs} inputs in groups of {group}",
        )
    layout = _group_layout(module, g_idx, inputs, group, groups, act_order)
    grid: Grid = (1, 1) if layout == "ragged" else (1, WHOLE if group == -1 else group)
    zeros = False
    if qzeros is not None:
        zeros, version, one_bits = zero_points(
            module, bits, one_bits, groups, out, symmetric, version
        )
    elif not symmetric:
        raise module.error("no qzeros", "an asymmetric GPTQ weight has zero points")
    return GPTQSpec(
        kind="gptq",
        code=CODES[f"{'uint' if zeros else 'int'}{bits}"],
        scales=(Leaf(grid, numpy_dtype(scales.dtype).name),),
        zeros=(Leaf(grid, "uint8"),) if zeros else (),
        affine="zero_point" if zeros else "symmetric",
        perm=layout == "sorted",
        group=group,
        version=version,
        one_bits=one_bits,
        scale_dtype=scales.dtype,
        qzeros=qzeros is not None,
        g_idx=None if g_idx is None else g_idx.dtype,
        ragged=layout == "ragged",
        dead_scales=True,
        signed_scales=signed,
    )


def _check_bits(module: RawModule, bits: int, rows: int, inputs: int) -> None:
    if rows * 32 == inputs * bits:
        return
    implied = [b for b in BITS if rows * 32 == inputs * b]
    raise module.need("qweight").error(
        f"{rows} rows of words for {inputs} inputs",
        f"{bits} bits give {inputs * bits / 32:g} rows",
        f"the shape says {implied[0]} bits: correct the config" if implied else "",
    )


def _group_layout(
    module: RawModule, g_idx: Any, inputs: int, group: int, groups: int, act_order: bool
) -> str:
    """How groups lie along the inputs: "plain", "sorted" (act-order) or "ragged"."""
    if g_idx is None:
        if act_order and groups > 1:
            raise module.error(
                "no g_idx",
                "desc_act needs the group of every input",
                "it cannot be reconstructed: export the checkpoint again",
            )
        return "plain"
    if g_idx.dtype not in ("I32", "I64") or g_idx.shape != (inputs,):
        raise g_idx.error(f"{g_idx.dtype} {list(g_idx.shape)}", f"I32 or I64 [{inputs}]")
    index = g_idx.read()
    check_group_index(index, groups, f"{g_idx.file}: {g_idx.name}")
    if groups == 1 or np.array_equal(index, np.arange(inputs) // group):
        return "plain"
    if not index.any():
        if act_order:
            raise g_idx.error("all zero", "with desc_act it holds the group of every input")
        return "plain"
    counts = np.bincount(index, minlength=groups)
    if np.array_equal(np.cumsum(counts), np.minimum(np.arange(1, groups + 1) * group, inputs)):
        return "sorted"
    return "ragged"


def gptq_shape(spec: GPTQSpec, module: RawModule) -> tuple[int, int]:
    """(out, in)."""
    rows, out = module.need("qweight").shape
    return out, rows * 32 // spec.code.bits


def gptq_slots(spec: GPTQSpec, shape: tuple[int, int]) -> tuple[Slot, ...]:
    """The tensors of one weight."""
    out, inputs = shape
    bits, groups = spec.code.bits, 1 if spec.group == -1 else cells(inputs, spec.group)
    return (
        Slot("qweight", ("I32", "U32"), ((inputs * bits // 32, out),)),
        Slot("scales", (spec.scale_dtype,), ((groups, out),)),
        Slot("qzeros", ("I32", "U32"), ((groups, out * bits // 32),), spec.qzeros),
        Slot("g_idx", ("I32", "I64"), ((inputs,),), spec.g_idx is not None),
    )


def gptq_decode(
    arrays: Mapping[str, np.ndarray], spec: GPTQSpec, shape: tuple[int, int]
) -> QTensor:
    """Decode; for 2, 4 and 8 bits a transposed word already is our packing."""
    out, inputs = shape
    code = spec.code
    data = rows_to_data(transpose_copy(arrays["qweight"]), code, inputs)
    scales = np.ascontiguousarray(arrays["scales"].T)
    zeros = None
    if spec.zeros:
        read = read_zeros(arrays["qzeros"], code.bits, spec.one_bits, out, spec.version)
        zeros = np.ascontiguousarray(read.T)
    perm = None
    if spec.perm:
        perm = np.argsort(arrays["g_idx"], kind="stable").astype(np.int32)
        data = take_inputs(data, code, inputs, perm)
    if spec.ragged:
        scales = scales[:, arrays["g_idx"]]
        zeros = None if zeros is None else zeros[:, arrays["g_idx"]]
    if code.name == "int8":
        data = ((data[0] ^ np.uint8(0x80)).view(np.int8),)
    return QTensor(
        data, (scales,), () if zeros is None else (zeros,), spec.layout(shape), perm=perm
    )


def gptq_encode(q: QTensor, spec: GPTQSpec) -> dict[str, np.ndarray]:
    """The tensors as GPTQ tools write them."""
    if spec.ragged:
        raise FormatError("gptq", "groups of unequal size", "they are read, not written")
    inputs = q.shape[1]
    code, bits = spec.code, spec.code.bits
    data = tuple(np.asarray(plane) for plane in q.data)
    if code.name == "int8":
        data = (data[0].view(np.uint8) ^ np.uint8(0x80),)
    groups = np.arange(inputs) // (inputs if spec.group == -1 else spec.group)
    if q.perm is not None:
        order = np.argsort(np.asarray(q.perm))
        data = take_inputs(data, code, inputs, order)
        groups = groups[order]
    middle = 1 << (bits - 1)
    zeros = np.asarray(q.zeros[0]).T if q.zeros else np.full(q.scales[0].shape[::-1], middle)
    arrays = {
        "qweight": transpose_copy(data_to_rows(data, code, inputs)),
        "scales": np.ascontiguousarray(np.asarray(q.scales[0]).T),
    }
    if spec.qzeros:
        arrays["qzeros"] = write_zeros(zeros.astype(np.uint8), bits, spec.one_bits, spec.version)
    if spec.g_idx is not None:
        arrays["g_idx"] = groups.astype(numpy_dtype(spec.g_idx))
    return arrays


def _claims(config: Mapping[str, Any]) -> bool:
    return method_of(config) in METHODS


GPTQ = Format(
    "gptq",
    _claims,
    ("qweight", "qzeros"),
    ("qweight", "qzeros", "scales", "g_idx"),
    _coverage,
    _spec,
    gptq_shape,
    gptq_slots,
    gptq_decode,
    gptq_encode,
)
