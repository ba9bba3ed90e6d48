"""Sharding: one logical spec per weight gives the PartitionSpec of every leaf.

A module says once which logical axis each of its axes is (``{"in": "embed", "out": "ffn"}``);
:class:`ShardingRules` maps logical axes to mesh axes; :func:`specs` derives the leaves' specs from
the layout.  The check is on extents, never on cell counts: 960 = 7.5 x 128 has 8 cells, which split
four ways while the 240-row shards straddle blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxquant.arrays.layout import WHOLE, Grid
from jaxquant.arrays.qtensor import QTensor, require_qtensor
from jaxquant.errors import LayoutError


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Which mesh axis each logical axis is split over; None replicates.

    Attributes:
        rules: logical axis -> mesh axis, as pairs so that the rules are hashable.
    """

    rules: tuple[tuple[str, str | None], ...]

    def __post_init__(self) -> None:
        names = [logical for logical, _ in self.rules]
        if len(set(names)) != len(names):
            raise LayoutError("ShardingRules", f"{names}", "each logical axis has one rule")

    def mesh_axis(self, logical: str | None) -> str | None:
        """Mesh axis of a logical axis; None for an axis without a rule."""
        return None if logical is None else dict(self.rules).get(logical)


def _refusal(
    q: QTensor, where: str, axis: str, ways: int, mesh_axis: str, span: int
) -> LayoutError:
    extent = q.extent(axis)
    legal = [n for n in range(2, ways) if extent % n == 0 and extent // n % span == 0]
    options = []
    if legal:
        options.append(f"use {' or '.join(map(str, legal))}-way {mesh_axis!r}")
    options.append(f"pad_axis({axis!r}, {-(-extent // (span * ways)) * span * ways})")
    options.append("replicate")
    shard = f"shards of {extent / ways:g} are not a multiple of {span}"
    found = f"cannot split axis {axis!r} ({extent}) {ways} ways over mesh axis {mesh_axis!r}"
    return LayoutError(where, found, shard, ", or ".join(options))


def specs(
    q: QTensor,
    logical: Mapping[str, str],
    rules: ShardingRules,
    mesh: Mesh,
    lead: tuple[str | None, ...] = (),
    where: str = "weight",
) -> QTensor:
    """Return ``q`` with a PartitionSpec in place of every leaf.

    Args:
        q: ``[*lead, *axes]``, real or abstract leaves.
        logical: axis of ``q`` -> logical axis.
        rules: logical axis -> mesh axis.
        mesh: the mesh.
        lead: logical axis (or None) of each leading axis, e.g. ``("expert",)``.
        where: module path for error messages.
    Returns:
        The same pytree, to be used as ``jit(in_shardings=)`` or in ``shard_map``.
    Raises:
        LayoutError: a shard would end inside a group or a block, two axes use one mesh axis, an
            act-order weight would be split along ``in`` (gather the activations first), or an axis
            is named that ``q`` or the mesh does not have.
    """
    unknown = sorted(set(logical) - set(require_qtensor(where, q).axes))
    if unknown:
        raise LayoutError(where, f"logical axes of {unknown}", f"the axes are {q.axes}")
    if len(lead) > len(q.lead):
        raise LayoutError(where, f"{lead} for leading axes", f"the weight has {len(q.lead)}")
    chosen = {axis: rules.mesh_axis(logical.get(axis)) for axis in q.axes}
    lead_axes = tuple(rules.mesh_axis(name) for name in lead) + (None,) * (len(q.lead) - len(lead))
    used = [axis for axis in (*lead_axes, *chosen.values()) if axis is not None]
    if absent := [axis for axis in used if axis not in mesh.shape]:
        raise LayoutError(where, f"mesh axes {absent}", f"the mesh has {tuple(mesh.shape)}")
    if len(set(used)) != len(used):
        raise LayoutError(where, f"mesh axes {used}", "a mesh axis splits one axis of a weight")
    for axis, mesh_axis in chosen.items():
        if mesh_axis is None:
            continue
        ways = mesh.shape[mesh_axis]
        span = q.layout.span(axis)
        if ways > 1 and axis == "in" and q.perm is not None:
            raise LayoutError(
                where,
                f"act-order weight split {ways} ways along 'in'",
                "every shard would need activations of all others",
                "split along 'out', or gather the activations before they are sharded",
            )
        if q.extent(axis) % ways or q.extent(axis) // ways % span:
            raise _refusal(q, where, axis, ways, mesh_axis, span)
    for extent, mesh_axis in zip(q.lead, lead_axes, strict=True):
        if mesh_axis is not None and extent % mesh.shape[mesh_axis]:
            ways = mesh.shape[mesh_axis]
            raise LayoutError(
                where, f"{extent} experts or layers, {ways} ways", "they divide evenly"
            )

    return partition(q, chosen, lead_axes)


def partition(
    q: QTensor, chosen: Mapping[str, str | None], lead: tuple[str | None, ...]
) -> QTensor:
    """Return ``q`` with the PartitionSpec of every leaf, where the cuts are known to be legal.

    Args:
        q: ``[*lead, *axes]``, whole or one device's part of it, real or abstract leaves.
        chosen: axis of ``q`` -> mesh axis that splits it; others are not split.
        lead: mesh axis (or None) of each leading axis.
    """

    def one(_: Any, grid: Grid) -> PartitionSpec:
        trailing = [
            None if step == WHOLE else chosen.get(axis)
            for axis, step in zip(q.axes, grid, strict=True)
        ]
        return PartitionSpec(*lead, *trailing)

    perm = None if q.perm is None else PartitionSpec(*lead, None)
    return q.map(one, perm=perm)


def shardings(partition: QTensor, mesh: Mesh) -> QTensor:
    """Turn the result of :func:`specs` into NamedShardings, for ``device_put``."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        partition,
        is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
    )
