"""Grouped matmul of 8-bit activations by the 8-bit weights of experts."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import a8_decode, a8_prefill
from pallas_kernels.a8_decode_configs import (
    DecodeConfig,
    grouped_decode_candidates,
    grouped_decode_default,
    grouped_decode_refuses,
)
from pallas_kernels.a8_prefill_configs import (
    PrefillConfig,
    grouped_prefill_candidates,
    grouped_prefill_default,
    grouped_prefill_refuses,
)
from pallas_kernels.a8_problem import ALIGN, operand_names
from pallas_kernels.group_problem import rows_of_experts
from pallas_kernels.group_tiles import Groups, sizes_of_layer
from pallas_kernels.matmul_a8 import a8_problem
from pallas_kernels.problem import Config, Kernel, KernelError, Problem, Shaped, select
from pallas_kernels.tiles import pad_columns, pad_tokens

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
    x_q: Shaped,
    x_scale: Shaped,
    w: Shaped,
    w_scale: Shaped,
    group_sizes: Shaped,
    *,
    w_block: tuple[int, int] | None = None,
    first: int = 0,
    into: Shaped | None = None,
    layer: Shaped | None = None,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> Problem:
    """Return the problem that the operands of `grouped_matmul_a8` form, from shapes and dtypes.

    Its m is what the weight's experts have of the rows if all experts are alike: tiles suit that.

    Raises:
        KernelError: an operand has a shape or dtype that the contract excludes.
    """
    lead = ("layers, " if layer is not None else "") + "experts"
    depth = 1 + (layer is not None)
    if len(w.shape) != depth + 2 or w_scale.shape[:depth] != w.shape[:depth]:
        raise KernelError(
            f"w is {w.shape}, w_scale is {w_scale.shape}; they must be [{lead}, N, K] and "
            f"[{lead}, ...]"
        )
    experts, n = w.shape[depth - 1 : depth + 1]
    one = [jax.ShapeDtypeStruct(x.shape[depth:], x.dtype) for x in (w, w_scale)]
    problem = a8_problem(x_q, x_scale, *one, w_block=w_block, out_dtype=out_dtype)
    out = (problem.m, n)
    m = rows_of_experts(OP, out, jnp.dtype(out_dtype), experts, group_sizes, first, into)
    return dataclasses.replace(problem, op=OP, m=m, experts=experts)


@functools.partial(
    jax.jit, static_argnames=("w_block", "first", "out_dtype", "config", "interpret")
)
def grouped_matmul_a8(
    x_q: jax.Array,
    x_scale: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    group_sizes: jax.Array,
    *,
    w_block: tuple[int, int] | None = None,
    first: int = 0,
    into: jax.Array | None = None,
    layer: jax.Array | None = None,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Multiply each expert's rows by its weights: y[r] = x[r] @ w[expert of r].T.

    x[r, k] = x_q * x_scale and w[e, n, k] = w_q * w_scale.  The host never learns the group sizes:
    a launch is as large as the GPU and its blocks share out the tiles that have rows.

    Args:
        x_q: [rows, K] e4m3, e5m2 or int8, sorted by expert.
        x_scale: float32; [rows, 1] per row, [1, 1] for all, or [ceil(K/128), rows] for groups of
            128 along K (then with rows or rows rounded up to 4 columns).
        w: [experts, N, K] float8 when x_q is, else int8; N and K multiples of 64.
        w_scale: float32; [experts, N, 1] per channel, [experts, 1, 1] per expert, or with `w_block`
            one per block.
        group_sizes: [total] int32, rows of each expert; they add up to at most `rows`.
        w_block: (channels, k) of a weight block, each dividing 128; w_scale is then
            [experts, ceil(N / channels), ceil(K / k)].
        first: position of w's first expert among the group sizes.
        into: [rows, N] to write to; it is given up, and rows of no expert here keep their values.
        layer: int32 scalar; with it the weight has an axis of layers before its experts, and this
            layer is used where it lies, without a copy.
        out_dtype: bfloat16 or float16.
        config: tile sizes, to override the tuned ones.
        interpret: run under the GPU interpreter on the host (jax 0.11 and later).

    Returns:
        [rows, N] in `out_dtype`; sums are made in int32 or float32.  Without `into`, rows of no
        expert here are not defined.

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
        w_block=w_block,
        first=first,
        into=into,
        layer=layer,
        out_dtype=out_dtype,
    )
    kernel, config = select(GROUPED_A8_KERNELS, problem, config)
    rows, total = x_q.shape[0], group_sizes.shape[0]
    operands = {
        "x_q": pad_tokens(x_q),
        "w": w.reshape(-1, problem.k),
        "x_groups": x_scale,
        "w_blocks": w_scale.reshape(-1, w_scale.shape[-1]),
        "x_scale": x_scale.reshape(-1),
        "w_scale": w_scale.reshape(-1),
        "group_sizes": sizes_of_layer(group_sizes, layer),
    }
    if problem.x_scale == "1x128":
        operands["x_groups"] = pad_columns(x_scale, 4)
    return kernel.fn(
        problem,
        config,
        interpret,
        *(operands[name] for name in operand_names(problem)),
        groups=Groups(rows, total, first, problem.experts, ALIGN, layer is not None),
        into=into,
    )
