"""Matmul of 16-bit activations by weights that are decoded in registers: W4A16, W8A16, FP8A16."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.a16_configs import (
    ExactConfig,
    RoundedConfig,
    decode_shapes,
    decode_trials,
    first_fitting,
    fitting,
    most_tokens,
    prefill_shapes,
    prefill_trials,
)
from pallas_kernels.prepack import Prepacked
from pallas_kernels.problem import Config, Kernel, KernelError, Problem, Shaped, require_tiles
from pallas_kernels.stream_config import record_of
from pallas_kernels.stream_problem import HALF_TYPES, check_operands, problem_of, run, run_padded


def _scales_weights(problem: Problem) -> bool:
    """Whether groups are so small that scaling the sum of each costs more than scaling weights."""
    record = record_of(problem)
    return record.code == "uint4" and record.group == 32 and not record.rounded


def _accepts_few(problem: Problem) -> str | None:
    if reason := require_tiles(problem):
        return reason
    if _scales_weights(problem):
        return "leaves groups of 32 to the kernel that rounds scales into the weights"
    most = most_tokens(problem)  # more would read the weights twice
    return None if problem.m <= most else f"takes at most {most} tokens"


def _accepts_many(problem: Problem) -> str | None:
    if reason := require_tiles(problem):
        return reason
    if problem.m > 32 or _scales_weights(problem):
        return None
    return "takes more than 32 tokens, or groups of 32"


A16_DECODE = Kernel(
    name="a16_decode",
    op="matmul_a16",
    config_type=ExactConfig,
    fn=functools.partial(run, "matmul_a16_decode", False),
    accepts=_accepts_few,
    default_config=functools.partial(first_fitting, ExactConfig, decode_shapes),
    candidates=functools.partial(fitting, ExactConfig, decode_trials),
)
A16_PREFILL = Kernel(
    name="a16_prefill",
    op="matmul_a16",
    config_type=RoundedConfig,
    fn=functools.partial(run, "matmul_a16_prefill", True),
    accepts=_accepts_many,
    default_config=functools.partial(first_fitting, RoundedConfig, prefill_shapes),
    candidates=functools.partial(fitting, RoundedConfig, prefill_trials),
)
A16_KERNELS = (A16_DECODE, A16_PREFILL)


def a16_problem(
    x: Shaped,
    weight: Prepacked,
    *,
    bias: Shaped | None = None,
    perm: Shaped | None = None,
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
    return problem_of("matmul_a16", x, weight, out, bias)


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
