"""Linears that read one input as one linear: fewer launches, the same outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.arrays.qtensor import QTensor
from jaxquant.nn.linear import Linear
from jaxquant.ops.joined import Part, cut, join
from jaxquant.ops.prepared import Prepared, prepare, unprepare


class JoinedLinear(Linear):
    """Linears of one input as one, their outputs side by side: one launch instead of several.

    Made by :func:`jaxquant.prepare_model` in place of those linears.

    Attributes:
        parts: static; outputs and layout of each of them.
    """

    def __init__(self, weight: QTensor | Prepared, bias: Any, parts: tuple[Part, ...]) -> None:
        super().__init__(weight, bias)
        self.parts = parts


def join_linears(linears: Sequence[Linear]) -> JoinedLinear | None:
    """The linears as one, in kernel order, or None where they differ; they are left as they were.

    See :func:`jaxquant.ops.joined.join` for what must be equal; biases are on all or on none.
    """
    weights = [linear.weight.get_value() for linear in linears]
    biases = [linear.bias.get_value() for linear in linears if linear.bias is not None]
    if not all(isinstance(weight, QTensor) for weight in weights):
        return None
    if any(linear.dtype is not None for linear in linears) or len(biases) not in (0, len(linears)):
        return None
    if len({bias.dtype for bias in biases}) > 1 or (joined := join(weights)) is None:
        return None
    parts = tuple(Part(weight.extent("out"), weight.layout) for weight in weights)
    return JoinedLinear(prepare(joined), jnp.concatenate(biases) if biases else None, parts)


def cut_linear(joined: JoinedLinear) -> list[Linear]:
    """Exact inverse of :func:`join_linears`, also for a stack of them."""
    weight = joined.weight.get_value()
    weights = cut(unprepare(weight) if isinstance(weight, Prepared) else weight, joined.parts)
    biases: list[Any] = [None] * len(weights)
    if joined.bias is not None:
        ends = np.cumsum([part.out for part in joined.parts])[:-1].tolist()
        biases = jnp.split(joined.bias.get_value(), ends, axis=-1)
    return [_linear(weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def _linear(weight: QTensor, bias: Any) -> Linear:
    """A linear, or one that stands for a stack of them."""
    depth = len(weight.lead)

    def one(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape[depth:], leaf.dtype)

    linear = Linear(*jax.tree.map(one, (weight, bias)))
    linear.weight.set_value(weight)
    if linear.bias is not None:
        linear.bias.set_value(bias)
    return linear
