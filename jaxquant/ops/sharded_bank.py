"""Banks of experts cut over the devices of a mesh: by experts, by their inner width, or both."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jaxquant.arrays.bank import ExpertBank, Run
from jaxquant.arrays.qtensor import QTensor
from jaxquant.ops.grouped_kernels import grouped_candidates
from jaxquant.ops.prepared_bank import join_banks, prepare_bank, split_bank, unprepare_bank
from jaxquant.ops.sharded import Placement, Sharded, cut, join, own, placement_of, stacked


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
    return cut(tuple(bank.parts), mesh, placements, _prepare_runs)


def _prepare_runs(parts: tuple[QTensor, ...]) -> ExpertBank:
    return prepare_bank(ExpertBank(parts, _runs_of([part.lead[0] for part in parts])))


def _unprepare_runs(bank: ExpertBank) -> tuple[QTensor, ...]:
    return unprepare_bank(bank).parts


def unshard_bank(bank: Sharded) -> ExpertBank:
    """Exact inverse of :func:`shard_bank`, onto the same mesh."""
    parts = join(bank, _unprepare_runs)
    return ExpertBank(parts, _runs_of([part.lead[0] for part in parts]))


def run_shapes(bank: Sharded) -> list[tuple[int, ...]]:
    """Logical shape ``[expert, out, in]`` of each run of the whole bank, before kernel order."""
    runs = jax.eval_shape(_unprepare_runs, bank.part)
    return [
        place.whole(run.shape, bank.mesh) for run, place in zip(runs, bank.placements, strict=True)
    ]


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


@functools.partial(jax.jit, static_argnames="function")
def _over_parts(function: Callable[..., Any], values: tuple[Sharded, ...]) -> Any:
    first = values[0]
    specs, depth = PartitionSpec(*first.cuts), len(first.cuts)

    def local(*parts: Any) -> Any:
        return stacked(depth, function(*(own(depth, part) for part in parts)))

    return jax.shard_map(
        local, mesh=first.mesh, in_specs=(specs,) * len(values), out_specs=specs, check_vma=False
    )(*(value.parts for value in values))


def join_shards(gate: Sharded, up: Sharded) -> Sharded | None:
    """:func:`join_banks` on every device, of banks that are cut over the same axes."""
    if jax.eval_shape(join_banks, gate.part, up.part) is None:
        return None
    return dataclasses.replace(gate, parts=_over_parts(join_banks, (gate, up)))


def split_shards(both: Sharded) -> tuple[Sharded, Sharded]:
    """Exact inverse of :func:`join_shards`."""
    gate, up = _over_parts(split_bank, (both,))
    return dataclasses.replace(both, parts=gate), dataclasses.replace(both, parts=up)


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
