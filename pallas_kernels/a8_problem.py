"""What the 8-bit matmul kernels share: reading a problem, operand order, common refusals.

Their bodies also multiply plain 16-bit experts, which have no scales (`grouped_dense`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.epilogue import Epilogue, Term
from pallas_kernels.problem import Problem, require_tiles

GROUP = 128  # tokens' scale group along K, fixed by the 1x128 format
# Rows at whose multiples the tiles of groups begin: TMA cuts activations in tiles of 8 rows, and a
# copy of float32 scales has to start at a multiple of 16 bytes.
ALIGN = 8
FLOAT8 = ("float8_e4m3fn", "float8_e5m2")


def w_block(problem: Problem) -> tuple[int, int] | None:
    """Return (channels, k) that share one weight scale, or None for other weight scales."""
    if "x" not in problem.w_scale:
        return None
    bn, bk = problem.w_scale.split("x")
    return int(bn), int(bk)


def promotes(problem: Problem) -> bool:
    """Whether scales vary along K, so that every K step is scaled before it is added."""
    return problem.x_scale == "1x128" or w_block(problem) is not None


def step_k(problem: Problem) -> int:
    """Return the K extent of one step: a weight block, at most one 128-byte swizzle atom."""
    block, atom = w_block(problem), 128 // jnp.dtype(problem.x_dtype).itemsize
    step = atom if problem.k % atom == 0 else 64
    return min(step, block[1]) if block else step


def step_bytes(problem: Problem) -> int:
    """Return the bytes of one row of a step."""
    return step_k(problem) * jnp.dtype(problem.x_dtype).itemsize


def epilogue_of(problem: Problem, *, transposed: bool) -> Epilogue:
    """Return the epilogue: scales constant along K, zero points and bias."""
    terms = []
    if problem.x_scale in ("token", "tensor"):
        terms.append(Term("x_scale", "m" if problem.x_scale == "token" else "one", jnp.float32))
    if problem.w_scale in ("channel", "tensor"):
        one = "expert" if problem.experts else "one"
        terms.append(Term("w_scale", "n" if problem.w_scale == "channel" else one, jnp.float32))
    if problem.zero:
        terms.append(Term("x_zero", "m" if problem.zero == "token" else "one", jnp.int32))
        terms.append(Term("w_sum", "n", jnp.int32))
    if problem.bias:
        terms.append(Term("bias", "n", jnp.dtype(problem.bias)))
    return Epilogue(tuple(terms), transposed, jnp.dtype(problem.out_dtype))


def operand_names(problem: Problem) -> tuple[str, ...]:
    """Return the order in which a kernel gets its operands."""
    names = ["x_q", "w"]
    if problem.x_scale == "1x128":
        names.append("x_groups")
    if w_block(problem):
        names.append("w_blocks")
    names += [term.name for term in epilogue_of(problem, transposed=False).terms]
    return (*names, "group_sizes") if problem.experts else tuple(names)


def accumulator_dtype(problem: Problem) -> jnp.dtype:
    """Return the type that the tensor cores add in."""
    return jnp.dtype(jnp.int32 if problem.x_dtype == "int8" else jnp.float32)


def common_refusal(problem: Problem) -> str | None:
    """Return the reason why no 8-bit kernel takes a problem, or None."""
    if reason := require_tiles(problem):
        return reason
    kinds = (problem.x_dtype, problem.w_dtype)
    if kinds != ("int8", "int8") and not all(kind in FLOAT8 for kind in kinds):
        return f"multiplies int8 x int8 or float8 x float8, not {kinds[0]} x {kinds[1]}"
    if kinds[0] != kinds[1] and jax.__version_info__ < (0, 11):
        return f"jax {jax.__version__} cannot multiply {kinds[0]} x {kinds[1]}; 0.11 can"
    if problem.zero and promotes(problem):
        return "zero points need scales that are constant along K"
    block = w_block(problem)
    if block and (block[0] not in (64, 128) or block[1] not in (32, 64, 128)):
        return f"weight blocks must be 64 or 128 channels by 32, 64 or 128 along K, not {block}"
    return None
