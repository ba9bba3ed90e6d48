"""How GPTQ, AWQ and FP8 checkpoints hold a weight without rounding, or why they cannot.

A change of form is exact: scales of a tensor or of blocks are repeated for every output, signed
codes get the zero point that they imply.  Nothing is quantized again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxquant.arrays.codes import CODES
from jaxquant.arrays.layout import WHOLE, cells, packed_grids
from jaxquant.arrays.qtensor import QTensor
from jaxquant.formats.awq import AWQSpec
from jaxquant.formats.base import (
    AXES,
    CHANNEL,
    SCALE_DTYPES,
    TENSOR,
    Leaf,
    Spec,
    disk_dtype,
    numpy_dtype,
)
from jaxquant.formats.gptq import GPTQSpec
from jaxquant.formats.gptq_zeros import BITS
from jaxquant.formats.scaled import ScaledSpec, Side
from jaxquant.transforms.structure import refine


class Arrangement(NamedTuple):
    """A weight as a format holds it.

    Attributes:
        adapt: the exact change of form that the format asks for.
        spec: how the format arranges the adapted weight.
        settings: what the config must say about it; hashable, equal for weights stored alike.
    """

    adapt: Callable[[QTensor], QTensor]
    spec: Spec
    settings: tuple[object, ...] = ()


def same(q: QTensor) -> QTensor:
    """No change of form."""
    return q


def each_output(q: QTensor) -> QTensor:
    """Scales and zero points of a tensor or of blocks, repeated for every output."""
    return refine(q, "out", 1)


def with_zeros(q: QTensor) -> QTensor:
    """A weight of signed codes as unsigned ones with the zero point in the middle."""
    q = each_output(q)
    if q.zeros:
        return q
    code = q.layout.code
    layout = dataclasses.replace(
        q.layout, code=CODES[f"uint{code.bits}"], zeros=q.layout.scales, affine="zero_point"
    )
    shape = tuple(map(cells, q.shape, q.layout.scales[0]))
    return dataclasses.replace(
        q, layout=layout, zeros=(np.full(shape, 1 << (code.bits - 1), np.uint8),)
    )


def unusual(q: QTensor) -> str | None:
    """What no format of this module holds, whatever the codes are."""
    if q.axes != AXES or q.lead:
        return f"axes {q.axes} behind {q.lead}"
    if q.pre_scale is not None:
        return "an activation pre-scale"
    if q.layout.data != packed_grids(q.layout.code, AXES, "in", q.shape[1]):
        return f"codes packed as {q.layout.data}"
    if q.layout.affine == "offset":
        return "an additive offset"
    return None


def ungrouped(q: QTensor, bits: tuple[int, ...]) -> str | None:
    """Why a weight is not integers of one of ``bits`` with one plain scale a group, or None."""
    code = q.layout.code
    if reason := unusual(q):
        return reason
    if code.kind not in ("int", "uint") or code.bits not in bits:
        return f"{code} codes"
    if (code.kind == "uint") != bool(q.zeros):
        return f"{code} codes with {len(q.zeros)} zero points"
    if len(q.scales) != 1 or q.layout.zeros not in ((), q.layout.scales):
        return f"{len(q.scales)} scales and {len(q.zeros)} zero points of different grids"
    return unscaled(q)


def unscaled(q: QTensor) -> str | None:
    """Why a weight's scales are no 16- or 32-bit floats, or None."""
    plain = [numpy_dtype(name) for name in SCALE_DTYPES]
    odd = [str(scale.dtype) for scale in q.scales if scale.dtype not in plain]
    return f"{odd[0]} scales" if odd else None


def _weight_only(q: QTensor) -> str | None:
    return None if q.act is None else f"activations quantized to {q.act}"


def _group(q: QTensor) -> int:
    step = q.layout.scales[0][1]
    return -1 if step == WHOLE else step


def arrange_gptq(q: QTensor) -> Arrangement | str:
    """GPTQ: integers of 2, 3, 4 or 8 bits in groups of inputs, in any order of inputs.

    Args:
        q: ``[out, in]``, abstract or real.
    Returns:
        The arrangement, or why there is none.
    """
    if reason := ungrouped(q, BITS) or _weight_only(q):
        return reason
    bits, (out, inputs) = q.layout.code.bits, q.shape
    if out % 32 or inputs % 32:
        return f"{out} x {inputs} codes, which are no multiples of 32"
    group, scale = _group(q), q.scales[0].dtype
    grid = (1, q.layout.scales[0][1])
    spec = GPTQSpec(
        kind="gptq",
        code=q.layout.code,
        scales=(Leaf(grid, scale.name),),
        zeros=(Leaf(grid, "uint8"),) if q.zeros else (),
        affine=q.layout.affine,
        perm=q.perm is not None,
        group=group,
        version=1,
        one_bits=bits,
        scale_dtype=disk_dtype(scale),
        qzeros=True,
        g_idx="I32",
        dead_scales=True,
    )
    return Arrangement(each_output, spec, (bits, group, not q.zeros, q.perm is not None))


