"""Multi-head latent attention of DeepSeek-V2 and V3, plain and absorbed.

Keys and values of all heads are linear in one compressed latent per token, and only that latent and
one shared rotary key are cached.  The *plain* form expands the latent to every head's keys and
values.  The *absorbed* form moves the expansion to the other side: queries are mapped into latent
space, attention runs over the latents themselves, and mixed latents are expanded to values.  Both
are equal; the absorbed one reads far less per cached position, the plain one computes less per new
token.  (Where kv_b_proj quantizes its input, that happens in the plain form alone: in the absorbed
one this linear has no input of its own.)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxquant import ops
from jaxquant.arrays.qtensor import QTensor
from jaxquant.nn.attention import Entries, Step, attend, einsum, probabilities
from jaxquant.nn.basic import RMSNorm
from jaxquant.nn.cache import empty_entry, read, write
from jaxquant.nn.joined import JoinedLinear
from jaxquant.nn.linear import Linear, Weights, readers
from jaxquant.nn.rope import Rope, rotate
from jaxquant.transforms.numeric import dequantize


@dataclasses.dataclass(frozen=True)
class LatentHeads:
    """Static shape of a latent attention layer.

    Attributes:
        heads: query heads.
        nope: features of a head without position.
        rope: rotated features of a head.
        value: features of a head's values.
        latent: width of the compressed latent.
        scale: factor of the scores.
    """

    heads: int
    nope: int
    rope: int
    value: int
    latent: int
    scale: float


class LatentAttention(nnx.Module):
    """Self-attention of DeepSeek-V2 and V3.

    Attributes:
        q_proj: queries, or None where they too are compressed by
        q_a_proj, q_a_layernorm, q_b_proj.
        kv_a_proj_with_mqa, kv_a_layernorm: hidden to latent and rotary key.
        qkv_a_proj: q_a_proj and kv_a_proj_with_mqa as one, which a prepared model may have in place
            of the two.
        kv_b_proj: latent to every head's keys and values, ``[heads * (nope + value), latent]``.
        o_proj: output projection.
        heads: static shape.
        rope: static rotary embedding.
    """

    def __init__(
        self,
        query: Linear | tuple[Linear, RMSNorm, Linear],
        latent: tuple[Linear, RMSNorm, Linear],
        o_proj: Linear,
        heads: LatentHeads,
        rope: Rope,
    ) -> None:
        compressed = isinstance(query, tuple)
        self.q_proj = None if compressed else query
        q_a_proj, self.q_a_layernorm, self.q_b_proj = query if compressed else (None,) * 3
        kv_a_proj, self.kv_a_layernorm, self.kv_b_proj = latent
        self.q_a_proj: Linear | None = q_a_proj
        self.kv_a_proj_with_mqa: Linear | None = kv_a_proj
        self.qkv_a_proj: JoinedLinear | None = None
        self.o_proj = o_proj
        self.heads = heads
        self.rope = rope

    def empty_cache(self, batch: int, capacity: int, dtype: Any) -> tuple[QTensor, QTensor]:
        """Empty latents and rotary keys for ``capacity`` positions."""
        return (
            empty_entry(batch, capacity, 1, self.heads.latent, dtype),
            empty_entry(batch, capacity, 1, self.heads.rope, dtype),
        )

    def reads(self) -> Weights:
        """The weights that read the input."""
        if self.qkv_a_proj is not None:
            return readers(self.qkv_a_proj)
        query = self.q_a_proj if self.q_proj is None else self.q_proj
        assert query and self.kv_a_proj_with_mqa
        return readers(query, self.kv_a_proj_with_mqa)

    def __call__(
        self,
        x: jax.Array | ops.QActivation,
        step: Step,
        cache: Entries | None = None,
        absorbed: bool | None = None,
    ) -> tuple[jax.Array, Entries | None]:
        """Attend to the step's own tokens, or to the cache after writing them into it.

        Args:
            x: ``[batch, token, hidden]``, maybe quantized for the weights that :meth:`reads` gives.
            step: positions and rotation.
            cache: this layer's entries, or None.
            absorbed: which form to compute; by default the absorbed one for single cached tokens.
        Returns:
            ``[batch, token, hidden]`` and the updated entries.
        """
        batch, token, _ = x.shape
        query, key = self._project(x)
        q = query.reshape(batch, token, self.heads.heads, self.heads.nope + self.heads.rope)
        q_nope, q_rope = jnp.split(q, [self.heads.nope], axis=-1)
        q_rope = rotate(self.rope, q_rope, step.cos, step.sin)
        latent, k_rope = jnp.split(key, [self.heads.latent], axis=-1)
        latent = self.kv_a_layernorm(latent)[:, :, None]
        k_rope = rotate(self.rope, k_rope[:, :, None], step.cos, step.sin)
        rows = None
        if cache is not None:
            cache = write(cache[0], latent, step.positions), write(cache[1], k_rope, step.positions)
            rows = step.rows(cache[0])
            latent, k_rope = read(cache[0], rows, x.dtype), read(cache[1], rows, x.dtype)
        mask = step.mask(rows, None)
        if absorbed is None:
            absorbed = cache is not None and token == 1
        form = self._absorbed if absorbed else self._plain
        mixed = form(q_nope, q_rope, latent[:, :, 0], k_rope, mask)
        return self.o_proj(mixed.reshape(batch, token, -1)), cache

    def _project(self, x: jax.Array | ops.QActivation) -> tuple[jax.Array, jax.Array]:
        """Queries of all heads; the latent with the rotary key, neither normed nor rotated."""
        if self.qkv_a_proj is not None:
            both = self.qkv_a_proj(x)
            width = both.shape[-1] - self.heads.latent - self.heads.rope
            compressed, key = jnp.split(both, [width], axis=-1)
        else:
            assert self.kv_a_proj_with_mqa
            key = self.kv_a_proj_with_mqa(x)
            if self.q_proj is not None:
                return self.q_proj(x), key
            assert self.q_a_proj
            compressed = self.q_a_proj(x)
        assert self.q_a_layernorm and self.q_b_proj
        return self.q_b_proj(self.q_a_layernorm.quantized(compressed, readers(self.q_b_proj))), key

    def _plain(
        self,
        q_nope: jax.Array,
        q_rope: jax.Array,
        latent: jax.Array,
        k_rope: jax.Array,
        mask: jax.Array,
    ) -> jax.Array:
        h = self.heads
        expanded = self.kv_b_proj(latent).reshape(*latent.shape[:2], h.heads, h.nope + h.value)
        k_nope, v = jnp.split(expanded, [h.nope], axis=-1)
        shared = jnp.broadcast_to(k_rope, (*k_nope.shape[:3], h.rope))
        q, k = jnp.concatenate([q_nope, q_rope], -1), jnp.concatenate([k_nope, shared], -1)
        return attend(q, k, v, mask, h.scale)

    def _absorbed(
        self,
        q_nope: jax.Array,
        q_rope: jax.Array,
        latent: jax.Array,
        k_rope: jax.Array,
        mask: jax.Array,
    ) -> jax.Array:
        h, dtype = self.heads, q_nope.dtype
        # Half of this weight is contracted along its outputs, where its scales do not follow; the
        # dense copy lives only inside the jitted program.
        q, bias = self.kv_b_proj.weight.get_value(), self.kv_b_proj.bias
        weight = dequantize(q, dtype, axes=("out", "in"))
        if q.pre_scale is not None:
            latent = latent * q.pre_scale.reshape(-1).astype(dtype)
        to_key, to_value = jnp.split(weight.reshape(h.heads, -1, h.latent), [h.nope], axis=1)
        q_latent = einsum("bthn,hnl->bthl", q_nope, to_key).astype(dtype)
        scores = einsum("bthl,bsl->bhts", q_latent, latent)
        scores += einsum("bthr,bsr->bhts", q_rope, k_rope[:, :, 0])
        weights = probabilities(scores * h.scale, mask).astype(dtype)
        mixed = einsum("bhts,bsl->bthl", weights, latent).astype(dtype)
        mixed = einsum("bthl,hvl->bthv", mixed, to_value)
        if bias is not None:
            # What a bias adds to the scores is the same for every key; weights add up to one.
            mixed += bias.get_value().astype(jnp.float32).reshape(h.heads, -1)[:, h.nope :]
        return mixed.astype(dtype)
