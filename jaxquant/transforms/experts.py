"""Experts of mixed formats: from one QTensor per expert to a plan and its banks.

Works on real arrays and on abstract ones (``jax.ShapeDtypeStruct`` leaves) alike, so that a model
can be planned and checked before a byte of it is read.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.arguments import whole
from jaxquant.arrays.bank import ExpertBank, ExpertPlan, Run
from jaxquant.arrays.qtensor import QTensor, require_qtensor
from jaxquant.errors import PlanError
from jaxquant.transforms.leading import index_lead
from jaxquant.transforms.repack import aligned_empty


def signature(q: QTensor) -> Hashable:
    """What two weights must share to stand in one run: layout, leaves present, shapes, dtypes."""
    leaves, structure = jax.tree.flatten(q)
    return structure, tuple((tuple(leaf.shape), str(leaf.dtype)) for leaf in leaves)


def _kin(q: QTensor) -> Hashable:
    """What weights share whose layouts kernels can read as one run, if they stand together."""
    return q.layout.code.bits, q.layout.scales, q.act, q.perm is None, q.shape


def _ranks(column: Sequence[QTensor]) -> list[int]:
    """Number each distinct layout in order of first appearance, kin next to each other."""
    keys = [signature(q) for q in column]
    kin: dict[Hashable, dict[Hashable, None]] = {}
    for q, key in zip(column, keys, strict=True):
        kin.setdefault(_kin(q), {})[key] = None
    number = {key: i for i, key in enumerate(itertools.chain.from_iterable(kin.values()))}
    return [number[key] for key in keys]


def _snake(classes: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Order distinct tuples so that neighbours differ in as few places as possible.

    Sorted by the first place; within it by the others, forwards and backwards in turn, so that a
    run of a later projection continues across a boundary of an earlier one.
    """
    if len(classes) < 2:
        return classes
    ordered: list[tuple[int, ...]] = []
    for i, head in enumerate(sorted({key[0] for key in classes})):
        tails = _snake(sorted(key[1:] for key in classes if key[0] == head))
        ordered += [(head, *tail) for tail in (tails if i % 2 == 0 else reversed(tails))]
    return ordered


def equal_runs(keys: Sequence[Any]) -> tuple[Run, ...]:
    """The ranges of equal neighbours: runs of experts in a bank, of layers in a model."""
    runs, start = [], 0
    for _, group in itertools.groupby(keys):
        stop = start + sum(1 for _ in group)
        runs.append(Run(start, stop))
        start = stop
    return tuple(runs)


def plan_experts(
    projections: Sequence[Sequence[QTensor]], devices: int = 1, where: str = "experts"
) -> ExpertPlan:
    """Sort experts so that equal layouts are contiguous in every projection.

    The first projection gets one run per layout, later ones as few as a common order allows.

    Args:
        projections: for each projection (gate, up, down) the weight of every expert by id, real or
            abstract; an act-order weight (with ``perm``) forms runs of its own.
        devices: ways of expert parallelism; each layout is dealt evenly over the devices.
        where: module path for messages.
    Raises:
        PlanError: projections of different length, or experts of one projection whose logical
            shapes differ.
        ConfigError: ``devices`` is no number of devices.
        LayoutError: an expert is no QTensor.
    """
    devices = whole("devices", devices)
    counts = {len(column) for column in projections}
    if len(counts) != 1 or 0 in counts:
        raise PlanError(where, [f"projections have {sorted(counts)} experts, all need as many"])
    problems = [
        f"projection {p}: experts have shapes {shapes}, all are equal"
        for p, column in enumerate(projections)
        if len(shapes := sorted({require_qtensor(where, q).shape for q in column})) > 1
    ]
    if problems:
        raise PlanError(where, problems)
    columns = [_ranks(column) for column in projections]
    members: dict[tuple[int, ...], list[int]] = collections.defaultdict(list)
    for expert, key in enumerate(zip(*columns, strict=True)):
        members[key].append(expert)
    classes = _snake(list(members))
    order: list[int] = []
    ghosts: list[int] = []
    for device in range(devices):
        for key in classes:
            share = -(-len(members[key]) // devices)
            dealt = members[key][device::devices]
            missing = share - len(dealt)
            ghosts += range(len(order) + len(dealt), len(order) + share)
            order += dealt + [members[key][0]] * missing
    local = order[: len(order) // devices]
    runs = tuple(equal_runs([column[expert] for expert in local]) for column in columns)
    return ExpertPlan(tuple(order), runs, tuple(ghosts), devices)


def bank_experts(
    plan: ExpertPlan, projection: int, load: Callable[[int], QTensor], where: str = "experts"
) -> ExpertBank:
    """Stack one projection's experts into a bank.

    NumPy leaves are copied one expert at a time into the stacked array, so that the peak is the
    bank plus one expert.

    Args:
        plan: made by :func:`plan_experts` from the same weights.
        projection: index of the projection in the plan.
        load: gives the weight of an expert id; called once per bank position, in bank order.
        where: module path for messages.
    Raises:
        PlanError: a loaded expert has another layout or shape than the rest of its run.
    """
    projection = whole("projection", projection, 0, len(plan.runs) - 1)
    runs = plan.runs[projection]
    parts = []
    for run in runs:
        positions = [
            device * plan.local + local
            for device in range(plan.devices)
            for local in range(run.start, run.stop)
        ]
        parts.append(_stack([plan.order[p] for p in positions], load, where))
    return ExpertBank(tuple(parts), runs)


def _stack(experts: Sequence[int], load: Callable[[int], QTensor], where: str) -> QTensor:
    first = require_qtensor(where, load(experts[0]))
    leaves, structure = jax.tree.flatten(first)
    expected, count = signature(first), len(experts)
    on_host = all(isinstance(leaf, np.ndarray) for leaf in leaves)
    abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    stacked: list[Any] = [
        aligned_empty((count, *leaf.shape), leaf.dtype) for leaf in leaves * on_host
    ]
    columns: list[list[Any]] = [[] for _ in leaves]
    for i, expert in enumerate(experts):
        q = first if i == 0 else load(expert)
        if signature(q) != expected:
            problem = f"{where}.{expert}: {q!r} is not like the rest of its run, {first!r}"
            raise PlanError(where, [problem])
        for j, leaf in enumerate(jax.tree.leaves(q)):
            if on_host:
                stacked[j][i] = leaf
            else:
                columns[j].append(leaf)
    if abstract:
        stacked = [jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype) for leaf in leaves]
    elif not on_host:
        stacked = [jnp.stack(column) for column in columns]
    return jax.tree.unflatten(structure, stacked)


def expert_weight(bank: ExpertBank, plan: ExpertPlan, expert: int) -> QTensor:
    """Return one expert's weight ``[out, in]`` by id.

    Raises:
        ConfigError: there is no such expert.
    """
    expert = whole("expert", expert, 0, plan.experts - 1)
    device, local = divmod(int(plan.positions[expert]), plan.local)
    for run, part in zip(bank.runs, bank.parts, strict=True):
        if run.start <= local < run.stop:
            return index_lead(part, device * (run.stop - run.start) + local - run.start)
    raise PlanError("experts", [f"expert {expert} stands in no run of {bank!r}"])
