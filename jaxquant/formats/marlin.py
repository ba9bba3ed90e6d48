"""Old Marlin checkpoints: GPTQ 4-bit symmetric codes in the Marlin kernel's order.

``B`` I32 [in/16, 2 * out] permuted words, ``s`` F16 [groups, out] permuted; ``workspace`` is
scratch memory.  value = (code - 8) x scale.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxquant.arrays.codes import CODES
from jaxquant.arrays.layout import WHOLE
from jaxquant.arrays.qtensor import QTensor
from jaxquant.errors import FormatError
from jaxquant.formats.base import Coverage, Format, Leaf, RawModule, Slot, Spec, method_of
from jaxquant.formats.words import data_of, integer, patterns_of
from jaxquant.transforms.repack import pack_bits, unpack_bits

INTERLEAVE = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}
GROUPED = np.array([i + 8 * j for i in range(8) for j in range(8)])
SINGLE = np.array([2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class MarlinSpec(Spec):
    """Spec of a Marlin weight.

    Attributes:
        group: inputs to a scale, -1 for all.
        workspace: shape of the scratch tensor on disk, None where there is none.
    """

    group: int
    workspace: tuple[int, ...] | None = None


def places(out: int, bits: int = 4) -> np.ndarray:
    """Field ``[16, out]`` within a row of words at which input ``k % 16`` of an output stands."""
    k, n = np.arange(16)[:, None], np.arange(out)[None, :]
    high, pair, low = k // 8, k % 8 // 2, k % 2
    tile, column = n // 16 % 4, n % 16
    entry = 4 * (column // 8) + 2 * high + low
    position = 32 * (4 * (column % 8) + pair) + 8 * tile + entry
    order = np.argsort(INTERLEAVE[bits])
    length = len(order)
    return 1024 * (n // 64) + position // length * length + order[position % length]


def _coverage(config: Mapping[str, Any]) -> Coverage:
    def targeted(path: str) -> bool:
        return path.rpartition(".")[2] != "lm_head" or config.get("lm_head") is True

    return Coverage((), lambda entry, path: False, targeted)


def _spec(config: Mapping[str, Any], module: RawModule) -> MarlinSpec:
    bits, group = integer(config, "bits"), integer(config, "group_size")
    if bits != 4 or group not in (-1, 128):
        raise FormatError(
            "quantization_config: bits", f"{bits}, group_size {group}", "4, and -1 or 128"
        )
    words, scales, scratch = module.need("B"), module.need("s"), module.get("workspace")
    if words.dtype != "I32" or len(words.shape) != 2:
        raise words.error(f"{words.dtype} {list(words.shape)}", "I32 [in/16, 2 * out]")
    inputs, out = words.shape[0] * 16, words.shape[1] // 2
    if inputs % 128 or out % 64 or words.shape[1] % 2:
        raise words.error(f"{out} x {inputs}", "tiles of 64 outputs and 128 inputs")
    groups = 1 if group == -1 else inputs // group
    if scales.dtype != "F16" or scales.shape != (groups, out):
        raise scales.error(f"{scales.dtype} {list(scales.shape)}", f"F16 {[groups, out]}")
    return MarlinSpec(
        kind="marlin",
        code=CODES["int4"],
        scales=(Leaf((1, WHOLE if group == -1 else group), "float16"),),
        dead_scales=True,
        group=group,
        workspace=None if scratch is None else scratch.shape,
    )


def _shape(spec: MarlinSpec, module: RawModule) -> tuple[int, int]:
    rows, columns = module.need("B").shape
    return columns // 2, rows * 16


def _slots(spec: MarlinSpec, shape: tuple[int, int]) -> tuple[Slot, ...]:
    out, inputs = shape
    groups = 1 if spec.group == -1 else inputs // spec.group
    return (
        Slot("B", ("I32",), ((inputs // 16, 2 * out),)),
        Slot("s", ("F16",), ((groups, out),)),
        Slot("workspace", ("I32",), (), spec.workspace is not None),
    )


def _scale_order(spec: MarlinSpec) -> np.ndarray:
    return SINGLE if spec.group == -1 else GROUPED


def _decode(arrays: Mapping[str, np.ndarray], spec: MarlinSpec, shape: tuple[int, int]) -> QTensor:
    out, inputs = shape
    fields = unpack_bits(np.ascontiguousarray(arrays["B"]).view(np.uint8), 4, -1)
    patterns = fields[:, places(out)].reshape(inputs, out).T
    order, stored = _scale_order(spec), arrays["s"]
    scales = np.empty_like(stored).reshape(-1, len(order))
    scales[:, order] = stored.reshape(-1, len(order))
    scales = np.ascontiguousarray(scales.reshape(stored.shape).T)
    return QTensor(
        data_of(np.ascontiguousarray(patterns), spec.code), (scales,), (), spec.layout(shape)
    )


def _encode(q: QTensor, spec: MarlinSpec) -> dict[str, np.ndarray]:
    out, inputs = q.shape
    patterns = patterns_of(q.data, spec.code, inputs)
    fields = np.empty((inputs // 16, 16 * out), np.uint8)
    fields[:, places(out).reshape(-1)] = patterns.T.reshape(inputs // 16, -1)
    order, scales = _scale_order(spec), np.ascontiguousarray(np.asarray(q.scales[0]).T)
    arrays = {
        "B": np.ascontiguousarray(pack_bits(fields, 4, -1)).view(np.int32),
        "s": scales.reshape(-1, len(order))[:, order].reshape(scales.shape),
    }
    if spec.workspace is not None:
        arrays["workspace"] = np.zeros(spec.workspace, np.int32)
    return arrays


def _claims(config: Mapping[str, Any]) -> bool:
    named = config.get("checkpoint_format") or config.get("format")
    marlin = named == "marlin" or config.get("is_marlin_format") is True
    return method_of(config) == "marlin" or (marlin and method_of(config) == "gptq")


MARLIN = Format(
    "marlin",
    _claims,
    ("B", "s"),
    ("B", "s", "workspace"),
    _coverage,
    _spec,
    _shape,
    _slots,
    _decode,
    _encode,
)
