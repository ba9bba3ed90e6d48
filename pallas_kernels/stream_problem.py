"""What the ops on prepacked weights share: checks, the problem, the epilogue, the call."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.epilogue import Epilogue, Term
from pallas_kernels.group_tiles import Groups
from pallas_kernels.prepack import Prepacked, factor_name
from pallas_kernels.problem import (
    Config,
    Kernel,
    KernelError,
    Problem,
    Shaped,
    current_device,
    select,
)
from pallas_kernels.record import E8M0, Record
from pallas_kernels.stream import stream_matmul
from pallas_kernels.stream_config import StreamConfig, factor_of, scale_name, zero_name
from pallas_kernels.tiles import pad_tokens

HALF_TYPES = ("bfloat16", "float16")


def epilogue_of(problem: Problem) -> Epilogue:
    """Return the epilogue: factors of the weights, scales and sums of tokens, the bias."""
    terms = []
    factor = factor_of(problem)
    if factor:
        one = "expert" if problem.experts else "one"
        terms.append(Term("w_scale", "n" if factor == "n" else one, jnp.float32))
    if problem.x_scale == "token":
        along = "m" if problem.m > 1 else "one"  # a vector of one would have to be padded first
        terms.append(Term("x_scale", along, jnp.float32))
        if problem.zero == "offset":
            terms += [Term("x_sum", along, jnp.float32), Term("w_offset", "n", jnp.float32)]
    if problem.bias:
        terms.append(Term("bias", "n", jnp.dtype(problem.bias)))
    return Epilogue(tuple(terms), True, jnp.dtype(problem.out_dtype))


def run(
    name: str,
    rounded: bool,
    problem: Problem,
    config: StreamConfig,
    interpret: bool,
    record: Record,
    *operands: jax.Array,
    groups: Groups | None = None,
    into: jax.Array | None = None,
) -> jax.Array:
    """Run the stream kernel; `operands`, `groups` and `into` are those of `stream_matmul`.

    Args:
        name: the kernel's name.
        rounded: whether scales are applied to the operand even where the record leaves the choice.
        problem: what to compute.
        config: tiles.
        interpret: run under the interpreter.
        record: format of the weight's records.
        *operands: activations, records, group sizes if there are groups, vectors of the epilogue.
        groups: the groups of rows of a grouped problem.
        into: array whose buffer the result takes over.
    """
    return stream_matmul(
        problem,
        config,
        interpret,
        record,
        epilogue_of(problem),
        *operands,
        rounded=rounded or record.rounded,
        name=name,
        groups=groups,
        into=into,
    )


def check_operands(
    op: str,
    x: Shaped,
    weight: Prepacked,
    operand: int,
    x_dtypes: tuple[str, ...],
    bias: Shaped | None,
    out: jnp.dtype,
) -> None:
    """Refuse operands that no kernel of `op` could take.

    Raises:
        KernelError: says what was found and what is needed.
    """
    if weight.records.ndim != 3:
        lead = weight.records.shape[:-3]
        raise KernelError(f"{op}: the weight is stacked {lead}; map or scan over it")
    check_types(op, x, weight, operand, x_dtypes, out)
    bias_types = (jnp.float32, jnp.bfloat16, jnp.float16)
    if bias is not None and (bias.shape != (weight.n,) or bias.dtype not in bias_types):
        raise KernelError(
            f"{op}: bias is {bias.shape} {bias.dtype}; it must be ({weight.n},) float32, "
            "bfloat16 or float16"
        )


def check_types(
    op: str,
    x: Shaped,
    weight: Prepacked,
    operand: int,
    x_dtypes: tuple[str, ...],
    out: jnp.dtype,
) -> None:
    """Refuse activations, a weight and a result that do not go together, stacked or not.

    Raises:
        KernelError: says what was found and what is needed.
    """
    record = weight.record
    if record.operand != operand:
        raise KernelError(
            f"{op}: the weight is packed for {record.operand}-bit operands; "
            f"pack it with operand={operand}"
        )
    if len(x.shape) != 2 or x.shape[1] != weight.k or not x.shape[0]:
        raise KernelError(f"{op}: x is {x.shape}; it must be [M, {weight.k}] with M at least 1")
    if x.dtype.name not in x_dtypes:
        raise KernelError(f"{op}: x is {x.dtype}; it must be {' or '.join(x_dtypes)}")
    if record.scale_dtype == E8M0 and record.operand == 16 and x.dtype != jnp.bfloat16:
        raise KernelError(f"{op}: x is {x.dtype}; e8m0 scales need the range of bfloat16")
    if out.name not in HALF_TYPES:
        raise KernelError(f"{op}: out_dtype is {out}; it must be {' or '.join(HALF_TYPES)}")


def problem_of(
    op: str,
    x: Shaped,
    weight: Prepacked,
    out: jnp.dtype,
    bias: Shaped | None = None,
    x_scale: str = "none",
) -> Problem:
    """Return the problem of checked operands."""
    return Problem(
        op=op,
        m=x.shape[0],
        n=weight.n,
        k=weight.k,
        x_dtype=x.dtype.name,
        w_dtype=weight.record.code,
        out_dtype=out.name,
        x_scale=x_scale,
        w_scale=scale_name(weight.record, factor_name(weight)),
        zero=zero_name(weight.record),
        bias="" if bias is None else bias.dtype.name,
        device=current_device(),
    )


def run_padded(
    kernels: tuple[Kernel, ...],
    problem: Problem,
    config: Config | None,
    interpret: bool,
    weight: Prepacked,
    x: jax.Array,
    vectors: tuple[jax.Array, ...],
) -> jax.Array:
    """Select a kernel and run it on a row count that TMA takes: up to 8, or a multiple of 8."""
    m, x = problem.m, pad_tokens(x)
    problem = dataclasses.replace(problem, m=x.shape[0])
    kernel, chosen = select(kernels, problem, config)
    if interpret and config is None:
        # The interpreter runs warpgroups on as many threads as the host has cores, and hangs when
        # those all wait for a warpgroup that has none.
        chosen = dataclasses.replace(chosen, nw=1, kw=1)
    vectors = vectors if weight.factor is None else (weight.factor, *vectors)
    out = kernel.fn(problem, chosen, interpret, weight.record, x, weight.records, *vectors)
    assert isinstance(out, jax.Array)
    return out[:m] if m < x.shape[0] else out
