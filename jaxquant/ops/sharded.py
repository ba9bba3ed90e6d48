"""Weights cut over the devices of a mesh, each part in the order that its device's kernels read.

XLA cannot split a kernel: it would gather the whole weight on every device, at every call.  So a
:class:`Sharded` weight holds every device's part as a weight of its own, and ops run on the parts
inside ``jax.shard_map``: a weight split along its outputs gives each device its outputs, one split
along its inputs sums the devices' products.  A column-parallel projection followed by a
row-parallel one therefore needs that one sum only, as in Megatron-LM (Shoeybi et al. 2019).

Activations that are quantized with scales computed from them are quantized on each device: along a
split input every device has a scale of its own for its part of a token.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxquant.arrays.qtensor import QTensor
from jaxquant.ops.kernels import candidates
from jaxquant.ops.prepared import Prepared, prepare, refusal, unprepare
from jaxquant.transforms.shard import partition


@dataclasses.dataclass(frozen=True)
class Placement:
    """Which mesh axis splits each axis of a weight; None splits nothing.

    Attributes:
        expert: of the leading axis of a stack of experts.
        out: of the outputs.
        inner: of the inputs, "in".
    """

    expert: str | None = None
    out: str | None = None
    inner: str | None = None

    @property
    def axes(self) -> set[str]:
        """The mesh axes."""
        return {axis for axis in (self.expert, self.out, self.inner) if axis is not None}

    def whole(self, shape: Sequence[int], mesh: Mesh) -> tuple[int, ...]:
        """Logical shape of the weight of which each device has ``[*lead, out, in]``."""
        split = (*(self.expert for _ in shape[:-2]), self.out, self.inner)
        return tuple(
            n if axis is None else n * mesh.shape[axis]
            for n, axis in zip(shape, split, strict=True)
        )

    def specs(self, q: QTensor) -> QTensor:
        """PartitionSpecs of the whole weight that ``q`` is, or is a part of."""
        return partition(q, {"out": self.out, "in": self.inner}, (self.expert,) * len(q.lead))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("parts",), meta_fields=("mesh", "placements")
)
@dataclasses.dataclass(frozen=True)
class Sharded:
    """A weight, or a bank of experts, as the parts that the devices of a mesh hold.

    Attributes:
        parts: what one device holds, a QTensor, a Prepared or an ExpertBank, with a leading axis on
            every leaf for each mesh axis of :attr:`cuts`.
        mesh: static.
        placements: static; of the weight, or of each run of the bank before kernel order.
    """

    parts: Any
    mesh: Mesh
    placements: tuple[Placement, ...]

    @property
    def placement(self) -> Placement:
        """Of a weight, or of a bank's first run."""
        return self.placements[0]

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes of a weight, always ``("out", "in")``."""
        return ("out", "in")

    @property
    def cuts(self) -> tuple[str, ...]:
        """Mesh axes over which parts differ."""
        used = set().union(*(placement.axes for placement in self.placements))
        return tuple(axis for axis in self.mesh.axis_names if axis in used)

    @property
    def devices(self) -> int:
        """Devices of the mesh."""
        return self.mesh.size

    @property
    def part(self) -> Any:
        """What one device holds, with abstract leaves."""
        return jax.eval_shape(functools.partial(own, len(self.cuts)), self.parts)

    @property
    def act(self) -> Any:
        """How activations are quantized, as of the whole weight."""
        return self.part.act

    @property
    def layout(self) -> Any:
        """Layout of a part."""
        return self.part.layout

    @property
    def lead(self) -> tuple[int, ...]:
        """Extents of leading axes of the whole weight."""
        return self.shape[:-2]

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape of the whole weight, ``[*lead, out, in]``; banks have one for each run."""
        return self.placement.whole(self.part.shape, self.mesh)

    def extent(self, axis: str) -> int:
        """Elements of the whole weight along "out" or "in"."""
        return self.shape[-2 if axis == "out" else -1]

    def __repr__(self) -> str:
        return f"Sharded({self.part!r} on each of {self.devices} devices)"

    @property
    def nbytes(self) -> int:
        """Bytes of the parts that differ: leaves that parts share count once for each."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.parts))


def own(depth: int, parts: Any) -> Any:
    """A device's part, out of the block of :attr:`Sharded.parts` that it sees."""
    return jax.tree.map(lambda leaf: leaf[(0,) * depth], parts)


