"""Banks of experts in the order in which grouped kernels read them; runs and banks as one.

Every run is a launch, and for few tokens a launch without rows costs as much as one with them.
Symmetric 4-bit weights beside such with zero points (GPTQ and AWQ) are one run here.

Gate and up projections of a layer take the same rows.  Where their experts stand in equal runs of
equal layouts, one bank with the channels of both is one launch instead of two, and quantizes the
rows once.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import pallas_kernels as pk
from jaxquant.arrays.bank import ExpertBank, Run
from jaxquant.arrays.codes import CODES
from jaxquant.arrays.layout import WHOLE
from jaxquant.arrays.qtensor import QTensor
from jaxquant.ops.prepared import Prepared, prepare, unprepare
from jaxquant.transforms.structure import concat, split

# Axis of the records of a stack of prepacked weights: those of one block of channels together.
_BLOCKS = -3


def prepare_bank(bank: ExpertBank) -> ExpertBank:
    """Bring every run into kernel order, where a kernel has one.

    Neighbouring runs of 4-bit weights that differ in nothing but whether they have zero points
    become one, and so one launch: zero points of 8 are stored where they were implied.
    """
    parts = [prepare(part) if isinstance(part, QTensor) else part for part in bank.parts]
    kinds = map(_kind, range(len(parts)), parts, bank.runs)
    merged: list[Any] = []
    runs: list[Run] = []
    for _, group in itertools.groupby(zip(kinds, parts, bank.runs, strict=True), lambda x: x[0]):
        own = list(group)
        kin = [part for _, part, _ in own]
        merged.append(_merge(kin) if len(kin) > 1 else kin[0])
        runs.append(Run(own[0][2].start, own[-1][2].stop))
    return ExpertBank(tuple(merged), tuple(runs))


def unprepare_bank(bank: ExpertBank) -> ExpertBank:
    """Exact inverse of :func:`prepare_bank`."""
    parts: list[Any] = []
    runs: list[Run] = []
    for part, run in zip(bank.parts, bank.runs, strict=True):
        if isinstance(part, Prepared) and part.members:
            counts = (count for count, _ in part.members)
            ends = itertools.accumulate(counts, initial=run.start)
            runs += itertools.starmap(Run, itertools.pairwise(ends))
            parts += map(unprepare, _members(part))
        else:
            parts.append(unprepare(part) if isinstance(part, Prepared) else part)
            runs.append(run)
    return ExpertBank(tuple(parts), tuple(runs))


def _with_zeros(part: Prepared) -> Prepared:
    """The same weight with its zero points stored, where it is one of 4 bits that implies them."""
    packed = pk.store_zeros(part.packed) if part.layout.affine == "symmetric" else None
    if packed is None:
        return part
    layout = part.layout
    layout = dataclasses.replace(
        layout, code=CODES["uint4"], affine="zero_point", zeros=layout.scales
    )
    return dataclasses.replace(part, packed=packed, layout=layout)


def _kind(index: int, part: Any, run: Run) -> Any:
    """What neighbouring runs share that can be one; those that cannot have their own index."""
    # Of several devices' runs each device has a part: they do not stand next to each other.
    if not isinstance(part, Prepared) or part.members or part.lead[-1] != run.stop - run.start:
        return index
    leaves, structure = jax.tree.flatten(jax.eval_shape(_with_zeros, part))
    axis = len(part.lead) - 1
    shapes = [(*leaf.shape[:axis], *leaf.shape[axis + 1 :]) for leaf in leaves]
    return structure, tuple(shapes), tuple(str(leaf.dtype) for leaf in leaves)


@jax.jit
def _merge(parts: Sequence[Prepared]) -> Prepared:
    axis = len(parts[0].lead) - 1
    first, *rest = map(_with_zeros, parts)
    merged = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis), first, *rest)
    return dataclasses.replace(
        merged, members=tuple((part.lead[-1], part.layout) for part in parts)
    )


@jax.jit
def _members(part: Prepared) -> list[Prepared]:
    """Exact inverse of :func:`_merge`."""
    axis = len(part.lead) - 1
    plain = dataclasses.replace(part, members=())
    members, start = [], 0
    for count, layout in part.members:
        cut = functools.partial(
            lax.slice_in_dim, start_index=start, limit_index=start + count, axis=axis
        )
        member = jax.tree.map(cut, plain)
        if layout != part.layout:
            member = dataclasses.replace(member, packed=pk.drop_zeros(member.packed), layout=layout)
        members.append(member)
        start += count
    return members


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
