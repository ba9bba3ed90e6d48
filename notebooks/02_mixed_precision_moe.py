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
# # Every expert in its own precision
#
# A plan file picks the precision of each weight, down to each expert's `w13` (gate and up) and `w2`
# (down). Here the precisions are schemes, so the weights are quantized from the base while loading;
# with `fp8_path`, `gptq_int4_path` and so on they come from checkpoints instead.

# %%
import tempfile
from pathlib import Path

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jaxquant as jq

bundled = Path(jq.__file__).parent / "bundled" / "tiny-qwen3-moe"
tokens = np.load(bundled / "eval_tokens.npy")[:4096]
folder = Path(tempfile.mkdtemp())


def load(mapping: dict[str, str]) -> jq.CausalLM:
    """The bundled model under a plan."""
    lines = "".join(f'    "{key}": "{value}"\n' for key, value in mapping.items())
    plan = folder / "plan.yaml"
    plan.write_text(f"mixed_precision:\n  base_model_path: {bundled}\n  weight_mapping:\n{lines}")
    return jq.from_pretrained(bundled, plan=plan, dtype=jnp.float32)


# %% [markdown]
# Uniform versions, and three that mix: attention at 8 bits, and experts at 4, 8 or a blend of both.

# %%
experts = "model.layers.*.mlp.experts.*"
attention = "model.layers.*.self_attn.?_proj.weight"
plans = {
    "fp8": {experts: "fp8_b128", attention: "fp8_b128"},
    "int8": {experts: "w8a8", attention: "w8a8"},
    "int4": {experts: "w4a16_g32", attention: "w4a16_g32"},
    "experts int4": {experts: "w4a16_g32", attention: "fp8_b128"},
    "w13 int4, w2 int8": {
        "model.layers.*.mlp.experts.*.w13_weight": "w4a16_g32",
        "model.layers.*.mlp.experts.*.w2_weight": "w8a16",
        attention: "fp8_b128",
    },
    "expert by expert": {
        "model.layers.*.mlp.experts.0.w13_weight": "fp8_b128",
        "model.layers.*.mlp.experts.0.w2_weight": "w8a8",
        "model.layers.*.mlp.experts.1.w13_weight": "w4a16_g32_asym",
        "model.layers.*.mlp.experts.1.w2_weight": "fp8_b128",
        "model.layers.*.mlp.experts.[2-3].w13_weight": "w4a16_g32",
        "model.layers.*.mlp.experts.[2-3].w2_weight": "w6a16_g32",
    },
}
base = jq.from_pretrained(bundled, dtype=jnp.float32)
results = {"bf16": (base.nbytes, jq.perplexity(base, tokens))}
for name, mapping in plans.items():
    model = load(mapping)
    results[name] = (model.nbytes, jq.perplexity(model, tokens))
for name, (size, perplexity) in results.items():
    print(f"{name:20s} {size / 2**20:5.2f} MiB  perplexity {perplexity:.3f}")

# %% [markdown]
# One jitted layer runs experts of all these formats: `explain` shows runs of equal layout as rows.

# %%
for row in jq.explain(load(plans["expert by expert"])).rows:
    if row.path.startswith("model.layers.0.mlp.experts"):
        print(f"{row.path:55s} {row.shape!s:15s} {row.layout}")

# %%
figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
for name, (size, perplexity) in results.items():
    axes.scatter(size / 2**20, perplexity, color="tab:blue")
    axes.annotate(name, (size / 2**20, perplexity), textcoords="offset points", xytext=(5, 4))
axes.set_xlabel("size of the model (MiB)")
axes.set_ylabel("perplexity")
axes.margins(x=0.2)
plt.show()

# %% [markdown]
# Mistakes come back all together, each with its reason.

# %%
try:
    load(
        {
            "model.layers.0.mlp.experts.9.w2_weight": "w8a8",
            "model.layers.7.self_attn.q_proj.weight": "w8a8",
        }
    )
except jq.PlanError as error:
    print(error)
