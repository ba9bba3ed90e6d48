"""Grouped-query attention with rotary positions and a functional key-value cache."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxquant import ops
from jaxquant.arrays.qtensor import QTensor
from jaxquant.nn.basic import RMSNorm
from jaxquant.nn.cache import Slot, empty_entry, read, write
from jaxquant.nn.joined import JoinedLinear
from jaxquant.nn.linear import Buffer, Linear, Weights, readers
from jaxquant.nn.rope import Rope, rotate, rotation

MASKED = -1e30
QUERY_BLOCK = 512

Entries = tuple[QTensor | Slot, QTensor | Slot]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("positions", "cos", "sin"),
    meta_fields=("fresh",),
)
@dataclasses.dataclass(frozen=True)
class Step:
    """What every layer of one forward pass shares.

    Attributes:
        positions: int32 ``[batch, token]``.
        cos: ``[batch, token, 1, dim / 2]`` of the rotary embedding.
        sin: same.
        fresh: whether positions count from 0 in every row, so that a cache holds nothing else.
    """

    positions: jax.Array
    cos: jax.Array
    sin: jax.Array
    fresh: bool = False

    @classmethod
    def at(
        cls,
        rope: Rope,
        positions: jax.Array,
        length: jax.Array | None = None,
        fresh: bool = False,
    ) -> Step:
        """A step whose tokens stand at ``positions``; ``length`` as for :func:`rotation`."""
        return cls(positions, *rotation(rope, positions, length), fresh)

    def rows(self, cache: QTensor | Slot) -> int:
        """How many rows of a cache a token may see: a prompt none past its own end."""
        return self.positions.shape[1] if self.fresh else cache.extent("token")

    def mask(self, rows: int | None, window: int | None) -> jax.Array:
        """Which keys each token sees: bool ``[batch, token, key]``.

        Args:
            rows: keys are the first rows of a cache; None: the step's own tokens.
            window: a token sees only so many positions, itself included; None sees all.
        """
        query = self.positions[:, :, None]
        if rows is None:
            key = self.positions[:, None, :]
        else:
            key = jnp.arange(rows, dtype=query.dtype)[None, None, :]
        visible = key <= query
        return visible if window is None else visible & (key > query - window)


def einsum(spec: str, *operands: jax.Array) -> jax.Array:
    """Contract with float32 accumulation and result; float32 operands at full precision."""
    exact = any(x.dtype == jnp.float32 for x in operands)
    precision = lax.Precision.HIGHEST if exact else None
    return jnp.einsum(spec, *operands, precision=precision, preferred_element_type=jnp.float32)


def probabilities(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax over the last axis of float32 ``[batch, ..., token, key]`` under ``mask``."""
    shape = (mask.shape[0], *(1,) * (scores.ndim - 3), *mask.shape[1:])
    return jax.nn.softmax(jnp.where(mask.reshape(shape), scores, MASKED), axis=-1)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, scale: float) -> jax.Array:
    """Attention where groups of query heads share a key-value head.

    Args:
        q: ``[batch, token, heads, dim]``.
        k: ``[batch, key, kv_heads, dim]``.
        v: ``[batch, key, kv_heads, value_dim]``.
        mask: bool ``[batch, token, key]``.
        scale: factor of the scores.
    Returns:
        ``[batch, token, heads, value_dim]`` in the dtype of ``q``.
    """
    token = q.shape[1]
    if token <= QUERY_BLOCK:
        return _attend_block(q, k, v, mask, scale)
    # Scores of a long prompt would take tokens squared; a block of queries at a time does not.
    pad = -token % QUERY_BLOCK
    q_blocks = _blocks(jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0))))
    mask_blocks = _blocks(jnp.pad(mask, ((0, 0), (0, pad), (0, 0))))
    mixed = lax.map(lambda b: _attend_block(b[0], k, v, b[1], scale), (q_blocks, mask_blocks))
    return jnp.moveaxis(mixed, 0, 1).reshape(q.shape[0], -1, *mixed.shape[3:])[:, :token]


def _blocks(x: jax.Array) -> jax.Array:
    """``[batch, token, ...]`` to ``[block, batch, QUERY_BLOCK, ...]``."""
    split = x.reshape(x.shape[0], -1, QUERY_BLOCK, *x.shape[2:])
    return jnp.moveaxis(split, 1, 0)


def _attend_block(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, scale: float
) -> jax.Array:
    batch, token, heads, dim = q.shape
    kv_heads = k.shape[2]
    shape = batch, kv_heads, heads // kv_heads, token
    # Heads in front, and the queries of a key-value head as rows of one product: neither scores nor
    # weights, the largest arrays here, are transposed.
    rows = q.reshape(batch, token, kv_heads, -1, dim).transpose(0, 2, 3, 1, 4)
    scores = einsum("bkrd,bksd->bkrs", rows.reshape(*shape[:2], -1, dim), k.swapaxes(1, 2))
    weights = probabilities(scores.reshape(*shape, -1) * scale, mask).astype(v.dtype)
    mixed = einsum("bkrs,bksd->bkrd", weights.reshape(scores.shape), v.swapaxes(1, 2))
    mixed = mixed.reshape(*shape, -1).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(batch, token, heads, -1).astype(q.dtype)


