"""Matmul of groups of 16-bit rows by plain 16-bit weights: experts that are not quantized.

The bodies are those of the 8-bit kernels: weights and activations come as they are, by TMA, and
there is nothing to scale.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import a8_decode, a8_prefill
from pallas_kernels.a8_decode_configs import (
    DecodeConfig,
    grouped_decode_candidates,
    grouped_decode_default,
)
from pallas_kernels.a8_prefill_configs import (
    PrefillConfig,
    grouped_prefill_candidates,
    grouped_prefill_default,
)
from pallas_kernels.a8_problem import ALIGN
from pallas_kernels.group_problem import rows_of_experts
from pallas_kernels.group_tiles import Groups, sizes_of_layer
from pallas_kernels.problem import (
    Config,
    Kernel,
    KernelError,
    Problem,
    Shaped,
    current_device,
    require_tiles,
    select,
)
from pallas_kernels.tiles import pad_tokens

OP = "grouped_matmul_dense"


def _refuses_many(problem: Problem) -> str | None:
    few = problem.m <= 96 * problem.experts
    return require_tiles(problem) or (None if few else "takes at most 96 rows an expert")


def _refuses_few(problem: Problem) -> str | None:
    many = problem.m >= problem.experts
    return require_tiles(problem) or (None if many else "takes at least a row an expert")


GROUPED_DENSE_KERNELS = (
    Kernel(
        name="dense_grouped_decode",
        op=OP,
        config_type=DecodeConfig,
        fn=a8_decode.matmul,
        accepts=_refuses_many,
        default_config=grouped_decode_default,
        candidates=grouped_decode_candidates,
    ),
    Kernel(
        name="dense_grouped_prefill",
        op=OP,
        config_type=PrefillConfig,
        fn=a8_prefill.matmul,
        accepts=_refuses_few,
        default_config=grouped_prefill_default,
        candidates=grouped_prefill_candidates,
    ),
)


def grouped_dense_problem(
    x: Shaped,
    w: Shaped,
    group_sizes: Shaped,
    *,
    first: int = 0,
    into: Shaped | None = None,
    layer: Shaped | None = None,
) -> Problem:
    """Return the problem that the operands of `grouped_matmul_dense` form; only types are read.

    Its m is what the weight's experts have of the rows if all experts are alike: tiles suit that.

    Raises:
        KernelError: an operand has a shape or dtype that the contract excludes.
    """
    if x.dtype not in (jnp.bfloat16, jnp.float16) or w.dtype != x.dtype:
        raise KernelError(f"x is {x.dtype}, w is {w.dtype}; both must be bfloat16 or float16")
    depth = 3 + (layer is not None)
    if len(x.shape) != 2 or len(w.shape) != depth or x.shape[1] != w.shape[-1] or not x.shape[0]:
        raise KernelError(
            f"x is {x.shape}, w is {w.shape}; they must be [rows, K], a row at least, and "
            f"[{'' if layer is None else 'layers, '}experts, N, K]"
        )
    experts, n, k = w.shape[-3:]
    m = rows_of_experts(OP, (x.shape[0], n), x.dtype, experts, group_sizes, first, into)
    return Problem(
        op=OP,
        m=m,
        n=n,
        k=k,
        x_dtype=x.dtype.name,
        w_dtype=w.dtype.name,
        out_dtype=x.dtype.name,
        experts=experts,
        device=current_device(),
    )


@functools.partial(jax.jit, static_argnames=("first", "config", "interpret"))
def grouped_matmul_dense(
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    *,
    first: int = 0,
    into: jax.Array | None = None,
    layer: jax.Array | None = None,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Multiply each expert's rows by its weight: y[r] = x[r] @ w[expert of r].T.

    Args:
        x: [rows, K] bfloat16 or float16, sorted by expert.
        w: [experts, N, K] of the type of x; N and K multiples of 64.
        group_sizes: [total] int32, rows of each expert; they add up to at most `rows`.
        first: position of w's first expert among the group sizes.
        into: [rows, N] to write to; it is given up, and rows of no expert here keep their values.
        layer: int32 scalar; with it the weight has an axis of layers before its experts, and this
            layer is used where it lies, without a copy.
        config: tile sizes, to override the chosen ones.
        interpret: run under the GPU interpreter on the host (jax 0.11 and later).

    Returns:
        [rows, N] in the type of x; sums are made in float32.  Without `into`, rows of no expert
        here are not defined.

    Raises:
        KernelError: an operand breaks the contract, or no kernel takes the problem; the message
            lists every kernel's reason.
    """
    problem = grouped_dense_problem(x, w, group_sizes, first=first, into=into, layer=layer)
    kernel, config = select(GROUPED_DENSE_KERNELS, problem, config)
    rows, total = x.shape[0], group_sizes.shape[0]
    return kernel.fn(
        problem,
        config,
        interpret,
        pad_tokens(x),
        w.reshape(-1, problem.k),
        sizes_of_layer(group_sizes, layer),
        groups=Groups(rows, total, first, problem.experts, ALIGN, layer is not None),
        into=into,
    )
