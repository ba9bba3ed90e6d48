"""Matmul of 8-bit activations by 8-bit weights: fp8 or int8, any scale layout."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.a8_decode import DECODE
from pallas_kernels.a8_prefill import PREFILL
from pallas_kernels.a8_problem import GROUP, operand_names
from pallas_kernels.problem import Config, KernelError, Problem, Shaped, current_device, select
from pallas_kernels.tiles import cdiv, pad_columns, pad_tokens, round_up

A8_KERNELS = (DECODE, PREFILL)


def a8_problem(
    x_q: Shaped,
    x_scale: Shaped,
    w: Shaped,
    w_scale: Shaped,
    *,
    w_block: tuple[int, int] | None = None,
    bias: Shaped | None = None,
    x_zero: Shaped | None = None,
    w_sum: Shaped | None = None,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> Problem:
    """Return the problem that the operands of `matmul_a8` form; only shapes and dtypes are read.

    Raises:
        KernelError: an operand has a shape or dtype that the contract of `matmul_a8` excludes.
    """
    if len(x_q.shape) != 2 or len(w.shape) != 2 or x_q.shape[1] != w.shape[1]:
        raise KernelError(f"x_q is {x_q.shape}, w is {w.shape}; they must be [M, K] and [N, K]")
    (m, k), n = x_q.shape, w.shape[0]
    groups = cdiv(k, GROUP)

    def layout(name: str, operand, choices: dict[str, tuple[tuple[int, ...], ...]]) -> str:
        for layout_name, shapes in choices.items():
            if operand.shape in shapes:
                return layout_name
        options = "; ".join(f"{c}: {' or '.join(map(str, s))}" for c, s in choices.items())
        raise KernelError(f"{name} is {operand.shape}; for M={m}, N={n}, K={k} use {options}")

    def require(name: str, operand, dtype: jax.typing.DTypeLike) -> None:
        if operand.dtype != dtype:
            raise KernelError(f"{name} is {operand.dtype}; it must be {jnp.dtype(dtype).name}")

    per_token = {"tensor": ((1, 1),), "token": ((m, 1),)}
    x_layout = layout(
        "x_scale",
        x_scale,
        {**per_token, "1x128": ((groups, m), (groups, round_up(m, 4)))},
    )
    if w_block is None:
        w_layout = layout("w_scale", w_scale, {"tensor": ((1, 1),), "channel": ((n, 1),)})
    else:
        blocks = (cdiv(n, w_block[0]), cdiv(k, w_block[1]))
        w_layout = layout("w_scale", w_scale, {f"{w_block[0]}x{w_block[1]}": (blocks,)})
    require("x_scale", x_scale, jnp.float32)
    require("w_scale", w_scale, jnp.float32)
    zero = ""
    if x_zero is not None:
        zero = layout("x_zero", x_zero, per_token)
        require("x_zero", x_zero, jnp.int32)
        if x_q.dtype != jnp.int8 or w_sum is None:
            raise KernelError(f"x_zero needs int8 operands and w_sum; x_q is {x_q.dtype}")
        layout("w_sum", w_sum, {"channel": ((n,),)})
        require("w_sum", w_sum, jnp.int32)
    if bias is not None:
        layout("bias", bias, {"channel": ((n,),)})
        if bias.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            raise KernelError(f"bias is {bias.dtype}; it must be float32, bfloat16 or float16")
    if jnp.dtype(out_dtype) not in (jnp.bfloat16, jnp.float16):
        raise KernelError(f"out_dtype is {out_dtype}; it must be bfloat16 or float16")
    return Problem(
        op="matmul_a8",
        m=m,
        n=n,
        k=k,
        x_dtype=x_q.dtype.name,
        w_dtype=w.dtype.name,
        out_dtype=jnp.dtype(out_dtype).name,
        x_scale=x_layout,
        w_scale=w_layout,
        zero=zero,
        bias="" if bias is None else bias.dtype.name,
        device=current_device(),
    )


@functools.partial(jax.jit, static_argnames=("w_block", "out_dtype", "config", "interpret"))
def matmul_a8(
    x_q: jax.Array,
    x_scale: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    *,
    w_block: tuple[int, int] | None = None,
    bias: jax.Array | None = None,
    x_zero: jax.Array | None = None,
    w_sum: jax.Array | None = None,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Multiply quantized activations by quantized weights: y = x @ w.T + bias.

    x[m, k] = (x_q - x_zero) * x_scale and w[n, k] = w_q * w_scale.

    Args:
        x_q: [M, K] e4m3, e5m2 or int8; any M >= 1.
        x_scale: float32; [M, 1] per token, [1, 1] for all, or [ceil(K/128), M] for groups of 128
            along K (then with M or M rounded up to 4 columns; the rest of them is not used).
        w: [N, K] float8 when x_q is, else int8; N and K multiples of 64.
        w_scale: float32; [N, 1] per channel, [1, 1] for all, or with `w_block` one per block.
        w_block: (channels, k) of a weight block, each dividing 128; w_scale is then
            [ceil(N / channels), ceil(K / k)].
        bias: [N] float32, bfloat16 or float16, added after scaling.
        x_zero: int32 [M, 1] or [1, 1], zero point of int8 activations, in steps of x_scale.
        w_sum: [N] int32, sum over K of the weight codes; needed with x_zero.
        out_dtype: bfloat16 or float16.
        config: tile sizes, to override the tuned ones.
        interpret: run under the GPU interpreter on the host (jax 0.11 and later).

    Returns:
        [M, N] in `out_dtype`; sums are made in int32 or float32.

    Raises:
        KernelError: an operand breaks the contract, or no kernel takes the problem; the message
            lists every kernel's reason.
    """
    problem = a8_problem(
        x_q,
        x_scale,
        w,
        w_scale,
        w_block=w_block,
        bias=bias,
        x_zero=x_zero,
        w_sum=w_sum,
        out_dtype=out_dtype,
    )
    m, x_q = problem.m, pad_tokens(x_q)
    problem = dataclasses.replace(problem, m=x_q.shape[0])
    kernel, config = select(A8_KERNELS, problem, config)
    operands = {
        "x_q": x_q,
        "w": w,
        "x_groups": x_scale,
        "w_blocks": w_scale,
        "x_scale": x_scale.reshape(-1),
        "w_scale": w_scale.reshape(-1),
        "x_zero": None if x_zero is None else x_zero.reshape(-1),
        "w_sum": w_sum,
        "bias": bias,
    }
    if problem.x_scale == "1x128":
        operands["x_groups"] = pad_columns(x_scale, 4)
    out = kernel.fn(
        problem, config, interpret, *(operands[name] for name in operand_names(problem))
    )
    return out[:m] if m < problem.m else out
