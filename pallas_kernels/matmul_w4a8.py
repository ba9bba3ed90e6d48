"""Matmul of 8-bit activations by 4-bit weights, which become int8 or e4m3 operands in registers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels.a16_configs import (
    accepts_hopper,
    decode_shapes,
    exceeds_registers,
    few_tokens,
    fitting,
    many_tokens,
    prefill_shapes,
)
from pallas_kernels.matmul_a16 import (
    check_operands,
    epilogue_of,
    problem_of,
    run_padded,
)
from pallas_kernels.prepack import Prepacked
from pallas_kernels.problem import Config, Kernel, KernelError, Problem
from pallas_kernels.record import Record
from pallas_kernels.stream import stream_matmul
from pallas_kernels.stream_config import StreamConfig, record_of
from pallas_kernels.tiles import pad_rows


@dataclasses.dataclass(frozen=True)
class W4A8Config(StreamConfig):
    """Tiles of the W4A8 kernel that scales the sums of every group in f32."""

    def refuses(self, problem: Problem) -> str | None:
        """Return why this config cannot run `problem`, or None."""
        return exceeds_registers(self, problem) or super().refuses(problem)


@dataclasses.dataclass(frozen=True)
class W4A8WholeConfig(StreamConfig):
    """Tiles of the W4A8 kernel that adds int8 operands over all of k in int32."""

    def refuses(self, problem: Problem) -> str | None:
        """Return why this config cannot run `problem`, or None."""
        return "needs a ring of 2 steps" if self.ring == 1 else super().refuses(problem)


def _accepts(whole: bool, problem: Problem) -> str | None:
    if reason := accepts_hopper(problem):
        return reason
    if record_of(problem).rounded == whole:
        return None
    return "takes progressive scales or offsets" if whole else "takes one scale for each group"


def _shapes(problem: Problem) -> Iterator[dict[str, int]]:
    """Yield tiles for codes that become int8 operands, the likeliest first."""
    yield from (decode_shapes if problem.m <= 64 else prefill_shapes)(problem)


def _candidates(problem: Problem) -> Iterator[W4A8Config]:
    """Yield the configs worth measuring."""
    return fitting(W4A8Config, decode_shapes(problem), problem)


def _whole_candidates(problem: Problem) -> Iterator[W4A8WholeConfig]:
    shapes = few_tokens if problem.m <= 32 else many_tokens
    return fitting(W4A8WholeConfig, shapes(problem), problem)


def _run(
    problem: Problem,
    config: StreamConfig,
    interpret: bool,
    record: Record,
    *operands: jax.Array,
) -> jax.Array:
    epilogue, rounded = epilogue_of(problem), record.rounded
    return stream_matmul(
        problem, config, interpret, record, epilogue, *operands, rounded=rounded, name="matmul_w4a8"
    )


W4A8 = Kernel(
    name="w4a8",
    op="matmul_w4a8",
    config_type=W4A8Config,
    fn=_run,
    accepts=functools.partial(_accepts, False),
    default_config=lambda problem: next(fitting(W4A8Config, decode_shapes(problem), problem)),
    candidates=_candidates,
)
W4A8_WHOLE = Kernel(
    name="w4a8_whole",
    op="matmul_w4a8",
    config_type=W4A8WholeConfig,
    fn=_run,
    accepts=functools.partial(_accepts, True),
    default_config=lambda problem: next(fitting(W4A8WholeConfig, _shapes(problem), problem)),
    candidates=_whole_candidates,
)
W4A8_KERNELS = (W4A8, W4A8_WHOLE)


def w4a8_problem(
    x_q: jax.Array | jax.ShapeDtypeStruct,
    x_scale: jax.Array | jax.ShapeDtypeStruct,
    weight: Prepacked,
    *,
    bias: jax.Array | jax.ShapeDtypeStruct | None = None,
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
    return problem_of("matmul_w4a8", x_q, weight, bias, out, x_scale="token")


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
