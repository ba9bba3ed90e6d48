"""Embedding, RMSNorm, gated MLP: the parts of a decoder without state."""

from __future__ import annotations

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from jaxquant import ops
from jaxquant.arrays.qtensor import dense
from jaxquant.errors import ConfigError
from jaxquant.nn.joined import JoinedLinear
from jaxquant.nn.linear import Linear, Weights, readers

Activation = Literal["silu", "swish", "gelu", "gelu_pytorch_tanh", "gelu_new", "relu"]


def activation(name: str, x: jax.Array) -> jax.Array:
    """Apply a gate activation by the name that checkpoints use.

    Raises:
        ConfigError: no such activation.
    """
    if name in ("silu", "swish"):
        return jax.nn.silu(x)
    if name == "gelu":
        return jax.nn.gelu(x, approximate=False)
    if name in ("gelu_pytorch_tanh", "gelu_new"):
        return jax.nn.gelu(x, approximate=True)
    if name == "relu":
        return jax.nn.relu(x)
    raise ConfigError("hidden_act", repr(name), f"one of {get_args(Activation)}")


class Embedding(nnx.Module):
    """Token embedding, dense; also the output projection of models that tie the two.

    Attributes:
        weight: ``[vocab, hidden]``.
        dtype: dtype of the looked-up rows.
    """

    def __init__(self, weight: Any, dtype: Any) -> None:
        self.weight = nnx.Param(weight)
        self.dtype = dtype

    def __call__(self, ids: jax.Array) -> jax.Array:
        """``[...] int32 -> [..., hidden]``; ids out of range are clipped."""
        return jnp.take(self.weight.get_value(), ids, axis=0, mode="clip").astype(self.dtype)

    def attend(self, x: jax.Array) -> jax.Array:
        """``[..., hidden] -> [..., vocab]``."""
        return ops.matmul(x, dense(self.weight.get_value()))


class RMSNorm(nnx.Module):
    """Root mean square normalisation in float32.

    Attributes:
        weight: ``[features]``.
        epsilon: added to the mean square.
    """

    def __init__(self, weight: Any, epsilon: float) -> None:
        self.weight = nnx.Param(weight)
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """``[..., features] -> [..., features]`` in the dtype of ``x``."""
        return ops.rms_norm(x, self.weight.get_value(), self.epsilon)

    def quantized(self, x: jax.Array, weights: Weights) -> jax.Array | ops.QActivation:
        """The same for linears of these weights, quantized where all want it in the same way."""
        return ops.rms_norm_quantize(x, self.weight.get_value(), self.epsilon, weights)


class MLP(nnx.Module):
    """``down(act(gate(x)) * up(x))``.

    Attributes:
        gate_proj, up_proj, down_proj: linears.
        gate_up_proj: gate and up as one, which a prepared model may have in place of the two.
        hidden_act: gate activation.
    """

    def __init__(
        self, gate_proj: Linear, up_proj: Linear, down_proj: Linear, hidden_act: str
    ) -> None:
        self.gate_proj: Linear | None = gate_proj
        self.up_proj: Linear | None = up_proj
        self.gate_up_proj: JoinedLinear | None = None
        self.down_proj = down_proj
        self.hidden_act = hidden_act

    def reads(self) -> Weights:
        """The weights that read the input."""
        if self.gate_up_proj is not None:
            return readers(self.gate_up_proj)
        assert self.gate_proj is not None and self.up_proj is not None
        return readers(self.gate_proj, self.up_proj)

    def __call__(self, x: jax.Array | ops.QActivation) -> jax.Array:
        """``[..., hidden] -> [..., hidden]``."""
        if self.gate_up_proj is not None:
            both = self.gate_up_proj(x)
            if self.hidden_act in ("silu", "swish"):
                return self.down_proj(ops.silu_mul_quantize(both, readers(self.down_proj)))
            gate, up = jnp.split(both, 2, axis=-1)
        else:
            assert self.gate_proj is not None and self.up_proj is not None
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(activation(self.hidden_act, gate) * up)
