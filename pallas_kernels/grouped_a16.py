"""Matmul of groups of 16-bit rows by a stack of weights decoded in registers: experts of a MoE."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.a16_configs import ExactConfig, RoundedConfig, first_fitting, fitting
from pallas_kernels.group_problem import rows_of_experts
from pallas_kernels.group_tiles import Groups, sizes_of_layer
from pallas_kernels.grouped_configs import (
    decode_shapes,
    decode_trials,
    prefill_shapes,
    prefill_trials,
)
from pallas_kernels.prepack import Prepacked
from pallas_kernels.problem import (
    Config,
    Kernel,
    KernelError,
    Problem,
    Shaped,
    require_tiles,
    select,
)
from pallas_kernels.stream_problem import HALF_TYPES, check_types, problem_of, run

OP = "grouped_matmul_a16"


def _accepts_few(problem: Problem) -> str | None:
    few = problem.m <= 16 * problem.experts
    return require_tiles(problem) or (None if few else "takes at most 16 rows an expert")


def _accepts_many(problem: Problem) -> str | None:
    many = problem.m > 2 * problem.experts
    return require_tiles(problem) or (None if many else "takes more than 2 rows an expert")


GROUPED_A16_KERNELS = (
    Kernel(
        name="grouped_a16_decode",
        op=OP,
        config_type=ExactConfig,
        fn=functools.partial(run, "grouped_a16_decode", False),
        accepts=_accepts_few,
        default_config=functools.partial(first_fitting, ExactConfig, decode_shapes),
        candidates=functools.partial(fitting, ExactConfig, decode_trials),
    ),
    Kernel(
        name="grouped_a16_prefill",
        op=OP,
        config_type=RoundedConfig,
        fn=functools.partial(run, "grouped_a16_prefill", True),
        accepts=_accepts_many,
        default_config=functools.partial(first_fitting, RoundedConfig, prefill_shapes),
        candidates=functools.partial(fitting, RoundedConfig, prefill_trials),
    ),
)


def grouped_a16_problem(
    x: Shaped,
    weight: Prepacked,
    group_sizes: Shaped,
    *,
    first: int = 0,
    into: Shaped | None = None,
    layer: Shaped | None = None,
    out_dtype: jax.typing.DTypeLike | None = None,
) -> Problem:
    """Return the problem of the operands of `grouped_matmul_a16`; only types are read.

    Its m is what the weight's experts have of the rows if all experts are alike: tiles suit that.

    Raises:
        KernelError: an operand has a shape or dtype that the contract excludes.
    """
    out = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    lead = weight.records.shape[:-3]
    if len(lead) != 1 + (layer is not None):
        axes = "an axis of experts" if layer is None else "axes of layers and experts"
        raise KernelError(f"{OP}: the weight is stacked {lead}; {axes} is needed")
    check_types(OP, x, weight, 16, HALF_TYPES, out)
    shape = (x.shape[0], weight.n)
    m = rows_of_experts(OP, shape, out, lead[-1], group_sizes, first, into)
    return dataclasses.replace(problem_of(OP, x, weight, out), m=m, experts=lead[-1])


@functools.partial(jax.jit, static_argnames=("first", "out_dtype", "config", "interpret"))
def grouped_matmul_a16(
    x: jax.Array,
    weight: Prepacked,
    group_sizes: jax.Array,
    *,
    first: int = 0,
    into: jax.Array | None = None,
    layer: jax.Array | None = None,
    out_dtype: jax.typing.DTypeLike | None = None,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Multiply groups of rows, each by its own expert: y[i] = x[i] @ w[expert of i].T.

    Group sizes stay on the device, rows need no padding, and experts without rows cost nothing.

    Args:
        x: [rows, K] bfloat16 or float16, sorted by expert.
        weight: [experts, N, K] from `prepack(..., operand=16)`: 4-bit, int8 or e4m3 codes.
        group_sizes: [total] int32, rows of each expert; they add up to at most `rows`.
        first: position of the weight's first expert among the group sizes.
        into: [rows, N] to write to; it is given up, and rows of no expert here keep their values.
        layer: int32 scalar; with it the weight has an axis of layers before its experts, and this
            layer is used where it lies, without a copy.
        out_dtype: bfloat16 or float16; None for the type of x.
        config: tile sizes, to override the chosen ones.
        interpret: run under the GPU interpreter on the host (jax 0.11 and later).

    Returns:
        [rows, N] in `out_dtype`; sums are made in float32.  Without `into`, rows of no expert here
        are not defined.

    Raises:
        KernelError: an operand breaks the contract, or no kernel takes the problem; the message
            lists every kernel's reason.
    """
    problem = grouped_a16_problem(
        x,
        weight,
        group_sizes,
        first=first,
        into=into,
        layer=layer,
        out_dtype=out_dtype,
    )
    kernel, chosen = select(GROUPED_A16_KERNELS, problem, config)
    total, stacked = group_sizes.shape[0], layer is not None
    groups = Groups(x.shape[0], total, first, problem.experts, stacked=stacked)
    records = weight.records.reshape(-1, *weight.records.shape[-2:])
    out = kernel.fn(
        problem,
        chosen,
        interpret,
        weight.record,
        x,
        records,
        sizes_of_layer(group_sizes, layer),
        *(() if weight.factor is None else (weight.factor.reshape(-1),)),
        groups=groups,
        into=into,
    )
    assert isinstance(out, jax.Array)
    return out
