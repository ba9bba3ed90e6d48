"""Layers under one loop: runs of equal layers as one module whose leaves have a leading axis.

A program that repeats its layers grows with their number, and compiling it takes a time that does
too.  Consecutive layers whose structure, layouts and static facts are all equal form a *run*; a
stacked run is one module with every leaf ``[layer, ...]``, over which ``lax.scan`` goes.

The loop takes each layer's leaves out of the stack.  Where that slice is part of a larger
computation (dequantization, a lookup) it costs nothing; where a kernel or library call reads the
weight it costs a copy.  Banks of experts are never sliced by layer: see
:class:`jaxquant.arrays.bank.StackedBank`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxquant.arguments import instance
from jaxquant.arrays.bank import ExpertBank, Run, StackedBank
from jaxquant.errors import LayoutError
from jaxquant.ops.sharded import Sharded
from jaxquant.transforms.experts import equal_runs
from jaxquant.transforms.leading import take_lead

M = TypeVar("M", bound=nnx.Module)


class Layers(nnx.Module):
    """Base of modules that are a sequence of layers, stacked or not.

    Attributes:
        layers: one module for each run.
        runs: static; which layers each of them stands for.  The leaves of one that stands for
            several layers have a leading axis of that length.
    """

    def __init__(self, layers: Sequence[nnx.Module], runs: Sequence[Run] | None = None) -> None:
        self.layers = nnx.List(layers)
        self.runs = tuple(runs or (Run(i, i + 1) for i in range(len(layers))))

    @property
    def stacked(self) -> bool:
        """Whether any layers are."""
        return any(map(is_stack, self.runs))


def is_stack(run: Run) -> bool:
    """Whether a run stands for several layers."""
    return run.stop - run.start > 1


def _abstract(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def layer_runs(layers: Iterable[nnx.Module]) -> tuple[Run, ...]:
    """The runs of equal layers: same structure, static facts, shapes and dtypes."""

    def key(layer: nnx.Module) -> Any:
        graph, state = nnx.split(layer)
        return graph, tuple((tuple(x.shape), str(x.dtype)) for x in jax.tree.leaves(state))

    return equal_runs([key(layer) for layer in layers])


def _room(count: int, leaf: Any) -> Any:
    """Zeros for ``count`` leaves like this one, on the same devices."""
    shape = (count, *leaf.shape)
    if _abstract(leaf):
        return jax.ShapeDtypeStruct(shape, leaf.dtype)
    where = leaf.sharding
    if isinstance(where, NamedSharding):
        where = NamedSharding(where.mesh, PartitionSpec(None, *where.spec))
    return jnp.zeros(shape, leaf.dtype, device=where)


@functools.partial(jax.jit, donate_argnums=0)
def _put(stack: jax.Array, leaf: jax.Array, index: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(stack, leaf, index, 0)


def stack_run(layers: Iterable[M], count: int) -> M:
    """One module of ``count`` equal layers.

    Layers are taken one by one and copied into place, so that the stack and one layer are in memory
    together where ``layers`` makes them on the way.
    """
    graph: Any = None
    stack: Any = None
    for index, layer in enumerate(layers):
        graph, state = nnx.split(layer)
        if stack is None:
            stack = jax.tree.map(functools.partial(_room, count), state)
        stack = jax.tree.map(
            lambda room, leaf, index=index: room if _abstract(leaf) else _put(room, leaf, index),
            stack,
            state,
        )
        del layer, state
    return nnx.merge(graph, stack)


def layer_of(stack: M, index: int) -> M:
    """One layer of a stack; inverse of :func:`stack_run`."""

    def take(leaf: Any) -> Any:
        shape = leaf.shape[1:]
        return jax.ShapeDtypeStruct(shape, leaf.dtype) if _abstract(leaf) else leaf[index]

    graph, state = nnx.split(stack)
    return nnx.merge(graph, jax.tree.map(take, state))


def sequences(model: nnx.Module) -> list[Layers]:
    """Every sequence of layers in a model."""
    return [node for _, node in nnx.iter_graph(model) if isinstance(node, Layers)]


def _has_cut_weights(layer: nnx.Module) -> bool:
    def is_cut(value: Any) -> bool:
        return isinstance(value, Sharded)

    return any(map(is_cut, jax.tree.leaves(nnx.state(layer), is_leaf=is_cut)))


def stack_layers(model: M) -> M:
    """Return the model with each run of equal layers stacked, to be compiled as one loop.

    A pure transform with an exact inverse, :func:`unstack_layers`; layers that equal none of their
    neighbours stay as they are.  For a model that fills the memory, load it with
    ``from_pretrained(..., scan_layers=True)``, which stacks on the way.

    Args:
        model: an NNX model with :class:`Layers` in it, real or abstract; left as it was.
    Raises:
        ConfigError: no NNX model.
        LayoutError: equal layers hold weights that are cut over a mesh in kernel order.
    """
    copy = nnx.clone(unstack_layers(model))
    for sequence in sequences(copy):
        layers = list(sequence.layers)
        sequence.runs = layer_runs(layers)
        parts = [layers[run.start : run.stop] for run in sequence.runs]
        if any(map(_has_cut_weights, (p[0] for p in parts if len(p) > 1))):
            raise LayoutError(
                "stack_layers",
                "layers whose weights are cut over a mesh in kernel order",
                "the parts that devices hold have no axis for layers",
                "unprepare_model first: on a mesh a model is stacked or in kernel order",
            )
        sequence.layers = nnx.List([stack_run(p, len(p)) if len(p) > 1 else p[0] for p in parts])
    return copy


def unstack_layers(model: M) -> M:
    """Exact inverse of :func:`stack_layers`; a model without stacks comes back itself.

    Raises:
        ConfigError: no NNX model.
    """
    instance("model", model, nnx.Module, "an NNX model is needed")
    if not any(sequence.stacked for sequence in sequences(model)):
        return model
    copy = nnx.clone(model)
    for sequence in sequences(copy):
        items = zip(sequence.runs, list(sequence.layers), strict=True)
        sequence.layers = nnx.List(
            [
                layer_of(item, index) if is_stack(run) else item
                for run, item in items
                for index in range(run.stop - run.start)
            ]
        )
        sequence.runs = tuple(Run(i, i + 1) for i in range(len(sequence.layers)))
    return copy


def scan_run(
    body: Callable[[nnx.GraphDef[Any], nnx.State, jax.Array, Any], Any],
    stack: nnx.Module,
    carry: Any,
) -> Any:
    """Carry a value through the layers of a stack: ``carry = body(graph, state, index, carry)``.

    Args:
        body: gets one layer's graph and state, and its index in the stack.
        stack: from :func:`stack_run`.
        carry: a pytree of fixed shapes.
    """
    graph, state = nnx.split(stack)
    count = jax.tree.leaves(state)[0].shape[0]

    def take(index: jax.Array, leaf: Any) -> Any:
        if isinstance(leaf, ExpertBank):
            return StackedBank(leaf, index)
        return take_lead(leaf, index)

    def step(carry: Any, index: jax.Array) -> tuple[Any, None]:
        layer = jax.tree.map(
            functools.partial(take, index), state, is_leaf=lambda x: isinstance(x, ExpertBank)
        )
        return body(graph, layer, index, carry), None

    return lax.scan(step, carry, jnp.arange(count, dtype=jnp.int32))[0]
