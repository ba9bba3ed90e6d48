"""From a weight to the code that multiplies it, and the reasons why."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

import pallas_kernels as pk
from jaxquant.arrays.bank import ExpertBank, Run, StackedBank
from jaxquant.arrays.qtensor import QTensor
from jaxquant.errors import KernelError
from jaxquant.ops.activations import QActivation
from jaxquant.ops.backend import Backend
from jaxquant.ops.grouped_kernels import GroupedCandidate, Operand, grouped_candidates
from jaxquant.ops.grouped_xla import grouped_matmul_xla
from jaxquant.ops.kernels import Candidate, candidates, spread_refusal
from jaxquant.ops.matmul_xla import matmul_xla
from jaxquant.ops.prepared import Prepared, unprepare

Reasons = tuple[tuple[str, str], ...]
C = TypeVar("C", Candidate, GroupedCandidate)


class Choice(NamedTuple):
    """What runs an op, and why nothing faster does.

    Attributes:
        kernel: name of the kernel, or "xla".
        reasons: name and reason of each kernel that refuses.
    """

    kernel: str
    reasons: Reasons


def _dense(weight: QTensor | Prepared) -> bool:
    """Dense weights need no kernel of ours: XLA's own matmul is the fast one."""
    return weight.layout.dense


def has_gpu() -> bool:
    """Whether this process computes on a GPU, so that kernels are worth tracing."""
    return jax.default_backend() == "gpu"


def has_kernels() -> bool:
    """Whether this process computes on a GPU that the kernels are written for."""
    return has_gpu() and pk.current_device().capability == "9.0"


def tries_kernels(backend: Backend) -> bool:
    """Whether a resolved backend looks for kernels at all."""
    return backend in ("pallas", "interpret") or (backend == "auto" and has_gpu())


def rows_of(x: jax.Array | QActivation) -> jax.ShapeDtypeStruct:
    """``[..., in]`` as the kernels see it, ``[rows, in]``."""
    return jax.ShapeDtypeStruct((math.prod(x.shape[:-1]), x.shape[-1]), x.dtype)


def _first(found: Sequence[C], weight: Any) -> tuple[C | None, Reasons]:
    """The first candidate that takes the problem, and the reasons of those that do not."""
    if spread := spread_refusal(weight):
        return None, tuple((c.name, spread) for c in found)
    taken = next((c for c in found if c.reason is None), None)
    return taken, tuple((c.name, c.reason) for c in found if c.reason is not None)


def explain_matmul(weight: QTensor | Prepared, rows: int) -> Choice:
    """What ``matmul`` of ``rows`` bfloat16 rows with a weight runs on this process's devices."""
    if _dense(weight):
        return Choice("xla", ())
    x = jax.ShapeDtypeStruct((rows, weight.extent("in")), jnp.bfloat16)
    return _explain(*_first(candidates(x, weight), weight))


def _explain(taken: Candidate | GroupedCandidate | None, reasons: Reasons) -> Choice:
    if taken is None:
        return Choice("xla", reasons)
    if not has_gpu():
        return Choice("xla", ((taken.name, "this process has no GPU"),))
    return Choice(taken.name, ())


def explain_grouped(part: QTensor | Prepared, rows: int) -> Choice:
    """What ``grouped_matmul`` of ``rows`` bfloat16 rows with one run of a bank runs."""
    x = jax.ShapeDtypeStruct((rows, part.extent("in")), jnp.bfloat16)
    return _explain(*_first(grouped_candidates(x, part, part.lead[0]), part))


def _xla(dtype: Any, x: jax.Array | QActivation, weight: QTensor | Prepared) -> jax.Array:
    return matmul_xla(x, unprepare(weight) if isinstance(weight, Prepared) else weight, dtype)


