"""Format: a record of pure functions that turns a checkpoint's raw tensors into a QTensor and back.

Adding a format is one file with one ``Format`` in it and one line in ``jaxquant.formats.FORMATS``.
Decoding is NumPy only, so it runs in threads, without devices, and is tested bit for bit.

Canonical results, so that kernels cannot tell where a weight came from:

* axes are ``("out", "in")``, codes of fewer than 8 bits are packed along ``in``;
* weights without zero points use a signed code (``int4``: excess form), those with zero points the
  unsigned code and the ``zero_point`` formula, whatever domain the file keeps them in;
* scales keep the dtype they have on disk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from jaxquant.arrays.codes import Code
from jaxquant.arrays.layout import WHOLE, Affine, Grid, Layout, cells, packed_grids
from jaxquant.arrays.qtensor import QTensor
from jaxquant.arrays.scheme import ActSpec
from jaxquant.errors import FormatError

AXES = ("out", "in")
TENSOR: Grid = (WHOLE, WHOLE)
CHANNEL: Grid = (1, WHOLE)

DTYPES: dict[str, tuple[str, int]] = {
    "BOOL": ("bool", 8),
    "U8": ("uint8", 8),
    "I8": ("int8", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "I16": ("int16", 16),
    "U16": ("uint16", 16),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "I32": ("int32", 32),
    "U32": ("uint32", 32),
    "F32": ("float32", 32),
    "I64": ("int64", 64),
    "U64": ("uint64", 64),
    "F64": ("float64", 64),
    "C64": ("complex64", 64),
    "F4": ("uint8", 4),
    "F6_E2M3": ("uint8", 6),
    "F6_E3M2": ("uint8", 6),
}
"""safetensors dtype: NumPy dtype name, bits of an element; F4 and F6 are read as packed bytes."""

DENSE_DTYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
SCALE_DTYPES = ("F32", "BF16", "F16")
EXPONENT_DTYPES = ("F8_E8M0", "U8")
FP8_DTYPES = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")


class FormatWarning(UserWarning):
    """A checkpoint is readable but says something odd about itself."""


def numpy_dtype(name: str) -> np.dtype:
    """NumPy dtype of a safetensors dtype string."""
    numpy_name = DTYPES[name][0]
    return np.dtype(getattr(ml_dtypes, numpy_name, numpy_name))


def disk_dtype(dtype: Any) -> str:
    """safetensors dtype string of a NumPy dtype, the inverse of :func:`numpy_dtype`."""
    name = np.dtype(dtype).name
    return next(disk for disk, (numpy_name, _) in DTYPES.items() if numpy_name == name)


@dataclasses.dataclass(frozen=True)
class RawTensor:
    """A tensor in a checkpoint file, not read yet.

    Attributes:
        name: full name in the checkpoint.
        dtype: safetensors dtype string, e.g. ``"F8_E4M3"``, ``"I32"``.
        shape: shape on disk.
        file: file it lies in, for error messages.
        read: returns the array (a read-only view of the file where that is possible).
        release: gives the memory behind such views back; they stay valid and are read again.
        entry: ``entry(i)`` is one entry along the first axis, unread, that shares no memory with
            the others; None where there is no such thing.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    read: Callable[[], np.ndarray] = dataclasses.field(repr=False, compare=False)
    release: Callable[[], None] = dataclasses.field(default=lambda: None, repr=False, compare=False)
    entry: Callable[[int], RawTensor] | None = dataclasses.field(
        default=None, repr=False, compare=False
    )

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return int(np.prod(self.shape, dtype=np.int64)) * DTYPES[self.dtype][1] // 8

    def error(self, found: str, rule: str = "", action: str = "") -> FormatError:
        """An error about this tensor."""
        return FormatError(f"{self.file}: {self.name}", found, rule, action)

    def pick(self, label: str, index: tuple[Any, ...], transpose: bool = False) -> RawTensor:
        """One entry of a stacked tensor as a tensor of its own, still unread.

        Args:
            label: what to append to the name, for messages.
            index: index into the array as it is on disk.
            transpose: swap the two trailing axes afterwards.
        """
        whole, rest = self, index
        if self.entry is not None and index and type(index[0]) is int:
            # Of a stack of gigabytes only the entry is mapped, and given back.
            whole, rest = self.entry(index[0]), index[1:]

        def cut(array: np.ndarray) -> np.ndarray:
            part = array[rest]
            return part.swapaxes(-1, -2) if transpose else part

        shape = cut(np.broadcast_to(np.uint8(0), whole.shape)).shape
        return dataclasses.replace(
            whole,
            name=self.name + label,
            shape=shape,
            read=lambda: cut(whole.read()),
            entry=None,
        )


