"""Banks of experts cut over the devices of a mesh: by experts, by their inner width, or both."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jaxquant.arrays.bank import ExpertBank, Run
from jaxquant.arrays.qtensor import QTensor
from jaxquant.ops.grouped_kernels import grouped_candidates
from jaxquant.ops.prepared_bank import prepare_bank, unprepare_bank
from jaxquant.ops.sharded import Placement, Sharded, cut, join, own, part_of, placement_of, stacked


def _runs_of(counts: Sequence[int]) -> tuple[Run, ...]:
    """Runs of so many positions, one after the other."""
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    return tuple(Run(end - count, end) for count, end in zip(counts, ends, strict=True))


def shard_bank(bank: ExpertBank) -> Sharded | None:
    """A bank that lies on a mesh as its devices' banks, each in kernel order; else None.

    A run that its mesh axis splits is one of fewer experts on each device, in the same order.
    """
    found = [placement_of(q) for q in bank.parts if isinstance(q, QTensor)]
    known = [one for one in found if one is not None]
    if len(known) < len(bank.parts) or len({mesh for mesh, _ in known}) != 1:
        return None
    mesh, placements = known[0][0], tuple(placement for _, placement in known)
    parts = [part_of(q, mesh, place) for q, place in zip(bank.parts, placements, strict=True)]
    local = ExpertBank((), _runs_of([part.lead[0] for part in parts]))

    def order(parts: tuple[QTensor, ...]) -> ExpertBank:
        return prepare_bank(dataclasses.replace(local, parts=parts))

    specs = tuple(place.specs(q) for q, place in zip(bank.parts, placements, strict=True))
    return cut(bank.parts, specs, mesh, placements, order)


def unshard_bank(bank: Sharded) -> ExpertBank:
    """Exact inverse of :func:`shard_bank`, onto the same mesh."""

    def whole(part: ExpertBank) -> tuple[QTensor, ...]:
        return unprepare_bank(part).parts

    local = jax.eval_shape(whole, bank.part)
    specs = tuple(place.specs(q) for q, place in zip(local, bank.placements, strict=True))
    parts = join(bank, whole, specs)
    return ExpertBank(parts, _runs_of([part.lead[0] for part in parts]))


def bank_gains(bank: Sharded) -> bool:
    """Whether a kernel takes a run of each device's bank."""
    part = bank.part
    row = jax.ShapeDtypeStruct((1, part.parts[0].extent("in")), jnp.bfloat16)
    return any(
        candidate.reason is None
        for own, run in zip(part.parts, part.runs, strict=True)
        for candidate in grouped_candidates(row, own, part.experts, run.start)
    )


def one_order(cut: Sequence[Sharded], banks: Sequence[ExpertBank]) -> bool:
    """Whether devices hold the same experts of all projections, and the same part of all.

    Args:
        cut: gate, up and down; the outputs of the first two are the inputs of the last.
        banks: the three before they were cut.
    """
    gate, up, down = cut
    inner = {place.out for bank in (gate, up) for place in bank.placements}
    inner |= {place.inner for place in down.placements}
    crossed = [place.inner for bank in (gate, up) for place in bank.placements]
    crossed += [place.out for place in down.placements]
    if len(inner) != 1 or any(axis is not None for axis in crossed):
        return False
    experts = [tuple(place.expert for place in bank.placements) for bank in (gate, up, down)]
    if not any(axis is not None for bank in experts for axis in bank):
        return True
    return len(set(experts)) == 1 and len({bank.runs for bank in banks}) == 1


def over_parts(function: Callable[..., Any], *values: Sharded) -> Any:
    """Apply a function to the parts of each device, of values that are cut over the same axes.

    Returns:
        What the function makes, None or a Sharded like the first of ``values``.
    """
    first, depth = values[0], len(values[0].cuts)
    if jax.eval_shape(function, *(value.part for value in values)) is None:
        return None
    specs = PartitionSpec(*first.cuts)

    def local(*parts: Any) -> Any:
        return stacked(depth, function(*(own(depth, part) for part in parts)))

    apply = jax.shard_map(
        local, mesh=first.mesh, in_specs=(specs,) * len(values), out_specs=specs, check_vma=False
    )
    made = jax.jit(apply)(*(value.parts for value in values))
    return dataclasses.replace(first, parts=made)


def local_positions(runs: Sequence[Run], placements: Sequence[Placement], mesh: Mesh) -> np.ndarray:
    """Where each position of a bank stands on each device along the mesh axis that splits experts.

    Experts of a run that is not split lie on every device, and are dealt out in turn.

    Args:
        runs: of the whole bank.
        placements: of each run.
        mesh: the mesh.
    Returns:
        int32 ``[ways, position]``; for positions of other devices, the number of local ones.
    """
    axis = next((place.expert for place in placements if place.expert is not None), None)
    ways = 1 if axis is None else mesh.shape[axis]
    counts = [
        (run.stop - run.start) // (1 if place.expert is None else ways)
        for run, place in zip(runs, placements, strict=True)
    ]
    table = np.full((ways, runs[-1].stop), sum(counts), np.int32)
    start = 0
    for run, place, count in zip(runs, placements, counts, strict=True):
        for i in range(run.stop - run.start):
            owner, local = (i % ways, i) if place.expert is None else divmod(i, count)
            table[owner, run.start + i] = start + local
        start += count
    return table
