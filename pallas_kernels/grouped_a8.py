"""Grouped matmul of 8-bit activations by the 8-bit weights of experts."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import a8_decode, a8_prefill
from pallas_kernels.a8_configs import (
    DecodeConfig,
    PrefillConfig,
    grouped_decode_candidates,
    grouped_decode_default,
    grouped_decode_refuses,
    grouped_prefill_candidates,
    grouped_prefill_default,
    grouped_prefill_refuses,
)
from pallas_kernels.a8_problem import operand_names
from pallas_kernels.matmul_a8 import a8_problem
from pallas_kernels.problem import Config, Kernel, KernelError, Problem, select
from pallas_kernels.tiles import cdiv, pad_columns, pad_rows, round_up

OP = "grouped_matmul_a8"

GROUPED_DECODE = Kernel(
    name="a8_grouped_decode",
    op=OP,
    config_type=DecodeConfig,
    fn=a8_decode.matmul,
    accepts=grouped_decode_refuses,
    default_config=grouped_decode_default,
    candidates=grouped_decode_candidates,
)
GROUPED_PREFILL = Kernel(
    name="a8_grouped_prefill",
    op=OP,
    config_type=PrefillConfig,
    fn=a8_prefill.matmul,
    accepts=grouped_prefill_refuses,
    default_config=grouped_prefill_default,
    candidates=grouped_prefill_candidates,
)
GROUPED_A8_KERNELS = (GROUPED_DECODE, GROUPED_PREFILL)


def grouped_a8_problem(
    x_q: jax.Array | jax.ShapeDtypeStruct,
    x_scale: jax.Array | jax.ShapeDtypeStruct,
    w: jax.Array | jax.ShapeDtypeStruct,
    w_scale: jax.Array | jax.ShapeDtypeStruct,
    group_sizes: jax.Array | jax.ShapeDtypeStruct,
    *,
    first: int = 0,
    into: jax.Array | jax.ShapeDtypeStruct | None = None,
    w_block: tuple[int, int] | None = None,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> Problem:
    """Return the problem that the operands of `grouped_matmul_a8` form, from shapes and dtypes.

    Its m is what the weight's experts have of the rows if all experts are alike: tiles suit that.

    Raises:
        KernelError: an operand has a shape or dtype that the contract excludes.
    """
    if len(w.shape) != 3 or w_scale.shape[:1] != w.shape[:1]:
        raise KernelError(
            f"w is {w.shape}, w_scale is {w_scale.shape}; they must be [experts, N, K] and "
            "[experts, ...]"
        )
    experts, rows = w.shape[0], x_q.shape[0]
    if len(group_sizes.shape) != 1 or group_sizes.dtype != jnp.int32:
        raise KernelError(
            f"group_sizes is {group_sizes.dtype} {group_sizes.shape}; it must be int32, one number "
            "for each expert"
        )
    total = group_sizes.shape[0]
    if first < 0 or first + experts > total:
        raise KernelError(
            f"experts {first} to {first + experts} of {total} group_sizes; every expert of the "
            "weight needs a size"
        )
    if into is not None and (into.shape != (rows, w.shape[1]) or into.dtype != out_dtype):
        raise KernelError(
            f"into is {into.dtype} {into.shape}; it must be {jnp.dtype(out_dtype)} "
            f"{(rows, w.shape[1])}"
        )
    one = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in (w, w_scale)]
    problem = a8_problem(x_q, x_scale, *one, w_block=w_block, out_dtype=out_dtype)
    return dataclasses.replace(problem, op=OP, experts=experts, m=cdiv(rows * experts, total))


@functools.partial(
    jax.jit, static_argnames=("first", "w_block", "out_dtype", "config", "interpret")
)
def grouped_matmul_a8(
    x_q: jax.Array,
    x_scale: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    group_sizes: jax.Array,
    *,
    first: int = 0,
    into: jax.Array | None = None,
    w_block: tuple[int, int] | None = None,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Multiply each expert's rows by its weights: y[r] = x[r] @ w[expert of r].T.

    x[r, k] = x_q * x_scale and w[e, n, k] = w_q * w_scale.  The host never learns the group sizes:
    a launch is as large as the GPU and its blocks share out the tiles that have rows.

    Args:
        x_q: [rows, K] e4m3, e5m2 or int8; the rows of expert 0, then of expert 1 and so on.
        x_scale: float32; [rows, 1] per row, [1, 1] for all, or [ceil(K/128), rows] for groups of
            128 along K (then with rows or rows rounded up to 4 columns).
        w: [experts, N, K] float8 when x_q is, else int8; N and K multiples of 64.
        w_scale: float32; [experts, N, 1] per channel, [experts, 1, 1] per expert, or with `w_block`
            one per block.
        group_sizes: int32 [total], rows of each expert, 0 for some; together at most `rows`.
        first: position of the weight's first expert among the group sizes.
        into: [rows, N] to write to; it is given up, and rows of no expert here keep their values.
        w_block: (channels, k) of a weight block, each dividing 128; w_scale is then
            [experts, ceil(N / channels), ceil(K / k)].
        out_dtype: bfloat16 or float16.
        config: tile sizes, to override the tuned ones.
        interpret: run under the GPU interpreter on the host (jax 0.11 and later).

    Returns:
        [rows, N] in `out_dtype`; sums are made in int32 or float32.  Without `into`, rows of no
        expert here hold anything.

    Raises:
        KernelError: an operand breaks the contract, or no kernel takes the problem; the message
            lists every kernel's reason.
    """
    problem = grouped_a8_problem(
        x_q,
        x_scale,
        w,
        w_scale,
        group_sizes,
        first=first,
        into=into,
        w_block=w_block,
        out_dtype=out_dtype,
    )
    kernel, config = select(GROUPED_A8_KERNELS, problem, config)
    # TMA cuts x_q and the result in tiles of 8 rows; fewer rows than that need no padding.
    rows = x_q.shape[0]
    padded = rows if rows <= 8 else round_up(rows, 8)
    problem = dataclasses.replace(problem, m=padded)
    start = jnp.sum(group_sizes[:first], dtype=jnp.int32, keepdims=True)
    operands = {
        "x_q": pad_rows(x_q, 8) if padded > rows else x_q,
        "w": w.reshape(-1, problem.k),
        "x_groups": x_scale,
        "w_blocks": w_scale.reshape(-1, w_scale.shape[-1]),
        "x_scale": x_scale.reshape(-1),
        "w_scale": w_scale.reshape(-1),
        # The first row of these experts, then how many each has.
        "tiles": jnp.concatenate([start, group_sizes[first : first + problem.experts]]),
    }
    if problem.x_scale == "1x128":
        operands["x_groups"] = pad_columns(x_scale, 4)
    if into is not None and padded > rows:
        into = pad_rows(into, 8)
    out = kernel.fn(
        problem, config, interpret, *(operands[name] for name in operand_names(problem)), into=into
    )
    return out[:rows] if padded > rows else out
