"""Transforms along leading axes: weights of one layout stacked, and taken out of a stack again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from jaxquant.arrays.qtensor import QTensor, require_qtensor
from jaxquant.errors import LayoutError
from jaxquant.transforms.structure import namespace, require_same


def stack(parts: Sequence[QTensor]) -> QTensor:
    """Stack weights of equal layout and shape along a new leading axis; the layout stays the same.

    Raises:
        LayoutError: layouts, activation schemes or shapes differ.
    """
    require_same(parts, "stack")
    shapes = {part.shape for part in parts}
    if len(shapes) != 1:
        raise LayoutError("stack", f"shapes {sorted(shapes)}", "all are equal")

    def join(*leaves: Any) -> Any:
        return namespace(leaves[0]).stack(leaves)

    return _zip_map(parts, join)


def unstack(q: QTensor) -> list[QTensor]:
    """Inverse of :func:`stack`."""
    if not require_qtensor("unstack", q).lead:
        raise LayoutError("unstack", "a weight without leading axes", "stack adds one")
    return [index_lead(q, i) for i in range(q.lead[0])]


def take_lead(leaf: Any, index: Any) -> Any:
    """``leaf[index]`` of leading axes, cheap also where a loop does it over and over.

    The CPU compiler widens the floats that it cannot slice, bfloat16 and those of 8 bits, and moves
    that out of the loop: it then converts the whole array for the one entry that is read.  There
    the same bits are sliced as integers.
    """
    narrow = isinstance(leaf, Tracer) and str(leaf.dtype).startswith(("bfloat16", "float8"))
    if not narrow:
        return leaf[index]
    bits = jnp.uint8 if leaf.dtype.itemsize == 1 else jnp.uint16

    def as_bits(leaf: jax.Array, index: Any) -> jax.Array:
        # Tied to the index, the view as integers stays in the loop, where it is no copy.
        leaf, index = lax.optimization_barrier((leaf, index))
        return lax.bitcast_convert_type(lax.bitcast_convert_type(leaf, bits)[index], leaf.dtype)

    return lax.platform_dependent(leaf, index, cpu=as_bits, default=lambda x, i: x[i])


def index_lead(q: QTensor, index: Any) -> QTensor:
    """Index leading axes of every leaf: by an integer, a slice, an index array or a tuple.

    Raises:
        LayoutError: there are not as many leading axes, or an integer is out of range.
    """
    entries = index if isinstance(index, tuple) else (index,)
    lead = require_qtensor("index_lead", q).lead
    past = any(
        isinstance(i, int | np.integer) and not -n <= i < n
        for i, n in zip(entries, lead, strict=False)
    )
    if len(entries) > len(lead) or past:
        raise LayoutError("index_lead", f"index {index!r}", f"the leading axes are {lead}")
    picked = q.map(lambda leaf, _: take_lead(leaf, index))
    return picked if q.perm is None else dataclasses.replace(picked, perm=q.perm[index])


def _zip_map(parts: Sequence[QTensor], join: Any, **replace: Any) -> QTensor:
    fields: dict[str, Any] = {}
    for name in ("data", "scales", "zeros"):
        columns = zip(*(getattr(part, name) for part in parts), strict=True)
        fields[name] = tuple(join(*column) for column in columns)
    for name in ("act_scale", "act_zero", "pre_scale", "perm"):
        leaves = [getattr(part, name) for part in parts]
        fields[name] = None if leaves[0] is None else join(*leaves)
    return dataclasses.replace(parts[0], **(fields | replace))
