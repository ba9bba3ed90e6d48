"""``grouped_matmul``: rows sorted by expert times a bank of experts."""

from __future__ import annotations

import jax

from jaxquant.arrays.bank import ExpertBank, StackedBank
from jaxquant.errors import LayoutError
from jaxquant.ops import operands
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
        LayoutError: shapes or types do not fit, or, where values are known (not under jit), sizes
            do not add up or rows or a layer are not there.
        KernelError: "pallas" or "interpret" was asked for and no kernel takes the problem.
    """
    where = "grouped_matmul"
    bank, x = operands.bank(where, bank), operands.activation(where, x)
    parts = bank.stack.parts if isinstance(bank, StackedBank) else bank.parts
    width = parts[0].extent("in") * (2 if gated else 1)
    if x.ndim != 2 or x.shape[-1] != width:
        raise LayoutError(where, f"x of shape {x.shape}", f"[rows, {width}] is needed")
    source = None if source is None else operands.row_numbers(where, source, x.shape[0])
    rows = x.shape[0] if source is None else source.shape[0]
    group_sizes = operands.group_sizes(where, group_sizes, bank.experts, rows)
    return run_grouped_matmul(x, bank, group_sizes, resolve(backend), source, gated)
