"""Transforms along named axes: pure functions that move a weight and its scales together.

Each of them commutes with :func:`jaxquant.transforms.numeric.dequantize`; a cut that would separate
codes from their scales is a LayoutError that names the legal cuts.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxquant.arguments import whole
from jaxquant.arrays.layout import WHOLE, Grid, cells
from jaxquant.arrays.qtensor import QTensor, require_qtensor
from jaxquant.errors import LayoutError


def namespace(leaf: Any) -> Any:
    """The module that has the functions of a leaf's kind of array."""
    return leaf.__array_namespace__()


def to_axes(q: QTensor, axes: Sequence[str]) -> QTensor:
    """Return ``q`` with its trailing axes in the order of ``axes``.

    Args:
        q: ``[*lead, *q.axes]`` in any layout.
        axes: the same names in the order wanted, e.g. ``("in", "out")``.
    Raises:
        LayoutError: ``axes`` is not an order of ``q.axes``.
    """
    layout = require_qtensor("to_axes", q).layout.permute(axes)
    if layout.axes == q.axes:
        return q
    order = [q.axes.index(a) for a in axes]
    rank = len(order)

    def move(leaf: Any, _: Grid) -> Any:
        lead = leaf.ndim - rank
        return leaf.transpose(*range(lead), *(lead + i for i in order))

    return q.map(move, layout=layout)


def _require_unpermuted(q: QTensor, what: str) -> None:
    if q.perm is not None:
        raise LayoutError(
            what,
            "an act-order weight along 'in'",
            "its data rows are sorted by group, not by input",
            "cut along 'out', or dequantize first",
        )