@dataclasses.dataclass(frozen=True)
class Heads:
    """Static shape of an attention layer.

    Attributes:
        query: query heads.
        kv: key-value heads.
        dim: features of a head.
        window: sliding window in positions, or None.
    """

    query: int
    kv: int
    dim: int
    window: int | None = None


class Attention(nnx.Module):
    """Self-attention of Llama, Mistral, Qwen2, Qwen3, Mixtral and Qwen3-MoE.

    Attributes:
        q_proj, k_proj, v_proj, o_proj: projections, biases where the family has them.
        qkv_proj: q, k and v as one, which a prepared model may have in place of the three.
        q_norm, k_norm: per-head RMSNorm before the rotation (Qwen3), or None.
        k_scale, v_scale: scales of an fp8 key-value cache, one or one per head; or None.
        heads: static shape.
        rope: static rotary embedding.
    """

    def __init__(
        self,
        projections: tuple[Linear, Linear, Linear, Linear],
        heads: Heads,
        rope: Rope,
        norms: tuple[RMSNorm, RMSNorm] | None = None,
        scales: tuple[Any, Any] | None = None,
    ) -> None:
        q_proj, k_proj, v_proj, self.o_proj = projections
        self.q_proj: Linear | None = q_proj
        self.k_proj: Linear | None = k_proj
        self.v_proj: Linear | None = v_proj
        self.qkv_proj: JoinedLinear | None = None
        self.q_norm, self.k_norm = norms if norms is not None else (None, None)
        self.k_scale = None if scales is None else Buffer(scales[0])
        self.v_scale = None if scales is None else Buffer(scales[1])
        self.heads = heads
        self.rope = rope

    def empty_cache(self, batch: int, capacity: int, dtype: Any) -> tuple[QTensor, QTensor]:
        """Empty keys and values for ``capacity`` positions."""
        k_scale, v_scale = (
            None if scale is None else scale.get_value().reshape(-1)
            for scale in (self.k_scale, self.v_scale)
        )
        kv, dim = self.heads.kv, self.heads.dim
        return (
            empty_entry(batch, capacity, kv, dim, dtype, k_scale),
            empty_entry(batch, capacity, kv, dim, dtype, v_scale),
        )

    def reads(self) -> Weights:
        """The weights that read the input."""
        if self.qkv_proj is not None:
            return readers(self.qkv_proj)
        assert self.q_proj and self.k_proj and self.v_proj
        return readers(self.q_proj, self.k_proj, self.v_proj)

    def _project(self, x: jax.Array | ops.QActivation) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values, ``[batch, token, heads, dim]`` each."""
        heads = self.heads
        if self.qkv_proj is not None:
            ends = [heads.query * heads.dim, (heads.query + heads.kv) * heads.dim]
            q, k, v = jnp.split(self.qkv_proj(x), ends, axis=-1)
        else:
            assert self.q_proj and self.k_proj and self.v_proj
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return (
            q.reshape(*x.shape[:2], heads.query, heads.dim),
            k.reshape(*x.shape[:2], heads.kv, heads.dim),
            v.reshape(*x.shape[:2], heads.kv, heads.dim),
        )

    def __call__(
        self, x: jax.Array | ops.QActivation, step: Step, cache: Entries | None = None
    ) -> tuple[jax.Array, Entries | None]:
        """Attend to the step's own tokens, or to the cache after writing them into it.

        Args:
            x: ``[batch, token, hidden]``, maybe quantized for the weights that :meth:`reads` gives.
            step: positions and rotation.
            cache: this layer's entries, or None.
        Returns:
            ``[batch, token, hidden]`` and the updated entries.
        """
        batch, token, _ = x.shape
        q, k, v = self._project(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q = rotate(self.rope, q, step.cos, step.sin)
        k = rotate(self.rope, k, step.cos, step.sin)
        rows = None
        if cache is None and self.k_scale is not None:
            # Without a cache, keys and values still pass through its codes: same result either way.
            at = jnp.broadcast_to(jnp.arange(token, dtype=jnp.int32), (batch, token))
            keys, values = self.empty_cache(batch, token, x.dtype)
            keys, values = write(keys, k, at), write(values, v, at)
            k, v = read(keys, token, x.dtype), read(values, token, x.dtype)
        elif cache is not None:
            cache = write(cache[0], k, step.positions), write(cache[1], v, step.positions)
            rows = step.rows(cache[0])
            k, v = read(cache[0], rows, x.dtype), read(cache[1], rows, x.dtype)
        mask = step.mask(rows, self.heads.window)
        mixed = attend(q, k, v, mask, self.heads.dim**-0.5)
        return self.o_proj(mixed.reshape(batch, token, -1)), cache