@dataclasses.dataclass(frozen=True)
class RawModule:
    """The unread tensors of one module.

    Attributes:
        path: module path as the checkpoint names it.
        tensors: what follows the path (``"qweight"``, ``"weight_scale"``) -> tensor.
        model: the checkpoint's ``config.json``.
    """

    path: str
    tensors: Mapping[str, RawTensor]
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    def get(self, suffix: str) -> RawTensor | None:
        """The tensor or None."""
        return self.tensors.get(suffix)

    def need(self, suffix: str) -> RawTensor:
        """The tensor.

        Raises:
            FormatError: the module has no such tensor; the message lists those it has.
        """
        if suffix in self.tensors:
            return self.tensors[suffix]
        some = next(iter(self.tensors.values()), None)
        raise FormatError(
            f"{some.file}: {self.path}.{suffix}" if some else f"{self.path}.{suffix}",
            f"missing; the module has {sorted(self.tensors)}",
            "its format stores the weight with this tensor",
            "the checkpoint is incomplete: download or export it again",
        )

    def error(self, found: str, rule: str = "", action: str = "") -> FormatError:
        """An error about the whole module."""
        some = next(iter(self.tensors.values()), None)
        return FormatError(f"{some.file}: {self.path}" if some else self.path, found, rule, action)


class Slot(NamedTuple):
    """One tensor that a quantized linear consists of on disk.

    Attributes:
        suffix: what follows the module path, e.g. ``"qweight"``.
        dtypes: accepted safetensors dtypes.
        shapes: accepted shapes; empty when ``Format.shape`` and ``spec`` have checked them.
        required: whether its absence is an error.
    """

    suffix: str
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...] = ()
    required: bool = True


class Leaf(NamedTuple):
    """Grid over ``("out", "in")`` and NumPy dtype name of one scale or zero leaf."""

    grid: Grid
    dtype: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """How one module is quantized; formats add fields of their own.

    Attributes:
        kind: the format's name for this arrangement of tensors.
        code: alphabet of the decoded data.
        scales: scale leaves; their product is the scale.
        zeros: zero point or offset leaves.
        affine: which formula holds.
        perm: whether the decoded weight is sorted by group (act-order).
        pre_scale: NumPy dtype name of the activation pre-scale, None where there is none.
        act: activation quantization.
        act_scale: whether the file carries a static activation scale.
        act_zero: NumPy dtype name of a static activation zero point, None where there is none.
        dead_scales: a zero scale over non-zero codes is legal (dead channels).
        signed_scales: negative scales are legal.
    """

    kind: str
    code: Code
    scales: tuple[Leaf, ...] = ()
    zeros: tuple[Leaf, ...] = ()
    affine: Affine = "symmetric"
    perm: bool = False
    pre_scale: str | None = None
    act: ActSpec | None = None
    act_scale: bool = False
    act_zero: str | None = None
    dead_scales: bool = False
    signed_scales: bool = False

    def layout(self, shape: tuple[int, int]) -> Layout:
        """Layout of the decoded QTensor of logical ``shape`` (out, in)."""
        return Layout(
            AXES,
            self.code,
            packed_grids(self.code, AXES, "in", shape[1]),
            tuple(leaf.grid for leaf in self.scales),
            tuple(leaf.grid for leaf in self.zeros),
            self.affine,
        )

    def abstract(self, shape: tuple[int, int]) -> QTensor:
        """The decoded QTensor with ``jax.ShapeDtypeStruct`` leaves, known before a byte is read."""
        layout = self.layout(shape)

        def leaf(grid: Grid, dtype: Any) -> jax.ShapeDtypeStruct:
            extents = tuple(cells(n, step) for n, step in zip(shape, grid, strict=True))
            if isinstance(dtype, str):
                dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
            return jax.ShapeDtypeStruct(extents, dtype)

        return QTensor(
            tuple(leaf(grid, self.code.storage) for grid in layout.data),
            tuple(leaf(*scale) for scale in self.scales),
            tuple(leaf(*zero) for zero in self.zeros),
            layout,
            perm=jax.ShapeDtypeStruct((shape[1],), np.int32) if self.perm else None,
            act_scale=leaf(TENSOR, "float32") if self.act_scale else None,
            act_zero=leaf(TENSOR, self.act_zero) if self.act_zero else None,
            pre_scale=leaf((WHOLE, 1), self.pre_scale) if self.pre_scale else None,
            act=self.act,
        )


