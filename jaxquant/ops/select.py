"""From a QTensor to the code that multiplies it, and the reasons why."""

from __future__ import annotations

from typing import NamedTuple

import jax

from jaxquant.arrays.bank import ExpertBank
from jaxquant.arrays.qtensor import QTensor
from jaxquant.errors import KernelError
from jaxquant.ops.backend import Backend
from jaxquant.ops.grouped_xla import grouped_matmul_xla
from jaxquant.ops.matmul_xla import matmul_xla

NO_KERNELS = (("pallas_kernels", "no kernel for this op is connected yet"),)


class Choice(NamedTuple):
    """What runs an op, and why nothing faster does.

    Attributes:
        kernel: name of the kernel, or "xla".
        reasons: name and reason of each kernel that refuses.
    """

    kernel: str
    reasons: tuple[tuple[str, str], ...]


def explain_matmul(q: QTensor, rows: int) -> Choice:
    """What ``matmul`` of ``rows`` rows with ``q`` runs on this process's devices."""
    if q.layout.dense:
        return Choice("xla", ())
    return Choice("xla", NO_KERNELS)


def explain_grouped(q: QTensor, rows: int) -> Choice:
    """What ``grouped_matmul`` of ``rows`` rows with one run of a bank runs."""
    if q.layout.dense:
        return Choice("xla", ())
    return Choice("xla", NO_KERNELS)


def run_matmul(x: jax.Array, q: QTensor, backend: Backend) -> jax.Array:
    """Run ``matmul`` on a resolved backend; dense weights need no kernel of ours."""
    if not q.layout.dense and backend in ("pallas", "interpret"):
        raise KernelError("matmul", explain_matmul(q, x.size // x.shape[-1]).reasons)
    return matmul_xla(x, q)


def run_grouped_matmul(
    x: jax.Array, bank: ExpertBank, group_sizes: jax.Array, backend: Backend
) -> jax.Array:
    """Run ``grouped_matmul`` on a resolved backend."""
    dense = all(part.layout.dense for part in bank.parts)
    if not dense and backend in ("pallas", "interpret"):
        raise KernelError("grouped_matmul", explain_grouped(bank.parts[0], x.shape[0]).reasons)
    return grouped_matmul_xla(x, bank, group_sizes)
