"""The key-value cache: QTensors with axes (token, head, dim), updated functionally.

An entry's layout says how it is stored: dense in the compute dtype, or e4m3 with the per-tensor or
per-head scales of the checkpoint.  Row ``p`` of the token axis holds position ``p``; a query at
position ``p`` sees rows ``0 .. p`` only, so rows past a prompt's end may hold anything.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.arrays.codes import CODES
from jaxquant.arrays.layout import WHOLE, Layout
from jaxquant.arrays.qtensor import QTensor, dense
from jaxquant.transforms.leading import index_lead
from jaxquant.transforms.numeric import dequantize, encode_values
from jaxquant.transforms.structure import slice_axis

AXES = ("token", "head", "dim")


@functools.partial(jax.tree_util.register_dataclass, data_fields=("layers",), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Cache:
    """All layers' caches; a pytree.

    Attributes:
        layers: for each layer its two entries ``[batch, token, head, dim]``: keys and values, or
            with latent attention the compressed latent and the rotary key (one head each).  A stack
            of layers has one pair of entries, ``[layer, batch, token, head, dim]``.
    """

    layers: tuple[tuple[QTensor, QTensor], ...]

    @property
    def capacity(self) -> int:
        """Positions that fit."""
        return self.layers[0][0].extent("token")


@functools.partial(jax.tree_util.register_dataclass, data_fields=("stack", "layer"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Slot:
    """One layer's entry inside the entry of a stack of layers, written in place.

    Attributes:
        stack: ``[layer, batch, token, head, dim]``.
        layer: int32, which one this is.
    """

    stack: QTensor
    layer: jax.Array

    @property
    def entry(self) -> QTensor:
        """The layer's own entry."""
        return index_lead(self.stack, self.layer)

    def extent(self, axis: str) -> int:
        """Elements along a named axis."""
        return self.stack.extent(axis)


def empty_entry(
    batch: int, capacity: int, heads: int, dim: int, dtype: Any, scale: jax.Array | None = None
) -> QTensor:
    """An entry full of zeros.

    Args:
        batch: rows.
        capacity: positions.
        heads: key-value heads.
        dim: features of a head.
        dtype: storage dtype of a dense entry.
        scale: ``[1]`` or ``[heads]``; given, the entry is stored as e4m3 times this scale.
    """
    shape = (batch, capacity, heads, dim)
    if scale is None:
        return dense(jnp.zeros(shape, dtype), AXES)
    grid = (WHOLE, WHOLE if scale.size == 1 else 1, WHOLE)
    layout = Layout(AXES, CODES["e4m3"], ((1, 1, 1),), (grid,))
    scales = jnp.broadcast_to(
        scale.astype(jnp.float32).reshape(1, 1, -1, 1), (batch, 1, scale.size, 1)
    )
    return QTensor((jnp.zeros(shape, CODES["e4m3"].storage),), (scales,), (), layout)


def encode_entry(entry: QTensor, values: jax.Array) -> jax.Array:
    """Codes of ``values`` ``[batch, token, head, dim]`` in the layout of ``entry``."""
    if entry.layout.dense:
        return values.astype(entry.data[0].dtype)
    return encode_values(values.astype(jnp.float32) / entry.scales[0], entry.layout.code)


def write(entry: QTensor | Slot, values: jax.Array, positions: jax.Array) -> QTensor | Slot:
    """Return ``entry`` with the rows at ``positions`` replaced.

    Args:
        entry: ``[batch, capacity, head, dim]``.
        values: ``[batch, token, head, dim]``.
        positions: int32 ``[batch, token]``; those past the capacity are dropped.
    """
    rows = jnp.arange(positions.shape[0], dtype=positions.dtype)[:, None]
    if isinstance(entry, Slot):
        new, where = encode_entry(entry.entry, values), (entry.layer, rows, positions)
        codes = entry.stack.data[0].at[where].set(new, mode="drop")
        return dataclasses.replace(entry, stack=dataclasses.replace(entry.stack, data=(codes,)))
    codes = entry.data[0].at[rows, positions].set(encode_entry(entry, values), mode="drop")
    return dataclasses.replace(entry, data=(codes,))


def read(entry: QTensor | Slot, rows: int, dtype: Any) -> jax.Array:
    """The first rows ``[batch, rows, head, dim]`` in ``dtype``."""
    own = entry.entry if isinstance(entry, Slot) else entry
    return dequantize(slice_axis(own, "token", 0, rows), dtype, axes=AXES)
