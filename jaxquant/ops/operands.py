"""Operands of the ops, checked: shapes, dtypes, and values where they are known.

Under jit values are not known, and wrong ones give wrong results; types and shapes always are.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.arguments import known_values
from jaxquant.arrays.bank import ExpertBank, StackedBank
from jaxquant.arrays.qtensor import QTensor, require_qtensor
from jaxquant.errors import LayoutError
from jaxquant.ops.prepared import Prepared
from jaxquant.ops.sharded import Sharded

Weight = QTensor | Prepared | Sharded
FLOATS = ("float32", "bfloat16", "float16")


def activation(where: str, x: Any) -> jax.Array:
    """Return activations ``[..., in]`` as an array of floats.

    Raises:
        LayoutError: they are something else.
    """
    if isinstance(x, np.ndarray):
        x = jnp.asarray(x)
    if not isinstance(x, jax.Array):
        raise LayoutError(where, f"activations of type {type(x).__name__}", "an array is needed")
    if str(x.dtype) not in FLOATS or not x.ndim:
        found = f"activations {x.dtype} of shape {x.shape}"
        raise LayoutError(where, found, f"[..., in] of {', '.join(FLOATS)} is needed", "cast them")
    return x


def weight(where: str, q: Any) -> Weight:
    """Return a weight after checking its leaves against its layout.

    Raises:
        LayoutError: it is no weight, or a leaf breaks the layout.
    """
    return q if isinstance(q, Prepared | Sharded) else require_qtensor(where, q).check(where)


def bank(where: str, value: Any) -> ExpertBank | StackedBank:
    """Return a bank after checking that its parts stand one after the other and go together.

    Raises:
        LayoutError: it is no bank, parts do not fit their runs, or differ in shape.
    """
    stacked = isinstance(value, StackedBank)
    one = value.stack if stacked else value
    if not isinstance(one, ExpertBank) or not one.parts or len(one.parts) != len(one.runs):
        rule, action = "an ExpertBank with a part for each run is needed", "see bank_experts"
        raise LayoutError(where, f"a bank of type {type(one).__name__}", rule, action)
    shapes, start = set(), 0
    for part, run in zip(one.parts, one.runs, strict=True):
        lead, count = weight(where, part).lead, run.stop - run.start
        if run.start != start or len(lead) != 1 + stacked or lead[-1] != count:
            axes = "layers and experts" if stacked else "experts"
            found = f"a part with leading axes {lead} for experts {run.start} to {run.stop}"
            raise LayoutError(where, found, f"{axes}, run after run from 0")
        shapes.add((lead[:-1], part.extent("out"), part.extent("in")))
        start = run.stop
    if len(shapes) != 1:
        raise LayoutError(where, f"experts of {sorted(shapes)}", "all have one shape")
    if stacked:
        _whole_numbers(where, "layer", value.layer, (), shapes.pop()[0][0])
    # Loops index experts by traced numbers, which arrays of NumPy do not take.
    return jax.tree.map(jnp.asarray, value)


def group_sizes(where: str, sizes: Any, experts: int, rows: int) -> jax.Array:
    """Return the rows of each expert, int32 ``[experts]``.

    Raises:
        LayoutError: another shape or type; where values are known, negative ones, or another sum.
    """
    sizes = _whole_numbers(where, "group_sizes", sizes, (experts,), rows + 1)
    known = known_values(sizes)
    if known is not None and int(known.sum()) != rows:
        raise LayoutError(where, f"group_sizes that add up to {known.sum()}", f"x has {rows} rows")
    return sizes


def row_numbers(where: str, source: Any, rows: int) -> jax.Array:
    """Return which of ``rows`` rows to take, int32 ``[n]``.

    Raises:
        LayoutError: another shape or type; where values are known, rows that are not there.
    """
    return _whole_numbers(where, "source", source, (-1,), rows)


def _whole_numbers(
    where: str, name: str, value: Any, shape: tuple[int, ...], limit: int
) -> jax.Array:
    """``value`` as int32 of a shape, -1 for any extent, each from 0 to below ``limit``."""
    if isinstance(value, np.ndarray | np.integer | int) and not isinstance(value, bool):
        values = np.asarray(value)
        value = jnp.asarray(values, jnp.int32 if values.dtype.kind in "iu" else None)
    extents = ", ".join("n" if extent == -1 else str(extent) for extent in shape)
    rule = f"int32 [{extents}] is needed, each at least 0 and below {limit}"
    if not isinstance(value, jax.Array):
        raise LayoutError(where, f"{name} of type {type(value).__name__}", rule)
    fits = len(value.shape) == len(shape) and all(
        want in (-1, have) for want, have in zip(shape, value.shape, strict=True)
    )
    if not fits or value.dtype != jnp.int32:
        raise LayoutError(where, f"{name} {value.dtype} of shape {value.shape}", rule)
    known = known_values(value)
    if value.size and limit < 1:
        raise LayoutError(where, f"{value.size} numbers as {name}", rule)
    if known is not None and known.size and (known.min() < 0 or known.max() >= limit):
        raise LayoutError(where, f"{name} from {known.min()} to {known.max()}", rule)
    return value
