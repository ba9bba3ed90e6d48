"""Weights in the order in which kernels read them, for a whole model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, TypeVar

from flax import nnx

from jaxquant.arguments import instance
from jaxquant.arrays.bank import Run
from jaxquant.arrays.qtensor import QTensor
from jaxquant.nn.attention import Attention
from jaxquant.nn.basic import MLP
from jaxquant.nn.joined import JoinedLinear, cut_linear, join_linears
from jaxquant.nn.linear import Linear, QWeight
from jaxquant.nn.mla import LatentAttention
from jaxquant.nn.moe import PROJECTIONS, Experts
from jaxquant.nn.stack import Layers, is_stack, layer_of, layer_runs, sequences, stack_run
from jaxquant.ops.prepared import Prepared, prepare, unprepare
from jaxquant.ops.prepared_bank import join_banks, prepare_bank, split_bank, unprepare_bank
from jaxquant.ops.sharded import Sharded, on_several_devices, shard, unshard
from jaxquant.ops.sharded_bank import (
    bank_gains,
    join_shards,
    one_order,
    shard_bank,
    split_shards,
    unshard_bank,
)

Model = TypeVar("Model", bound=nnx.Module)

# Linears of a module that read one input, and what holds them joined.
_JOINS: tuple[tuple[type[nnx.Module], tuple[str, ...], str], ...] = (
    (Attention, ("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    (LatentAttention, ("q_a_proj", "kv_a_proj_with_mqa"), "qkv_a_proj"),
    (MLP, ("gate_proj", "up_proj"), "gate_up_proj"),
)

# Absorbed latent attention cuts this weight by head, which kernel order does not allow.
_STRUCTURAL = re.compile(r"(^|\.)kv_b_proj$")


def prepare_model(model: Model) -> Model:
    """Return the model with every weight in kernel order, where a kernel has one.

    Projections that read one input (q, k and v; gate and up, also those of experts) become one
    weight where their layouts allow and a kernel takes it.

    Weights that lie on a mesh become their devices' parts, each in kernel order, and stay apart:
    their matmuls run on every device, with one sum over devices after a weight whose inputs are
    split.  There each device quantizes its part of the inputs by itself, with its own scales.

    A pure transform with an exact inverse, to be made last: prepared weights cannot be cut, joined
    or sharded.  :func:`jaxquant.from_pretrained` does it where the machine has such kernels;
    weights are converted module by module, so that only those of one are in memory twice.

    Stacked layers are prepared one by one and stacked again, twice each, so that the old stack, the
    new one and one layer are in memory together.  Stacks on a mesh stay as they are, since the
    parts of devices have no axis for layers.

    Args:
        model: any NNX model with :class:`jaxquant.Linear` layers; it is left as it was.
    Raises:
        ConfigError: no NNX model.
    """
    instance("prepare_model", model, nnx.Module, "an NNX model is needed")
    prepared = nnx.clone(model)
    for sequence in sequences(prepared):
        _prepare_stacks(sequence)
    for module, names, joined in _joins(prepared):
        _join(module, names, joined)
    for path, node in list(nnx.iter_graph(prepared)):
        if isinstance(node, Experts):
            _prepare_experts(node)
        elif isinstance(node, Linear) and not _STRUCTURAL.search(".".join(map(str, path))):
            value = node.weight.get_value()
            if isinstance(value, QTensor) and not value.lead:
                node.weight.set_value(_prepare_weight(value))
    return prepared


def unprepare_model(model: Model) -> Model:
    """Exact inverse of :func:`prepare_model`.

    Raises:
        ConfigError: no NNX model.
    """
    instance("unprepare_model", model, nnx.Module, "an NNX model is needed")
    plain = nnx.clone(model)
    for module, names, joined in _joins(plain):
        _cut(module, names, joined)
    for _, node in list(nnx.iter_graph(plain)):
        if isinstance(node, Experts):
            _unprepare_experts(node)
        elif isinstance(node, Linear):
            value = node.weight.get_value()
            if isinstance(value, Prepared):
                node.weight.set_value(unprepare(value))
            elif isinstance(value, Sharded):
                node.weight.set_value(unshard(value))
    return plain


def is_prepared(model: nnx.Module) -> bool:
    """Return whether :func:`prepare_model` changed anything in this model."""
    for _, node in nnx.iter_graph(model):
        if isinstance(node, JoinedLinear):
            return True
        if isinstance(node, Linear) and isinstance(node.weight.get_value(), Prepared | Sharded):
            return True
        if isinstance(node, Experts):
            if node.gate_up_proj is not None:
                return True
            banks = [getattr(node, name).get_value() for name in PROJECTIONS]
            if isinstance(banks[0], Sharded):
                return True
            if any(isinstance(part, Prepared) for bank in banks for part in bank.parts):
                return True
    return False


def _joins(model: nnx.Module) -> list[tuple[nnx.Module, tuple[str, ...], str]]:
    """Every module with linears that read one input, with their names and that of the joined."""
    return [
        (node, names, joined)
        for _, node in nnx.iter_graph(model)
        for kind, names, joined in _JOINS
        if isinstance(node, kind)
    ]


def _join(module: nnx.Module, names: tuple[str, ...], joined: str) -> None:
    linears: list[Any] = [getattr(module, name) for name in names]
    both = None if None in linears else join_linears(linears)
    if both is not None:
        setattr(module, joined, nnx.data(both))
        for name in names:
            setattr(module, name, nnx.static(None))


def _cut(module: nnx.Module, names: tuple[str, ...], joined: str) -> None:
    both = getattr(module, joined)
    if both is not None:
        setattr(module, joined, nnx.static(None))
        for name, linear in zip(names, cut_linear(both), strict=True):
            setattr(module, name, nnx.data(linear))


def _prepare_stacks(sequence: Layers) -> None:
    """Prepare the layers of every stack, each of which may be several stacks then."""
    layers: list[nnx.Module] = []
    runs: list[Run] = []
    for run, item in zip(sequence.runs, list(sequence.layers), strict=True):
        made = _prepared_stack(item, run.stop - run.start) if is_stack(run) else None
        for part, own in made or [(item, Run(0, run.stop - run.start))]:
            layers.append(part)
            runs.append(Run(run.start + own.start, run.start + own.stop))
    sequence.layers, sequence.runs = nnx.List(layers), tuple(runs)


def _prepared_stack(stack: nnx.Module, count: int) -> list[tuple[nnx.Module, Run]] | None:
    """The stacks that the prepared layers of one are, None where nothing changes."""
    if on_several_devices(nnx.state(stack)):
        return None

    def prepared(run: Run) -> Iterator[nnx.Module]:
        return (prepare_model(layer_of(stack, i)) for i in range(run.start, run.stop))

    if len(layer_runs([layer_of(stack, 0), next(prepared(Run(0, 1)))])) == 1:
        return None
    # Whether projections are joined may depend on their values, and so on the layer.
    runs = layer_runs(prepared(Run(0, count)))
    return [
        (
            stack_run(prepared(run), run.stop - run.start)
            if is_stack(run)
            else next(prepared(run)),
            run,
        )
        for run in runs
    ]


def _prepare_weight(q: QTensor) -> QTensor | Prepared | Sharded:
    return shard(q) if on_several_devices(q) else prepare(q)


def _prepare_experts(experts: Experts) -> None:
    banks = [variable.get_value() for variable in _projections(experts)]
    if on_several_devices(banks):
        if not any(isinstance(bank, Sharded) for bank in banks):
            _shard_experts(experts, banks)
        return
    for variable in _projections(experts):
        variable.set_value(prepare_bank(variable.get_value()))
    gate, up = experts.gate_proj, experts.up_proj
    both = None
    if gate is not None and up is not None:
        both = join_banks(gate.get_value(), up.get_value())
    if both is not None:
        experts.gate_up_proj = nnx.data(QWeight(both))
        experts.gate_proj, experts.up_proj = nnx.static(None), nnx.static(None)


def _projections(experts: Experts) -> list[QWeight]:
    """Those of gate, up and down that stand for themselves."""
    variables = (experts.gate_proj, experts.up_proj, experts.down_proj)
    return [variable for variable in variables if variable is not None]


def _shard_experts(experts: Experts, banks: list[Any]) -> None:
    """Put each device's experts into kernel order; as they are where no kernel would take them."""
    cut = [made for bank in banks if (made := shard_bank(bank)) is not None]
    if len(cut) < len(banks) or not one_order(cut, banks) or not any(map(bank_gains, cut)):
        return
    both = join_shards(cut[0], cut[1])
    if both is not None:
        experts.gate_up_proj = nnx.data(QWeight(both))
        experts.gate_proj, experts.up_proj = nnx.static(None), nnx.static(None)
    for variable, value in zip(_projections(experts), cut[-1:] if both else cut, strict=True):
        variable.set_value(value)


def _unprepare_experts(experts: Experts) -> None:
    if experts.gate_up_proj is not None:
        both = experts.gate_up_proj.get_value()
        gate, up = split_shards(both) if isinstance(both, Sharded) else split_bank(both)
        experts.gate_up_proj = nnx.static(None)
        experts.gate_proj, experts.up_proj = nnx.data(QWeight(gate)), nnx.data(QWeight(up))
    for variable in _projections(experts):
        value = variable.get_value()
        plain = unshard_bank(value) if isinstance(value, Sharded) else unprepare_bank(value)
        variable.set_value(plain)
