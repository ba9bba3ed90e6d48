"""4-bit floats packed two to a byte, low nibble first: NVFP4 and MXFP4.

value = e2m1 x block scale [x tensor scale].  Block scales lie row-major, [out, in/16] e4m3 (NVFP4)
or [out, in/32] e8m0 (MXFP4).  ModelOpt stores the tensor scale as a multiplier, compressed-tensors
its reciprocal; a QTensor always holds the multiplier.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from jaxquant.arrays.codes import CODES
from jaxquant.arrays.qtensor import QTensor
from jaxquant.arrays.scheme import ActSpec
from jaxquant.formats.base import EXPONENT_DTYPES, TENSOR, Leaf, RawModule, Slot, Spec, numpy_dtype
from jaxquant.formats.scaled import Side, side


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fp4Spec(Spec):
    """Spec of a 4-bit float weight; ``kind`` is "nvfp4" or "mxfp4".

    Attributes:
        data: suffix and dtype of the packed codes.
        block: the block scale on disk.
        tensor: the tensor scale on disk, None for MXFP4.
        act_disk: the activation's tensor scale on disk.
        pre_disk: the activation pre-scale on disk.
        reciprocal: tensor scales are stored as reciprocals.
    """

    data: Side
    block: Side
    tensor: Side | None = None
    act_disk: Side | None = None
    pre_disk: Side | None = None
    reciprocal: bool = False


def fp4_activations(kind: str) -> ActSpec:
    """What the family's own runtime does to activations."""
    if kind == "nvfp4":
        return ActSpec(CODES["e2m1"], "group", group_size=16, scale_code="e4m3")
    return ActSpec(CODES["e2m1"], "group", group_size=32, scale_code="mx")


def fp4_spec(
    module: RawModule,
    *,
    data: str = "weight",
    block: str = "weight_scale",
    tensor: str | None = None,
    act: ActSpec | None = None,
    act_name: str | None = None,
    pre_name: str | None = None,
    reciprocal: bool = False,
) -> Fp4Spec:
    """Build the spec from headers; ``tensor`` present makes it NVFP4.

    Raises:
        FormatError: dtypes or shapes break the format, e.g. swizzled or padded scales.
    """
    codes, scale = module.need(data), module.need(block)
    if codes.dtype not in ("U8", "I8") or len(codes.shape) != 2:
        raise codes.error(f"{codes.dtype} {list(codes.shape)}", "U8 [out, in/2]")
    group = 16 if tensor else 32
    out, inputs = codes.shape[0], codes.shape[1] * 2
    dtypes = ("F8_E4M3",) if tensor else EXPONENT_DTYPES
    if scale.dtype not in dtypes:
        raise scale.error(f"dtype {scale.dtype}", f"{' or '.join(dtypes)} scales per {group}")
    if inputs % group or scale.shape != (out, inputs // group):
        raise scale.error(
            f"shape {list(scale.shape)}",
            f"[out, in/{group}] = {[out, inputs / group]}, row-major",
            "swizzled or padded scales are not read: export without swizzling",
        )
    leaves = [Leaf((1, group), "float8_e4m3fn" if tensor else "float8_e8m0fnu")]
    top = None
    if tensor:
        top = side(module.need(tensor), tensor)
        leaves.append(Leaf(TENSOR, "float32"))
    act_tensor = module.get(act_name) if act_name and act else None
    pre = module.get(pre_name) if pre_name else None
    return Fp4Spec(
        kind="nvfp4" if tensor else "mxfp4",
        code=CODES["e2m1"],
        scales=tuple(leaves),
        act=act,
        act_scale=act_tensor is not None,
        pre_scale=None if pre is None else numpy_dtype(pre.dtype).name,
        data=Side(data, codes.dtype, codes.shape),
        block=Side(block, scale.dtype, scale.shape),
        tensor=top,
        act_disk=side(act_tensor, act_name or ""),
        pre_disk=side(pre, pre_name or ""),
        reciprocal=reciprocal,
    )


def fp4_shape(spec: Fp4Spec, module: RawModule) -> tuple[int, int]:
    """(out, in)."""
    rows, *columns = spec.data.shape
    return rows, 2 * math.prod(columns)


def fp4_slots(spec: Fp4Spec, shape: tuple[int, int]) -> tuple[Slot, ...]:
    """The tensors of one weight."""
    scalar: tuple[tuple[int, ...], ...] = ((), (1,), (1, 1))
    slots = [
        Slot(spec.data.suffix, (spec.data.dtype,), (spec.data.shape,)),
        Slot(spec.block.suffix, (spec.block.dtype,), (spec.block.shape,)),
    ]
    slots += [Slot(s.suffix, ("F32",), scalar) for s in (spec.tensor, spec.act_disk) if s]
    if spec.pre_disk:
        slots.append(Slot(spec.pre_disk.suffix, ("F32", "BF16", "F16"), ((shape[1],),)))
    return tuple(slots)


def fp4_decode(arrays: Mapping[str, np.ndarray], spec: Fp4Spec, shape: tuple[int, int]) -> QTensor:
    """Decode; codes and block scales are views of the file."""
    block = arrays[spec.block.suffix]
    if block.dtype == np.uint8:
        block = block.view(ml_dtypes.float8_e8m0fnu)
    scales = [block]

    def scalar(entry: Side) -> np.ndarray:
        value = arrays[entry.suffix].astype(np.float32).reshape(1, 1)
        return np.float32(1) / value if spec.reciprocal else value

    if spec.tensor:
        scales.append(scalar(spec.tensor))
    pre = arrays[spec.pre_disk.suffix].reshape(1, -1) if spec.pre_disk else None
    return QTensor(
        (np.ascontiguousarray(arrays[spec.data.suffix]).view(np.uint8).reshape(shape[0], -1),),
        tuple(scales),
        (),
        spec.layout(shape),
        act_scale=scalar(spec.act_disk) if spec.act_disk else None,
        pre_scale=pre,
        act=spec.act,
    )


def _reciprocal(value: np.ndarray) -> np.ndarray:
    """A float32 whose float32 reciprocal is ``value``, if there is one."""
    value = value.astype(np.float32)
    guess = np.float32(1) / value
    for steps in range(3):
        for direction in (np.inf, -np.inf):
            near = guess
            for _ in range(steps):
                near = np.nextafter(near, np.float32(direction), dtype=np.float32)
            if (np.float32(1) / near == value).all():
                return near
    return guess


def fp4_encode(q: QTensor, spec: Fp4Spec) -> dict[str, np.ndarray]:
    """The tensors as they were on disk."""
    arrays = {
        spec.data.suffix: np.asarray(q.data[0])
        .view(numpy_dtype(spec.data.dtype))
        .reshape(spec.data.shape),
        spec.block.suffix: np.asarray(q.scales[0]).view(numpy_dtype(spec.block.dtype)),
    }
    for entry, leaf in ((spec.tensor, q.scales[-1]), (spec.act_disk, q.act_scale)):
        if entry:
            value = np.asarray(leaf, np.float32)
            value = _reciprocal(value) if spec.reciprocal else value
            arrays[entry.suffix] = value.reshape(entry.shape)
    if spec.pre_disk:
        arrays[spec.pre_disk.suffix] = np.asarray(q.pre_scale).reshape(-1)
    return arrays