def arrange_awq(q: QTensor) -> Arrangement | str:
    """AWQ's GEMM layout: 4-bit integers with zero points, in groups of inputs."""
    if reason := ungrouped(q, (4,)) or _weight_only(q):
        return reason
    if q.perm is not None:
        return "inputs sorted by group (act-order)"
    out, inputs = q.shape
    group, scale = _group(q), q.scales[0].dtype
    if out % 8 or (group != -1 and inputs % group):
        return f"{out} outputs and {inputs} inputs, no multiples of 8 and of {group}"
    grid = (1, q.layout.scales[0][1])
    spec = AWQSpec(
        kind="gemm",
        code=CODES["uint4"],
        scales=(Leaf(grid, scale.name),),
        zeros=(Leaf(grid, "uint8"),),
        affine="zero_point",
        group=group,
        scale_dtype=disk_dtype(scale),
        width=1 if group == -1 else cells(inputs, group),
        dead_scales=True,
    )
    return Arrangement(with_zeros, spec, (group,))


def arrange_fp8(q: QTensor) -> Arrangement | str:
    """FP8 under the method that has the weight's scales: a tensor, outputs, blocks, or MXFP8."""
    if reason := unusual(q):
        return reason
    if q.layout.code.name != "e4m3":
        return f"{q.layout.code} codes"
    if len(q.scales) != 1 or q.zeros or q.perm is not None:
        return f"{len(q.scales)} scales, {len(q.zeros)} zero points"
    if q.act is None or q.act.code.name != "e4m3" or not q.act.symmetric:
        return f"activations {q.act or 'of 16 bits'}"
    act, grid = q.act, q.layout.scales[0]
    where = (act.granularity, act.dynamic)
    name, block = "weight_scale", None
    if q.scales[0].dtype.name == "float8_e8m0fnu" and grid == (1, 32):
        name, method = "weight_scale_inv", "mxfp8"
        fits = where == ("group", True) and act.group_size == 32
    elif grid == TENSOR:
        method, fits = "fp8", where in (("token", True), ("tensor", False))
    elif grid == CHANNEL:
        method = "w8a8_fp8" if act.upper_bound is None else "fbgemm_fp8"
        fits = where == ("token", True)
    else:
        name, method, block = "weight_scale_inv", "fp8", grid
        fits = where == ("group", True) and act.group_size == grid[1] and WHOLE not in grid
    if method in ("fp8", "w8a8_fp8", "mxfp8") and act.upper_bound is not None:
        fits = False
    if not fits:
        return f"activations {act} beside scales of {grid}"
    exponents = q.scales[0].dtype.name == "float8_e8m0fnu"
    if not exponents and (reason := unscaled(q)):
        return reason
    # A scalar and one block are told apart by the rank of the scale.
    shape = () if grid == TENSOR else tuple(map(cells, q.shape, grid))
    spec = scaled(q, name, shape, kind=method)
    if spec.act_disk:
        spec = dataclasses.replace(spec, act_disk=Side("input_scale", "F32", ()))
    rounded = "ue8m0" if act.scale_code == "e8m0" else "float"
    return Arrangement(same, spec, (method, block, act.dynamic, rounded, act.upper_bound))


def scaled(q: QTensor, name: str, shape: tuple[int, ...], kind: str) -> ScaledSpec:
    """The spec of one array of 8-bit codes beside one array of scales.

    Args:
        q: the adapted weight, of any 8-bit code, or of integers that are stored a byte each.
        name: suffix of the scale.
        shape: its shape on disk.
        kind: the format's name of the arrangement.
    """
    dtype, code, grid = q.scales[0].dtype, q.layout.code, q.layout.scales[0]
    # Microscaling exponents are plain bytes in every family; those of larger blocks have a type.
    disk = "U8" if dtype.name == "float8_e8m0fnu" and grid == (1, 32) else disk_dtype(dtype)
    return ScaledSpec(
        kind=kind,
        code=code,
        scales=(Leaf(grid, dtype.name),),
        zeros=(Leaf(grid, "uint8"),) if q.zeros else (),
        affine=q.layout.affine,
        act=q.act,
        act_scale=q.act_scale is not None,
        act_zero=None if q.act_zero is None else "int8",
        weight_dtype=disk_dtype(code.storage) if code.kind == "float" else "I8",
        scale=Side(name, disk, shape),
        zero=Side("weight_zero_point", "I8", shape) if q.zeros else None,
        act_disk=None if q.act_scale is None else Side("input_scale", "F32", (1,)),
        act_zero_disk=None if q.act_zero is None else Side("input_zero_point", "I8", (1,)),
    )
