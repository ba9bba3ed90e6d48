"""QServe (QoQ) W4A8 checkpoints: 4-bit codes in the kernel's permuted order.

=============  ===============================================================
``qweight``    I8 [out, in/2], permuted in tiles of 32 x 32
``s1_scales``  F16 [out]
``s1_szeros``  F16 [out] = zero x scale (per channel)
``s2_scales``  I8 [in/128, out] permuted columns (per group)
``s2_zeros``   I8 [in/128, out] = -zero x s2_scale, permuted columns
=============  ===============================================================

Per channel: value = code x s1 - szeros.  Per group: value = (code - zero) x s2 x s1, where the
product with s2 fits int8: it is the second-level weight, the operand of the W4A8 kernel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxquant.arrays.codes import CODES
from jaxquant.arrays.qtensor import QTensor
from jaxquant.arrays.scheme import ActSpec
from jaxquant.errors import FormatError
from jaxquant.formats.base import (
    CHANNEL,
    Coverage,
    Format,
    Leaf,
    RawModule,
    Slot,
    Spec,
    method_of,
)
from jaxquant.formats.names import by_component, string_list
from jaxquant.formats.words import data_of, patterns_of

GROUP = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class QServeSpec(Spec):
    """Spec of a QServe weight; ``kind`` is "channel" or "group"."""


def _tiles(out: int, inputs: int) -> tuple[int, ...]:
    """Axes of the stored bytes: o//32, k//32, o%8, k%16//4, k%32//16, o//8%2, k%4."""
    return (out // 32, inputs // 32, 8, 4, 2, 2, 4)


def permuted_to_patterns(qweight: np.ndarray) -> np.ndarray:
    """Codes uint8 ``[out, in]`` of permuted bytes ``[out, in/2]``."""
    out, inputs = qweight.shape[0], qweight.shape[1] * 2
    octets = np.ascontiguousarray(qweight).view(np.uint8).reshape(_tiles(out, inputs))
    nibbles = np.stack([octets & np.uint8(15), octets >> np.uint8(4)])
    # To o//32, o//16%2, o//8%2, o%8, k//32, k//16%2, k//4%4, k%4.
    ordered = nibbles.transpose(1, 0, 6, 3, 2, 5, 4, 7)
    return np.ascontiguousarray(ordered).reshape(out, inputs)


def patterns_to_permuted(patterns: np.ndarray) -> np.ndarray:
    """Inverse of :func:`permuted_to_patterns`, int8."""
    out, inputs = patterns.shape
    ordered = patterns.reshape(out // 32, 2, 2, 8, inputs // 32, 2, 4, 4)
    nibbles = ordered.transpose(1, 0, 4, 3, 6, 5, 2, 7)
    octets = nibbles[0] | nibbles[1] << np.uint8(4)
    return np.ascontiguousarray(octets).reshape(out, inputs // 2).view(np.int8)


def _columns(out: int) -> np.ndarray:
    """Where channel ``o`` stands among the permuted columns of second-level scales."""
    o = np.arange(out)
    return o // 32 * 32 + o % 8 * 4 + o % 32 // 8


def _coverage(config: Mapping[str, Any]) -> Coverage:
    return Coverage(string_list(config, "modules_to_not_convert", "ignore"), by_component)


def _spec(config: Mapping[str, Any], module: RawModule) -> QServeSpec:
    qweight = module.need("qweight")
    if qweight.dtype not in ("I8", "U8") or len(qweight.shape) != 2:
        raise qweight.error(f"{qweight.dtype} {list(qweight.shape)}", "I8 [out, in/2]")
    out, inputs = qweight.shape[0], qweight.shape[1] * 2
    grouped, channel = module.get("s2_scales"), module.get("s1_szeros")
    if grouped is not None and channel is not None:
        raise module.error("both s1_szeros and s2_scales", "a weight is per channel or per group")
    if out % 32 or inputs % (GROUP if grouped is not None else 32):
        raise qweight.error(f"{out} x {inputs}", "tiles of 32 x 32, groups of 128 inputs")
    act = ActSpec(CODES["int8"])
    first = Leaf(CHANNEL, "float16")
    if grouped is None:
        module.need("s1_szeros")
        return QServeSpec(
            kind="channel",
            code=CODES["uint4"],
            scales=(first,),
            zeros=(first,),
            affine="offset",
            act=act,
        )
    scale, zero = grouped.read(), module.need("s2_zeros").read()
    if scale.shape != (inputs // GROUP, out) or zero.shape != scale.shape:
        raise grouped.error(
            f"shape {list(scale.shape)}", f"[{inputs // GROUP}, {out}], as s2_zeros"
        )
    if (scale <= 0).any():
        raise grouped.error("a scale that is not positive", "second-level scales are 1 to 127")
    if (zero % scale).any() or (-(zero // scale) > 15).any() or (zero > 0).any():
        raise module.error("s2_zeros that are no multiples of s2_scales", "-zero x scale, 0 to 15")
    grid = (1, GROUP)
    return QServeSpec(
        kind="group",
        code=CODES["uint4"],
        scales=(Leaf(grid, "int8"), first),
        zeros=(Leaf(grid, "uint8"),),
        affine="zero_point",
        act=act,
    )


def _shape(spec: QServeSpec, module: RawModule) -> tuple[int, int]:
    rows, columns = module.need("qweight").shape
    return rows, columns * 2


def _slots(spec: QServeSpec, shape: tuple[int, int]) -> tuple[Slot, ...]:
    out, inputs = shape
    slots = (
        Slot("qweight", ("I8", "U8"), ((out, inputs // 2),)),
        Slot("s1_scales", ("F16",), ((out,), (out, 1))),
    )
    if spec.kind == "channel":
        return (*slots, Slot("s1_szeros", ("F16",), ((out,), (out, 1))))
    shapes = ((inputs // GROUP, out),)
    return (*slots, Slot("s2_scales", ("I8",), shapes), Slot("s2_zeros", ("I8",), shapes))


def _check_second_level(codes: np.ndarray, zero: np.ndarray, scale: np.ndarray) -> None:
    """Refuse codes [out, in] that exceed int8 with the zero points and scales of their groups.

    Raises:
        FormatError: names the first such group.
    """
    groups = codes.reshape(*zero.shape, GROUP)
    least, most = (
        (edge.astype(np.int32) - zero) * scale for edge in (groups.min(-1), groups.max(-1))
    )
    bad = (least < -128) | (most > 127)
    if bad.any():
        channel, group = np.unravel_index(int(np.argmax(bad)), bad.shape)
        raise FormatError(
            "qweight",
            f"{least[bad][0]} to {most[bad][0]} in channel {channel}, group {group}",
            "(code - zero) x s2_scale fits int8",
            "the checkpoint is damaged, or of another tool: export it again",
        )


def _decode(arrays: Mapping[str, np.ndarray], spec: QServeSpec, shape: tuple[int, int]) -> QTensor:
    codes = permuted_to_patterns(arrays["qweight"])
    data = data_of(codes, spec.code)
    first = arrays["s1_scales"].reshape(-1, 1)
    if spec.kind == "channel":
        zero = arrays["s1_szeros"].reshape(-1, 1)
        return QTensor(data, (first,), (zero,), spec.layout(shape), act=spec.act)
    columns = _columns(shape[0])
    second = np.ascontiguousarray(arrays["s2_scales"][:, columns].T)
    scaled_zero = arrays["s2_zeros"][:, columns].T.astype(np.int16)
    zero = (-(scaled_zero // second)).astype(np.uint8)
    _check_second_level(codes, zero, second)
    return QTensor(data, (second, first), (zero,), spec.layout(shape), act=spec.act)


def _encode(q: QTensor, spec: QServeSpec) -> dict[str, np.ndarray]:
    arrays = {
        "qweight": patterns_to_permuted(patterns_of(q.data, spec.code, q.shape[1])),
        "s1_scales": np.asarray(q.scales[-1]).reshape(-1),
    }
    if spec.kind == "channel":
        return arrays | {"s1_szeros": np.asarray(q.zeros[0]).reshape(-1)}
    second, zero = np.asarray(q.scales[0]), np.asarray(q.zeros[0])
    columns = _columns(q.shape[0])
    scales = np.empty(second.shape[::-1], np.int8)
    scales[:, columns] = second.T
    zeros = np.empty_like(scales)
    zeros[:, columns] = (-(zero.astype(np.int16) * second)).astype(np.int8).T
    return arrays | {"s2_scales": scales, "s2_zeros": zeros}


QSERVE = Format(
    "qserve",
    lambda config: method_of(config) in ("qoq", "qserve"),
    ("qweight", "s1_scales", "s2_scales"),
    ("qweight", "s1_scales", "s1_szeros", "s2_scales", "s2_zeros"),
    _coverage,
    _spec,
    _shape,
    _slots,
    _decode,
    _encode,
)
