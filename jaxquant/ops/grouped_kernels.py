"""The Pallas kernels of ``grouped_matmul``: which one takes a run of a bank, with which operands.

As in :mod:`jaxquant.ops.kernels`, static facts alone decide.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import pallas_kernels as pk
from jaxquant.arrays.qtensor import QTensor
from jaxquant.ops.activations import quantize_activation
from jaxquant.ops.kernels import (
    a8_activation,
    a8_refusal,
    kernel_reason,
    quantize,
    scale_layout,
    w_block,
)
from jaxquant.ops.prepared import Prepared, refusal

Run = Callable[[jax.Array, Any, jax.Array, int, jax.Array | None, bool], jax.Array]


class GroupedCandidate(NamedTuple):
    """A kernel for one run of a bank.

    Attributes:
        name: the op in ``pallas_kernels``.
        reason: why it does not take the problem, None when it does.
        run: ``run(x, part, group_sizes, first, into, interpret)``: ``x`` ``[rows, in]``, sizes of
            the whole bank, the run's first position in it, and the array that takes the run's rows
            and keeps the others (None for any values there).
    """

    name: str
    reason: str | None
    run: Run


def grouped_candidates(
    x: jax.ShapeDtypeStruct, part: QTensor | Prepared, experts: int, first: int = 0
) -> list[GroupedCandidate]:
    """Every kernel with its reason for one run.

    Args:
        x: ``[rows, in]``.
        part: the run's stacked weight.
        experts: positions of the whole bank.
        first: the run's first one.
    """
    sizes = jax.ShapeDtypeStruct((experts,), jnp.int32)
    if isinstance(part, Prepared):
        reason = kernel_reason(
            lambda: pk.grouped_a16_problem(x, part.packed, sizes, first=first),
            pk.GROUPED_A16_KERNELS,
        )
        return [GroupedCandidate("grouped_matmul_a16", reason, _run_a16)]
    if part.act is not None:
        return [GroupedCandidate("grouped_matmul_a8", _refused_a8(x, part, sizes, first), _run_a8)]
    why_not = refusal(part) or "it is not in kernel order: jaxquant.prepare_model does that"
    return [GroupedCandidate("grouped_matmul_a16", why_not, _run_a16)]


def _expert_of_row(sizes: jax.Array, first: int, experts: int, rows: int) -> jax.Array:
    """Which of a run's experts each row belongs to; any of them for rows of other runs."""
    passed = jnp.cumsum(sizes)[None] <= jnp.arange(rows)[:, None]
    return jnp.clip(jnp.sum(passed, 1, dtype=jnp.int32) - first, 0, experts - 1)


def _run_a16(
    x: jax.Array,
    part: Prepared,
    sizes: jax.Array,
    first: int,
    into: jax.Array | None,
    interpret: bool,
) -> jax.Array:
    if part.pre_scale is not None or part.perm is not None:
        expert = _expert_of_row(sizes, first, part.lead[0], x.shape[0])
        if part.pre_scale is not None:
            x = x * part.pre_scale.reshape(part.lead[0], -1)[expert].astype(x.dtype)
        if part.perm is not None:
            x = jnp.take_along_axis(x, part.perm[expert], axis=1)
    return pk.grouped_matmul_a16(x, part.packed, sizes, first=first, into=into, interpret=interpret)


def _refused_a8(
    x: jax.ShapeDtypeStruct, part: QTensor, sizes: jax.ShapeDtypeStruct, first: int
) -> str | None:
    if reason := a8_refusal(part):
        return reason
    assert part.act is not None
    if not part.act.symmetric:
        return "activations with zero points have no grouped kernel"
    codes, x_scale = a8_activation(x, part, _row_layout(part))
    w, w_scale = (
        jax.ShapeDtypeStruct(part.data[0].shape, part.data[0].dtype),
        jax.ShapeDtypeStruct(part.scales[0].shape, jnp.float32),
    )
    return kernel_reason(
        lambda: pk.grouped_a8_problem(
            codes,
            x_scale,
            w,
            w_scale,
            sizes,
            first=first,
            w_block=w_block(part),
            out_dtype=x.dtype,
        ),
        pk.GROUPED_A8_KERNELS,
    )


def _row_layout(part: QTensor) -> str:
    """Layout of the activations' scales: static ones are of an expert, so of each of its rows."""
    layout = scale_layout(part)
    return "1x128" if layout == "1x128" else "token"


def _quantize_rows(
    x: jax.Array, part: QTensor, sizes: jax.Array, first: int, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """Codes and scales of all rows, those of other runs too, whose codes nobody reads."""
    assert part.act is not None
    if scale_layout(part) != "tensor":
        quantized = quantize(x, part, interpret)
        return quantized.codes, quantized.scale
    expert = _expert_of_row(sizes, first, part.lead[0], x.shape[0])
    bare = dataclasses.replace(part, data=(), scales=(), zeros=())

    def one(row: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
        made = quantize_activation(row, dataclasses.replace(bare, act_scale=scale))
        return made.codes, made.scale

    codes, scale = jax.vmap(one)(x, part.act_scale.reshape(-1)[expert])
    return codes.astype(part.act.code.storage), scale


def _run_a8(
    x: jax.Array,
    part: QTensor,
    sizes: jax.Array,
    first: int,
    into: jax.Array | None,
    interpret: bool,
) -> jax.Array:
    codes, x_scale = _quantize_rows(x, part, sizes, first, interpret)
    return pk.grouped_matmul_a8(
        codes,
        x_scale,
        part.data[0],
        part.scales[0].astype(jnp.float32),
        sizes,
        first=first,
        into=into,
        w_block=w_block(part),
        out_dtype=x.dtype,
        interpret=interpret,
    )
