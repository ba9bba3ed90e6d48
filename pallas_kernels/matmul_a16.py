"""Matmul of 16-bit activations by weights that are decoded in registers: W4A16, W8A16, FP8A16."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.a16_configs import (
    A16DecodeConfig,
    A16PrefillConfig,
    accepts_hopper,
    decode_candidates,
    decode_shapes,
    fitting,
    most_tokens,
    prefill_candidates,
    prefill_shapes,
)
from pallas_kernels.epilogue import Epilogue, Term
from pallas_kernels.prepack import Prepacked, factor_name
from pallas_kernels.problem import (
    Config,
    Kernel,
    KernelError,
    Problem,
    current_device,
    select,
)
from pallas_kernels.record import E8M0, Record
from pallas_kernels.stream import stream_matmul
from pallas_kernels.stream_config import (
    StreamConfig,
    factor_of,
    record_of,
    scale_name,
    zero_name,
)
from pallas_kernels.tiles import pad_rows, round_up

HALF_TYPES = ("bfloat16", "float16")


def _scales_weights(problem: Problem) -> bool:
    """Whether groups are so small that scaling the sum of each costs more than scaling weights."""
    record = record_of(problem)
    return record.code == "uint4" and record.group == 32 and not record.rounded


def epilogue_of(problem: Problem) -> Epilogue:
    """Return the epilogue: factors of the weight, scales and sums of tokens, the bias."""
    terms = []
    factor = factor_of(problem)
    if factor:
        terms.append(Term("w_scale", "n" if factor == "n" else "one", jnp.float32))
    if problem.x_scale == "token":
        along = "m" if problem.m > 1 else "one"  # a vector of one would have to be padded first
        terms.append(Term("x_scale", along, jnp.float32))
        if problem.zero == "offset":
            terms += [Term("x_sum", along, jnp.float32), Term("w_offset", "n", jnp.float32)]
    if problem.bias:
        terms.append(Term("bias", "n", jnp.dtype(problem.bias)))
    return Epilogue(tuple(terms), True, jnp.dtype(problem.out_dtype))


def _run(
    rounded: bool,
    problem: Problem,
    config: StreamConfig,
    interpret: bool,
    record: Record,
    *operands: jax.Array,
) -> jax.Array:
    name = "matmul_a16_prefill" if rounded else "matmul_a16_decode"
    rounded = rounded or record.rounded
    epilogue = epilogue_of(problem)
    return stream_matmul(
        problem, config, interpret, record, epilogue, *operands, rounded=rounded, name=name
    )


def _default_decode(problem: Problem) -> StreamConfig:
    return next(fitting(A16DecodeConfig, decode_shapes(problem), problem))


def _default_prefill(problem: Problem) -> StreamConfig:
    return next(fitting(A16PrefillConfig, prefill_shapes(problem), problem))


def _accepts_few(problem: Problem) -> str | None:
    if reason := accepts_hopper(problem):
        return reason
    if _scales_weights(problem):
        return "leaves groups of 32 to the kernel that rounds scales into the weights"
    most = most_tokens(problem)  # more would read the weights twice
    return None if problem.m <= most else f"takes at most {most} tokens"


def _accepts_many(problem: Problem) -> str | None:
    if reason := accepts_hopper(problem):
        return reason
    if problem.m > 32 or _scales_weights(problem):
        return None
    return "takes more than 32 tokens, or groups of 32"


A16_DECODE = Kernel(
    name="a16_decode",
    op="matmul_a16",
    config_type=A16DecodeConfig,
    fn=functools.partial(_run, False),
    accepts=_accepts_few,
    default_config=_default_decode,
    candidates=decode_candidates,
)
A16_PREFILL = Kernel(
    name="a16_prefill",
    op="matmul_a16",
    config_type=A16PrefillConfig,
    fn=functools.partial(_run, True),
    accepts=_accepts_many,
    default_config=_default_prefill,
    candidates=prefill_candidates,
)
A16_KERNELS = (A16_DECODE, A16_PREFILL)


def a16_problem(
    x: jax.Array | jax.ShapeDtypeStruct,
    weight: Prepacked,
    *,
    bias: jax.Array | jax.ShapeDtypeStruct | None = None,
    perm: jax.Array | jax.ShapeDtypeStruct | None = None,
    out_dtype: jax.typing.DTypeLike | None = None,
) -> Problem:
    """Return the problem that the operands of `matmul_a16` form; only shapes and dtypes are read.

    Raises:
        KernelError: an operand has a shape or dtype that the contract of `matmul_a16` excludes.
    """
    out = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    check_operands("matmul_a16", x, weight, 16, HALF_TYPES, bias, out)
    if perm is not None and (perm.shape != (weight.k,) or perm.dtype != jnp.int32):
        raise KernelError(f"perm is {perm.shape} {perm.dtype}; it must be ({weight.k},) int32")
    return problem_of("matmul_a16", x, weight, bias, out)


def check_operands(
    op: str,
    x: jax.Array | jax.ShapeDtypeStruct,
    weight: Prepacked,
    operand: int,
    x_dtypes: tuple[str, ...],
    bias: jax.Array | jax.ShapeDtypeStruct | None,
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
    x: jax.Array | jax.ShapeDtypeStruct,
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
    x: jax.Array | jax.ShapeDtypeStruct,
    weight: Prepacked,
    bias: jax.Array | jax.ShapeDtypeStruct | None,
    out: jnp.dtype,
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


@functools.partial(jax.jit, static_argnames=("out_dtype", "config", "interpret"))
def matmul_a16(
    x: jax.Array,
    weight: Prepacked,
    *,
    bias: jax.Array | None = None,
    perm: jax.Array | None = None,
    out_dtype: jax.typing.DTypeLike | None = None,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Multiply 16-bit activations by a prepacked weight: y = x[:, perm] @ w.T + bias.

    Up to 32 tokens, scales multiply f32 sums, so the result is exact but for the rounding of y.
    For more than 64 tokens, and for 4-bit codes in groups of 32 at any number, the weights are
    rounded to the type of x after scaling, as a dequantized weight would be, which makes the error
    of a random y 1.4 times that of rounding it; in between the faster of both runs.  Scales of 8
    bits and offsets are always applied to the weight: with e2m1 codes and float8 scales that is
    exact; integer scales times super-scales, and offsets, are rounded to the type of x first.

    Args:
        x: [M, K] bfloat16 or float16; any M >= 1.
        weight: [N, K] from `prepack(..., operand=16)`.  e2m1 codes with e8m0 scales need bfloat16
            activations and scales up to 2**33; larger ones give infinities.
        bias: [N] float32, bfloat16 or float16, added before rounding.
        perm: [K] int32; column k of the weight belongs to column perm[k] of x (GPTQ act-order).
        out_dtype: bfloat16 or float16; None for the type of x.
        config: tile sizes, to override the tuned ones.
        interpret: run under the GPU interpreter on the host (jax 0.11 and later).

    Returns:
        [M, N] in `out_dtype`; sums are made in float32.

    Raises:
        KernelError: an operand breaks the contract, or no kernel takes the problem; the message
            lists every kernel's reason.
    """
    problem = a16_problem(x, weight, bias=bias, perm=perm, out_dtype=out_dtype)
    if perm is not None:
        x = jnp.take(x, perm, axis=1)
    vectors = () if bias is None else (bias,)
    return run_padded(A16_KERNELS, problem, config, interpret, weight, x, vectors)


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
    m = problem.m
    padded = m if m <= 8 else round_up(m, 8)
    problem = dataclasses.replace(problem, m=padded)
    kernel, chosen = select(kernels, problem, config)
    if interpret and config is None:
        # The interpreter runs warpgroups on as many threads as the host has cores, and hangs when
        # those all wait for a warpgroup that has none.
        chosen = dataclasses.replace(chosen, nw=1, kw=1)
    x = pad_rows(x, padded) if padded > m else x
    vectors = vectors if weight.factor is None else (weight.factor, *vectors)
    out = kernel.fn(problem, chosen, interpret, weight.record, x, weight.records, *vectors)
    assert isinstance(out, jax.Array)
    return out[:m] if padded > m else out
