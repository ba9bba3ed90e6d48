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
# Four checkpoints of one mixture of experts, as their own tools lay them out: bf16, FP8 in blocks,
# GPTQ int4 and AWQ int4. A plan file then picks for each weight, down to each expert's `w13` (gate
# and up) and `w2` (down), which of the four it is loaded from. Nothing is dequantized on the way,
# and one jitted layer runs experts of all formats.
#
# This runs on the bundled model of 2 million parameters. `MODEL` in the environment names another
# folder; `OUT` keeps what is made here.

# %%
import json
import os
import tempfile
from pathlib import Path

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jaxquant as jq

bundled = Path(jq.__file__).parent / "bundled" / "tiny-qwen3-moe"
base = Path(os.environ.get("MODEL", bundled))
out = Path(os.environ.get("OUT") or tempfile.mkdtemp())
tokens = np.load(bundled / "eval_tokens.npy")
models = {"bf16": jq.from_pretrained(base, dtype=jnp.float32)}
experts = models["bf16"].config.moe.routing.experts

# %% [markdown]
# The checkpoints. Rounding is to the nearest code, without the calibration that GPTQ and AWQ are
# known for; files and configs are theirs, and so any of their checkpoints serves as well.

# %%
formats = {
    "fp8": ("fp8", "fp8_b128"),
    "gptq_int4": ("gptq", "w4a16_g32"),
    "awq_int4": ("awq", "w4a16_g32_asym"),
}
for precision, (format, scheme) in formats.items():
    jq.export_pretrained(base, out / precision, format=format, scheme=scheme)
    config = json.loads((out / precision / "config.json").read_text())["quantization_config"]
    print(f"{precision:10s}", {key: value for key, value in config.items() if len(str(value)) < 40})

# %% [markdown]
# The plans. Three are uniform; three mix.


# %%
def load(name: str, mapping: dict[str, str]) -> jq.CausalLM:
    """The model under a plan, whose file is written beside the checkpoints."""
    lines = [f"  base_model_path: {base}"]
    lines += [f"  {precision}_path: {out / precision}" for precision in formats]
    lines += ["  weight_mapping:", *(f'    "{key}": {value}' for key, value in mapping.items())]
    plan = out / f"{name.replace(' ', '_')}.yaml"
    plan.write_text("\n".join(["mixed_precision:", *lines]) + "\n")
    return jq.from_pretrained(base, plan=plan, dtype=jnp.float32)


attention = "model.layers.*.self_attn.?_proj.weight"
expert = "model.layers.*.mlp.experts.{}.{}_weight".format
plans = {name: {attention: name, expert("*", "*"): name} for name in formats}
plans["attention fp8, experts GPTQ"] = {attention: "fp8", expert("*", "*"): "gptq_int4"}
plans["w13 AWQ, the rest fp8"] = {
    attention: "fp8",
    expert("*", "w13"): "awq_int4",
    expert("*", "w2"): "fp8",
}
plans["a third of the experts each"] = {attention: "fp8"}
for e in range(experts):
    turn = list(formats)[e % 3 :] + list(formats)[: e % 3]
    plans["a third of the experts each"] |= {expert(e, "w13"): turn[0], expert(e, "w2"): turn[1]}

# %%
models |= {name: load(name, mapping) for name, mapping in plans.items()}
results = {
    name: (model.nbytes, jq.perplexity(model, tokens, window=256)) for name, model in models.items()
}
reference = results["bf16"][1]
lines = ["| version | MiB | perplexity | against bf16 |", "|---|---|---|---|"]
for name, (size, perplexity) in results.items():
    change = 100 * (perplexity / reference - 1)
    lines.append(f"| {name} | {size / 2**20:.2f} | {perplexity:.3f} | {change:+.2f} % |")
print("\n".join(lines))
(out / "table.md").write_text("\n".join(lines) + "\n")

# %% [markdown]
# What loading did, and one layer of the last version: `explain` shows each run of equal layout.

# %%
mixed = models["a third of the experts each"]
print(mixed.report)
for row in jq.explain(mixed).rows:
    if row.path.startswith("model.layers.0.mlp.experts"):
        print(f"{row.path:50s} {row.layout}")

# %%
figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
for i, (name, (size, perplexity)) in enumerate(results.items()):
    color = "tab:blue" if name in ("bf16", *formats) else "tab:red"
    axes.scatter(size / 2**20, perplexity, color=color)
    beside = (6, 4 if i % 2 == 0 else -12)
    axes.annotate(name, (size / 2**20, perplexity), textcoords="offset points", xytext=beside)
axes.set(xlabel="size of the model (MiB)", ylabel="perplexity", title=base.name)
axes.margins(x=0.3)
figure.savefig(out / "mixed_precision_moe.png", dpi=100)
plt.show()

# %% [markdown]
# Mistakes come back all together, each with its reason.

# %%
try:
    load(
        "wrong",
        {expert(99, "w2"): "fp8", "model.layers.77.self_attn.q_proj.weight": "gptq_int4"},
    )
except jq.PlanError as error:
    print(error)
