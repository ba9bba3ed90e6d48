"""One array of 8-bit codes [out, in] beside one array of scales: what fp8 and int8 families share.

value = code x scale, or (code - zero) x scale.  The scale covers the whole tensor ([] or [1]), a
channel ([out, 1] or [out]), blocks ([ceil(out/bo), ceil(in/bi)]) or one part of a fused module
([n]).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np

from jaxquant.arrays.codes import CODES, Code
from jaxquant.arrays.layout import Grid, cells
from jaxquant.arrays.qtensor import QTensor
from jaxquant.arrays.scheme import ActSpec
from jaxquant.formats.base import (
    AXES,
    CHANNEL,
    EXPONENT_DTYPES,
    SCALE_DTYPES,
    TENSOR,
    Leaf,
    RawModule,
    RawTensor,
    Slot,
    Spec,
    numpy_dtype,
)

E4M3FNUZ = Code("e4m3fnuz", 8, "float", "float8_e4m3fnuz")
E5M2FNUZ = Code("e5m2fnuz", 8, "float", "float8_e5m2fnuz")
CODE_OF = {
    "F8_E4M3": CODES["e4m3"],
    "F8_E5M2": CODES["e5m2"],
    "F8_E4M3FNUZ": E4M3FNUZ,
    "F8_E5M2FNUZ": E5M2FNUZ,
    "I8": CODES["int8"],
}


class Side(NamedTuple):
    """A side tensor as it is on disk."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]


