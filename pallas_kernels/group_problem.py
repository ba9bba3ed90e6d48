"""What the grouped matmuls share: the checks of their groups of rows."""

from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels.problem import KernelError, Shaped
from pallas_kernels.tiles import cdiv


def rows_of_experts(
    op: str,
    out: tuple[int, int],
    out_dtype: jnp.dtype,
    experts: int,
    group_sizes: Shaped,
    first: int,
    into: Shaped | None,
) -> int:
    """Return what the weight's experts have of the rows if all experts are alike: tiles suit that.

    Args:
        op: the public function.
        out: shape of the result, [rows, N].
        out_dtype: its type.
        experts: experts of the weight.
        group_sizes: rows of each expert.
        first: position of the weight's first expert among them.
        into: the array to write to, or None.

    Raises:
        KernelError: group sizes of another type, experts without a size, or another `into`.
    """
    if len(group_sizes.shape) != 1 or group_sizes.dtype != jnp.int32:
        raise KernelError(
            f"{op}: group_sizes is {group_sizes.shape} {group_sizes.dtype}; "
            "it must be int32, one number for each expert"
        )
    (total,) = group_sizes.shape
    if not 0 <= first <= total - experts:
        raise KernelError(
            f"{op}: experts {first} to {first + experts} of {total} group_sizes; "
            "every expert of the weight needs a size"
        )
    if into is not None and (into.shape != out or into.dtype != out_dtype):
        raise KernelError(f"{op}: into is {into.shape} {into.dtype}; it must be {out} {out_dtype}")
    return cdiv(out[0] * experts, total)
