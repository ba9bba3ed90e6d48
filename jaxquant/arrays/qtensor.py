"""QTensor: a few arrays plus one static layout."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxquant.arrays.codes import CODES
from jaxquant.arrays.layout import WHOLE, Grid, Layout, cells, dense_layout
from jaxquant.arrays.scheme import ActSpec
from jaxquant.errors import LayoutError


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("data", "scales", "zeros", "perm", "act_scale", "act_zero", "pre_scale"),
    meta_fields=("layout", "act"),
)
@dataclasses.dataclass(frozen=True)
class QTensor:
    """A quantized (or dense) weight.  Frozen; a pytree whose leaves are its arrays.

    Every leaf but ``perm`` has the rank of the logical array and obeys the law of
    :mod:`jaxquant.arrays.layout`; leading axes (layers, experts) are allowed in all leaves.

    Attributes:
        data: bit planes of the codes, ``[*lead, out/step, in/step]`` each.
        scales: scale leaves; their product is the scale.
        zeros: zero points (one) or offsets (any number).
        perm: ``[*lead, in]`` int32 or None.  With act-order, row ``i`` of the data is input
            ``perm[i]``; activations are gathered, ``x[..., perm]``, weights stay contiguous.
        act_scale: ``[*lead, 1, 1]`` f32 static activation scale, or None.
        act_zero: ``[*lead, 1, 1]`` static activation zero point, or None.
        pre_scale: ``[*lead, 1, in]``, or ``[*lead, in, 1]`` where the axes are ``("in", "out")``:
            activations are multiplied by it before anything else, or None.
        layout: the static layout.
        act: how a matmul quantizes its activations, None for not at all.
    """

    data: tuple[Any, ...]
    scales: tuple[Any, ...]
    zeros: tuple[Any, ...]
    layout: Layout
    perm: Any = None
    act_scale: Any = None
    act_zero: Any = None
    pre_scale: Any = None
    act: ActSpec | None = None

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the trailing axes."""
        return self.layout.axes

    @property
    def lead(self) -> tuple[int, ...]:
        """Extents of the leading (stacked) axes."""
        return tuple(self.data[0].shape[: -len(self.axes)])

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape, ``[*lead, *axes]``."""
        trailing = self.data[0].shape[-len(self.axes) :]
        return (
            *self.lead,
            *(n * step for n, step in zip(trailing, self.layout.data[0], strict=True)),
        )

    @property
    def ndim(self) -> int:
        """Rank of the logical array."""
        return len(self.data[0].shape)

    def extent(self, axis: str) -> int:
        """Elements along a named axis."""
        return self.shape[len(self.lead) + self.layout.index(axis)]

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def bits_per_weight(self) -> float:
        """Bits of all leaves over the number of weights."""
        return 8 * self.nbytes / max(1, int(np.prod(self.shape)))

    def map(self, change: Callable[[Any, Grid], Any], **replace: Any) -> QTensor:
        """Apply ``change(leaf, grid)`` to all lawful leaves; ``replace`` sets other fields."""
        layout = self.layout
        fields: dict[str, Any] = {
            "data": tuple(map(change, self.data, layout.data)),
            "scales": tuple(map(change, self.scales, layout.scales)),
            "zeros": tuple(map(change, self.zeros, layout.zeros)),
        }
        whole = (WHOLE,) * len(self.axes)
        along_in = tuple(1 if axis == "in" else WHOLE for axis in self.axes)
        for name, grid in (("act_scale", whole), ("act_zero", whole), ("pre_scale", along_in)):
            if getattr(self, name) is not None:
                fields[name] = change(getattr(self, name), grid)
        return dataclasses.replace(self, **(fields | replace))

    def check(self, where: str = "QTensor") -> QTensor:
        """Return self after checking every leaf against the law.

        Raises:
            LayoutError: a leaf has another shape than the law gives, data another dtype than the
                code's, or a static activation scheme lacks its scale.
        """
        if len(self.data) != len(self.layout.data) or len(self.scales) != len(self.layout.scales):
            raise LayoutError(
                where,
                f"{len(self.data)} data and {len(self.scales)} scale leaves",
                str(self.layout),
            )
        if len(self.zeros) != len(self.layout.zeros):
            raise LayoutError(where, f"{len(self.zeros)} zero leaves", str(self.layout))
        lead, rank = self.lead, len(self.axes)
        extents = self.shape[len(lead) :]
        storage = self.layout.code.storage
        for leaf in self.data:
            if leaf.dtype != storage:
                rule = f"{self.layout.code} codes are stored as {storage}"
                raise LayoutError(where, f"data of dtype {leaf.dtype}", rule)

        def expect(leaf: Any, grid: Grid) -> Any:
            rule = (*lead, *(cells(n, step) for n, step in zip(extents, grid, strict=True)))
            if tuple(leaf.shape) != rule:
                raise LayoutError(
                    where, f"a leaf of shape {tuple(leaf.shape)}", f"{self.layout} needs {rule}"
                )
            return leaf

        self.map(expect)
        if self.perm is not None and tuple(self.perm.shape) != (*lead, self.extent("in")):
            raise LayoutError(
                where, f"perm of shape {self.perm.shape}", f"one index per input, {extents[-rank:]}"
            )
        if self.perm is not None and np.dtype(self.perm.dtype).kind not in "iu":
            raise LayoutError(where, f"perm of dtype {self.perm.dtype}", "indices are integers")
        if self.act is not None and not self.act.dynamic and self.act_scale is None:
            raise LayoutError(
                where, "static activations without act_scale", "a static scale is a leaf"
            )
        return self

    def __repr__(self) -> str:
        perm = ", act-order" if self.perm is not None else ""
        act = f", act {self.act}" if self.act else ""
        return f"QTensor({list(self.shape)} {self.layout}{perm}{act})"


def require_qtensor(where: str, value: Any) -> QTensor:
    """Return ``value``, which has to be a QTensor.

    Raises:
        LayoutError: it is something else.
    """
    if not isinstance(value, QTensor):
        found, action = type(value).__name__, 'jaxquant.quantize(w, "bf16") wraps an array'
        if found == "Prepared":
            action = "jaxquant.unprepare_model brings weights back from kernel order"
        raise LayoutError(where, found, "a QTensor is needed", action)
    return value


def dense(array: Any, axes: tuple[str, ...] = ("out", "in")) -> QTensor:
    """Wrap a 16- or 32-bit array ``[*lead, *axes]`` as a QTensor without scales."""
    names = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
    dtype = getattr(array, "dtype", None)
    name = names.get(str(dtype))
    if name is None:
        found = type(array).__name__ if dtype is None else f"dtype {dtype}"
        raise LayoutError("dense", found, "float32, float16 or bfloat16")
    if len(array.shape) < len(axes):
        raise LayoutError("dense", f"an array of shape {array.shape}", f"it has axes {axes}")
    return QTensor((array,), (), (), dense_layout(CODES[name], axes))
