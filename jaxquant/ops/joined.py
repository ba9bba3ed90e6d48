"""Weights that read one input as one weight, for one launch instead of several, and back.

Made before kernel order, by :func:`jaxquant.prepare_model`, where a kernel takes the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.arrays.layout import WHOLE, Layout
from jaxquant.arrays.qtensor import QTensor
from jaxquant.ops.kernels import candidates
from jaxquant.ops.prepared import refusal
from jaxquant.ops.sharded import on_several_devices
from jaxquant.transforms.structure import concat, refine, split

# Leaves that concern the input, so that joined weights have them in common.
_SHARED = ("perm", "act_scale", "act_zero", "pre_scale")


class Part(NamedTuple):
    """What a weight was before it was joined: its outputs and its layout."""

    out: int
    layout: Layout


def _equal(a: Any, b: Any) -> bool:
    return (a is None) == (b is None) and (a is None or np.array_equal(a, b))


def _joinable(weights: Sequence[QTensor]) -> bool:
    """Whether the weights read one quantized input, and a cut gives them back as they were."""
    first, *others = weights
    layout = first.layout
    if layout.axes != ("out", "in") or layout.dense or first.lead:
        return False
    if any(q.layout != layout or q.act != first.act or q.lead for q in others):
        return False
    if any(q.extent("in") != first.extent("in") for q in others):
        return False
    if any(q.extent("out") % layout.span("out") for q in weights[:-1]):
        return False
    steps = {grid[0] for grid in (*layout.scales, *layout.zeros)}
    if WHOLE in steps and steps - {WHOLE, 1}:
        return False
    if on_several_devices(weights):
        return False
    return all(_equal(getattr(q, n), getattr(first, n)) for q in others for n in _SHARED)


def _refined(q: QTensor) -> QTensor:
    """Scales that cover the weight become one per output: joined, they differ along it."""
    whole = any(grid[0] == WHOLE for grid in (*q.layout.scales, *q.layout.zeros))
    return refine(q, "out", 1) if whole else q


@jax.jit
def _concat(weights: Sequence[QTensor]) -> QTensor:
    return concat([_refined(q) for q in weights], "out")


def join(weights: Sequence[QTensor]) -> QTensor | None:
    """One weight with the outputs of all, in order; None where they differ or no kernel gains.

    Args:
        weights: ``[out, in]`` each, on one device.  Layout and activation scheme have to be equal,
            and so have the values of act-orders, pre-scales and static activation scales.
    """
    if not _joinable(weights):
        return None
    shared = {name: None for name in _SHARED}
    joined = _concat([dataclasses.replace(q, **shared) for q in weights])
    joined = dataclasses.replace(joined, **{n: getattr(weights[0], n) for n in _SHARED})
    row = jax.ShapeDtypeStruct((1, joined.extent("in")), jnp.bfloat16)
    takes = refusal(joined) is None or any(c.reason is None for c in candidates(row, joined))
    return joined if takes else None


def _restored(q: QTensor, layout: Layout) -> QTensor:
    """Undo :func:`_refined` of a weight that had ``layout``: every output has the same scale."""

    def first(leaf: Any, now: int, before: int) -> Any:
        return leaf[..., :1, :] if before == WHOLE and now != WHOLE else leaf

    fields = {
        name: tuple(
            first(leaf, now[0], before[0])
            for leaf, now, before in zip(
                getattr(q, name), getattr(q.layout, name), getattr(layout, name), strict=True
            )
        )
        for name in ("scales", "zeros")
    }
    return dataclasses.replace(q, layout=layout, **fields)


def cut(joined: QTensor, parts: Sequence[Part]) -> list[QTensor]:
    """Exact inverse of :func:`join`, also for a stack of joined weights."""
    pieces = split(joined, "out", [part.out for part in parts])
    return [_restored(q, part.layout) for q, part in zip(pieces, parts, strict=True)]
