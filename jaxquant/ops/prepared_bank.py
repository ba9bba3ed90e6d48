"""Banks of experts in the order in which grouped kernels read them, and two banks as one.

Gate and up projections of a layer take the same rows.  Where their experts stand in equal runs of
equal layouts, one bank with the channels of both is one launch instead of two, and quantizes the
rows once.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.arrays.bank import ExpertBank
from jaxquant.arrays.layout import WHOLE
from jaxquant.arrays.qtensor import QTensor
from jaxquant.ops.prepared import Prepared, prepare, unprepare
from jaxquant.transforms.structure import concat, split

# Axis of the records of a stack of prepacked weights: those of one block of channels together.
_BLOCKS = -3


def prepare_bank(bank: ExpertBank) -> ExpertBank:
    """Bring every run into kernel order, where a kernel has one."""
    parts = (prepare(part) if isinstance(part, QTensor) else part for part in bank.parts)
    return ExpertBank(tuple(parts), bank.runs)


def unprepare_bank(bank: ExpertBank) -> ExpertBank:
    """Exact inverse of :func:`prepare_bank`."""
    parts = (unprepare(part) if isinstance(part, Prepared) else part for part in bank.parts)
    return ExpertBank(tuple(parts), bank.runs)


def _signature(part: Any) -> Any:
    leaves, structure = jax.tree.flatten(part)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


def _joinable(part: QTensor | Prepared) -> bool:
    """Whether another weight's channels can follow, so that a cut gives both back as they were."""
    leaves = [part.perm, part.act_scale, part.act_zero, part.pre_scale]
    leaves += [part.packed.factor] if isinstance(part, Prepared) else []
    layout = part.layout
    steps = [grid[layout.index("out")] for grid in (*layout.data, *layout.scales, *layout.zeros)]
    return all(leaf is None for leaf in leaves) and all(
        step != WHOLE and part.extent("out") % step == 0 for step in steps
    )


def _join(a: QTensor | Prepared, b: QTensor | Prepared) -> QTensor | Prepared:
    if isinstance(a, QTensor) and isinstance(b, QTensor):
        return concat([a, b], "out")
    assert isinstance(a, Prepared) and isinstance(b, Prepared)
    records = jnp.concatenate([a.packed.records, b.packed.records], _BLOCKS)
    packed = dataclasses.replace(a.packed, records=records, n=a.packed.n + b.packed.n)
    return dataclasses.replace(a, packed=packed)


def _halves(part: QTensor | Prepared) -> list[QTensor | Prepared]:
    if isinstance(part, QTensor):
        return list(split(part, "out", [part.extent("out") // 2] * 2))
    both = jnp.split(part.packed.records, 2, _BLOCKS)
    n = part.packed.n // 2
    packed = (dataclasses.replace(part.packed, records=records, n=n) for records in both)
    return [dataclasses.replace(part, packed=half) for half in packed]


@jax.jit
def _joined(a: ExpertBank, b: ExpertBank) -> ExpertBank:
    return ExpertBank(tuple(map(_join, a.parts, b.parts)), a.runs)


def join_banks(a: ExpertBank, b: ExpertBank) -> ExpertBank | None:
    """One bank with the channels of ``a``, then those of ``b``; None where layouts or runs differ.

    Weights with leaves that all channels share (act-orders, static activation scales, scales for
    the whole weight) are not joined: only their values could tell whether they are the same.
    """
    if a.runs != b.runs or _signature(a) != _signature(b) or not all(map(_joinable, a.parts)):
        return None
    return _joined(a, b)


@jax.jit
def split_bank(bank: ExpertBank) -> tuple[ExpertBank, ExpertBank]:
    """Exact inverse of :func:`join_banks`."""
    first, second = zip(*map(_halves, bank.parts), strict=True)
    return ExpertBank(first, bank.runs), ExpertBank(second, bank.runs)
