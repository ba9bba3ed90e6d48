"""What `prepack` is given, checked and taken apart."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.problem import KernelError
from pallas_kernels.record import CHANNELS, CODES, DEPTH, E2M1, ROTATION, Record
from pallas_kernels.tiles import cdiv

_SCALE_DTYPES = ("bfloat16", "float16", "float32")
Levels = jax.Array | tuple[jax.Array, ...]


class Parts(NamedTuple):
    """A weight taken apart: what of it goes where in a record, or besides to its result."""

    planes: tuple[jax.Array, ...]
    scale: jax.Array | None
    super_scale: jax.Array | None
    zero: jax.Array | None
    super_zero: jax.Array | None
    factor: jax.Array | None = None
    offset: jax.Array | None = None


def as_tuple(levels: Levels | None) -> tuple[jax.Array, ...]:
    return () if levels is None else levels if isinstance(levels, tuple) else (levels,)


def _refuse(found: str, rule: str) -> None:
    raise KernelError(f"prepack: {found}; {rule}")


def _check_codes(planes: tuple[jax.Array, ...], code: str, operand: int) -> tuple[int, int]:
    """Return (n, k) of the codes after checking them."""
    if code not in CODES:
        _refuse(f"code {code!r}", f"take {', '.join(CODES)}")
    widths = CODES[code].planes
    dtype = code if widths == (8,) else "uint8"
    if len(planes) != len(widths) or any(plane.dtype.name != dtype for plane in planes):
        found = " and ".join(plane.dtype.name for plane in planes)
        _refuse(f"codes are {found}", f"{code} needs {len(widths)} of {dtype}")
    *lead, n, width = planes[0].shape
    k = width * 8 // widths[0]
    if n % CHANNELS or k % 64 or not n or not k:
        _refuse(f"the weight is {n} x {k}", "n and k must be multiples of 64; pad them first")
    for plane, bits in zip(planes, widths, strict=True):
        if plane.shape != (*lead, n, k * bits // 8):
            _refuse(f"a plane of {bits} bits is {plane.shape}", f"need {(*lead, n, k * bits // 8)}")
    if operand not in (8, 16) or (operand == 8 and code != "uint4"):
        _refuse(f"{operand}-bit operand of {code} codes", "16, or 8 for 4-bit codes")
    return n, k


def _check_scales(
    code: str, parts: Parts, cells: tuple[int, ...], wide: tuple[int, ...], group: int, k: int
) -> None:
    scale, zero, offset = parts.scale, parts.zero, parts.super_zero is not None
    assert scale is not None
    if scale.dtype.name not in (*_SCALE_DTYPES, *ROTATION):
        _refuse(f"scales are {scale.dtype}", f"take {', '.join((*_SCALE_DTYPES, *ROTATION))}")
    product = scale.dtype.name in ("uint8", "int8")
    if product != (parts.super_scale is not None):
        _refuse(f"{scale.dtype} scales", "integer scales, and only they, have super-scales")
    narrow = scale.dtype.name in ROTATION
    if code == E2M1 and (product or not narrow):
        _refuse(f"{code} codes with {scale.dtype} scales", "they have e4m3 or e8m0 scales")
    if narrow and group not in (16, 32):
        _refuse(f"group {group}", "8-bit scales have groups of 16 or 32")
    if not narrow and group not in (32, 64) and group % DEPTH and group < k:
        _refuse(f"group {group}", "groups of 32, 64, multiples of 128 and whole rows are packed")
    if scale.shape != cells:
        _refuse(f"scales {scale.shape}", f"this group and block need {cells}")
    for level in (parts.super_scale, parts.super_zero):
        if level is not None and (level.dtype != jnp.float16 or level.shape != wide):
            _refuse(f"super-scales {level.shape} {level.dtype}", f"need {wide} float16")
    if zero is None:
        return
    if CODES[code].excess == 0 or not (offset or code == "uint4"):
        _refuse(f"zero points with {code} codes", "only 4-bit integer codes have zero points")
    if offset and not product:
        _refuse(f"offsets with {scale.dtype} scales", "only integer scales have offsets")
    dtype = scale.dtype if offset else jnp.dtype(jnp.uint8)
    if zero.shape != cells or zero.dtype != dtype:
        _refuse(f"zeros {zero.shape} {zero.dtype}", f"need {cells} {dtype}")


def _of_int8_operands(
    planes: tuple[jax.Array, ...],
    scales: tuple[jax.Array, ...],
    zeros: tuple[jax.Array, ...],
    cells: tuple[int, ...],
    group: int,
    k: int,
) -> tuple[Parts, Record]:
    """Return parts and record of codes that become int8 operands exactly."""
    given = f"scales {[str(s.dtype) for s in scales]}, zeros {[str(z.dtype) for z in zeros]}"
    fine, wide = scales[0], scales[-1]
    if wide.dtype.name not in _SCALE_DTYPES or len(scales) > 2 or len(zeros) != 1:
        _refuse(given, "8-bit operands have int8 scales and zero points, or offsets")
    (zero,) = zeros
    channels = (*planes[0].shape[:-1], 1)
    if len(scales) == 1:
        if not wide.shape == zero.shape == channels or zero.dtype != wide.dtype or group < k:
            _refuse(f"{given} {wide.shape} {zero.shape}", f"need {channels} of one type")
        record = Record("uint4", 8, DEPTH, "", False, offset=True)
        return Parts(planes, None, None, None, None, wide, zero), record
    if fine.dtype != jnp.int8 or zero.dtype != jnp.uint8 or group % DEPTH:
        _refuse(f"{given} in groups of {group}", "need int8 and uint8 in groups of 128")
    if not fine.shape == zero.shape == cells or cells[-2] != channels[-2]:
        _refuse(f"scales {fine.shape}, zeros {zero.shape}", f"need {(*channels[:-1], cells[-1])}")
    return Parts(planes, fine, None, zero, None, wide), Record("uint4", 8, DEPTH, "int8", True)


def take_apart(
    codes: Levels,
    scales: Levels,
    zeros: Levels | None,
    code: str | None,
    group: int | None,
    block: int,
    factor_block: int,
    operand: int,
) -> tuple[Parts, Record, int, int, int]:
    """Return (parts, record, n, k, group) of the arguments of `prepack`.

    Raises:
        KernelError: a shape, dtype or group that the format does not have.
    """
    planes, levels, points = as_tuple(codes), as_tuple(scales), as_tuple(zeros)
    code = code or ("uint4" if planes[0].dtype == jnp.uint8 else planes[0].dtype.name)
    n, k = _check_codes(planes, code, operand)
    lead = planes[0].shape[:-2]
    group = k if group is None else group
    cells = (*lead, cdiv(n, block), cdiv(k, group))
    if operand == 8 and (len(levels) > 1 or any(point.dtype != jnp.uint8 for point in points)):
        parts, record = _of_int8_operands(planes, levels, points, cells, group, k)
    else:
        scale, *rest = as_tuple(scales)
        factor = rest.pop() if rest and rest[-1].dtype == jnp.float32 else None
        zero, super_zero = (*points, None, None)[:2]
        parts = Parts(planes, scale, rest.pop() if rest else None, zero, super_zero, factor)
        _check_scales(code, parts, cells, (*lead, n, cdiv(k, 2 * DEPTH)), group, k)
        offset = super_zero is not None
        record = Record(
            code,
            operand,
            group if group in (16, 32, 64) else DEPTH,
            scale.dtype.name,
            zero is not None and not offset,
            offset,
            parts.super_scale is not None,
        )
    if parts.factor is not None and parts.factor.shape != (*lead, cdiv(n, factor_block), 1):
        _refuse(f"factors {parts.factor.shape}", f"need {(*lead, cdiv(n, factor_block), 1)}")
    return parts, record, n, k, group