def on_several_devices(value: Any) -> bool:
    """Whether any leaf lies on more than one device.

    Arrays of NumPy lie on none, and those under trace on none that is known.
    """
    return any(
        isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) and len(leaf.devices()) > 1
        for leaf in jax.tree.leaves(value)
    )


def _placed(leaf: Any, spec: PartitionSpec, mesh: Mesh) -> bool:
    return leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim)


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, PartitionSpec)


def placement_of(q: QTensor) -> tuple[Mesh, Placement] | None:
    """Where a weight lies, or None: on one device, or not as one placement says."""
    if q.axes != ("out", "in") or len(q.lead) > 1:
        return None
    sharding = getattr(q.data[0], "sharding", None)
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
        return None
    if sharding.mesh.size == 1:
        return None
    spec = (*sharding.spec, *(None,) * (q.data[0].ndim - len(sharding.spec)))
    if any(entry is not None and not isinstance(entry, str) for entry in spec):
        return None
    *lead, out, inner = spec
    placement = Placement(lead[0] if lead else None, out, inner)
    leaves = zip(
        jax.tree.leaves(q), jax.tree.leaves(placement.specs(q), is_leaf=_is_spec), strict=True
    )
    if not all(_placed(leaf, spec, sharding.mesh) for leaf, spec in leaves):
        return None
    return sharding.mesh, placement


def part_of(q: QTensor, mesh: Mesh, placement: Placement) -> QTensor:
    """One device's part of a weight, with abstract leaves."""

    def one(leaf: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        shape = NamedSharding(mesh, spec).shard_shape(leaf.shape)
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    leaves, structure = jax.tree.flatten(q)
    specs = jax.tree.leaves(placement.specs(q), is_leaf=_is_spec)
    return jax.tree.unflatten(structure, map(one, leaves, specs))


def _gains(part: QTensor) -> bool:
    """Whether a kernel takes a device's part of a weight, in kernel order if there is one."""
    if part.layout.dense:
        return False
    row = jax.ShapeDtypeStruct((1, part.extent("in")), jnp.bfloat16)
    return refusal(part) is None or any(c.reason is None for c in candidates(row, part))


def stacked(depth: int, part: Any) -> Any:
    """Inverse of :func:`own`."""
    return jax.tree.map(lambda leaf: leaf.reshape((1,) * depth + leaf.shape), part)


# Here and below jit is given functions of the module and static facts, never a closure: equal
# layers of a model are compiled once.
@functools.partial(jax.jit, static_argnames=("mesh", "placements", "order"))
def cut(
    values: tuple[QTensor, ...],
    mesh: Mesh,
    placements: tuple[Placement, ...],
    order: Callable[[tuple[QTensor, ...]], Any],
) -> Sharded:
    """Cut values as they lie, and bring every device's parts into kernel order there.

    Args:
        values: a weight, or the runs of a bank.
        mesh: where they lie.
        placements: of each.
        order: of one device's parts of all of them; a function of a module, equal for equal work.
    """
    cuts = Sharded(None, mesh, placements).cuts

    def local(parts: tuple[QTensor, ...]) -> Any:
        return stacked(len(cuts), order(parts))

    specs = tuple(place.specs(q) for q, place in zip(values, placements, strict=True))
    made = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(specs,),
        out_specs=PartitionSpec(*cuts),
        check_vma=False,
    )
    return Sharded(made(values), mesh, placements)


def _prepare_one(parts: tuple[QTensor, ...]) -> QTensor | Prepared:
    return prepare(parts[0])