def run_matmul(
    x: jax.Array | QActivation, weight: QTensor | Prepared, backend: Backend, dtype: Any = None
) -> jax.Array:
    """Run ``matmul`` on a resolved backend; dense weights need no kernel of ours.

    ``dtype`` is that of the result, None for ``x.dtype``.  Kernels round to ``x.dtype`` first.
    """
    dtype = x.dtype if dtype is None else dtype
    strict = backend in ("pallas", "interpret")
    slow = functools.partial(_xla, dtype)
    if _dense(weight) or not tries_kernels(backend):
        return slow(x, weight)
    taken, reasons = _first(candidates(rows_of(x), weight), weight)
    if taken is None:
        if strict:
            raise KernelError("matmul", reasons, 'use backend="auto" for the XLA path')
        return slow(x, weight)
    kernel = functools.partial(_on_rows, taken, dtype)
    if backend == "auto":
        return lax.platform_dependent(x, weight, cuda=kernel, default=slow)
    return kernel(x, weight, interpret=backend == "interpret")


def _on_rows(
    taken: Candidate,
    dtype: Any,
    x: jax.Array | QActivation,
    weight: QTensor | Prepared,
    interpret: bool = False,
) -> jax.Array:
    """Run a kernel, which sees ``[rows, in]``, on ``[..., in]``."""
    rows = x if isinstance(x, QActivation) else x.reshape(-1, x.shape[-1])
    y = taken.run(rows, weight, interpret)
    return y.reshape(*x.shape[:-1], y.shape[-1]).astype(dtype)


def run_grouped_matmul(
    x: jax.Array,
    bank: ExpertBank | StackedBank,
    group_sizes: jax.Array,
    backend: Backend,
    source: jax.Array | None = None,
    gated: bool = False,
) -> jax.Array:
    """Run ``grouped_matmul`` on a resolved backend: each run by its kernel, or by XLA.

    Dense runs that no kernel takes are left to XLA also where kernels were asked for.
    """
    strict = backend in ("pallas", "interpret")
    slow = functools.partial(grouped_matmul_xla, gated=gated)
    if not tries_kernels(backend):
        return slow(x, bank, group_sizes, source)
    rows = (x if source is None else source).shape[0]
    one = jax.eval_shape(StackedBank.cut, bank) if isinstance(bank, StackedBank) else bank
    shape = jax.ShapeDtypeStruct((rows, one.parts[0].extent("in")), x.dtype)
    taken: list[GroupedCandidate | None] = []
    refused: list[tuple[str, str]] = []
    for part, run in zip(one.parts, one.runs, strict=True):
        candidate, reasons = _first(grouped_candidates(shape, part, one.experts, run.start), bank)
        taken.append(candidate)
        if candidate is None and not _dense(part):
            refused += [(f"{name} [{run.start}:{run.stop}]", reason) for name, reason in reasons]
    if strict and refused:
        raise KernelError("grouped_matmul", tuple(refused), 'use backend="auto" for the XLA path')
    if not any(taken):
        return slow(x, bank, group_sizes, source)
    kernels = functools.partial(_each_run, taken, gated)
    if backend == "auto":
        return lax.platform_dependent(x, bank, group_sizes, source, cuda=kernels, default=slow)
    return kernels(x, bank, group_sizes, source, interpret=backend == "interpret")


def _each_run(
    taken: Sequence[GroupedCandidate | None],
    gated: bool,
    x: jax.Array,
    bank: ExpertBank | StackedBank,
    group_sizes: jax.Array,
    source: jax.Array | None,
    interpret: bool = False,
) -> jax.Array:
    """Let every run write its rows into one array: those of XLA first, which start from zeros."""
    slow = [i for i, candidate in enumerate(taken) if candidate is None]
    y = None
    if slow:
        y = grouped_matmul_xla(x, bank, group_sizes, source, gated=gated, runs=slow)
    layer, bank = (bank.layer, bank.stack) if isinstance(bank, StackedBank) else (None, bank)
    readers: dict[Any, list[Run]] = {}
    for candidate, run in zip(taken, bank.runs, strict=True):
        if candidate is not None:
            readers.setdefault(candidate.form, []).append(run)
    operand = Operand(x, group_sizes, source, gated, readers, layer, interpret)
    found = [
        (candidate, part, run)
        for candidate, part, run in zip(taken, bank.parts, bank.runs, strict=True)
        if candidate is not None
    ]
    # Quantized activations first: what makes them may make the plain ones besides.
    for candidate, part, run in sorted(found, key=lambda one: one[0].form is None):
        y = candidate.run(operand, part, run.start, y)
    assert y is not None
    return y