def side(tensor: RawTensor | None, suffix: str) -> Side | None:
    """Describe a side tensor, None for none."""
    return None if tensor is None else Side(suffix, tensor.dtype, tensor.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaledSpec(Spec):
    """Spec of a scaled 8-bit weight.

    Attributes:
        weight_dtype: safetensors dtype of ``weight``.
        scale: the weight scale on disk.
        zero: the weight zero point on disk, None where there is none.
        act_disk: the static activation scale on disk.
        act_zero_disk: the static activation zero point on disk.
        parts: output rows of each part of a fused module whose scale has one entry a part.
        weight: suffix of the weight.
        nibbles: two 4-bit two's complement codes to a byte along ``in``, low nibble first.
        pre_disk: the activation pre-scale on disk.
    """

    weight_dtype: str
    scale: Side
    zero: Side | None = None
    act_disk: Side | None = None
    act_zero_disk: Side | None = None
    parts: tuple[int, ...] = ()
    weight: str = "weight"
    nibbles: bool = False
    pre_disk: Side | None = None


def weight_shape(module: RawModule, suffix: str = "weight") -> tuple[int, int]:
    """(out, in) of a weight that is stored one element to an entry."""
    weight = module.need(suffix)
    if len(weight.shape) != 2:
        raise weight.error(f"shape {list(weight.shape)}", "[out, in]")
    return weight.shape[0], weight.shape[1]


def first_of(module: RawModule, names: tuple[str, ...], what: str) -> tuple[str, RawTensor]:
    """The tensor under the only one of several names that is present.

    Raises:
        FormatError: none of them, or more than one.
    """
    found = [name for name in names if module.get(name) is not None]
    if not found:
        raise module.error(
            f"no {what}; the module has {sorted(module.tensors)}",
            f"a quantized weight has one of {', '.join(names)}",
            "the checkpoint is incomplete: a weight without its scale cannot be used",
        )
    if len(found) > 1:
        raise module.error(f"both {found[0]} and {found[1]}", f"one {what}")
    return found[0], module.need(found[0])


def scale_grid(
    scale: RawTensor, shape: tuple[int, int], block: tuple[int, int] | None, kinds: tuple[str, ...]
) -> Grid:
    """The grid over (out, in) that a scale of this shape has.

    Args:
        scale: the scale tensor.
        shape: (out, in).
        block: the block size for ``"block"``.
        kinds: allowed readings, tried in order: "tensor", "channel", "block".
    Raises:
        FormatError: the shape fits none; the message gives the shapes that would.
    """
    rows, columns = shape
    expected = []
    for kind in kinds:
        if kind == "tensor":
            shapes: tuple[tuple[int, ...], ...] = ((), (1,), (1, 1))
            grid = TENSOR
        elif kind == "channel":
            shapes, grid = ((rows, 1), (rows,)), CHANNEL
        else:
            assert block is not None
            cover = (cells(rows, block[0]), cells(columns, block[1]))
            # One block is written as a scalar by some tools.
            shapes = (cover, (), (1,)) if cover == (1, 1) else (cover,)
            grid = block
        if scale.shape in shapes:
            return grid
        if kind == "block" and len(scale.shape) > 2:
            # ModelOpt keeps size-1 axes: [r, 1, c, 1].
            squeezed = tuple(n for n in scale.shape if n != 1)
            if squeezed == tuple(n for n in shapes[0] if n != 1):
                return grid
        expected.append(f"{kind}: " + " or ".join(str(list(s)) for s in shapes))
    blocks = f" (blocks of {block[0]}x{block[1]}, rounded up)" if block else ""
    raise scale.error(
        f"shape {list(scale.shape)} for a weight {list(shape)}", "; ".join(expected) + blocks
    )


def fused_parts(module: RawModule, scale: RawTensor, rows: int) -> tuple[int, ...]:
    """Rows of each part of a fused module whose per-tensor scales are one vector, or ().

    A re-saved fused checkpoint has one entry for q, k, v or for gate, up.
    """
    last = module.path.rpartition(".")[2]
    if scale.shape == (2,) and last == "gate_up_proj" and rows % 2 == 0:
        return (rows // 2, rows // 2)
    if scale.shape != (3,) or last != "qkv_proj":
        return ()
    heads = module.model.get("num_attention_heads")
    kv_heads = module.model.get("num_key_value_heads", heads)
    if not isinstance(heads, int) or not isinstance(kv_heads, int):
        return ()
    width, rest = divmod(rows, heads + 2 * kv_heads)
    return () if rest else (heads * width, kv_heads * width, kv_heads * width)


def scaled_spec(
    kind: str,
    module: RawModule,
    scale_name: str,
    grid: Grid,
    *,
    act: ActSpec | None = None,
    act_name: str | None = None,
    zero_name: str | None = None,
    act_zero_name: str | None = None,
    parts: tuple[int, ...] = (),
    weight_name: str = "weight",
    nibbles: bool = False,
    pre_name: str | None = None,
) -> ScaledSpec:
    """Build the spec from the tensors' headers; ``*_name`` are suffixes of optional tensors."""
    weight, scale = module.need(weight_name), module.need(scale_name)
    if weight.dtype not in CODE_OF:
        raise weight.error(
            f"dtype {weight.dtype} beside {scale_name}",
            f"a weight that has a scale is {', '.join(CODE_OF)}",
            "a weight that is already dequantized must not have a scale",
        )
    if scale.dtype not in SCALE_DTYPES + EXPONENT_DTYPES:
        raise scale.error(
            f"dtype {scale.dtype}", f"one of {', '.join(SCALE_DTYPES + EXPONENT_DTYPES)}"
        )
    zero = side(module.get(zero_name) if zero_name else None, zero_name or "")
    act_disk = side(module.get(act_name) if act_name else None, act_name or "")
    act_zero = side(module.get(act_zero_name) if act_zero_name else None, act_zero_name or "")
    dtype = "float8_e8m0fnu" if scale.dtype in EXPONENT_DTYPES else numpy_dtype(scale.dtype).name
    pre = module.get(pre_name) if pre_name else None
    code = CODES["int4"] if nibbles else CODE_OF[weight.dtype]
    grid = CHANNEL if parts else grid
    return ScaledSpec(
        kind=kind,
        code=CODES["uint8"] if zero else code,
        scales=(Leaf(grid, dtype),),
        zeros=(Leaf(grid, "uint8"),) if zero else (),
        affine="zero_point" if zero else "symmetric",
        act=act,
        act_scale=act_disk is not None,
        act_zero="int8" if act_zero else None,
        weight_dtype=weight.dtype,
        scale=Side(scale_name, scale.dtype, scale.shape),
        zero=zero,
        act_disk=act_disk,
        act_zero_disk=act_zero,
        parts=parts,
        weight=weight_name,
        nibbles=nibbles,
        pre_disk=side(pre, pre_name or ""),
        pre_scale=None if pre is None else numpy_dtype(pre.dtype).name,
    )


def scaled_shape(spec: ScaledSpec, module: RawModule) -> tuple[int, int]:
    """(out, in)."""
    out, columns = weight_shape(module, spec.weight)
    return out, columns * 2 if spec.nibbles else columns


def scaled_slots(spec: ScaledSpec, shape: tuple[int, int]) -> tuple[Slot, ...]:
    """The tensors that the spec was built from."""
    columns = shape[1] // 2 if spec.nibbles else shape[1]
    slots = [
        Slot(spec.weight, (spec.weight_dtype,), ((shape[0], columns),)),
        Slot(spec.scale.suffix, (spec.scale.dtype,), (spec.scale.shape,)),
    ]
    scalar: tuple[tuple[int, ...], ...] = ((), (1,), (1, 1))
    if spec.zero:
        slots.append(Slot(spec.zero.suffix, ("I8",), (spec.scale.shape,)))
    if spec.act_disk:
        shapes = (*scalar, (len(spec.parts),)) if spec.parts else scalar
        slots.append(Slot(spec.act_disk.suffix, SCALE_DTYPES, shapes))
    if spec.act_zero_disk:
        slots.append(Slot(spec.act_zero_disk.suffix, ("I8",), scalar))
    if spec.pre_disk:
        slots.append(Slot(spec.pre_disk.suffix, SCALE_DTYPES, ((shape[1],),)))
    return tuple(slots)


def _cells_shape(grid: Grid, shape: tuple[int, int]) -> tuple[int, int]:
    return cells(shape[0], grid[0]), cells(shape[1], grid[1])


def scaled_decode(
    arrays: Mapping[str, np.ndarray], spec: ScaledSpec, shape: tuple[int, int]
) -> QTensor:
    """Decode; zero-copy but for zero points and nibbles."""
    weight, scale = arrays[spec.weight], arrays[spec.scale.suffix]
    if spec.nibbles:
        weight = np.ascontiguousarray(weight).view(np.uint8) ^ np.uint8(0x88)
    if scale.dtype == np.uint8:
        scale = scale.view(ml_dtypes.float8_e8m0fnu)
    if spec.parts:
        scale = np.repeat(scale, spec.parts)
    grid = _cells_shape(spec.scales[0].grid, shape)
    zeros = ()
    if spec.zero:
        weight = np.ascontiguousarray(weight).view(np.uint8) ^ np.uint8(0x80)
        zero = np.ascontiguousarray(arrays[spec.zero.suffix]).view(np.uint8) ^ np.uint8(0x80)
        zeros = (zero.reshape(grid),)
    act_scale = act_zero = None
    if spec.act_disk:
        act_scale = arrays[spec.act_disk.suffix].astype(np.float32).max().reshape(1, 1)
    if spec.act_zero_disk:
        act_zero = arrays[spec.act_zero_disk.suffix].reshape(1, 1)
    return QTensor(
        (weight,),
        (scale.reshape(grid),),
        zeros,
        spec.layout(shape),
        act_scale=act_scale,
        act_zero=act_zero,
        pre_scale=arrays[spec.pre_disk.suffix].reshape(1, -1) if spec.pre_disk else None,
        act=spec.act,
    )


def scaled_encode(q: QTensor, spec: ScaledSpec) -> dict[str, np.ndarray]:
    """The tensors as they were on disk."""
    assert q.axes == AXES
    weight, scale = np.asarray(q.data[0]), np.asarray(q.scales[0])
    if spec.nibbles or spec.zero:
        flipped = weight ^ np.uint8(0x88 if spec.nibbles else 0x80)
        weight = flipped.view(numpy_dtype(spec.weight_dtype))
    if spec.parts:
        scale = scale[np.cumsum([0, *spec.parts[:-1]])]
    arrays = {
        spec.weight: weight,
        spec.scale.suffix: scale.view(numpy_dtype(spec.scale.dtype)).reshape(spec.scale.shape),
    }
    if spec.zero:
        zero = (np.asarray(q.zeros[0]) ^ np.uint8(0x80)).view(np.int8)
        arrays[spec.zero.suffix] = zero.reshape(spec.zero.shape)
    if spec.act_disk:
        act = np.asarray(q.act_scale).astype(numpy_dtype(spec.act_disk.dtype)).reshape(())
        arrays[spec.act_disk.suffix] = np.broadcast_to(act, spec.act_disk.shape)
    if spec.act_zero_disk:
        arrays[spec.act_zero_disk.suffix] = np.asarray(q.act_zero).reshape(spec.act_zero_disk.shape)
    if spec.pre_disk:
        arrays[spec.pre_disk.suffix] = np.asarray(q.pre_scale).reshape(-1)
    return arrays
