"""From a weight to the code that multiplies it, and the reasons why."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

import pallas_kernels as pk
from jaxquant.arrays.bank import ExpertBank
from jaxquant.arrays.qtensor import QTensor
from jaxquant.errors import KernelError
from jaxquant.ops.backend import Backend
from jaxquant.ops.grouped_xla import grouped_matmul_xla
from jaxquant.ops.kernels import Candidate, candidates
from jaxquant.ops.matmul_xla import matmul_xla
from jaxquant.ops.prepared import Prepared, unprepare

NO_GROUPED = (("pallas_kernels", "there is no grouped kernel yet"),)


class Choice(NamedTuple):
    """What runs an op, and why nothing faster does.

    Attributes:
        kernel: name of the kernel, or "xla".
        reasons: name and reason of each kernel that refuses.
    """

    kernel: str
    reasons: tuple[tuple[str, str], ...]


def _dense(weight: QTensor | Prepared) -> bool:
    """Dense weights need no kernel of ours: XLA's own matmul is the fast one."""
    return weight.layout.dense


def has_gpu() -> bool:
    """Whether this process computes on a GPU, so that kernels are worth tracing."""
    return jax.default_backend() == "gpu"


def has_kernels() -> bool:
    """Whether this process computes on a GPU that the kernels are written for."""
    return has_gpu() and pk.current_device().capability == "9.0"


def _choose(
    x: jax.ShapeDtypeStruct, weight: QTensor | Prepared
) -> tuple[Candidate | None, tuple[tuple[str, str], ...]]:
    found = candidates(x, weight)
    taken = next((c for c in found if c.reason is None), None)
    return taken, tuple((c.name, c.reason) for c in found if c.reason is not None)


def explain_matmul(weight: QTensor | Prepared, rows: int) -> Choice:
    """What ``matmul`` of ``rows`` bfloat16 rows with a weight runs on this process's devices."""
    if _dense(weight):
        return Choice("xla", ())
    x = jax.ShapeDtypeStruct((rows, weight.extent("in")), jnp.bfloat16)
    taken, reasons = _choose(x, weight)
    if taken is None:
        return Choice("xla", reasons)
    if not has_gpu():
        return Choice("xla", ((taken.name, "this process has no GPU"),))
    return Choice(taken.name, ())


def explain_grouped(q: QTensor, rows: int) -> Choice:
    """What ``grouped_matmul`` of ``rows`` rows with one run of a bank runs."""
    return Choice("xla", () if q.layout.dense else NO_GROUPED)


def _xla(x: jax.Array, weight: QTensor | Prepared) -> jax.Array:
    return matmul_xla(x, unprepare(weight) if isinstance(weight, Prepared) else weight)


def run_matmul(x: jax.Array, weight: QTensor | Prepared, backend: Backend) -> jax.Array:
    """Run ``matmul`` on a resolved backend; dense weights need no kernel of ours."""
    strict = backend in ("pallas", "interpret")
    if _dense(weight) or backend == "xla" or not (strict or has_gpu()):
        return _xla(x, weight)
    rows = x.reshape(-1, x.shape[-1])
    taken, reasons = _choose(jax.ShapeDtypeStruct(rows.shape, rows.dtype), weight)
    if taken is None:
        if strict:
            raise KernelError("matmul", reasons, 'use backend="auto" for the XLA path')
        return _xla(x, weight)
    kernel = functools.partial(_rows_of, taken)
    if backend == "auto":
        return lax.platform_dependent(x, weight, cuda=kernel, default=_xla)
    return kernel(x, weight, interpret=backend == "interpret")


def _rows_of(
    taken: Candidate, x: jax.Array, weight: QTensor | Prepared, interpret: bool = False
) -> jax.Array:
    """Run a kernel, which sees ``[rows, in]``, on ``[..., in]``."""
    y = taken.run(x.reshape(-1, x.shape[-1]), weight, interpret)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def run_grouped_matmul(
    x: jax.Array, bank: ExpertBank, group_sizes: jax.Array, backend: Backend
) -> jax.Array:
    """Run ``grouped_matmul`` on a resolved backend."""
    dense = all(part.layout.dense for part in bank.parts)
    if not dense and backend in ("pallas", "interpret"):
        raise KernelError("grouped_matmul", NO_GROUPED, 'use backend="auto" for the XLA path')
    return grouped_matmul_xla(x, bank, group_sizes)
