"""compressed-tensors ``pack-quantized``: integer codes of 2 to 8 bits in words.

=====================  ============================================================
``weight_packed``      I32 [out, words], along ``in``, stored code + 2**(bits-1)
``weight_scale``       [out, groups], [out, 1] or [1]
``weight_zero_point``  I32 [words, groups] packed along ``out``, or I8 [out, groups]
``weight_shape``       I64 [2] = (out, in)
``weight_g_idx``       I32 [in]: the group of every input (act-order)
=====================  ============================================================

Widths that do not divide 32 are either a dense bit stream or floor(32/bits) codes to a word,
depending on the version that wrote the file; the number of words tells them apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from jaxquant.arrays.codes import CODES
from jaxquant.arrays.layout import WHOLE, Grid, cells
from jaxquant.arrays.qtensor import QTensor
from jaxquant.formats.base import (
    CHANNEL,
    SCALE_DTYPES,
    TENSOR,
    Leaf,
    RawModule,
    RawTensor,
    Slot,
    Spec,
    numpy_dtype,
)
from jaxquant.formats.checks import check_group_index
from jaxquant.formats.ct_config import Arguments, activation_spec
from jaxquant.formats.scaled import Side, side
from jaxquant.formats.words import data_of, patterns_of, rows_to_data, take_inputs
from jaxquant.transforms.repack import elements_to_words, words_to_elements


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedSpec(Spec):
    """Spec of a pack-quantized weight.

    Attributes:
        logical: (out, in).
        group: inputs to a scale, None where a scale covers all.
        padded: floor(32/bits) codes to a word instead of a dense stream.
        words: words in a row.
        scale: the scale on disk.
        zero: the zero point on disk, also when it is all zero and not kept.
        shape_disk: the stored shape on disk.
        g_idx: the group index on disk.
        act_disk: the static activation scale on disk.
        act_zero_disk: the static activation zero point on disk.
    """

    logical: tuple[int, int]
    group: int | None
    padded: bool
    words: int
    scale: Side
    zero: Side | None
    shape_disk: Side | None
    g_idx: Side | None
    act_disk: Side | None
    act_zero_disk: Side | None


def _width(count: int, bits: int, padded: bool) -> int:
    return cells(count, 32 // bits) if padded else cells(count * bits, 32)


def read_words(words: np.ndarray, bits: int, count: int, padded: bool) -> np.ndarray:
    """Codes uint8 ``[rows, count]`` of words ``[rows, W]`` in either arrangement."""
    if not padded:
        return words_to_elements(words, bits, count)
    unsigned = np.ascontiguousarray(words).view(np.uint32)
    shifts = np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits)
    fields = (unsigned[..., None] >> shifts) & np.uint32((1 << bits) - 1)
    return fields.astype(np.uint8).reshape(words.shape[0], -1)[:, :count]


def write_words(codes: np.ndarray, bits: int, padded: bool) -> np.ndarray:
    """Inverse of :func:`read_words`."""
    if not padded:
        return elements_to_words(codes, bits)
    per_word = 32 // bits
    fields = np.pad(codes, ((0, 0), (0, -codes.shape[1] % per_word))).astype(np.uint32)
    fields = fields.reshape(codes.shape[0], -1, per_word)
    shifts = np.arange(per_word, dtype=np.uint32) * np.uint32(bits)
    return np.bitwise_or.reduce(fields << shifts, axis=-1).astype(np.uint32).view(np.int32)


def _logical(module: RawModule, bits: int, scale: RawTensor, group: int | None) -> tuple[int, int]:
    """(out, in), from ``weight_shape`` or, without it, where the sizes leave no doubt."""
    packed, stored = module.need("weight_packed"), module.get("weight_shape")
    if len(packed.shape) != 2 or packed.dtype not in ("I32", "U32"):
        raise packed.error(f"{packed.dtype} {list(packed.shape)}", "I32 [out, words]")
    rows, words = packed.shape
    if stored is not None:
        if stored.dtype not in ("I64", "I32") or stored.shape != (2,):
            raise stored.error(f"{stored.dtype} {list(stored.shape)}", "I64 [2]")
        out, inputs = (int(n) for n in stored.read())
        if out != rows or inputs < 1:
            raise stored.error(f"{[out, inputs]}", f"weight_packed has {rows} rows")
        return out, inputs
    if group is not None and len(scale.shape) == 2:
        return rows, scale.shape[1] * group
    if 32 % bits == 0 or words * 32 % bits == 0:
        return rows, words * 32 // bits
    raise packed.error(
        f"{words} words of {bits}-bit codes and no weight_shape", "the padding is unknown"
    )


def _arrangement(packed: RawTensor, bits: int, inputs: int, version: tuple[int, int]) -> bool:
    """Whether words are padded; both arrangements agree for widths that divide 32."""
    words = packed.shape[1]
    fits = {padded: words == _width(inputs, bits, padded) for padded in (False, True)}
    if not any(fits.values()):
        raise packed.error(
            f"{words} words in a row",
            f"{inputs} codes of {bits} bits take {_width(inputs, bits, False)} (dense) or "
            f"{_width(inputs, bits, True)} (padded)",
        )
    if all(fits.values()) and 32 % bits:
        return version < (0, 17)
    return not fits[False]


def packed_spec(
    module: RawModule, weights: Arguments, acts: Arguments | None, version: tuple[int, int]
) -> PackedSpec:
    """Spec from the group's arguments and the module's headers and side tensors.

    Raises:
        FormatError: a tensor is missing or contradicts the arguments.
    """
    bits, scale = weights.bits, module.need("weight_scale")
    if weights.kind != "int" or not 2 <= bits <= 8:
        raise module.error(f"{weights.kind}{bits} in weight_packed", "int of 2 to 8 bits")
    if scale.dtype not in SCALE_DTYPES:
        raise scale.error(f"dtype {scale.dtype}", f"one of {', '.join(SCALE_DTYPES)}")
    group = weights.group if weights.strategy == "group" else None
    out, inputs = _logical(module, bits, scale, group)
    packed = module.need("weight_packed")
    padded = _arrangement(packed, bits, inputs, version)
    grid: Grid = {"tensor": TENSOR, "channel": CHANNEL}.get(weights.strategy, (1, group or WHOLE))
    groups = cells(inputs, grid[1])
    shapes = [(1,), (), (1, 1)] if grid == TENSOR else [(out, groups)]
    if scale.shape not in shapes:
        raise scale.error(
            f"shape {list(scale.shape)}", f"{list(shapes[0])} for strategy {weights.strategy}"
        )
    zero = module.get("weight_zero_point")
    keep_zero = _keeps_zero(zero, bits, out, scale.shape, padded)
    if zero is None and not weights.symmetric:
        raise module.error("no weight_zero_point", "an asymmetric weight has zero points")
    g_idx = module.get("weight_g_idx")
    act_scale = act_zero = None
    if acts is not None and acts.dynamic is False:
        act_scale = module.need("input_scale")
        act_zero = None if acts.symmetric else module.need("input_zero_point")
    zeros = (Leaf(grid, "uint8"),) if keep_zero or not weights.symmetric else ()
    return PackedSpec(
        kind="pack-quantized",
        code=CODES[f"{'uint' if zeros else 'int'}{bits}"],
        scales=(Leaf(grid, numpy_dtype(scale.dtype).name),),
        zeros=zeros,
        affine="zero_point" if zeros else "symmetric",
        perm=_sorted_inputs(module, g_idx, inputs, group, groups, weights.act_order),
        act=activation_spec(acts),
        act_scale=act_scale is not None,
        act_zero="int8" if act_zero is not None else None,
        logical=(out, inputs),
        group=group,
        padded=padded,
        words=packed.shape[1],
        scale=Side("weight_scale", scale.dtype, scale.shape),
        zero=side(zero, "weight_zero_point"),
        shape_disk=side(module.get("weight_shape"), "weight_shape"),
        g_idx=side(g_idx, "weight_g_idx"),
        act_disk=side(act_scale, "input_scale"),
        act_zero_disk=side(act_zero, "input_zero_point"),
    )


def _keeps_zero(
    zero: RawTensor | None, bits: int, out: int, scale: tuple[int, ...], padded: bool
) -> bool:
    """Whether a stored zero point is not all zero (symmetric weights may carry zeros)."""
    if zero is None:
        return False
    packed = (_width(out, bits, padded), scale[-1] if scale else 1)
    if not (zero.dtype == "I8" and zero.shape == scale) and not (
        zero.dtype in ("I32", "U32") and zero.shape == packed
    ):
        raise zero.error(
            f"{zero.dtype} {list(zero.shape)}", f"I8 {list(scale)} or I32 {list(packed)}"
        )
    return bool((_read_zero(zero.read(), bits, out, padded) != 1 << (bits - 1)).any())


def _read_zero(stored: np.ndarray, bits: int, out: int, padded: bool) -> np.ndarray:
    """Unsigned zero points uint8 ``[out, groups]`` of either form."""
    if stored.dtype == np.int8:
        middle, mask = np.uint8(1 << (bits - 1)), np.uint8((1 << bits) - 1)
        shifted = (np.ascontiguousarray(stored).view(np.uint8) + middle) & mask
        return shifted.reshape(out, -1)
    return read_words(np.ascontiguousarray(stored.T), bits, out, padded).T


def _sorted_inputs(
    module: RawModule,
    g_idx: RawTensor | None,
    inputs: int,
    group: int | None,
    groups: int,
    act_order: bool,
) -> bool:
    """Whether inputs must be sorted by group; placeholders and plain order need none."""
    if g_idx is None:
        if act_order and groups > 1:
            raise module.error("no weight_g_idx", "actorder 'group' stores the group of each input")
        return False
    if g_idx.dtype not in ("I32", "I64") or g_idx.shape != (inputs,):
        raise g_idx.error(f"{g_idx.dtype} {list(g_idx.shape)}", f"I32 [{inputs}]")
    index = g_idx.read()
    if (index == -1).all() or groups == 1 or group is None:
        return False
    check_group_index(index, groups, f"{g_idx.file}: {g_idx.name}")
    if np.array_equal(index, np.arange(inputs) // group):
        return False
    counts = np.bincount(index, minlength=groups)
    if not np.array_equal(np.cumsum(counts), np.minimum(np.arange(1, groups + 1) * group, inputs)):
        raise g_idx.error(f"groups of {sorted(set(counts.tolist()))} inputs", f"all have {group}")
    return True


def packed_shape(spec: PackedSpec, module: RawModule) -> tuple[int, int]:
    """(out, in)."""
    return spec.logical


def packed_slots(spec: PackedSpec, shape: tuple[int, int]) -> tuple[Slot, ...]:
    """The tensors of one weight."""
    sides = (spec.scale, spec.zero, spec.shape_disk, spec.g_idx, spec.act_disk, spec.act_zero_disk)
    return (
        Slot("weight_packed", ("I32", "U32"), ((shape[0], spec.words),)),
        *(Slot(s.suffix, (s.dtype,), (s.shape,)) for s in sides if s),
    )


def packed_decode(
    arrays: Mapping[str, np.ndarray], spec: PackedSpec, shape: tuple[int, int]
) -> QTensor:
    """Decode; words of 2, 4 and 8 bits without padding are used as they are."""
    out, inputs = shape
    code, bits = spec.code, spec.code.bits
    words = arrays["weight_packed"]
    if spec.padded:
        data = data_of(read_words(words, bits, inputs, True), code)
    else:
        data = rows_to_data(words, code, inputs)
    perm = None
    if spec.perm:
        perm = np.argsort(arrays["weight_g_idx"], kind="stable").astype(np.int32)
        data = take_inputs(data, code, inputs, perm)
    if code.name == "int8":
        data = ((data[0] ^ np.uint8(0x80)).view(np.int8),)
    scale = arrays["weight_scale"]
    zeros = ()
    if spec.zeros:
        zero = _read_zero(arrays["weight_zero_point"], bits, out, spec.padded)
        zeros = (np.ascontiguousarray(zero).reshape(-1, 1 if not scale.shape else scale.shape[-1]),)
    act_scale = act_zero = None
    if spec.act_disk:
        act_scale = arrays["input_scale"].astype(np.float32).reshape(1, 1)
    if spec.act_zero_disk:
        act_zero = arrays["input_zero_point"].reshape(1, 1)
    scales = (scale.reshape(1, 1) if spec.scales[0].grid == TENSOR else scale,)
    return QTensor(
        data,
        scales,
        zeros,
        spec.layout(shape),
        perm=perm,
        act_scale=act_scale,
        act_zero=act_zero,
        act=spec.act,
    )


def packed_encode(q: QTensor, spec: PackedSpec) -> dict[str, np.ndarray]:
    """The tensors as compressed-tensors writes them."""
    out, inputs = q.shape
    code, bits = spec.code, spec.code.bits
    data = tuple(np.asarray(plane) for plane in q.data)
    if code.name == "int8":
        data = (data[0].view(np.uint8) ^ np.uint8(0x80),)
    groups = np.arange(inputs) // (spec.group or inputs)
    if q.perm is not None:
        order = np.argsort(np.asarray(q.perm))
        data, groups = take_inputs(data, code, inputs, order), groups[order]
    arrays = {
        "weight_packed": write_words(patterns_of(data, code, inputs), bits, spec.padded),
        "weight_scale": np.asarray(q.scales[0]).reshape(spec.scale.shape),
    }
    if spec.zero:
        middle = np.uint8(1 << (bits - 1))
        shape = (out, 1) if not spec.scale.shape else (out, spec.scale.shape[-1])
        stored = np.asarray(q.zeros[0]) if q.zeros else np.full(shape, middle)
        if spec.zero.dtype == "I8":
            signed = stored.astype(np.int16) - np.int16(middle)
            arrays["weight_zero_point"] = signed.astype(np.int8).reshape(spec.zero.shape)
        else:
            words = write_words(np.ascontiguousarray(stored.T), bits, spec.padded)
            arrays["weight_zero_point"] = np.ascontiguousarray(words.T)
    if spec.shape_disk:
        arrays["weight_shape"] = np.array([out, inputs], numpy_dtype(spec.shape_disk.dtype))
    if spec.g_idx:
        arrays["weight_g_idx"] = groups.astype(numpy_dtype(spec.g_idx.dtype))
    if spec.act_disk:
        scale = np.asarray(q.act_scale).astype(numpy_dtype(spec.act_disk.dtype))
        arrays["input_scale"] = scale.reshape(spec.act_disk.shape)
    if spec.act_zero_disk:
        arrays["input_zero_point"] = np.asarray(q.act_zero).reshape(spec.act_zero_disk.shape)
    return arrays
