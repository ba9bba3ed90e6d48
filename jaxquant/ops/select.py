"""From a QTensor to the code that multiplies it, and the reasons why."""

from __future__ import annotations

import jax

from jaxquant.arrays.bank import ExpertBank
from jaxquant.arrays.qtensor import QTensor
from jaxquant.errors import KernelError
from jaxquant.ops.backend import Backend
from jaxquant.ops.grouped_xla import grouped_matmul_xla
from jaxquant.ops.matmul_xla import matmul_xla

NO_KERNELS = (("pallas_kernels", "no kernel for this op is connected yet"),)


def run_matmul(x: jax.Array, q: QTensor, backend: Backend) -> jax.Array:
    """Run ``matmul`` on a resolved backend."""
    if backend in ("pallas", "interpret"):
        raise KernelError("matmul", NO_KERNELS, 'use backend="auto"')
    return matmul_xla(x, q)


def run_grouped_matmul(
    x: jax.Array, bank: ExpertBank, group_sizes: jax.Array, backend: Backend
) -> jax.Array:
    """Run ``grouped_matmul`` on a resolved backend."""
    if backend in ("pallas", "interpret"):
        raise KernelError("grouped_matmul", NO_KERNELS, 'use backend="auto"')
    return grouped_matmul_xla(x, bank, group_sizes)
