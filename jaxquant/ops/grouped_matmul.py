"""``grouped_matmul``: rows sorted by expert times a bank of experts."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxquant.arrays.bank import ExpertBank, StackedBank
from jaxquant.errors import LayoutError
from jaxquant.ops.backend import Backend, resolve
from jaxquant.ops.select import run_grouped_matmul


def grouped_matmul(
    x: jax.Array,
    bank: ExpertBank | StackedBank,
    group_sizes: jax.Array,
    *,
    source: jax.Array | None = None,
    gated: bool = False,
    backend: Backend | None = None,
) -> jax.Array:
    """Multiply each group of rows with its own expert.

    Args:
        x: ``[rows, in]``, sorted by bank position; ``[rows, 2 in]`` when ``gated``.
        bank: experts in bank order, each in its own layout; inside a loop over layers, the stack
            of all layers' banks and the layer.
        group_sizes: ``[experts]`` int32 rows per bank position; they add up to ``rows``.
        source: int32 ``[rows]``, where ``x`` is not sorted: the row of ``x`` that each row is.  It
            may occur several times; activations are quantized on the way, not before.
        gated: multiply ``silu(gate) * up``, the first and second halves of each row of ``x``.
        backend: as for :func:`jaxquant.matmul`.
    Returns:
        ``[rows, out]`` in ``x.dtype``.
    Raises:
        LayoutError: shapes do not fit, or ``source`` is no int32 vector.
        KernelError: "pallas" or "interpret" was asked for and no kernel takes the problem.
    """
    parts = bank.stack.parts if isinstance(bank, StackedBank) else bank.parts
    inn = parts[0].extent("in")
    width = inn * (2 if gated else 1)
    if x.ndim != 2 or x.shape[-1] != width:
        raise LayoutError("grouped_matmul", f"x of shape {x.shape}", f"[rows, {width}] is needed")
    if group_sizes.shape != (bank.experts,):
        raise LayoutError(
            "grouped_matmul",
            f"group_sizes of shape {group_sizes.shape}",
            f"one size for each of {bank.experts} experts",
        )
    if source is not None and (source.ndim != 1 or source.dtype != jnp.int32):
        raise LayoutError(
            "grouped_matmul",
            f"source {source.dtype} of shape {source.shape}",
            "an int32 [rows] of row numbers of x is needed",
        )
    return run_grouped_matmul(x, bank, group_sizes, resolve(backend), source, gated)
