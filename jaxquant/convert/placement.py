"""Where weights go: one device, or the shards that a mesh asks for."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxquant.arrays.bank import ExpertBank
from jaxquant.arrays.qtensor import QTensor
from jaxquant.errors import LayoutError
from jaxquant.transforms.repack import aligned_copy, is_host_memory
from jaxquant.transforms.shard import ShardingRules, shardings, specs

_TENSOR_AXES, _EXPERT_AXES = ("tp", "model"), ("ep", "expert")
# Logical axis that a projection splits over: outputs of the first, inputs of the second.
_SPLIT_OUT = re.compile(r"\.(q_proj|k_proj|v_proj|q_b_proj|kv_b_proj|gate_proj|up_proj)$")
_SPLIT_IN = re.compile(r"\.(o_proj|down_proj)$")


def automatic(mesh: Mesh) -> Mesh:
    """The same devices under the same names, with shardings that the compiler propagates.

    Axes of ``jax.make_mesh`` are explicit by default: there every matmul and scatter of a model
    would have to say how its result is split.
    """
    return Mesh(mesh.devices, mesh.axis_names)


def rules_for(mesh: Mesh) -> ShardingRules:
    """Logical axes to mesh axes, which are known by their names."""
    tensor = next((name for name in _TENSOR_AXES if name in mesh.shape), None)
    expert = next((name for name in _EXPERT_AXES if name in mesh.shape), None)
    return ShardingRules((("inner", tensor), ("vocab", tensor), ("expert", expert)))


def logical_axes(path: str) -> dict[str, str]:
    """Which axis of the weight at a module path is split, by logical axis."""
    if _SPLIT_OUT.search(path):
        return {"out": "inner"}
    if _SPLIT_IN.search(path):
        return {"in": "inner"}
    return {"out": "vocab"} if path.endswith("lm_head") else {}


def _weight_shardings(q: QTensor, path: str, mesh: Mesh, lead: tuple[str, ...]) -> QTensor:
    """Shardings of a weight; one that cannot be cut there is replicated.

    Experts that the mesh does not divide are on every device, cut along their inner width still.
    """
    rules = rules_for(mesh)
    for logical, leading in ((logical_axes(path), lead), (logical_axes(path), ())):
        try:
            return shardings(specs(q, logical, rules, mesh, leading, path), mesh)
        except LayoutError:
            continue
    return shardings(specs(q, {}, rules, mesh, (), path), mesh)


def sharding_of(path: str, value: Any, mesh: Mesh) -> Any:
    """Shardings with the structure of ``value``: a QTensor, an ExpertBank or an array.

    A weight whose blocks cannot be cut evenly is replicated, which is correct and costs memory;
    ``value.addressable_shards`` shows it.
    """
    if isinstance(value, ExpertBank):
        parts = tuple(_weight_shardings(p, path, mesh, ("expert",)) for p in value.parts)
        return ExpertBank(parts, value.runs)
    if isinstance(value, QTensor):
        return _weight_shardings(value, path, mesh, ())
    return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), value)


def placer(mesh: Mesh | None) -> Callable[[str, Any], Any]:
    """``place(path, value)`` that puts NumPy leaves onto devices, never aliasing a file."""

    def own(leaf: Any) -> Any:
        # A view of a mapped file must not become a weight: the file may change or vanish.
        mapped = isinstance(leaf, np.ndarray) and not is_host_memory(leaf)
        return aligned_copy(leaf) if mapped else leaf

    def place(path: str, value: Any) -> Any:
        value = jax.tree.map(own, value)
        if mesh is None:
            return jax.device_put(value)
        return jax.device_put(value, sharding_of(path, value, mesh))

    return place
