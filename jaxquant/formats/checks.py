"""Checks of values that only the data shows: scales, NaN codes, group indices."""

from __future__ import annotations

import numpy as np

from jaxquant.arrays.layout import WHOLE
from jaxquant.arrays.qtensor import QTensor
from jaxquant.errors import FormatError
from jaxquant.formats.base import Spec
from jaxquant.transforms.repack import unpack_codes

_CHUNK = 1 << 20
_NAN_BYTES = {
    "float8_e4m3fn": (0x7F, 0x7F),
    "float8_e5m2": (0x7C, 0x7C),
    "float8_e4m3fnuz": (0xFF, 0x80),
    "float8_e5m2fnuz": (0xFF, 0x80),
}
"""dtype: (mask, pattern) of bytes that are not finite numbers."""


def check_finite_codes(data: np.ndarray, slot: str) -> None:
    """Refuse NaN and infinity among 8-bit floats.

    Raises:
        FormatError: names the first such element.
    """
    mask, pattern = _NAN_BYTES[data.dtype.name]
    octets = np.ravel(data).view(np.uint8)
    for start in range(0, octets.size, _CHUNK):
        bad = (octets[start : start + _CHUNK] & np.uint8(mask)) == np.uint8(pattern)
        if bad.any():
            at = np.unravel_index(start + int(np.argmax(bad)), data.shape)
            raise FormatError(
                slot,
                f"byte 0x{octets[start + int(np.argmax(bad))]:02X} at {tuple(map(int, at))}",
                f"{data.dtype.name} weights are finite",
                "the quantizer overflowed: quantize again with clipping",
            )


def check_scale(scale: np.ndarray, slot: str, signed: bool = False) -> bool:
    """Refuse scales that are NaN, infinite or negative.

    Args:
        scale: any float dtype.
        slot: name for messages.
        signed: negative scales are legal in this format.
    Returns:
        whether some scale is zero.
    Raises:
        FormatError: names the first bad cell.
    """
    values = scale.astype(np.float32)
    bad = ~np.isfinite(values) if signed else ~(values >= 0) | np.isinf(values)
    if bad.any():
        at = np.unravel_index(int(np.argmax(bad)), values.shape)
        raise FormatError(
            slot,
            f"scale {values[at]} at {tuple(map(int, at))}",
            "scales are finite" if signed else "scales are finite and positive",
            "the checkpoint is damaged or its quantizer failed: export it again",
        )
    return bool((values == 0).any())


def check_dead_cells(q: QTensor, scale_slot: str) -> None:
    """Where a scale is zero every code must stand for zero.

    Raises:
        FormatError: a zero scale hides codes that are not zero.
    """
    code = q.layout.code
    if code.kind == "float":
        alive = q.data[0].astype(np.float32) != 0
    elif code.kind == "table":
        alive = np.asarray(code.table)[unpack_codes(q.data, code, q.layout.data)] != 0
    elif q.layout.affine == "symmetric":
        alive = unpack_codes(q.data, code, q.layout.data) != code.bias
    else:
        return
    for leaf, grid in zip(q.scales, q.layout.scales, strict=True):
        dead = leaf.astype(np.float32) == 0
        for axis, step in enumerate(grid):
            if step not in (1, WHOLE):
                dead = dead.repeat(step, axis=axis).take(range(q.shape[axis]), axis=axis)
        if (hidden := dead & alive).any():
            at = np.unravel_index(int(np.argmax(hidden)), hidden.shape)
            raise FormatError(
                scale_slot,
                f"scale 0 over a non-zero code at {tuple(map(int, at))}",
                "a scale is positive unless all of its codes are zero",
                "the checkpoint is damaged: export it again",
            )


def check_group_index(g_idx: np.ndarray, groups: int, slot: str) -> None:
    """Refuse a group index outside ``0 .. groups``.

    Raises:
        FormatError: names the first bad input.
    """
    bad = (g_idx < 0) | (g_idx >= groups)
    if bad.any():
        i = int(np.argmax(bad))
        raise FormatError(
            slot, f"group {int(g_idx[i])} of input {i}", f"there are {groups} groups of scales"
        )


def verify(q: QTensor, spec: Spec) -> QTensor:
    """Return ``q`` after all checks of its values.

    Raises:
        FormatError: names the leaf; the caller adds file and module.
        LayoutError: a leaf contradicts the layout.
    """
    q.check("decoded weight")
    if q.layout.code.kind == "float" and q.layout.code.bits == 8:
        check_finite_codes(q.data[0], "weight")
    dead = [check_scale(scale, "weight scale", spec.signed_scales) for scale in q.scales]
    if any(dead) and not spec.dead_scales:
        check_dead_cells(q, "weight scale")
    if q.layout.affine == "offset":
        for zero in q.zeros:
            check_scale(zero, "weight offset", signed=True)
    if q.act_scale is not None and check_scale(q.act_scale, "activation scale"):
        raise FormatError("activation scale", "0", "a static activation scale is positive")
    if q.pre_scale is not None:
        check_scale(q.pre_scale, "activation pre-scale", signed=True)
    return q
