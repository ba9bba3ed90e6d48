"""Matmul of groups of 16-bit rows by a stack of weights decoded in registers: experts of a MoE."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.a16_configs import (
    A16DecodeConfig,
    A16PrefillConfig,
    accepts_hopper,
    fitting,
)
from pallas_kernels.epilogue import Epilogue, Term
from pallas_kernels.group_tiles import Groups, sizes_of_layer
from pallas_kernels.grouped_configs import (
    decode_candidates,
    decode_shapes,
    prefill_candidates,
    prefill_shapes,
)
from pallas_kernels.matmul_a16 import HALF_TYPES, check_types
from pallas_kernels.prepack import Prepacked, factor_name
from pallas_kernels.problem import Config, Kernel, KernelError, Problem, current_device, select
from pallas_kernels.record import Record
from pallas_kernels.stream import stream_matmul
from pallas_kernels.stream_config import StreamConfig, factor_of, scale_name, zero_name
from pallas_kernels.tiles import cdiv

Array = jax.Array | jax.ShapeDtypeStruct


def _epilogue(problem: Problem) -> Epilogue:
    """Return the epilogue: the factors of each expert's weight, if any."""
    factor = factor_of(problem)
    term = Term("w_scale", "n" if factor == "n" else "expert", jnp.float32)
    return Epilogue((term,) if factor else (), True, jnp.dtype(problem.out_dtype))


def _run(
    rounded: bool,
    problem: Problem,
    config: StreamConfig,
    interpret: bool,
    record: Record,
    groups: Groups,
    into: jax.Array | None,
    *operands: jax.Array,
) -> jax.Array:
    return stream_matmul(
        problem,
        config,
        interpret,
        record,
        _epilogue(problem),
        *operands,
        rounded=rounded or record.rounded,
        name="grouped_a16_prefill" if rounded else "grouped_a16_decode",
        groups=groups,
        into=into,
    )


def _default_decode(problem: Problem) -> StreamConfig:
    return next(fitting(A16DecodeConfig, decode_shapes(problem), problem))


def _default_prefill(problem: Problem) -> StreamConfig:
    return next(fitting(A16PrefillConfig, prefill_shapes(problem), problem))


def _accepts_few(problem: Problem) -> str | None:
    few = problem.m <= 16 * problem.experts
    return accepts_hopper(problem) or (None if few else "takes at most 16 rows an expert")


def _accepts_many(problem: Problem) -> str | None:
    many = problem.m > 2 * problem.experts
    return accepts_hopper(problem) or (None if many else "takes more than 2 rows an expert")


GROUPED_A16_KERNELS = (
    Kernel(
        name="grouped_a16_decode",
        op="grouped_matmul_a16",
        config_type=A16DecodeConfig,
        fn=functools.partial(_run, False),
        accepts=_accepts_few,
        default_config=_default_decode,
        candidates=decode_candidates,
    ),
    Kernel(
        name="grouped_a16_prefill",
        op="grouped_matmul_a16",
        config_type=A16PrefillConfig,
        fn=functools.partial(_run, True),
        accepts=_accepts_many,
        default_config=_default_prefill,
        candidates=prefill_candidates,
    ),
)


def _found(x: Array | None) -> str:
    return "None" if x is None else f"{x.shape} {x.dtype}"


def grouped_a16_problem(
    x: Array,
    weight: Prepacked,
    group_sizes: Array,
    *,
    first: int = 0,
    into: Array | None = None,
    layer: Array | None = None,
    out_dtype: jax.typing.DTypeLike | None = None,
) -> Problem:
    """Return the problem of the operands of `grouped_matmul_a16`; only types are read.

    Its m is what the weight's experts have of the rows if all experts are alike: tiles suit that.

    Raises:
        KernelError: an operand has a shape or dtype that the contract excludes.
    """
    out = jnp.dtype(x.dtype if out_dtype is None else out_dtype)

    def need(good: bool, found: str, rule: str) -> None:
        if not good:
            raise KernelError(f"grouped_matmul_a16: {found}; {rule}")

    lead = weight.records.shape[:-3]
    axes = "an axis of experts" if layer is None else "axes of layers and experts"
    need(len(lead) == 1 + (layer is not None), f"the weight is stacked {lead}", f"{axes} is needed")
    experts = lead[-1]
    check_types("grouped_matmul_a16", x, weight, 16, HALF_TYPES, out)
    sizes = group_sizes.shape
    need(
        len(sizes) == 1 and group_sizes.dtype == jnp.int32,
        f"group_sizes is {_found(group_sizes)}",
        "it must be int32, one number for each expert",
    )
    need(
        first >= 0 and first + experts <= sizes[0],
        f"experts {first} to {first + experts} of {sizes[0]} group sizes",
        "every expert of the weight needs a size",
    )
    need(
        into is None or (into.shape == (x.shape[0], weight.n) and into.dtype == out),
        f"into is {_found(into)}",
        f"it must be ({x.shape[0]}, {weight.n}) {out}",
    )
    return Problem(
        op="grouped_matmul_a16",
        m=cdiv(x.shape[0] * experts, sizes[0]),
        n=weight.n,
        k=weight.k,
        x_dtype=x.dtype.name,
        w_dtype=weight.record.code,
        out_dtype=out.name,
        w_scale=scale_name(weight.record, factor_name(weight)),
        zero=zero_name(weight.record),
        experts=experts,
        device=current_device(),
    )


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
        groups,
        into,
        x,
        records,
        sizes_of_layer(group_sizes, layer),
        *(() if weight.factor is None else (weight.factor.reshape(-1),)),
    )
    assert isinstance(out, jax.Array)
    return out
