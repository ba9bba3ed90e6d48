"""llama.cpp's arithmetic on a CPU, put in the place of jaxquant's to compare whole models.

ggml never multiplies a quantized weight with a float: it quantizes the activations too, to the
block type that the weight's dot product wants (``Q8_0``, ``Q8_1`` or ``Q8_K``).  Its flash
attention reads queries, keys and values as float16 and sums the values in float16, one key after
the other.  Source: llama.cpp, ``ggml-cpu`` (type traits, ``quantize_row_*``, ``flash_attn_ext``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxquant.convert.gguf_model import GgufModel
from jaxquant.models import CausalLM
from jaxquant.nn import attention, moe
from jaxquant.nn.basic import Embedding
from jaxquant.nn.linear import Linear
from jaxquant.transforms.experts import expert_weight
from jaxquant.transforms.numeric import dequantize

BY_32 = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL")
WITH_SUMS = ("Q4_1", "Q5_1")


def half(x: jax.Array) -> jax.Array:
    """Rounded to float16."""
    return x.astype(jnp.float16).astype(jnp.float32)


def codes_of(x: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Codes ``[..., block, size]`` of activations and the float32 scale ``[..., block, 1]``."""
    blocks = x.reshape(*x.shape[:-1], -1, size)
    largest = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)
    return jnp.round(blocks * jnp.where(largest > 0, 127 / largest, 0)), largest / 127


def quantized(kind: str, x: jax.Array) -> jax.Array:
    """Activations ``[..., in]`` after ggml's quantization for a weight of type ``kind``.

    Q8_0: 32 values, whose scale is stored as float16.  Q8_K: 256 values, a float32 scale.
    """
    if kind == "F32":
        return x
    codes, scale = codes_of(x, 32 if kind in BY_32 else 256)
    return (codes * (half(scale) if kind in BY_32 else scale)).reshape(x.shape)


def error_of_sums(x: jax.Array) -> jax.Array:
    """Q8_1's stored float16 sum of every block, less that of :func:`quantized`.

    It is what the offsets of a weight are multiplied with: ``[..., in / 32]``.
    """
    codes, scale = codes_of(x, 32)
    total = jnp.sum(codes, axis=-1)
    return half(total * scale[..., 0]) - total * half(scale[..., 0])


def matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.matmul(x, weight.T, precision="highest")


def linear(self: Any, x: jax.Array) -> jax.Array:
    q = self.weight.get_value()
    y = matmul(quantized(self.kind, x), dequantize(q))
    if self.kind in WITH_SUMS:
        y -= matmul(error_of_sums(x), q.zeros[0].astype(jnp.float32))
    return y if self.bias is None else y + self.bias.get_value()


def attend_to_vocabulary(self: Any, x: jax.Array) -> jax.Array:
    return matmul(quantized(self.kind, x), self.weight.get_value())


def experts(self: Any, x: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
    total = jnp.zeros_like(x)
    inputs = quantized(self.kind, x)
    for expert in range(self.plan.experts):
        gate, up, down = (
            dequantize(expert_weight(getattr(self, name).get_value(), self.plan, expert))
            for name in moe.PROJECTIONS
        )
        inner = jax.nn.silu(matmul(inputs, gate)) * matmul(inputs, up)
        share = jnp.sum(jnp.where(ids == expert, weights, 0), axis=-1)[:, None]
        total += matmul(quantized(self.kind, inner), down) * share
    return total


def flash_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, scale: float
) -> jax.Array:
    """As :func:`jaxquant.nn.attention.attend`, with a running maximum and float16 sums."""
    q, k, v = half(q), half(k), half(v)
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    scores = attention.einsum("btkgd,bskd->btkgs", grouped, k) * scale
    scores = jnp.where(mask[:, :, None, None], scores, -jnp.inf)
    top = jnp.full(scores.shape[:-1], -jnp.inf)
    total = jnp.zeros_like(top)
    mixed = jnp.zeros_like(grouped)
    for key in range(k.shape[1]):
        score = scores[..., key]
        rises = score > top
        now = jnp.maximum(top, score)
        fade = jnp.where(rises, jnp.exp(top - now), 1)
        share = jnp.where(rises, 1, jnp.exp(score - now))
        mixed = half(mixed * fade[..., None])
        mixed = half(mixed + v[:, key, None, :, None] * share[..., None])
        total = total * fade + share
        top = now
    return (mixed / total[..., None]).reshape(q.shape)


def kinds_of(model: GgufModel, path: str) -> str:
    """Type of the tensor that a module's weight comes from."""
    names = (path, f"{path}.weight", f"{path}.0.down_proj")
    piece = next(model.pieces[name] for name in names if name in model.pieces)
    return model.file.tensors[piece.sources[0]].dtype


PATCHES: tuple[tuple[type, str, Callable], ...] = (
    (Linear, "__call__", linear),
    (Embedding, "attend", attend_to_vocabulary),
    (moe.Experts, "__call__", experts),
)


def emulate(built: CausalLM, model: GgufModel, patch: pytest.MonkeyPatch) -> CausalLM:
    """Let a model compute as llama.cpp does.

    Every module is told its weight's type, which also makes the model another one to ``jax.jit``.
    """
    nodes: Any = nnx.iter_graph(built)
    for path, node in nodes:
        if isinstance(node, Linear | Embedding | moe.Experts):
            node.kind = kinds_of(model, ".".join(map(str, path)))
    for owner, name, function in PATCHES:
        patch.setattr(owner, name, function)
    patch.setattr(attention, "attend", flash_attention)
    return built