def slice_axis(q: QTensor, axis: str, start: int, stop: int) -> QTensor:
    """Return entries ``start:stop`` of one named axis, codes, scales and zeros together.

    Args:
        q: ``[*lead, *axes]`` in any layout.
        axis: one of ``q.axes``.
        start: first entry, a multiple of the span of the axis.
        stop: one past the last entry, a multiple of the span or the extent.
    Raises:
        LayoutError: a boundary falls inside a group; the message gives the nearest legal cuts.
        ConfigError: a boundary is no whole number.
    """
    where = f"slice {axis!r}"
    extent, span = require_qtensor(where, q).extent(axis), q.layout.span(axis)
    start, stop = whole(where, start, None), whole(where, stop, None)
    if not 0 <= start < stop <= extent:
        raise LayoutError(where, f"[{start}:{stop}] of {extent}", "0 <= start < stop <= extent")
    for cut in (start, stop):
        if cut % span and cut != extent:
            low = cut // span * span
            raise LayoutError(
                where,
                f"a cut at {cut}",
                f"{q.layout} can be cut at multiples of {span} and at the end, {extent}",
                f"cut at {low} or {min(low + span, extent)}",
            )
    if axis == "in":
        _require_unpermuted(q, where)
    i = q.layout.index(axis)
    rank = len(q.axes)

    def cut_leaf(leaf: Any, grid: Grid) -> Any:
        if grid[i] == WHOLE:
            return leaf
        index: list[Any] = [slice(None)] * leaf.ndim
        index[leaf.ndim - rank + i] = slice(start // grid[i], cells(stop, grid[i]))
        return leaf[tuple(index)]

    return q.map(cut_leaf)


def split(q: QTensor, axis: str, sizes: Sequence[int]) -> list[QTensor]:
    """Cut one named axis into consecutive pieces of ``sizes`` entries.

    Raises:
        LayoutError: the sizes do not add up to the extent, or a boundary falls inside a group.
        ConfigError: a size is no whole number from 1.
    """
    where = f"split {axis!r}"
    extent = require_qtensor(where, q).extent(axis)
    sizes = [whole(where, size) for size in sizes]
    if sum(sizes) != extent:
        raise LayoutError(where, f"sizes {sizes}", f"they must add up to {extent}")
    bounds = np.cumsum([0, *sizes]).tolist()
    return [slice_axis(q, axis, a, b) for a, b in itertools.pairwise(bounds)]


def require_parts(parts: Sequence[QTensor], what: str) -> None:
    """Raise a LayoutError unless there is a part, and each is a QTensor."""
    if not isinstance(parts, Sequence) or not parts:
        found = "no parts" if isinstance(parts, Sequence) else type(parts).__name__
        raise LayoutError(what, found, "a list of at least one QTensor is needed")
    for part in parts:
        require_qtensor(what, part)


def require_same(parts: Sequence[QTensor], what: str) -> None:
    """Raise a LayoutError unless layouts, activations and the leaves that are there are equal."""
    require_parts(parts, what)
    first = parts[0]
    for i, part in enumerate(parts[1:], 1):
        if part.layout != first.layout or part.act != first.act:
            raise LayoutError(
                what,
                f"part {i} is {part.layout}, act {part.act}",
                f"part 0 is {first.layout}, act {first.act}",
            )
        for name in ("perm", "act_scale", "act_zero", "pre_scale"):
            if (getattr(part, name) is None) != (getattr(first, name) is None):
                raise LayoutError(what, f"only some parts have {name}", "all or none")


def refine(q: QTensor, axis: str, step: int) -> QTensor:
    """Repeat scale and zero cells so that each covers ``step`` elements along ``axis``.

    Lossless: every element keeps its scale.

    Args:
        q: ``[*lead, *axes]``.
        axis: one of ``q.axes``.
        step: the new step in elements; it must divide the present ones (WHOLE is divided by any).
    Raises:
        LayoutError: a present step is not a multiple of the new one.
        ConfigError: the new step is no whole number from 1.
    """
    require_qtensor(f"refine {axis!r}", q)
    step = whole(f"refine {axis!r}", step)
    return _refine(q, axis, [step] * len(q.scales), [step] * len(q.zeros))


def _refine(
    q: QTensor, axis: str, scale_steps: Sequence[int], zero_steps: Sequence[int]
) -> QTensor:
    """:func:`refine` with a step for each scale and zero leaf."""
    i, extent, rank = q.layout.index(axis), q.extent(axis), len(q.axes)

    def finer(grid: Grid, step: int) -> Grid:
        if grid[i] != WHOLE and grid[i] % step:
            rule = "the new step divides the old one"
            raise LayoutError(f"refine {axis!r}", f"step {grid[i]} to {step}", rule)
        return (*grid[:i], step, *grid[i + 1 :])

    def repeat(leaf: Any, grid: Grid, step: int) -> Any:
        if grid[i] == step:
            return leaf
        position = leaf.ndim - rank + i
        times = cells(extent if grid[i] == WHOLE else grid[i], step)
        wide = namespace(leaf).repeat(leaf, times, axis=position)
        index: list[Any] = [slice(None)] * leaf.ndim
        index[position] = slice(0, cells(extent, step))
        return wide[tuple(index)]

    scale_grids, zero_grids = q.layout.scales, q.layout.zeros
    layout = dataclasses.replace(
        q.layout,
        scales=tuple(map(finer, scale_grids, scale_steps)),
        zeros=tuple(map(finer, zero_grids, zero_steps)),
    )
    scales = tuple(map(repeat, q.scales, scale_grids, scale_steps))
    zeros = tuple(map(repeat, q.zeros, zero_grids, zero_steps))
    return dataclasses.replace(q, scales=scales, zeros=zeros, layout=layout)


def _common_steps(parts: Sequence[QTensor], axis: str) -> list[QTensor]:
    """Refine until each scale and zero leaf has one step, never WHOLE, in all parts."""
    i = parts[0].layout.index(axis)
    extents = [part.extent(axis) for part in parts]

    def common(grids: Sequence[Grid]) -> int:
        steps = {grid[i] for grid in grids}
        if len(steps) == 1 and WHOLE not in steps:
            return steps.pop()
        return math.gcd(*(steps - {WHOLE}), *(extents if WHOLE in steps else ()))

    scale_steps = [common(grids) for grids in zip(*(p.layout.scales for p in parts), strict=True)]
    zero_steps = [common(grids) for grids in zip(*(p.layout.zeros for p in parts), strict=True)]
    return [_refine(part, axis, scale_steps, zero_steps) for part in parts]


def concat(parts: Sequence[QTensor], axis: str) -> QTensor:
    """Join weights along a named axis (fused q, k, v or gate, up), lossless.

    Scales that cover the whole axis are repeated over their own part first, never re-quantized.

    Args:
        parts: weights of one code and activation scheme.
        axis: the axis to join along.
    Raises:
        LayoutError: codes or activation schemes differ, static activation scales or act-orders
            differ, or a part ends inside a scale block.
    """
    what = f"concat {axis!r}"
    require_parts(parts, what)
    if len({(p.layout.code, len(p.scales), len(p.zeros), p.axes) for p in parts}) != 1:
        raise LayoutError(what, " and ".join(str(p.layout) for p in parts), "one code and formula")
    others = {(p.lead, *(p.extent(a) for a in p.axes if a != axis)) for p in parts}
    if len(others) != 1:
        shapes = " and ".join(map(str, dict.fromkeys(p.shape for p in parts)))
        raise LayoutError(what, f"shapes {shapes}", f"they are equal but for {axis!r}")
    parts = _common_steps(parts, axis)
    require_same(parts, what)
    span = parts[0].layout.span(axis)
    for k, part in enumerate(parts[:-1]):
        if part.extent(axis) % span:
            raise LayoutError(
                what,
                f"part {k} ends at {part.extent(axis)}, inside a block of {span}",
                "every part but the last is a multiple of the block",
                "keep the parts separate",
            )
    i, rank = parts[0].layout.index(axis), len(parts[0].axes)
    first = parts[0]
    for name in ("act_scale", "act_zero") + (("pre_scale", "perm") if axis != "in" else ()):
        shared = getattr(first, name)
        if shared is not None and not all(
            np.array_equal(shared, getattr(p, name)) for p in parts[1:]
        ):
            raise LayoutError(
                f"concat {axis!r}",
                f"the parts' {name} differ",
                "joined parts see one activation",
                "keep them separate",
            )

    def join(leaves: Sequence[Any], grid: Grid) -> Any:
        if grid[i] == WHOLE:
            return leaves[0]
        return namespace(leaves[0]).concatenate(leaves, axis=leaves[0].ndim - rank + i)

    fields: dict[str, Any] = {}
    for name in ("data", "scales", "zeros"):
        columns = zip(*(getattr(part, name) for part in parts), strict=True)
        grids = getattr(first.layout, name)
        fields[name] = tuple(join(c, g) for c, g in zip(columns, grids, strict=True))
    if axis == "in":
        if first.pre_scale is not None:
            fields["pre_scale"] = join([p.pre_scale for p in parts], (1,) * rank)
        if first.perm is not None:
            offsets = np.cumsum([0, *(p.extent("in") for p in parts[:-1])]).tolist()
            shifted = [p.perm + np.int32(o) for p, o in zip(parts, offsets, strict=True)]
            fields["perm"] = namespace(shifted[0]).concatenate(shifted, axis=-1)
    return dataclasses.replace(first, **fields)


def pad_axis(q: QTensor, axis: str, extent: int) -> QTensor:
    """Grow a named axis to ``extent`` with elements whose value is zero.

    New codes have the pattern of value zero where the code has one and every new scale cell is
    one; a zero point's new cells equal the pattern of the new codes.

    Raises:
        LayoutError: the extent shrinks, falls inside a packed byte, or the weight is act-order
            along ``in`` or has offsets.
        ConfigError: the extent is no whole number from 1.
    """
    old = require_qtensor(f"pad {axis!r}", q).extent(axis)
    i, rank, extent = q.layout.index(axis), len(q.axes), whole(f"pad {axis!r}", extent)
    step = math.lcm(*(grid[i] for grid in q.layout.data))
    if extent < old or extent % step:
        raise LayoutError(f"pad {axis!r}", f"{old} to {extent}", f"grow to a multiple of {step}")
    if q.layout.affine == "offset" and extent != old:
        raise LayoutError(
            f"pad {axis!r}", "a layout with offsets", "its ragged cells carry non-zero offsets"
        )
    if extent == old:
        return q
    if axis == "in":
        _require_unpermuted(q, f"pad {axis!r}")
    if any(grid[i] not in (WHOLE, 1) and old % grid[i] for grid in q.layout.zeros):
        raise LayoutError(
            f"pad {axis!r}", f"{old} ends inside a group with a zero point", "pad whole groups"
        )
    if any(grid[i] == WHOLE for grid in q.layout.zeros):
        raise LayoutError(f"pad {axis!r}", "a zero point that covers the axis", "refine it first")

    def fill(leaf: Any, grid: Grid, value: Any) -> Any:
        if grid[i] == WHOLE:
            return leaf
        xp, position = namespace(leaf), leaf.ndim - rank + i
        shape = list(leaf.shape)
        shape[position] = cells(extent, grid[i]) - shape[position]
        if shape[position] == 0:
            return leaf
        return xp.concatenate([leaf, xp.full(tuple(shape), value, leaf.dtype)], axis=position)

    pattern, code, grids = q.layout.code.zero_pattern, q.layout.code, q.layout.data
    if all(step == 1 for grid in grids for step in grid):
        data = [fill(q.data[0], grids[0], pattern)]
    else:
        data, low = [], 0
        for width, grid, leaf in zip(code.planes, grids, q.data, strict=True):
            bits = pattern >> low & ((1 << width) - 1)
            data.append(fill(leaf, grid, sum(bits << width * k for k in range(math.prod(grid)))))
            low += width
    scales = tuple(fill(leaf, g, 1) for leaf, g in zip(q.scales, q.layout.scales, strict=True))
    zeros = tuple(fill(leaf, g, 0) for leaf, g in zip(q.zeros, q.layout.zeros, strict=True))
    padded = dataclasses.replace(q, data=tuple(data), scales=scales, zeros=zeros)
    if axis == "in" and q.pre_scale is not None:
        along_in = tuple(1 if name == "in" else WHOLE for name in q.axes)
        padded = dataclasses.replace(padded, pre_scale=fill(q.pre_scale, along_in, 1))
    return padded
