# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # One weight
#
# A weight is a `QTensor`: some arrays and one static layout. Every array covers the same named axes
# in integer steps, and that one law moves codes and scales together.

# %%
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from jaxquant.transforms.structure import slice_axis, to_axes

bundled = Path(jq.__file__).parent / "bundled" / "tiny-qwen3-moe"
weights = jq.read_quantized(bundled)
name = "model.layers.0.self_attn.q_proj"
weights[name]

# %% [markdown]
# Quantize it to 4 bits in groups of 32, round to nearest. The layout says how the arrays cover the
# weight: two codes to a byte along `in`, one scale for 32 inputs.

# %%
w = jq.dequantize(weights[name])
q = jq.quantize(w, "w4a16_g32", axes=("out", "in"))
print(q)
print("bits per weight:", q.bits_per_weight)
print("arrays:", [(leaf.dtype.name, leaf.shape) for leaf in jax.tree.leaves(q)])

# %% [markdown]
# Structural transforms are pure and commute with `dequantize`. A cut inside a group is refused and
# the legal cuts are named.

# %%
half = slice_axis(q, "in", 0, 64)
np.testing.assert_array_equal(jq.dequantize(half), jq.dequantize(q)[:, :64])
np.testing.assert_array_equal(jq.dequantize(to_axes(q, ("in", "out"))), jq.dequantize(q))
try:
    slice_axis(q, "in", 0, 40)
except jq.LayoutError as error:
    print(error)

# %% [markdown]
# `matmul` multiplies it packed; the scheme says what happens to the activations.

# %%
x = jax.random.normal(jax.random.key(0), (4, q.extent("in")))
for scheme in ("bf16", "fp8", "fp8_b128", "w8a8", "w4a16_g32"):
    other = jq.quantize(w, scheme, axes=("out", "in"))
    y = jax.jit(jq.matmul)(x, other)
    error = jnp.linalg.norm(y - x @ w.T) / jnp.linalg.norm(x @ w.T)
    print(f"{scheme:10s} {other.bits_per_weight:6.2f} bits per weight, error {float(error):.4f}")

# %%
print(jq.explain(q, batch=16))