class Coverage(NamedTuple):
    """What a config says about which modules are quantized.

    Attributes:
        ignored: the entries of its ignore list.
        matches: ``matches(entry, path)``: the family's own rule (formats.names).
        targeted: whether the config means ``path`` to be quantized, ignore list aside.
    """

    ignored: tuple[str, ...]
    matches: Callable[[str, str], bool]
    targeted: Callable[[str], bool] = lambda path: True


class Format(NamedTuple):
    """One checkpoint format.

    Attributes:
        name: short name, e.g. ``"gptq"``.
        claims: ``claims(config) -> bool``, given a ``quantization_config`` dict.
        markers: suffixes of which a quantized module has at least one.
        suffixes: every suffix that belongs to a quantized module.
        coverage: ``coverage(config) -> Coverage``.
        spec: ``spec(config, module) -> Spec | None``: how the module is quantized, read from the
            config, headers and small side tensors, never from the weight's bytes; None where the
            config does not mean it.
        shape: ``shape(spec, module) -> (out, in)`` of the logical weight, from headers and side
            tensors.
        slots: ``slots(spec, shape)``: the tensors on disk with their dtypes and shapes.
        decode: ``decode(arrays, spec, shape) -> QTensor`` (suffix -> array).
        encode: ``encode(q, spec) -> arrays``, the inverse, as the format's own tools write it.
        idle: suffixes of tensors that a weight may have and inference may have no use for; a zero
            point is one only where it is zero.
    """

    name: str
    claims: Callable[[Mapping[str, Any]], bool]
    markers: tuple[str, ...]
    suffixes: tuple[str, ...]
    coverage: Callable[[Mapping[str, Any]], Coverage]
    spec: Callable[[Mapping[str, Any], RawModule], Any]
    shape: Callable[[Any, RawModule], tuple[int, int]]
    slots: Callable[[Any, tuple[int, int]], tuple[Slot, ...]]
    decode: Callable[[Mapping[str, np.ndarray], Any, tuple[int, int]], QTensor]
    encode: Callable[[QTensor, Any], dict[str, np.ndarray]]
    idle: tuple[str, ...] = ()


def by_auto_round(config: Mapping[str, Any]) -> bool:
    """Whether AutoRound wrote the checkpoint, whose symmetric weights have scales of both signs."""
    return config.get("provider") == "auto-round" or method_of(config) == "auto-round"


def method_of(config: Mapping[str, Any]) -> str:
    """The normalised ``quant_method``: lower case, dashes, no vendor prefix; "" where absent."""
    name = str(config.get("quant_method") or "").lower().replace("_", "-")
    return name.removeprefix("intel/")
