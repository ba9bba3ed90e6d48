"""Matmul of 8-bit activations by 4-bit weights, which become int8 or e4m3 operands in registers."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels.a16_configs import (
    ExactConfig,
    RoundedConfig,
    decode_shapes,
    first_fitting,
    fitting,
    prefill_shapes,
    prefill_trials,
)
from pallas_kernels.prepack import Prepacked
from pallas_kernels.problem import Config, Kernel, KernelError, Problem, Shaped, require_tiles
from pallas_kernels.stream_config import record_of
from pallas_kernels.stream_problem import check_operands, problem_of, run, run_padded
from pallas_kernels.tiles import pad_rows


def _accepts(whole: bool, problem: Problem) -> str | None:
    if reason := require_tiles(problem):
        return reason
    if record_of(problem).rounded == whole:
        return None
    return "takes progressive scales or offsets" if whole else "takes one scale for each group"


def _shapes(problem: Problem) -> Iterator[dict[str, int]]:
    """Return tiles for codes that become int8 operands, the likeliest first."""
    return (decode_shapes if problem.m <= 64 else prefill_shapes)(problem)


_RUN = functools.partial(run, "matmul_w4a8", False)
W4A8 = Kernel(
    name="w4a8",
    op="matmul_w4a8",
    config_type=ExactConfig,
    fn=_RUN,
    accepts=functools.partial(_accepts, False),
    default_config=functools.partial(first_fitting, ExactConfig, decode_shapes),
    candidates=functools.partial(fitting, ExactConfig, decode_shapes),
)
W4A8_WHOLE = Kernel(
    name="w4a8_whole",
    op="matmul_w4a8",
    config_type=RoundedConfig,
    fn=_RUN,
    accepts=functools.partial(_accepts, True),
    default_config=functools.partial(first_fitting, RoundedConfig, _shapes),
    candidates=functools.partial(fitting, RoundedConfig, prefill_trials),
)
W4A8_KERNELS = (W4A8, W4A8_WHOLE)


def w4a8_problem(
    x_q: Shaped,
    x_scale: Shaped,
    weight: Prepacked,
    *,
    bias: Shaped | None = None,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> Problem:
    """Return the problem that the operands of `matmul_w4a8` form.

    Raises:
        KernelError: an operand has a shape or dtype that the contract of `matmul_w4a8` excludes.
    """
    out = jnp.dtype(out_dtype)
    check_operands("matmul_w4a8", x_q, weight, 8, ("int8", "float8_e4m3fn"), bias, out)
    if x_scale.shape != (x_q.shape[0], 1) or x_scale.dtype != jnp.float32:
        raise KernelError(
            f"matmul_w4a8: x_scale is {x_scale.shape} {x_scale.dtype}; "
            f"it must be ({x_q.shape[0]}, 1) float32"
        )
    if weight.record.rounded and x_q.dtype != jnp.int8:
        raise KernelError(f"matmul_w4a8: x_q is {x_q.dtype}; this weight becomes int8 operands")
    return problem_of("matmul_w4a8", x_q, weight, out, bias, x_scale="token")


@functools.partial(jax.jit, static_argnames=("out_dtype", "config", "interpret"))
def matmul_w4a8(
    x_q: jax.Array,
    x_scale: jax.Array,
    weight: Prepacked,
    *,
    bias: jax.Array | None = None,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Multiply quantized activations by a prepacked 4-bit weight: y = x_scale * x_q @ w.T + bias.

    Progressive scales and offsets (QServe's, https://arxiv.org/abs/2405.04532) are exact: codes
    become int8 operands, whose sums over all of k are made in int32.

    Args:
        x_q: [M, K] int8 or float8_e4m3fn, the latter only with scales of groups; any M >= 1.
        x_scale: [M, 1] float32, one per token.
        weight: [N, K] from `prepack(..., operand=8)`.
        bias: [N] float32, bfloat16 or float16, added after scaling.
        out_dtype: bfloat16 or float16.
        config: tile sizes, to override the tuned ones.
        interpret: run under the GPU interpreter on the host (jax 0.11 and later).

    Returns:
        [M, N] in `out_dtype`; the sums of a group are made in int32 or float32.

    Raises:
        KernelError: an operand breaks the contract, or no kernel takes the problem; the message
            lists every kernel's reason.
    """
    problem = w4a8_problem(x_q, x_scale, weight, bias=bias, out_dtype=out_dtype)
    # Vectors along tokens travel with the tile, whose rows are padded to 8; one number does not.
    rows = 8 if problem.m > 1 else 1
    vectors = (pad_rows(x_scale.reshape(-1), rows),)
    if weight.offset is not None:
        x_sum = jnp.sum(x_q, axis=1, dtype=jnp.int32).astype(jnp.float32) * x_scale[:, 0]
        vectors += (pad_rows(x_sum, rows), weight.offset)
    vectors += () if bias is None else (bias,)
    return run_padded(W4A8_KERNELS, problem, config, interpret, weight, x_q, vectors)
