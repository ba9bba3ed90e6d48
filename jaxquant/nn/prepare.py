"""Weights in the order in which kernels read them, for a whole model."""

from __future__ import annotations

import re
from typing import TypeVar

from flax import nnx

from jaxquant.arrays.qtensor import QTensor
from jaxquant.nn.linear import Linear, QWeight
from jaxquant.nn.moe import PROJECTIONS, Experts
from jaxquant.ops.prepared import Prepared, prepare, unprepare
from jaxquant.ops.prepared_bank import join_banks, prepare_bank, split_bank, unprepare_bank

Model = TypeVar("Model", bound=nnx.Module)

# Absorbed latent attention cuts this weight by head, which kernel order does not allow.
_STRUCTURAL = re.compile(r"(^|\.)kv_b_proj$")


def prepare_model(model: Model) -> Model:
    """Return the model with every weight in kernel order, where a kernel has one.

    Experts' gate and up projections become one bank where their layouts allow.

    A pure transform with an exact inverse, to be made last: prepared weights cannot be cut, joined
    or sharded.  :func:`jaxquant.from_pretrained` does it where the machine has such kernels;
    weights are converted one by one, so that only one of them is in memory twice.

    Args:
        model: any NNX model with :class:`jaxquant.Linear` layers; it is left as it was.
    """
    prepared = nnx.clone(model)
    for path, node in list(nnx.iter_graph(prepared)):
        if isinstance(node, Experts):
            _prepare_experts(node)
        elif isinstance(node, Linear) and not _STRUCTURAL.search(".".join(map(str, path))):
            value = node.weight.get_value()
            if isinstance(value, QTensor) and not value.lead:
                node.weight.set_value(prepare(value))
    return prepared


def unprepare_model(model: Model) -> Model:
    """Exact inverse of :func:`prepare_model`."""
    plain = nnx.clone(model)
    for _, node in list(nnx.iter_graph(plain)):
        if isinstance(node, Experts):
            _unprepare_experts(node)
        elif isinstance(node, Linear) and isinstance(node.weight.get_value(), Prepared):
            node.weight.set_value(unprepare(node.weight.get_value()))
    return plain


def is_prepared(model: nnx.Module) -> bool:
    """Return whether :func:`prepare_model` changed anything in this model."""
    for _, node in nnx.iter_graph(model):
        if isinstance(node, Linear) and isinstance(node.weight.get_value(), Prepared):
            return True
        if isinstance(node, Experts):
            if node.gate_up_proj is not None:
                return True
            banks = (getattr(node, name).get_value() for name in PROJECTIONS)
            if any(isinstance(part, Prepared) for bank in banks for part in bank.parts):
                return True
    return False


def _prepare_experts(experts: Experts) -> None:
    for variable in (experts.gate_proj, experts.up_proj, experts.down_proj):
        if variable is not None:
            variable.set_value(prepare_bank(variable.get_value()))
    gate, up = experts.gate_proj, experts.up_proj
    both = None
    if gate is not None and up is not None:
        both = join_banks(gate.get_value(), up.get_value())
    if both is not None:
        experts.gate_up_proj = nnx.data(QWeight(both))
        experts.gate_proj, experts.up_proj = nnx.static(None), nnx.static(None)


def _unprepare_experts(experts: Experts) -> None:
    if experts.gate_up_proj is not None:
        gate, up = split_bank(experts.gate_up_proj.get_value())
        experts.gate_up_proj = nnx.static(None)
        experts.gate_proj, experts.up_proj = nnx.data(QWeight(gate)), nnx.data(QWeight(up))
    for variable in (experts.gate_proj, experts.up_proj, experts.down_proj):
        if variable is not None:
            variable.set_value(unprepare_bank(variable.get_value()))
