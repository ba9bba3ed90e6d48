"""Weights in the order in which kernels read them, for a whole model."""

from __future__ import annotations

import re
from typing import TypeVar

import jax
from flax import nnx

from jaxquant.arrays.qtensor import QTensor
from jaxquant.nn.linear import Linear
from jaxquant.ops.prepared import Prepared, prepare, unprepare

Model = TypeVar("Model", bound=nnx.Module)

# Absorbed latent attention cuts this weight by head, which kernel order does not allow.
_STRUCTURAL = re.compile(r"(^|\.)kv_b_proj$")


def prepare_model(model: Model) -> Model:
    """Return the model with every linear's weight in kernel order, where a kernel has one.

    A pure transform with an exact inverse, to be made last: prepared weights cannot be cut, joined
    or sharded.  :func:`jaxquant.from_pretrained` does it where the machine has such kernels;
    weights are converted one by one, so that only one of them is in memory twice.

    Args:
        model: any NNX model with :class:`jaxquant.Linear` layers; it is left as it was.
    """
    prepared = nnx.clone(model)
    for path, node in nnx.iter_graph(prepared):
        if isinstance(node, Linear) and not _STRUCTURAL.search(".".join(map(str, path))):
            value = node.weight.get_value()
            if isinstance(value, QTensor) and not value.lead:
                node.weight.set_value(prepare(value))
    return prepared


def unprepare_model(model: Model) -> Model:
    """Exact inverse of :func:`prepare_model`."""
    plain = nnx.clone(model)
    for _, node in nnx.iter_graph(plain):
        if isinstance(node, Linear) and isinstance(node.weight.get_value(), Prepared):
            value = node.weight.get_value()
            node.weight.set_value((jax.vmap(unprepare) if value.lead else unprepare)(value))
    return plain
