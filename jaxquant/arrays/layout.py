"""Layout: how the leaves of a QTensor cover the same named axes in integer steps.

The one law: along every axis, ``leaf.shape == ceil(extent / step)``, and a step of ``WHOLE`` means
that one cell covers the whole axis.  Transposing, slicing, stacking, concatenating and sharding are
arithmetic on steps, so a weight and its scales cannot drift apart.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Literal

from jaxquant.arrays.codes import Code
from jaxquant.errors import LayoutError

WHOLE = 0
Grid = tuple[int, ...]
"""One step per axis, in elements; ``WHOLE`` where a single cell covers the axis."""

Affine = Literal["symmetric", "zero_point", "offset"]


def cells(extent: int, step: int) -> int:
    """Number of cells that cover ``extent`` elements in steps of ``step``."""
    return 1 if step == WHOLE else -(-extent // step)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Static description of a QTensor; hashable, so it is part of the jit cache key.

    The value of an element is

    * ``symmetric``: code x product(scales)
    * ``zero_point``: (code - zeros[0]) x product(scales)
    * ``offset``: code x product(scales) - product(zeros)

    Attributes:
        axes: names of the trailing axes, e.g. ``("out", "in")``; any number of leading axes
            (stacked layers, experts) may precede them in every leaf.
        code: alphabet of the data.
        data: one grid per bit plane of ``code``; a step of n on an axis means n elements to a byte.
        scales: one grid per scale leaf; their product is the scale.
        zeros: grids of the zero points or offsets.
        affine: which of the three formulas holds.
    """

    axes: tuple[str, ...]
    code: Code
    data: tuple[Grid, ...]
    scales: tuple[Grid, ...] = ()
    zeros: tuple[Grid, ...] = ()
    affine: Affine = "symmetric"

    def __post_init__(self) -> None:
        rank = len(self.axes)
        if any(len(grid) != rank for grid in self.grids()):
            raise LayoutError(
                "layout", f"a grid has another rank than axes {self.axes}", "all are equal"
            )
        zeros_expected = {"symmetric": len(self.zeros) == 0, "zero_point": len(self.zeros) == 1}
        if not zeros_expected.get(self.affine, len(self.zeros) > 0):
            raise LayoutError(
                "layout", f"{self.affine} with {len(self.zeros)} zero leaves", "0, 1 or more"
            )
        widths = self.code.planes
        unpacked = self.data == ((1,) * rank,)
        if not unpacked:
            if len(self.data) != len(widths):
                raise LayoutError(
                    "layout", f"{len(self.data)} data grids for {self.code}", f"planes {widths}"
                )
            for grid, width in zip(self.data, widths, strict=True):
                if math.prod(grid) != max(1, 8 // width) or WHOLE in grid:
                    raise LayoutError(
                        "layout",
                        f"data grid {grid}",
                        f"{8 // width} elements of {width} bits to a byte",
                    )

    def grids(self) -> Iterator[Grid]:
        """Every grid: data planes, scales, zeros."""
        yield from self.data
        yield from self.scales
        yield from self.zeros

    def index(self, axis: str) -> int:
        """Position of ``axis`` among the trailing axes; LayoutError when there is none."""
        if axis not in self.axes:
            raise LayoutError("axis", f"{axis!r}", f"the axes are {self.axes}")
        return self.axes.index(axis)

    def span(self, axis: str) -> int:
        """Cuts along ``axis`` are legal at multiples of this many elements."""
        i = self.index(axis)
        return math.lcm(*(grid[i] for grid in self.grids() if grid[i] != WHOLE))

    def permute(self, axes: Sequence[str]) -> Layout:
        """The same layout with its trailing axes in another order."""
        if sorted(axes) != sorted(self.axes):
            raise LayoutError("axes", f"{tuple(axes)}", f"an order of {self.axes} is needed")
        order = [self.axes.index(a) for a in axes]
        return self.map(lambda grid: tuple(grid[i] for i in order), axes=tuple(axes))

    def map(self, change, axes: tuple[str, ...] | None = None) -> Layout:
        """Apply ``change`` to every grid."""
        return dataclasses.replace(
            self,
            axes=self.axes if axes is None else axes,
            data=tuple(change(grid) for grid in self.data),
            scales=tuple(change(grid) for grid in self.scales),
            zeros=tuple(change(grid) for grid in self.zeros),
        )

    @property
    def dense(self) -> bool:
        """Whether this is a plain 16- or 32-bit array without scales."""
        return self.code.kind == "float" and self.code.bits > 8 and not self.scales

    def __str__(self) -> str:
        def show(grid: Grid) -> str:
            return "x".join("*" if step == WHOLE else str(step) for step in grid)

        parts = [f"{self.code.name}[{','.join(self.axes)}]"]
        if self.scales:
            parts.append("scale " + " * ".join(map(show, self.scales)))
        if self.zeros:
            parts.append(f"{self.affine.replace('_', ' ')} " + " * ".join(map(show, self.zeros)))
        return " ".join(parts)


def dense_layout(code: Code, axes: Sequence[str] = ("out", "in")) -> Layout:
    """Layout of an unquantized array."""
    return Layout(tuple(axes), code, ((1,) * len(axes),))


def packed_grids(code: Code, axes: Sequence[str], axis: str, extent: int) -> tuple[Grid, ...]:
    """Data grids of ``code`` packed along ``axis``.

    An extent that is not a multiple of the widest step cannot be packed without a tail; such codes
    stay one to a byte, and the layout says so.
    """
    ones = (1,) * len(axes)
    steps = [max(1, 8 // width) for width in code.planes]
    if extent % math.lcm(*steps):
        return (ones,)
    i = list(axes).index(axis)
    return tuple((*ones[:i], step, *ones[i + 1 :]) for step in steps)