def shard(q: QTensor) -> QTensor | Sharded:
    """Return a weight that lies on a mesh as its devices' parts, each in kernel order.

    A weight that lies on one device, or whose parts no kernel takes, comes back as it is.
    """
    found = placement_of(q)
    if found is None or q.lead or not _gains(part_of(q, *found)):
        return q
    mesh, placement = found
    return cut((q,), mesh, (placement,), _prepare_one)


def _unprepare_one(part: QTensor | Prepared) -> tuple[QTensor, ...]:
    return (unprepare(part) if isinstance(part, Prepared) else part,)


def unshard(weight: Sharded) -> QTensor:
    """Exact inverse of :func:`shard`, onto the same mesh."""
    return join(weight, _unprepare_one)[0]


@functools.partial(jax.jit, static_argnames="whole")
def join(value: Sharded, whole: Callable[[Any], tuple[QTensor, ...]]) -> tuple[QTensor, ...]:
    """Exact inverse of :func:`cut`; ``whole`` is that of its ``order``."""

    def local(parts: Any) -> Any:
        return whole(own(len(value.cuts), parts))

    made = jax.eval_shape(whole, value.part)
    specs = tuple(place.specs(q) for q, place in zip(made, value.placements, strict=True))
    return jax.shard_map(
        local,
        mesh=value.mesh,
        in_specs=(PartitionSpec(*value.cuts),),
        out_specs=specs,
        check_vma=False,
    )(value.parts)


def rows_axes(value: Sharded, rows: int) -> tuple[str, ...] | None:
    """Mesh axes that split the first axis of activations: those that do not split the weight.

    None where they do not divide it: then every device computes all rows.
    """
    others = tuple(axis for axis in value.mesh.axis_names if axis not in value.cuts)
    ways = math.prod(value.mesh.shape[axis] for axis in others)
    return others if ways > 1 and rows % ways == 0 else None


def matmul_on_parts(
    function: Callable[[jax.Array, Any, Any], jax.Array], x: jax.Array, weight: Sharded
) -> jax.Array:
    """Multiply ``[..., in]`` on every device with its part, by ``function(x, part, dtype)``.

    Where inputs are split, the products are summed in float32 and the sum is rounded.
    """
    place, depth = weight.placement, len(weight.cuts)
    lead: tuple[Any, ...] = (None,) * (x.ndim - 1)
    if lead:
        lead = (rows_axes(weight, x.shape[0]), *lead[1:])

    def local(x: jax.Array, parts: Any) -> jax.Array:
        part = own(depth, parts)
        if place.inner is None:
            return function(x, part, x.dtype)
        return lax.psum(function(x, part, jnp.float32), place.inner).astype(x.dtype)

    return jax.shard_map(
        local,
        mesh=weight.mesh,
        in_specs=(PartitionSpec(*lead, place.inner), PartitionSpec(*weight.cuts)),
        out_specs=PartitionSpec(*lead, place.out),
        check_vma=False,
    )(x, weight.parts)


def on_parts(
    function: Callable[..., jax.Array], values: Sequence[Sharded], *arrays: jax.Array
) -> jax.Array:
    """``function(parts, *arrays)`` on every device; devices that share rows have one result.

    Args:
        function: of the values' parts and rows of the arrays; sums over the devices itself.
        values: cut over the same axes.
        arrays: ``[row, ...]`` each, on every device.
    """
    first, depth = values[0], len(values[0].cuts)
    rows = PartitionSpec(rows_axes(first, arrays[0].shape[0]))

    def local(parts: Sequence[Any], *arrays: jax.Array) -> jax.Array:
        return function([own(depth, part) for part in parts], *arrays)

    return jax.shard_map(
        local,
        mesh=first.mesh,
        in_specs=(PartitionSpec(*first.cuts), *(rows for _ in arrays)),
        out_specs=rows,
        check_vma=False,
    )([value.parts for value in values], *arrays)
